"""The figures of a report, as plotly figures.

The colours are Okabe and Ito's, which colour-blind readers tell apart, and families differ in their markers.
Backgrounds are clear and the page sets the colour of text, so that light and dark pages both work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from simulations.comparison import Setting, differences_of
from simulations.statistics import Floats, Interval
from simulations.tables import REFERENCE, Record, base_name, has_cache, unit_of

DSA, META, DENSE, SHARED, MASKS, CACHE, CONTROLS = (
    "sparse from the pool",
    "meta-learned",
    "a LoRA each",
    "shared LoRA",
    "other masks",
    "with cache",
    "without a pool",
)
COLOURS = {
    DSA: "#0072b2",
    META: "#56b4e9",
    DENSE: "#d55e00",
    SHARED: "#009e73",
    MASKS: "#cc79a7",
    CACHE: "#e69f00",
    CONTROLS: "#999999",
}
SYMBOLS = {
    DSA: "circle",
    META: "triangle-up",
    DENSE: "square",
    SHARED: "diamond",
    MASKS: "x",
    CACHE: "star",
    CONTROLS: "cross",
}
_LABELS = dict.fromkeys(COLOURS, "top left") | {DENSE: "bottom center"}
_FAMILIES = {
    "dsa": DSA,
    **dict.fromkeys(("melpa", "maml", "fomaml", "reptile"), META),
    "dense": DENSE,
    "shared": SHARED,
    **dict.fromkeys(("head", "neighbours"), CONTROLS),
}
"""By the first word of a method's name."""
_ORDERED = tuple(COLOURS.values())
_GREY = "#888888"
_MOST_DOTS = 400


def family(name: str) -> str:
    """The methods that are drawn alike."""
    if has_cache(name):
        return CACHE
    return _FAMILIES.get(base_name(name).partition("_")[0], MASKS)


@dataclass(frozen=True)
class Point:
    """A method's gain, its interval, and the bytes it keeps for each user."""

    name: str
    gain: Interval
    bytes_per_user: float


def points_of_record(record: Record) -> list[Point]:
    """One run's methods, with two standard errors each way; without the base."""
    return [
        Point(name, _two_errors(entry["mean"], entry["se"]), entry["bytes_per_user"])
        for name, entry in record["methods"].items()
        if name != REFERENCE
    ]


def points_of_setting(setting: Setting) -> list[Point]:
    """The methods of several seeds, with their bootstrapped intervals."""
    return [Point(method.name, method.gain, method.bytes_per_user) for method in setting.methods]


def quality_against_bytes(points: Sequence[Point], unit: str) -> go.Figure:
    """Gain against bytes; a family's points are joined by their bytes. What keeps nothing is a level line."""
    figure = go.Figure()
    for kind in COLOURS:
        members = [point for point in points if family(point.name) == kind and point.bytes_per_user > 0]
        if members:
            figure.add_trace(_family_trace(kind, sorted(members, key=lambda point: point.bytes_per_user)))
    for point in points:
        if not point.bytes_per_user:
            line = {"color": COLOURS[family(point.name)], "width": 1.5, "dash": "dot"}
            label = {"text": f"{point.name}: no bytes kept", "xanchor": "right", "font": {"size": 11}}
            figure.add_hline(point.gain.mean, line=line, annotation=label)
    figure.update_xaxes(type="log", title="bytes kept for each user", dtick=1, tickformat=",")
    figure.update_yaxes(title=f"{unit} saved", zeroline=True)
    return _styled(figure, height=480)


def gains_by_user(users: Mapping[str, Any], unit: str) -> go.Figure:
    """The distribution of each method's gain: a box from quartile to quartile, and a dot for every user."""
    losses = {name: np.asarray(loss) for name, loss in users["loss"].items()}
    base_u = losses.pop(REFERENCE)
    figure = go.Figure()
    for name, loss_u in losses.items():
        colour = COLOURS[family(name)]
        figure.add_trace(
            go.Box(
                x=base_u - loss_u, name=name, text=[f"user {i}" for i in users["ids"]], boxmean=True,
                boxpoints="all" if len(base_u) <= _MOST_DOTS else False, pointpos=0, jitter=0.7,
                line={"color": colour, "width": 1.5}, marker={"color": colour, "size": 4, "opacity": 0.4},
                fillcolor="rgba(128,128,128,0.12)", showlegend=False,
            )
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=f"{unit} saved for a user", zeroline=True, zerolinewidth=2)
    return _styled(figure, height=80 + 42 * len(losses))


