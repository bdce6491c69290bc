"""Reports: one page about a run, or one about several runs together. All of it comes from records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from federation.errors import RunError
from federation.files import write_file
from federation.meta_config import OUTER_GRADIENTS
from simulations import curves, meta_sections, page, plots, tables
from simulations.comparison import MeasuredRun, Setting, compare, comparison_table, differences_of
from simulations.record import USERS_NAME, read_record
from simulations.tables import DENSE, REFERENCE, Record, headroom, percent, unit_of, with_error

REPORT_NAME = "report.html"
SUBJECT = "dsa_t2"
_NOT_SENT = ("round", "unused_share", "revived")
"""What a round's metrics hold besides users' figures: the server's own."""


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into the folder of a finished run, and returns its path.

    A run without evaluation, or without its evaluation.json, gives a shorter page. Raises RunError when the
    folder holds no record.
    """
    record, users = read_record(run_folder), _read_users(run_folder)
    title = f"fedquilt: {record.get('name', run_folder.name)}"
    rows = tables.without_curves(record)
    parts = (
        _opening(record),
        _results(rows),
        meta_sections.few_shots(record),
        meta_sections.continual(record),
        _users(rows, users),
        _training(record),
        _units(users),
        _what_left(record),
        _provenance(record),
    )
    path = run_folder / REPORT_NAME
    write_file(path, page.page(title, parts).encode())
    return path


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Writes one page about several evaluated runs (seeds, settings of a sweep) to `out`; returns its path.

    Raises RunError when a folder holds no evaluated run, or the runs cannot be compared (see `compare`).
    """
    runs = [_measured(folder) for folder in run_folders]
    settings = compare(runs)
    unit = unit_of(runs[0].record)
    title = f"{len(runs)} runs of {', '.join(dict.fromkeys(str(run.record['name']) for run in runs))}"
    caption = "Each method's mean over seeds with its 95% interval over users; open dots are single seeds."
    parts = [
        f"<header><p>fedquilt, runs compared</p><h1>{escape(title)}</h1></header>",
        page.figure(plots.gains_over_seeds(settings, unit), "gains", caption),
        *(_setting(index, setting, unit) for index, setting in enumerate(settings)),
        page.section("The runs", *(page.facts(_run_facts(run.record)) for run in runs)),
    ]
    write_file(out, page.page(f"fedquilt: {title}", parts).encode())
    return out


def headline(record: Record) -> str:
    """The run in one sentence."""
    methods = record.get("methods")
    if not methods:
        return f"A pool trained for {record.get('rounds', 'some')} rounds; no users were served with it"
    if SUBJECT not in methods:
        if (found := curves.curves_of_record(record)) is not None:
            return curves.summary(found)
        best = tables.best_of(tables.gains_of(record))
        return f"{best} saves {methods[best]['mean']:.3f} {unit_of(record)}" if best else "Only the base was measured"
    subject, dense = methods[SUBJECT], methods.get(DENSE)
    kept = f"{subject['bytes_per_user']:,.0f} bytes for each user"
    if dense is None or dense["mean"] <= 0:
        return f"{kept} save {subject['mean']:.3f} {unit_of(record)}"
    share = subject["mean"] / dense["mean"]
    return f"{kept} give {share:.0%} of the gain of a LoRA of {dense['bytes_per_user']:,.0f} bytes"


def findings(record: Record) -> list[str]:
    """What the 95% intervals say of `dsa_t2`: which methods it beats, which beat it, which stand level."""
    beaten, better, level = "is better than", "is worse than", "cannot be told apart from"
    verdicts: dict[str, list[str]] = {beaten: [], better: [], level: []}
    for other, gap in differences_of(record, SUBJECT).items():
        verdict = beaten if gap.low > 0 else better if gap.high < 0 else level
        verdicts[verdict].append(f"{other} ({gap.mean:+.3f})")
    return [f"{SUBJECT} {verdict} {', '.join(others)}." for verdict, others in verdicts.items() if others]


def _opening(record: Record) -> str:
    splits = record.get("splits", {})
    trained = f"{splits['train']:,} users" if "train" in splits else "users"
    about = f"fedquilt, run {record.get('name', '')}: {record.get('rounds', '?')} rounds over {trained}"
    parts = [f"<header><p>{escape(about)}</p><h1>{escape(headline(record))}</h1></header>"]
    if SUBJECT in record.get("methods", {}) and "base_bits_per_char" in record:
        parts.append(page.paragraph(_lead(record), "lead"))
    parts.append(page.cards(_key_figures(record)))
    room = headroom(record)
    if room is not None:
        parts.append(page.paragraph(room.sentence(unit_of(record)), "" if room.enough else "note"))
    return "".join(parts)


