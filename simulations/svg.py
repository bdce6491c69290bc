"""Plots on adaptation as SVG text: few-shot curves, and matrices of tasks. The same record gives the same bytes.

They are part of a report and files beside documents, light or dark as the reader's screen is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from simulations.continual_tables import Continual, Matrix, matrices, shown
from simulations.curves import Curve, FewShots, owned
from simulations.tables import NOTHING

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's; one for each method, in the record's order."""

_INK, _SOFT = "fq-ink", "fq-soft"
_STYLE = (
    "<style>.fq-card{fill:#fff}.fq-ink{fill:#1f2328}.fq-soft{fill:#59636e}.fq-grid{stroke:#d8dee4}.fq-level{stroke:#59636e}"
    "@media(prefers-color-scheme:dark){.fq-card{fill:#161b22}.fq-ink{fill:#e6edf3}.fq-soft{fill:#9aa4af}"
    ".fq-grid{stroke:#30363d}.fq-level{stroke:#9aa4af}}</style>"
)
_PANEL, _HEIGHT, _LEFT, _GAP, _LINE = 300, 230, 64, 26, 20
_CELL, _CELL_HEIGHT, _ACROSS = 52, 24, 3
_DARK, _BRIGHT = (0, 44, 94), (253, 231, 120)
_UNKNOWN, _WHITE, _BLACK = "#d8dee4", "#ffffff", "#1f2328"


def few_shot_curves(found: FewShots) -> str:
    """A panel for each amount of data, a line for each method, over steps that are spaced as log(1 + steps)."""
    panels, names = found.shots, found.names
    width = _LEFT + len(panels) * (_PANEL + _GAP)
    top = 44 + _LINE * len(names)
    legend = [
        part
        for place, name in enumerate(names)
        for part in (
            _path([(16, 20 + _LINE * place), (44, 20 + _LINE * place)], _colour(place)),
            _text(52, 24 + _LINE * place, name, size=13),
        )
    ]
    ticks = _ticks(found)
    drawn = [_panel(found, shots, ticks, _LEFT + at * (_PANEL + _GAP), top) for at, shots in enumerate(panels)]
    scale = [
        _text(_LEFT - 8, _y(tick, ticks, top) + 4, f"{tick:g}" + "%" * found.percent, "end", _SOFT) for tick in ticks
    ]
    label = _text(_LEFT - 8, top - 12, found.unit, "start", _SOFT)
    return _svg(width, top + _HEIGHT + 52, [*legend, label, *scale, *drawn])


def task_matrices(continual: Continual) -> str:
    """A matrix for each rule: tasks across, what was learned so far down, all in one scale."""
    found = matrices(continual)
    tasks = len(found[0].rows[0])
    values = [value for matrix in found for row in matrix.rows for value in row if math.isfinite(value)] or [0.0]
    wide, high = 96 + tasks * _CELL + 24, 58 + (tasks + 1) * _CELL_HEIGHT + 18
    parts = [
        _matrix(continual, matrix, (min(values), max(values)), at % _ACROSS * wide, at // _ACROSS * high)
        for at, matrix in enumerate(found)
    ]
    return _svg(min(_ACROSS, len(found)) * wide, math.ceil(len(found) / _ACROSS) * high, parts)


def learned_so_far(tasks: int) -> list[str]:
    """The rows of a matrix."""
    return ["at the start", *(f"after task {t}" for t in range(1, tasks + 1))]


def _panel(found: FewShots, shots: int, ticks: Sequence[float], left: float, top: float) -> str:
    bottom, right = top + _HEIGHT, left + _PANEL
    most = math.log1p(found.steps[-1]) or 1.0
    places = {steps: left + 12 + (_PANEL - 24) * math.log1p(steps) / most for steps in found.steps}
    parts = [_text((left + right) / 2, top - 12, owned(shots), "middle")]
    parts += [_rule(left, _y(tick, ticks, top), right, "fq-grid") for tick in ticks]
    parts += [_text(x, bottom + 18, str(steps), "middle", _SOFT) for steps, x in places.items()]
    parts.append(_text((left + right) / 2, bottom + 38, "steps", "middle", _SOFT))
    if not math.isnan(found.frozen):
        parts.append(_rule(left, _y(found.frozen, ticks, top), right, "fq-level", dashes="2 4"))
    for curve in found.of(shots):
        parts += _curve(curve, _colour(found.names.index(curve.name)), places, ticks, top)
    return "".join(parts)


def _curve(curve: Curve, colour: str, places: dict[int, float], ticks: Sequence[float], top: float) -> list[str]:
    """The band, the means and their dots."""
    line = [(places[steps], _y(point.mean, ticks, top)) for steps, point in curve.points.items()]
    above = [(places[steps], _y(point.high, ticks, top)) for steps, point in curve.points.items()]
    below = [(places[steps], _y(point.low, ticks, top)) for steps, point in curve.points.items()]
    band = f'<polygon points="{_points(above + below[::-1])}" fill="{colour}" fill-opacity="0.18"/>'
    return [band, _path(line, colour), *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in line)]


