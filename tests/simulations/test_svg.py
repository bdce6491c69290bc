"""SVG plots: well-formed, the same each time, with every figure of the record in its place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from simulations import curves, svg
from simulations.statistics import Interval
from simulations.tables import NOTHING
from tests.simulations.meta_records import CURVES, R, made_up_continual, with_curves

SPACE = "{http://www.w3.org/2000/svg}"


def few_shots(error: float = 0.02) -> curves.FewShots:
    record = with_curves()
    for entry in record["methods"].values():
        entry["quality_se"] = error
    found = curves.curves_of_record(record)
    assert found is not None
    return found


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def drawn_curves(text: str) -> list[list[tuple[float, float]]]:
    """The lines of panels; those of the legend come first."""
    lines = [points(line) for line in ElementTree.fromstring(text).iter(f"{SPACE}polyline")]
    return lines[len({name for name, _ in CURVES}) :]


def test_heights_are_linear_in_values_and_places_in_the_logarithm_of_steps() -> None:
    lines = drawn_curves(svg.few_shot_curves(few_shots()))
    values = [value for points_of in CURVES.values() for value in points_of.values()]
    heights = [y for line in lines for _, y in line]
    slope, offset = np.polyfit(values, heights, 1)
    assert slope < 0
    assert heights == pytest.approx([slope * value + offset for value in values], abs=0.11)
    for line, points_of in zip(lines, CURVES.values(), strict=True):
        first, last = line[0][0], line[-1][0]
        share = [math.log(1 + steps) / math.log(6) for steps in points_of]
        assert [x for x, _ in line] == pytest.approx([first + s * (last - first) for s in share], abs=0.11)


def test_panels_are_side_by_side_by_data() -> None:
    lines = drawn_curves(svg.few_shot_curves(few_shots()))
    right = [max(x for x, _ in line) for line in lines]
    left = [min(x for x, _ in line) for line in lines]
    assert max(right[:3]) < min(left[3:])


def test_bands_hold_two_errors_each_way() -> None:
    text = svg.few_shot_curves(few_shots(0.02))
    band = points(next(ElementTree.fromstring(text).iter(f"{SPACE}polygon")))
    line = drawn_curves(text)[0]
    per_point = (line[0][1] - line[2][1]) / (0.62 - 0.3)
    upper, lower = band[: len(line)], band[len(line) :][::-1]
    for (x, y), (x_above, above), (x_below, below) in zip(line, upper, lower, strict=True):
        assert x == x_above == x_below
        assert (y - above, below - y) == pytest.approx((0.04 * per_point, 0.04 * per_point), abs=0.11)


def test_every_cell_of_every_matrix_is_there_and_brighter_is_better() -> None:
    text = svg.task_matrices(made_up_continual())
    cells = [row for r in R.values() for row in ([0.1] * 3, *r)]
    written = re.findall(r">(\d+\.\d)</text>", text)
    assert written == [f"{100 * value:.1f}" for row in cells for value in row]
    fills = re.findall(r'<rect [^>]*fill="(#\w{6})"', text)
    order = np.argsort([int(fill[1:3], 16) for fill in fills], kind="stable")
    values = np.array(cells).ravel()[order]
    assert list(values) == sorted(values)


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_cells_without_a_number_are_dashes_and_change_no_other_cell(lost: float) -> None:
    fill = r'<rect [^>]*fill="(#\w{6})"[^>]*/><text [^>]*>([^<]*)</text>'
    whole, broken = made_up_continual(), made_up_continual()
    broken["rules"]["none"]["r"][0][1] = lost
    before, after = (re.findall(fill, svg.task_matrices(continual)) for continual in (whole, broken))
    assert len(before) == len(after) == 24
    assert after[4][1] == NOTHING
    assert [cell for at, cell in enumerate(after) if at != 4] == [cell for at, cell in enumerate(before) if at != 4]


def test_a_matrix_without_any_number_is_drawn() -> None:
    continual = made_up_continual()
    for rule in continual["rules"].values():
        rule["r"] = [[math.nan] * 3] * 3
        rule["before"] = [math.nan] * 3
    assert svg.task_matrices(continual).count(NOTHING) == 24


def name_of_a_rule(name: str) -> str:
    continual = made_up_continual()
    return svg.task_matrices(continual | {"rules": {name: continual["rules"]["none"]}})


def name_of_a_method(name: str) -> str:
    curve = curves.Curve(name, 0, few_shots().curves[0].points)
    return svg.few_shot_curves(curves.FewShots((curve,), "accuracy", True, math.nan, ""))


@pytest.mark.parametrize("draw", [name_of_a_rule, name_of_a_method])
def test_names_are_text_and_plots_are_the_same_each_time(draw: Callable[[str], str]) -> None:
    attack = "</text><script>&"
    text = draw(attack)
    assert attack in [element.text for element in ElementTree.fromstring(text).iter(f"{SPACE}text")]
    assert not list(ElementTree.fromstring(text).iter(f"{SPACE}script"))
    assert draw(attack) == text


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-6, 1e6])
def test_a_level_curve_is_drawn(value: float) -> None:
    level = Interval(value, value, value)
    curve = curves.Curve("melpa", 0, {0: level, 1: level})
    text = svg.few_shot_curves(curves.FewShots((curve,), "bits saved", False, math.nan, ""))
    top, bottom = (float(line.attrib["y1"]) for line in [*ElementTree.fromstring(text).iter(f"{SPACE}line")][::-1][:2])
    (line,) = [points(line) for line in ElementTree.fromstring(text).iter(f"{SPACE}polyline")][1:]
    assert min(top, bottom) - 1 <= line[0][1] <= max(top, bottom) + 1