def _lead(record: Record) -> str:
    """The headline's figures, with their errors."""
    methods, unit = record["methods"], unit_of(record)
    subject, dense = methods[SUBJECT], methods.get(DENSE)
    text = (
        f"The frozen model needs {record['base_bits_per_char']:.3f} {unit}. With {SUBJECT} each user keeps "
        f"{subject['bytes_per_user']:,.0f} bytes and saves {with_error(subject['mean'], subject['se'])}."
    )
    if dense is not None and subject["bytes_per_user"]:
        ratio = dense["bytes_per_user"] / subject["bytes_per_user"]
        text += (
            f" A LoRA of one's own ({DENSE}) keeps {ratio:.3g} times as many bytes and saves "
            f"{with_error(dense['mean'], dense['se'])}."
        )
    return f"{text} {_harmed(subject, record)} worse off than with the frozen model."


def _harmed(entry: Mapping[str, float], record: Record) -> str:
    measured = record.get("splits", {}).get("measured")
    if measured is None:
        return f"{percent(entry['harmed'])} of users are"
    count = round(entry["harmed"] * measured)
    return f"{count or 'None'} of {measured} users {'is' if count == 1 else 'are'}"


def _key_figures(record: Record) -> dict[str, str]:
    figures = {}
    methods = record.get("methods", {})
    if "base_bits_per_char" in record:
        figures[f"{unit_of(record)} with the frozen model"] = f"{record['base_bits_per_char']:.3f}"
    for name in (SUBJECT, DENSE):
        if name in methods:
            entry = methods[name]
            figures[f"saved by {name}, keeping {tables.kept_bytes(entry['bytes_per_user'])} bytes"] = (
                f"{entry['mean']:.3f}"
            )
    if SUBJECT in methods:
        figures[f"of users harmed by {SUBJECT}"] = percent(methods[SUBJECT]["harmed"])
    if record.get("users_per_second"):
        figures["users trained per second"] = f"{record['users_per_second']:,.0f}"
    return figures


def _results(record: Record) -> str:
    if not record.get("methods"):
        return ""
    parts = [tables.html(tables.result_table(record))]
    if any(name != REFERENCE for name in record["methods"]):
        drawn = plots.quality_against_bytes(plots.points_of_record(record), unit_of(record))
        caption = "Up is better, left is smaller. Bars: two standard errors each way, clustered by group."
        parts.append(page.figure(drawn, "bytes", caption))
    if differences_of(record, SUBJECT):
        caption = f"Paired by user; right of zero {SUBJECT} is better. Bars: 95% intervals over groups of users."
        parts += [
            page.bullets(findings(record)),
            page.figure(plots.differences(record, SUBJECT), "pairs", caption),
        ]
    return page.section("Users never seen in training", *parts)


def _users(record: Record, users: Mapping[str, Any] | None) -> str:
    if users is None or len(users["loss"]) < 2:
        return ""
    caption = (
        "Every dot is a user; left of zero, users are worse off than with the frozen model. A box holds the "
        "middle half of the users, its dashed line is the mean."
    )
    rows = record.get("methods", users["loss"])
    losses = {name: loss_u for name, loss_u in users["loss"].items() if name in rows}
    drawn = plots.gains_by_user({**users, "loss": losses}, unit_of(record))
    return page.section("Who gains, and who does not", page.figure(drawn, "users", caption))


def _training(record: Record) -> str:
    if not record.get("history"):
        return ""
    caption = (
        "Means over each round's cohort, in nats per target. Reward: minus the loss on query examples under "
        "the masks as sampled, before any step. Every round draws another cohort, so single rounds are noisy."
    )
    warmup = record.get("config", {}).get("gate", {}).get("warmup", 0)
    if warmup:
        caption += f" The first {warmup} rounds draw masks at random."
    drawn = plots.learning_curves(record["history"])
    return page.section("The federation learns", page.figure(drawn, "rounds", caption), *_gate_health(record))


def _gate_health(record: Record) -> list[str]:
    """Nothing where no gate was trained."""
    history = record["history"]
    if not plots.has_gate(history):
        return []
    text = (
        "Entropy says how much chance is left in the gate's masks (100%: all masks are equally likely), and a unit is "
        "unused that is chosen less than a tenth as often as the mean: the first falls as the gate learns, but if both "
        "go wrong, entropy to nearly nothing and more than half of the units unused, everyone gets the same few."
    )
    revived = sum(line.get("revived", 0) for line in history)
    caption = f"The gate's health by round. {revived:,.0f} times a unit that was unused was taken up again."
    return [page.paragraph(text), page.figure(plots.gate_curves(history), "gate", caption)]