def _matrix(continual: Continual, matrix: Matrix, span: tuple[float, float], left: float, top: float) -> str:
    tasks, first = len(matrix.rows[0]), left + 96
    middle = first + tasks * _CELL / 2
    parts = [_text(middle, top + 22, matrix.rule, "middle", size=13)]
    parts += [_text(first + (i + 0.5) * _CELL, top + 44, f"task {i + 1}", "middle", _SOFT) for i in range(tasks)]
    for t, (row, label) in enumerate(zip(matrix.rows, learned_so_far(tasks), strict=True)):
        y = top + 52 + t * _CELL_HEIGHT
        parts.append(_text(first - 8, y + 16, label, "end", _SOFT))
        for i, value in enumerate(row):
            x = first + i * _CELL
            if math.isfinite(value):
                share = (value - span[0]) / ((span[1] - span[0]) or 1.0)
                parts += _cell(x, y, shown(continual, value), _blend(share), _WHITE if share < 0.5 else _BLACK)
            else:
                parts += _cell(x, y, NOTHING, _UNKNOWN, _BLACK)
    return "".join(parts)


def _cell(x: float, y: float, text: str, fill: str, ink: str) -> list[str]:
    middle = x + _CELL / 2 - 1
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_CELL - 2}" height="{_CELL_HEIGHT - 2}" fill="{fill}"/>',
        f'<text x="{middle:.1f}" y="{y + 16:.1f}" text-anchor="middle" fill="{ink}" font-size="12">{text}</text>',
    ]


def _ticks(found: FewShots) -> list[float]:
    """Round numbers that hold all intervals between the first and the last."""
    values = [end for curve in found.curves for point in curve.points.values() for end in (point.low, point.high)]
    values += [] if math.isnan(found.frozen) else [found.frozen]
    low, high = min(values), max(values)
    rough = (high - low) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * tick for tick in range(first, max(last, first + 1) + 1)]


def _y(value: float, ticks: Sequence[float], top: float) -> float:
    return top + _HEIGHT * (ticks[-1] - value) / (ticks[-1] - ticks[0])


def _blend(share: float) -> str:
    """From dark to bright."""
    return "#" + "".join(f"{round(dark + share * (bright - dark)):02x}" for dark, bright in zip(_DARK, _BRIGHT))


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _points(line: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in line)


def _path(line: Iterable[tuple[float, float]], colour: str) -> str:
    return f'<polyline points="{_points(line)}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _rule(left: float, y: float, right: float, kind: str, dashes: str = "none") -> str:
    return (
        f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" class="{kind}" stroke-dasharray="{dashes}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = _INK, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" font-size="{size}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif">\n'
        f'{_STYLE}\n<rect width="100%" height="100%" rx="8" class="fq-card"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