def differences(record: Record, name: str) -> go.Figure:
    """Paired difference to each other method with its 95% interval: right of zero, `name` is better."""
    found = differences_of(record, name)
    colours = [_GREY if other == REFERENCE else COLOURS[family(other)] for other in found]
    figure = go.Figure(
        go.Scatter(
            x=[gap.mean for gap in found.values()], y=list(found), mode="markers",
            marker={"color": colours, "size": 10}, error_x=_error_bars(list(found.values())) | {"color": _GREY},
            hovertemplate="%{x:+.3f} against %{y}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=unit_of(record), zeroline=True, zerolinewidth=2)
    return _styled(figure, height=80 + 28 * len(found))


def learning_curves(history: Sequence[Mapping[str, float]]) -> go.Figure:
    """The cohort's mean loss before training and, once the gate learns, its mean reward, by round."""
    return _curves(
        history, {"support_loss": "loss of the cohort before its steps", "reward": "reward of the gate's masks"}
    )


def has_gate(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether a gate chose masks in any round."""
    return any("gate_entropy" in line for line in history)


def gate_curves(history: Sequence[Mapping[str, float]]) -> go.Figure:
    """The entropy of the gate's masks and the share of units that it leaves unused, by round."""
    titles = {"gate_entropy": "entropy of the gate's masks", "unused_share": "share of units unused"}
    return _curves(history, titles).update_yaxes(tickformat=".0%", range=[0, 1.05])


def _curves(history: Sequence[Mapping[str, float]], titles: Mapping[str, str]) -> go.Figure:
    """Metrics by round, each over those rounds that have it; those that no round has are left out."""
    shown = [metric for metric in titles if any(metric in line for line in history)]
    figure = make_subplots(rows=len(shown), shared_xaxes=True, vertical_spacing=0.12,
                           subplot_titles=[titles[metric] for metric in shown])  # fmt: skip
    for row, metric in enumerate(shown, start=1):
        lines = [line for line in history if metric in line]
        x, y = [line["round"] for line in lines], np.array([line[metric] for line in lines])
        pale = {"color": _ORDERED[row - 1], "width": 1}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=pale, opacity=0.35, name="each round"), row, 1)
        figure.add_trace(
            go.Scatter(x=x, y=_smoothed(y), mode="lines", line=pale | {"width": 2.5}, name="smoothed"), row, 1
        )
    figure.update_xaxes(title="round", row=len(shown))
    return _styled(figure, height=130 + 190 * len(shown), top=36).update_layout(showlegend=False)


def shared_units(share_g: Sequence[float], modules: Sequence[str]) -> go.Figure:
    """The share of measured users whose mask holds each unit g = (j, r): modules down, ranks across."""
    share_jr = np.asarray(share_g).reshape(len(modules), -1)
    figure = go.Figure(
        go.Heatmap(
            z=100 * share_jr, y=modules, colorscale="Cividis", zmin=0, xgap=1, ygap=1,
            colorbar={"title": {"text": "% of users", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="%{y}, unit %{x}: %{z:.0f}% of users<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title="unit of the module", showgrid=False)
    return _styled(figure, height=100 + 26 * len(share_jr))


def gains_over_seeds(settings: Sequence[Setting], unit: str) -> go.Figure:
    """Each method's mean over seeds with its 95% interval, a colour for each setting; open dots are seeds."""
    figure = go.Figure()
    for index, setting in enumerate(settings):
        colour = _ORDERED[index % len(_ORDERED)]
        names = [method.name for method in setting.methods]
        gains = [method.gain for method in setting.methods]
        label = setting.label or "mean over seeds"
        seeds = [(name, gain) for name, method in zip(names, setting.methods) for gain in method.seed_gains]
        figure.add_trace(
            go.Scatter(
                x=[gain for _, gain in seeds], y=[name for name, _ in seeds], mode="markers", orientation="h",
                marker={"color": colour, "size": 7, "symbol": "circle-open"}, opacity=0.6,
                offsetgroup=str(index), showlegend=False,
                hovertemplate="one seed: %{x:.3f}<extra>" + label + "</extra>",
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[gain.mean for gain in gains], y=names, mode="markers", name=label, offsetgroup=str(index),
                marker={"color": colour, "size": 10, "symbol": list(SYMBOLS.values())[index % len(SYMBOLS)]},
                orientation="h", error_x=_error_bars(gains), hovertemplate="%{y}: %{x:.3f}",
            )
        )  # fmt: skip
    rows = len({method.name for setting in settings for method in setting.methods})
    figure.update_layout(scattermode="group", showlegend=len(settings) > 1)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_xaxes(title=f"{unit} saved", zeroline=True, zerolinewidth=2)
    return _styled(figure, height=100 + rows * (14 + 16 * len(settings)))


def _family_trace(kind: str, points: Sequence[Point]) -> go.Scatter:
    return go.Scatter(
        x=[point.bytes_per_user for point in points], y=[point.gain.mean for point in points], name=kind,
        mode="markers" if kind == MASKS else "lines+markers+text",
        text=["" if "@" in point.name else point.name for point in points],  # with formats too, names would overlap
        hovertext=[point.name for point in points], textposition=_LABELS[kind], textfont={"size": 11},
        line={"color": COLOURS[kind], "width": 2}, marker={"size": 11, "symbol": SYMBOLS[kind]},
        error_y=_error_bars([point.gain for point in points]), cliponaxis=False,
        hovertemplate="%{hovertext}<br>%{x:,.0f} bytes, %{y:.3f} saved<extra></extra>",
    )  # fmt: skip


def _error_bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.mean for interval in intervals],
        "arrayminus": [interval.mean - interval.low for interval in intervals],
        "thickness": 1.5,
        "width": 4,
    }


def _two_errors(mean: float, se: float) -> Interval:
    return Interval(mean, mean - 2 * se, mean + 2 * se)


def _smoothed(values_t: Floats) -> Floats:
    """Mean over the rounds up to a twentieth of all rounds before and after, fewer at the ends."""
    half, rounds = len(values_t) // 20, np.arange(len(values_t))
    sums = np.concatenate(([0.0], np.cumsum(values_t)))
    first, end = np.maximum(rounds - half, 0), np.minimum(rounds + half + 1, len(values_t))
    return np.asarray((sums[end] - sums[first]) / (end - first))


def _styled(figure: go.Figure, height: int, top: int = 12) -> go.Figure:
    """Clear backgrounds, quiet grids, and a finger on a phone that scrolls the page instead of zooming."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 28, "t": top, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        dragmode=False,
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zerolinecolor="rgba(128,128,128,0.6)")
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zerolinecolor="rgba(128,128,128,0.6)")
    return figure
