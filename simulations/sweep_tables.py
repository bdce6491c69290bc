"""What a sweep's record says, as rows of tables: methods over seeds, claims, masks, gates, quality against sparsity.

Every function takes one variant of the record and gives a head and rows of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from federation.config import RunConfig
from simulations.continual_metrics import METRICS
from simulations.methods import known_methods, parsed_name
from simulations.tables import NOTHING, percent
from simulations.variants import MAIN

Summary = Mapping[str, Any]
Rows = list[tuple[str, ...]]
Drawn = tuple[Sequence[str], Rows]


def seeds(summary: Summary) -> Drawn:
    """Every method's gain over the seeds, but for the points of curves."""
    head = ("method", "gain", "95% interval", "harmed", "bytes", "by seed")
    rows: Rows = [
        (
            f"`{name}`",
            f"{method['gain']['mean']:.4f}",
            f"{method['gain']['low']:.4f} to {method['gain']['high']:.4f}",
            percent(method["harmed"]),
            f"{method['bytes_per_user']:,.0f}",
            ", ".join(f"{gain:.4f}" for gain in method["seed_gains"]),
        )
        for name, method in summary["methods"].items()
        if name not in summary.get("curves", ())
    ]
    return head, rows


def claims(summary: Summary) -> Drawn:
    """By how much the first of two methods is better, in the record's order: in bits, and in the run's quality where
    that is another."""
    rows: Rows = []
    for claim in summary["claims"]:
        name = f"`{claim['better']}` - `{claim['worse']}`"
        rows.append((name, *_claimed(claim)))
        if "quality" in claim:
            rows.append((f"{name}, {summary['quality']}", *_claimed(claim["quality"])))
    return ("difference of gains", *_CLAIMED), rows


def masks(summary: Summary) -> Drawn:
    """How near masks come to the user's best ones, and what they reach in the run's quality, unless it is the loss."""
    head = ("mask", "F1 against the user's best", "by seed", "share of the best reward", "by seed")
    measured = any(summary["methods"][name].get("quality") is not None for name in summary["masks"])
    rows: Rows = []
    for name, mask in summary["masks"].items():
        by_seed = mask["seeds"]
        cells = (
            f"`{name}`",
            f"{mask['f1']:.3f}",
            span(by_seed["f1"], "{:.3f}"),
            share(mask["reward_share"]),
            span(map(_in_percent, by_seed["reward_share"]), "{:.1f}%"),
        )
        rows.append((*cells, *_quality(summary["methods"][name])) if measured else cells)
    return ((*head, summary["quality"], "by seed"), rows) if measured else (head, rows)


def types(summary: Summary) -> Drawn:
    """The share of the best reward that each mask gets, by type of user."""
    kinds = list(dict.fromkeys(kind for mask in summary["masks"].values() for kind in mask["by_type"]))
    rows: Rows = []
    for name, mask in summary["masks"].items():
        found = mask["by_type"]
        cells = (share(found[kind]["reward_share"]) if kind in found else NOTHING for kind in kinds)
        rows.append((f"`{name}`", *cells))
    return ("share of the best reward", *(f"type {kind}" for kind in kinds)), rows


def gates(summary: Summary) -> Drawn:
    """The federations whose gate was trained, and how each ended."""
    head = ("federation", "estimator", "the gate sees", "masks", "entropy at the end", "units unused", "revived")
    rows: Rows = []
    for name, gate in summary["gate"].items():
        cells = (
            share(gate["gate_entropy"]) if "gate_entropy" in gate else NOTHING,
            share(gate["unused_share"]) if "unused_share" in gate else NOTHING,
            f"{gate['revived']:.4g}" if "revived" in gate else NOTHING,
        )
        seen = ", ".join(gate["inputs"]) or "nothing"
        rows.append((f"`{name}`", f"`{gate['estimator']}`", seen, asked(gate), *cells))
    return head, rows


def curve(summary: Summary) -> Drawn:
    """Quality against sparsity: every method that is a mask alone, the sparsest first."""
    head = ("method", "asked for", "active share", "by seed", "gain", "share of the best reward")
    known = known_methods(RunConfig())
    found = []
    for text, method in summary["methods"].items():
        name = parsed_name(text)
        base = known.get(name.base)
        if base is None or base.choice is None or base.tuned != "nothing":
            continue
        gate = summary["gate"].get(name.options.get("pool", MAIN))
        budget = name.options.get("budget")
        chosen = gate is not None and base.choice.rule in ("gate", "other")
        wanted = f"budget {budget}" if budget else asked(gate) if chosen else NOTHING
        mask = summary["masks"].get(text)
        cells = (
            f"`{text}`",
            wanted,
            share(method["active_share"]),
            span(map(_in_percent, method["seed_active_shares"]), "{:.1f}%"),
            f"{method['gain']['mean']:.4f}",
            share(mask["reward_share"]) if mask else NOTHING,
        )
        found.append((method["active_share"], cells))
    return head, [cells for _, cells in sorted(found, key=lambda entry: entry[0])]


