"""The result table of a run, rendered from its record: for a terminal, as Markdown, as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from simulations.methods import parsed_name

Record = Mapping[str, Any]

NOTHING = "—"
REFERENCE = "base"
SHARED = "shared"
DENSE = "dense_lora"
CACHE_SUFFIX = "_cache"
HEADROOM_ERRORS = 2.0

EXPLANATIONS = {
    "base": "the frozen model as it is",
    "shared": "one LoRA for everyone, by federated averaging",
    "dense_lora": "a LoRA of the user's own, from scratch, fp16",
    "dense_lora_full_rank": "the same with as many rows as the pool has units",
    "dense_lora_compressed": "a LoRA of the user's own, through dsa_t2's codec",
    "shared_tuned": "the shared LoRA, then tuned for the user, fp16",
    "shared_tuned_compressed": "the same, its difference through dsa_t2's codec",
    "shared_scales": "the shared LoRA, one tuned scale for each row",
    "random_mask": "units drawn at random, nothing tuned",
    "magnitude_mask": "the strongest units, the same for everyone",
    "saliency_mask": "the units of the largest first-order gain",
    "other_mask": "the units the gate chose for someone else",
    "type_mask": "the best units for the user's type, as the population knows them",
    "informed_mask": "the best units given the user's type and the very examples that the gate sees",
    "best_mask": "the user's best units, as the population knows them",
    "dsa_t0": "the units the gate chose, nothing tuned",
    "dsa_t1": "the gate's units, one tuned scale for each",
    "dsa_t2": "the gate's units, their rows tuned for the user",
    "melpa": "the federation's learned start, rows tuned by its learned update rule",
    "maml": "the same of a pool trained by exact MAML",
    "fomaml": "the same of a pool trained by first-order MAML",
    "reptile": "the same of a pool trained by Reptile",
    "head_only": "the classifying module alone tuned for the user, fp16",
    "neighbours": "the user's nearest examples vote, nothing trained",
    "ngram_cache": "the frozen model and a 5-gram cache of the user's text",
    "dsa_t2_cache": "dsa_t2 and a 5-gram cache of the user's text",
}

_GROUP_WORDS = {"code": "project", "shakespeare": "play"}


@dataclass(frozen=True)
class Row:
    """One line: a method, what it is in plain words, and the formatted cells."""

    name: str
    meaning: str
    cells: tuple[str, ...]
    emphasised: bool = False


@dataclass(frozen=True)
class Table:
    """A table before it is drawn: the first column, under `names`, holds the rows' names, `columns` head the cells."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str
    names: str = "method"


@dataclass(frozen=True)
class Headroom:
    """What a LoRA of one's own adds to the one for everyone: mean difference of gains, clustered error."""

    difference: float
    se: float

    @property
    def enough(self) -> bool:
        """Whether the difference exceeds two standard errors; not when the error is unknown (NaN)."""
        return self.difference > HEADROOM_ERRORS * self.se

    def sentence(self, unit: str) -> str:
        """The rule's verdict in words."""
        if math.isnan(self.se):
            return "Headroom unknown: all measured users are of one group, so there is no standard error."
        found = (
            f"a LoRA of one's own ({DENSE}) gains {with_error(self.difference, self.se)} {unit} more "
            f"than the one for everyone ({SHARED})"
        )
        if self.enough:
            return f"There is headroom: {found}."
        return (
            f"Little headroom: {found}, which is not above two standard errors. "
            "On this population the comparison of methods says nothing; use another."
        )


def result_table(record: Record) -> Table:
    """One row per method of the record that is no point of a curve, in its order; the best method without a cache is
    emphasised. The run's quality has a column where it was measured beside the loss."""
    record = without_curves(record)
    methods, best = record["methods"], best_of(gains_of(record))
    measured = any("quality" in entry for entry in methods.values())
    rows = (
        Row(name, explain(name), ((_quality(entry),) if measured else ()) + _cells(name, entry), name == best)
        for name, entry in methods.items()
    )
    columns = (
        *((quality_of(record),) if measured else ()),
        "gain over base",
        "p10",
        "p90",
        "users harmed",
        "bytes per user",
        "active share",
        "tuning time",
    )
    return Table(columns, tuple(rows), caption(record))


def without_curves(record: Record) -> Record:
    """The record without methods that are there as points of few-shot curves alone, which are drawn instead."""
    asked = record.get("config", {}).get("evaluate", {}).get("methods")
    if asked is None or "methods" not in record:
        return record
    rows = {REFERENCE, *(str(parsed_name(name)) for name in asked)}
    pairs = record.get("comparisons", ())
    return {
        **record,
        "methods": {name: entry for name, entry in record["methods"].items() if name in rows},
        "comparisons": [pair for pair in pairs if {pair["a"], pair["b"]} <= rows],
    }


def quality_of(record: Record) -> str:
    """The name of the run's quality."""
    name = record.get("config", {}).get("gate", {}).get("reward", {}).get("quality", {}).get("name", "loss")
    return str(name)


def best_of(gains: Mapping[str, float]) -> str | None:
    """The method of the largest gain, of those without a cache; None where only the base was measured."""
    eligible = [name for name in gains if name != REFERENCE and not has_cache(name)]
    return max(eligible, key=gains.__getitem__, default=None)


def gains_of(record: Record) -> dict[str, float]:
    """Each method's mean gain over the base."""
    return {name: entry["mean"] for name, entry in record["methods"].items()}


def has_cache(name: str) -> bool:
    """Whether a method reads the user's text again when it serves: no adapter alone competes with that."""
    return base_name(name).endswith(CACHE_SUFFIX)


