"""Few-shot curves, read from a record: how good a method is after so many steps, for users who own so many examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simulations.methods import parsed_name
from simulations.statistics import Interval
from simulations.tables import NOTHING, REFERENCE, Record, bits, quality_of, unit_of

Entry = Mapping[str, Any]
Drawn = tuple[tuple[str, ...], list[tuple[str, ...]]]

_OVER_USERS = "the 95% interval over users"
_OVER_SEEDS = "the range of the seeds"


@dataclass(frozen=True)
class Curve:
    """A method after steps (ascending), each with its interval. shots: examples owned; 0 for all that there are."""

    name: str
    shots: int
    points: Mapping[int, Interval]

    def first_at(self, value: float) -> int | None:
        """The fewest measured steps with at least this value; None where it is not reached."""
        return next((steps for steps, point in self.points.items() if point.mean >= value), None)

    @property
    def best(self) -> tuple[int, float]:
        """The steps of the largest mean, and that."""
        steps = max(self.points, key=lambda steps: self.points[steps].mean)
        return steps, self.points[steps].mean


@dataclass(frozen=True)
class FewShots:
    """All curves, in the record's order; higher is better.

    unit: what values are, in words. percent: whether they are percentages. frozen: of the frozen model. band: what the
    intervals are, in words; "" where errors are unknown, and all intervals end at their means.
    """

    curves: tuple[Curve, ...]
    unit: str
    percent: bool
    frozen: float
    band: str

    @property
    def shots(self) -> list[int]:
        """Ascending; all that there are comes last."""
        return sorted({curve.shots for curve in self.curves}, key=lambda shots: (shots == 0, shots))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(curve.name for curve in self.curves))

    @property
    def steps(self) -> list[int]:
        return sorted({steps for curve in self.curves for steps in curve.points})

    def of(self, shots: int) -> list[Curve]:
        return [curve for curve in self.curves if curve.shots == shots]

    def shown(self, value: float) -> str:
        return f"{value:z.1f}%" if self.percent else bits(value)


def curves_of_record(record: Record) -> FewShots | None:
    """Those of one run; None where no method has two numbers of steps."""
    return _few_shots(record.get("methods", {}), quality_of(record), f"{unit_of(record)} saved", _gain_of_run)


def curves_of_summary(summary: Record) -> FewShots | None:
    """Those of a sweep's variant: means over seeds."""
    return _few_shots(summary["methods"], summary["quality"], "bits saved", _gain_over_seeds)


def owned(shots: int) -> str:
    """
    >>> [owned(20), owned(1), owned(0)]
    ['20 examples', '1 example', 'all examples']
    """
    return "all examples" if shots == 0 else f"{shots} example" + "s" * (shots != 1)


def table(found: FewShots) -> Drawn:
    """A head and rows of text: methods by steps, the amounts of data below one another."""
    head = ("examples owned", "method", *(f"{steps} step" + "s" * (steps != 1) for steps in found.steps))
    rows = [
        (owned(shots), f"`{curve.name}`", *(_cell(found, curve.points.get(steps)) for steps in found.steps))
        for shots in found.shots
        for curve in found.of(shots)
    ]
    return head, rows


def summary(found: FewShots) -> str:
    """The first curve in one sentence."""
    first = found.curves[0]
    steps, best = first.best
    frozen = f"; the frozen model is at {found.shown(found.frozen)}" if found.frozen == found.frozen else ""
    return f"{first.name} is at {found.shown(best)} {found.unit} after {_steps(steps)} on {owned(first.shots)}{frozen}"


def verdicts(found: FewShots) -> list[str]:
    """For each amount of data: after how many steps the first method is where the best of the others ever is."""
    lines = []
    for shots in found.shots:
        first, *others = found.of(shots)
        if not others:
            continue
        other = max(others, key=lambda curve: curve.best[1])
        steps, best = other.best
        reached = first.first_at(best)
        at = first.best[0] if reached is None else reached
        verdict = "does not get there, its best is" if reached is None else "is at least there with"
        lines.append(
            f"With {owned(shots)}, the best of the others is {other.name} with {found.shown(best)} after "
            f"{_steps(steps)}; {first.name} {verdict} {found.shown(first.points[at].mean)} after {_steps(at)}."
        )
    return lines


def _few_shots(
    methods: Mapping[str, Entry], quality: str, gain_unit: str, gain: Callable[[Entry], Interval]
) -> FewShots | None:
    """In the run's quality where it was measured, else in what is gained over the frozen model."""
    by_curve: dict[tuple[str, int], dict[int, Entry]] = {}
    for text, entry in methods.items():
        name = parsed_name(text)
        if "steps" in name.options:
            rest = {option: value for option, value in name.options.items() if option not in ("steps", "shots")}
            key = str(replace(name, options=rest)), int(name.options.get("shots", 0))
            by_curve.setdefault(key, {})[int(name.options["steps"])] = entry
    drawn = {key: dict(sorted(points.items())) for key, points in by_curve.items() if len(points) > 1}
    entries = [entry for points in drawn.values() for entry in points.values()]
    if not entries:
        return None
    measured = all(entry.get("quality") is not None for entry in entries)
    percent = measured and quality == "accuracy"
    times = 100.0 if percent else 1.0
    value = _quality if measured else gain
    curves = tuple(
        Curve(*key, {steps: _times(times, value(entry)) for steps, entry in points.items()})
        for key, points in drawn.items()
    )
    return FewShots(
        curves,
        ("accuracy" if percent else quality) if measured else gain_unit,
        percent,
        _frozen(methods) * times if measured else 0.0,
        _band(entries[0], measured),
    )


def _frozen(methods: Mapping[str, Entry]) -> float:
    """A sweep's record leaves the frozen model out: NaN."""
    quality = methods.get(REFERENCE, {}).get("quality")
    return float("nan") if quality is None else float(quality)


def _band(entry: Entry, measured: bool) -> str:
    if not measured or "quality_se" in entry:
        return _OVER_USERS
    return _OVER_SEEDS if "seed_qualities" in entry else ""


def _quality(entry: Entry) -> Interval:
    mean = float(entry["quality"])
    if "quality_se" in entry:
        return _two_errors(mean, entry["quality_se"])
    seeds = entry.get("seed_qualities", [mean])
    return Interval(mean, min(seeds), max(seeds))


def _gain_of_run(entry: Entry) -> Interval:
    return _two_errors(entry["mean"], entry["se"])


def _gain_over_seeds(entry: Entry) -> Interval:
    return Interval(**entry["gain"])


def _two_errors(mean: float, se: float) -> Interval:
    """Ends at the mean where the error is unknown (NaN)."""
    known = se if se == se else 0.0
    return Interval(mean, mean - 2 * known, mean + 2 * known)


def _times(factor: float, interval: Interval) -> Interval:
    return Interval(factor * interval.mean, factor * interval.low, factor * interval.high)


def _cell(found: FewShots, point: Interval | None) -> str:
    return NOTHING if point is None else found.shown(point.mean)


def _steps(steps: int) -> str:
    return "no step" if steps == 0 else f"{steps} step" + "s" * (steps != 1)