def continual(summary: Summary) -> Drawn:
    """What every rule left its users with, and the references, over the seeds."""
    measured = summary["continual"]
    head = ("rule", *(words.label for words in METRICS.values()), "ACC by seed", "BWT by seed", "bytes", "diverged")
    rows: Rows = []
    for name, rule in measured["rules"].items():
        metrics = rule["metrics"]
        cells = (_with_error(metrics[figure]) for figure in METRICS)
        by_seed = (_by_seed(metrics[figure]["seeds"]) for figure in ("acc", "bwt"))
        rows.append((f"`{name}`", *cells, *by_seed, f"{rule['bytes_per_user']:,.0f}", str(rule["diverged"])))
    for name, reference in measured["references"].items():
        acc, rest = reference["metrics"]["acc"], [NOTHING] * (len(METRICS) - 1)
        found = (_with_error(acc), *rest, _by_seed(acc["seeds"]), NOTHING, NOTHING, str(reference["diverged"]))
        rows.append((f"`{name}`", *found))
    return head, rows


def continual_claims(summary: Summary) -> Drawn:
    """By how much the first of two rules is better, in ACC and in BWT."""
    by_figure = summary["continual"]["claims"]
    rows: Rows = [
        (f"{figure.upper()}, `{claim['better']}` - `{claim['worse']}`", *_claimed(claim))
        for figure, found in by_figure.items()
        for claim in found
    ]
    return ("difference", *_CLAIMED), rows


def variance(record: Mapping[str, Any]) -> Drawn:
    """Of a `bench gate` record: each estimator's variance by situation, at equal evaluations. Biased ones have the norm
    of their bias beside it, as a share of the gradient's."""
    tables = record["variance"]
    sides = list(dict.fromkeys(side for table in tables.values() for side in table))
    rows = [(f"`{side}`", *(_variance(table.get(side)) for table in tables.values())) for side in sides]
    return ("estimator", *tables), rows


def asked(gate: Mapping[str, Any]) -> str:
    """What a gate's masks were asked to be, in words."""
    if gate["target"] is not None:
        return f"target {gate['target']:.3g}"
    if gate["price"]:
        return f"price {gate['price']:.3g}"
    return f"budget {gate['budget']}" if gate["distribution"] == "budget" else "no price"


def span(values: Iterable[float], form: str) -> str:
    """The smallest and the largest."""
    listed = list(values)
    return f"{form.format(min(listed))} to {form.format(max(listed))}"


def share(value: float) -> str:
    """In percent, to one decimal: claims about shares are that fine."""
    return f"{_in_percent(value):.1f}%"


_CLAIMED = ("mean", "in standard errors", "95% interval", "by seed")


def _claimed(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """Under the heads `_CLAIMED`."""
    return (
        f"{claim['difference']:+.4f}",
        NOTHING if claim["z"] is None else f"{claim['z']:+.1f}",
        f"{claim['low']:+.4f} to {claim['high']:+.4f}",
        ", ".join(f"{difference:+.4f}" for difference in claim["seed_differences"]),
    )


def _with_error(figure: Mapping[str, Any]) -> str:
    """Without the error where there is none, or it is unknown (NaN)."""
    known = "se" in figure and not math.isnan(figure["se"])
    return f"{figure['mean']:.4f} ± {figure['se']:.4f}" if known else f"{figure['mean']:.4f}"


def _by_seed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _quality(method: Mapping[str, Any]) -> tuple[str, str]:
    if method["quality"] is None:
        return NOTHING, NOTHING
    return f"{method['quality']:.4f}", span(method["seed_qualities"], "{:.4f}")


def _variance(row: Mapping[str, float] | None) -> str:
    if row is None:
        return NOTHING
    text = f"{row['relative']:.3g}"
    if "squared_bias" not in row:
        return text
    if not row["squared_norm"] > 0:
        return f"{text}, biased"
    return f"{text}, bias {(row['squared_bias'] / row['squared_norm']) ** 0.5:.0%}"


def _in_percent(value: float) -> float:
    return 100 * value