def base_name(name: str) -> str:
    """`dsa_t2` of `dsa_t2[windows=4]@ternary:0.2`."""
    return re.split(r"[\[@]", name, maxsplit=1)[0]


def explain(name: str) -> str:
    """A method in plain words, with its options and format if it names any; empty for a name of another version."""
    base, (named, _, written) = base_name(name), name.partition("@")
    if base == name or base not in EXPLANATIONS:
        return EXPLANATIONS.get(base, "")
    options = named[len(base) :].strip("[]").replace("=", " ").replace(",", ", ")
    kind, _, share = written.partition(":")
    formatted = f"written in {kind}" + (f", the largest {percent(float(share))}" if share else "")
    return ", ".join((base, *([options] if options else []), *([formatted] if kind else [])))


def unit_of(record: Record) -> str:
    """What gains and losses are counted in: populations of text count characters, others targets."""
    return "bits per character" if "characters" in record.get("population", {}) else "bits per target"


def caption(record: Record) -> str:
    """What the table's figures mean, in one line."""
    splits = record.get("splits", {})
    group = _GROUP_WORDS.get(record.get("population", {}).get("name", ""), "group")
    measured = f"{splits['measured']} new users of {splits['groups']} {group}s" if "measured" in splits else "new users"
    return (
        f"Gain: {unit_of(record)} saved against the frozen model, higher is better; mean over {measured} "
        f"± standard error clustered by {group}; p10, p90: percentiles over users. Harmed: worse off than "
        "with the frozen model. Bytes: what is kept for each user; a cache reads the user's own text besides. "
        "Tuning time leaves the choice of the mask out."
    )


def headroom(record: Record) -> Headroom | None:
    """Gain of `dense_lora` over `shared`; None unless both were measured.

    Where it is below two standard errors, a population has nothing to tell personal methods apart by.
    """
    for entry in record.get("comparisons", ()):
        if (entry["a"], entry["b"]) == (DENSE, SHARED):
            return Headroom(entry["difference"], entry["se"])
        if (entry["a"], entry["b"]) == (SHARED, DENSE):
            return Headroom(-entry["difference"], entry["se"])
    return None


def terminal(table: Table) -> RenderableType:
    """For `rich.console.Console.print`: the figures, then what the methods are. Fits 80 columns."""
    figures = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    figures.add_column(table.names, min_width=max(len(row.name) for row in table.rows))
    for index, column in enumerate(table.columns):
        widest = max(len(row.cells[index]) for row in table.rows)
        figures.add_column(column.replace(" ", "\n", 1), justify="right", vertical="bottom", min_width=widest)
    meanings = RichTable.grid(padding=(0, 2, 0, 0))
    for row in table.rows:
        figures.add_row(*map(Text, (row.name, *row.cells)), style="bold" if row.emphasised else "")
        if row.meaning:
            meanings.add_row(Text(row.name), Text(row.meaning), style="dim")
    return Group(figures, "", Text(table.caption), "", meanings)


def markdown(table: Table) -> str:
    """A GitHub table, its caption below."""
    lines = [
        _markdown_line((table.names, *table.columns, "what it is")),
        _markdown_line(("---", *["---:"] * len(table.columns), "---")),
    ]
    for row in table.rows:
        cells = (f"`{row.name}`", *row.cells)
        shown = [f"**{cell}**" for cell in cells] if row.emphasised else cells
        lines.append(_markdown_line((*shown, row.meaning)))
    return "\n".join(lines) + f"\n\n{table.caption}\n"


def html(table: Table) -> str:
    """A <table> that scrolls sideways where the screen is narrow, with its caption below."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(_html_row(row) for row in table.rows)
    return (
        f'<figure><div class="scroll" tabindex="0"><table><thead><tr><th scope="col">{escape(table.names)}</th>{heads}'
        "</tr></thead>"
        f"<tbody>{body}</tbody></table></div><figcaption>{escape(table.caption)}</figcaption></figure>"
    )


def with_error(mean: float, se: float) -> str:
    """`0.511 ± 0.034`; without the error where it is unknown (NaN)."""
    return bits(mean) if math.isnan(se) else f"{bits(mean)} ± {bits(se)}"


def bits(value: float) -> str:
    """Three decimals, and no -0.000."""
    return f"{value:z.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def kept_bytes(count: float) -> str:
    """A dash where nothing is kept."""
    return f"{count:,.0f}" if count else NOTHING


def _cells(name: str, entry: Mapping[str, float]) -> tuple[str, ...]:
    """In the order of `result_table`'s columns. The base is what gains are counted from."""
    if name == REFERENCE:
        return ("0", *[NOTHING] * 6)

    def cell(key: str, shown: Callable[[float], str]) -> str:
        return shown(entry[key]) if key in entry else NOTHING

    return (
        with_error(entry["mean"], entry["se"]),
        cell("p10", bits),
        cell("p90", bits),
        cell("harmed", percent),
        cell("bytes_per_user", kept_bytes),
        cell("active_share", percent),
        cell("seconds_per_user", _duration) if entry.get("steps") else NOTHING,
    )


def _quality(entry: Mapping[str, float]) -> str:
    return bits(entry["quality"]) if "quality" in entry else NOTHING


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_row(row: Row) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row.cells)
    emphasis = ' class="best"' if row.emphasised else ""
    name = f"<code>{escape(row.name)}</code><small>{escape(row.meaning)}</small>"
    return f'<tr{emphasis}><th scope="row">{name}</th>{cells}</tr>'