def _units(users: Mapping[str, Any] | None) -> str:
    if users is None:
        return ""
    use_g = users["units_in_use"]
    unused = sum(share == 0 for share in use_g)
    text = (
        f"On average a user has {sum(use_g):.3g} of the {len(use_g)} units on. The most used unit serves "
        f"{max(use_g):.0%} of the measured users; {unused or 'none'} of the units "
        f"{'is' if unused == 1 else 'are'} used by nobody."
    )
    drawn = plots.shared_units(use_g, users["modules"])
    caption = "Bright units are common ground, dark ones serve few users or nobody."
    return page.section("Which units users share", page.paragraph(text), page.figure(drawn, "units", caption))


def _what_left(record: Record) -> str:
    """What a device sends in training, as long as there is no private aggregation."""
    meta = record.get("config", {}).get("meta", {})
    by_gradient = meta.get("signal") in OUTER_GRADIENTS
    rows = (
        "the gradient of its query loss with respect to their rows"
        if by_gradient
        else "how far its steps moved their rows"
    )
    sent = [f"the numbers of the units that were active for the user, and {rows}"]
    if meta.get("rule", {}).get("name", "sgd") != "sgd":
        sent.append("that loss's gradient with respect to the update rule's parameters")
    if meta.get("start", {}).get("name", "pool") != "pool":
        sent.append("and with respect to those of the network that says where rows start, which can reveal its context")
    gate = record.get("config", {}).get("gate", {})
    if gate.get("policy") == "gate":
        sent.append("the gate's policy gradient of the user, which can reveal its private embedding")
        sent.append("the units that it would be served, as its part in how often each unit is used (the load)")
        if gate.get("reward", {}).get("target") is not None:
            sent.append("how far the user's share of active units is off the target (the price)")
    metrics = dict.fromkeys(name for line in record.get("history", ()) for name in line)
    if figures := [name for name in metrics if name not in _NOT_SENT]:
        sent.append(f"a few figures: {', '.join(figures)}")
    return page.section(
        "What left the devices",
        page.paragraph("This is a simulation. On real devices, a user sends in every round it takes part in:"),
        page.bullets(sent),
        page.paragraph(
            "Never its data, its private embedding or its personal values. There is no private aggregation "
            "yet: the server could read each of these parts while it adds them up, and the active units say "
            "something about what a user is interested in. It neither logs nor stores the parts of single "
            "users. New users send nothing at all: they fetch the pool and the gate."
        ),
    )


def _provenance(record: Record) -> str:
    config = json.dumps(record.get("config", {}), indent=2)
    population = json.dumps(record.get("population", {}), indent=2)
    return (
        f"<details><summary>Where these figures come from</summary>{page.facts(_run_facts(record))}"
        f"<h2>Configuration</h2><pre>{escape(config)}</pre>"
        f"<h2>Population</h2><pre>{escape(population)}</pre></details>"
    )


def _run_facts(record: Record) -> dict[str, object]:
    machine, versions = record.get("machine", {}), record.get("versions", {})
    return {
        "command": record.get("command"),
        "commit": record.get("commit"),
        "seed": record.get("seed"),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()) or None,
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value) or None,
        "wall-clock seconds": record.get("seconds"),
        "users trained per second": record.get("users_per_second"),
        "rejected updates": record.get("rejected"),
        "checksum of the last checkpoint": record.get("checksum"),
    }


def _setting(index: int, setting: Setting, unit: str) -> str:
    """One setting of a comparison: its verdict on headroom, its table, its gain against bytes."""
    room = setting.headroom
    caption = "Up is better, left is smaller. Bars: 95% intervals over groups of users, of the mean over seeds."
    drawn = plots.quality_against_bytes(plots.points_of_setting(setting), unit)
    return page.section(
        setting.label or "All seeds",
        "" if room is None else page.paragraph(room.sentence(unit), "" if room.enough else "note"),
        tables.html(comparison_table(setting, unit)),
        page.figure(drawn, f"bytes-{index}", caption),
    )


def _read_users(run_folder: Path) -> dict[str, Any] | None:
    """The measured users' losses; None where the run has none."""
    path = run_folder / USERS_NAME
    if not path.exists():
        return None
    try:
        users: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); run `fedquilt simulate --resume` to write it again") from error
    return users


def _measured(run_folder: Path) -> MeasuredRun:
    record, users = read_record(run_folder), _read_users(run_folder)
    if users is None or "methods" not in record:
        raise RunError(
            f"runs are compared by their evaluated users, {str(run_folder)!r} holds no {USERS_NAME}; "
            "give it evaluate.methods and run it with --resume"
        )
    return MeasuredRun(record, users)
