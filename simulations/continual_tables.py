"""What a run, or several seeds, measured of rules that are to keep what users learned: a table, matrices, words.

All functions take `continual` of a run's record or of a sweep's variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulations.continual_metrics import METRICS, REFERENCES
from simulations.tables import NOTHING, Row, Table, kept_bytes

Continual = Mapping[str, Any]
_STEPS = "steps_to_target"
"""The only figure of `METRICS` that is not counted in the quality's unit."""


@dataclass(frozen=True)
class Matrix:
    """A rule's R with the start above it: rows (T + 1, N), mean over users, in points or in the quality's unit."""

    rule: str
    rows: Sequence[Sequence[float]]


def rules_table(continual: Continual) -> Table:
    """Every rule and reference: all of `METRICS`, and what a user keeps beside its rows."""
    columns = (*(words.label for words in METRICS.values()), "bytes kept", "diverged")
    rules = continual["rules"].items()
    best = max((name for name, _ in rules), key=lambda name: _mean(continual, name, "acc"), default=None)
    rows = [Row(name, rule_meaning(name), _rule_cells(continual, rule), name == best) for name, rule in rules]
    for name, reference in continual["references"].items():
        nothing = [NOTHING] * len(METRICS)
        cells = (_figure(continual, "acc", reference), *nothing, str(reference["diverged"]))
        rows.append(Row(name, REFERENCES[_base(name)].meaning, cells))
    return Table(columns, tuple(rows), _caption(continual), "rule")


def matrices(continual: Continual) -> list[Matrix]:
    """One for each rule, in the record's order."""
    times = scale(continual)
    return [
        Matrix(name, [[times * value for value in row] for row in (rule["before"], *rule["r"])])
        for name, rule in continual["rules"].items()
    ]


def example(continual: Continual) -> str:
    """How to read the first rule's matrix, in its own figures; "" where there is no rule."""
    found = matrices(continual)
    if not found:
        return ""
    rule, rows = found[0].rule, found[0].rows
    learned, end = rows[1][0], rows[-1][0]
    forgotten = shown(continual, learned - end)
    sign, points = ("%", " points") if continual["quality"] == "accuracy" else ("", " bits")
    verdict = f"{forgotten}{points} forgotten" if float(forgotten) > 0 else "nothing forgotten"
    begun, right_after, left = (shown(continual, value) + sign for value in (rows[0][0], learned, end))
    bwt = _mean(continual, rule, "bwt") * scale(continual)
    return (
        f"For example, by the rule {rule}: task 1 begins at {begun}, is at {right_after} right after it was learned, "
        f"and at {left} when all {len(rows) - 1} tasks were: {verdict}. The mean of such changes, over all tasks but "
        f"the last, is BWT: {shown(continual, bwt)} here."
    )


def words_of_metrics() -> list[tuple[str, str]]:
    """Every figure of the table, and what it means."""
    return [(words.label, words.meaning) for words in METRICS.values()]


def unit(continual: Continual) -> str:
    """What matrices and most figures are counted in, as `scale` has it."""
    return "accuracy, in %" if continual["quality"] == "accuracy" else "minus bits per character"


def scale(continual: Continual) -> float:
    return 100.0 if continual["quality"] == "accuracy" else 1.0


def shown(continual: Continual, value: float) -> str:
    """A value of a matrix: points with one decimal, bits with three."""
    return f"{value:z.1f}" if continual["quality"] == "accuracy" else f"{value:z.3f}"


def rule_meaning(name: str) -> str:
    """A rule in plain words, of a name such as `ewc:100[pool=random]`."""
    base, _, pool = name.partition("[pool=")
    base, _, strength = base.partition(":")
    parts = [RULES[base], f"strength {strength}" if strength else "", f"from the pool {pool[:-1]}" if pool else ""]
    return ", ".join(part for part in parts if part)


RULES: Mapping[str, str] = {
    "none": "plain fine-tuning, one task after the other",
    "ewc": "rows that mattered to earlier tasks are pulled back, with a memory of each task",
    "online_ewc": "the same, with one memory for all tasks",
    "lwf": "the model as it was before the task teaches too",
    "replay": "some examples of earlier tasks are kept and seen again",
    "isolation": "units that an earlier task moved most move no more",
    "meta": "the federation's learned update rule, nothing else kept",
}


def _rule_cells(continual: Continual, rule: Mapping[str, Any]) -> tuple[str, ...]:
    figures = (_figure(continual, name, rule) for name in METRICS)
    return (*figures, kept_bytes(rule["bytes_per_user"]), str(rule["diverged"]))


def _figure(continual: Continual, name: str, entry: Mapping[str, Any]) -> str:
    """With its error where that is known."""
    figure, times = entry["metrics"][name], 1.0 if name == _STEPS else scale(continual)
    error = figure.get("se", math.nan) * times
    digits = 1 if name == _STEPS or continual["quality"] == "accuracy" else 3
    mean = f"{figure['mean'] * times:z.{digits}f}"
    return mean if math.isnan(error) else f"{mean} ± {error:.{digits}f}"


def _caption(continual: Continual) -> str:
    return (
        f"In {_points(continual)}, mean over {continual['users']} new users who meet {continual['tasks']} tasks of "
        f"{continual['steps']} steps each, ± standard error clustered by group. Bytes: what "
        "a user keeps to remember by, beside its rows. Diverged: users whose steps did on some task, "
        "so that they kept what they had."
    )


def _points(continual: Continual) -> str:
    return "points of accuracy (%)" if continual["quality"] == "accuracy" else "bits per character (with a minus)"


def _mean(continual: Continual, rule: str, figure: str) -> float:
    return float(continual["rules"][rule]["metrics"][figure]["mean"])


def _base(name: str) -> str:
    return name.partition("[")[0]
