"""Few-shot curves: every point is the record's figure, and sentences are those of a search by hand."""

from __future__ import annotations

from typing import Any

import pytest

from simulations import curves
from simulations.tables import NOTHING, result_table, without_curves
from tests.simulations.meta_records import CURVES, with_curves
from tests.simulations.records import made_up_record


def found(record: dict[str, Any]) -> curves.FewShots:
    few_shots = curves.curves_of_record(record)
    assert few_shots is not None
    return few_shots


def test_points_are_the_records_by_method_data_and_steps() -> None:
    few_shots = found(with_curves())
    drawn = {(c.name, c.shots): {steps: p.mean / 100 for steps, p in c.points.items()} for c in few_shots.curves}
    assert drawn == {key: pytest.approx(points) for key, points in CURVES.items()}
    assert all(list(curve.points) == sorted(curve.points) for curve in few_shots.curves)
    assert (few_shots.shots, few_shots.steps, few_shots.frozen) == ([5, 20], [0, 1, 5], 25.0)
    assert (few_shots.unit, few_shots.band) == ("accuracy", "")


@pytest.mark.parametrize("quality", [0.0, None])
def test_a_frozen_model_that_is_never_right_is_known(quality: float | None) -> None:
    record = with_curves()
    record["methods"]["base"]["quality"] = quality
    assert found(record).frozen == pytest.approx(float("nan") if quality is None else quality, nan_ok=True)


def test_an_accuracys_error_is_a_band_of_two_errors_in_percent() -> None:
    record = with_curves()
    for entry in record["methods"].values():
        entry["quality_se"] = 0.02
    point = found(record).of(5)[0].points[1]
    assert (point.low, point.high) == pytest.approx((50 - 4, 50 + 4))
    assert found(record).band == "the 95% interval over users"


def test_without_a_quality_curves_are_gains_with_their_errors() -> None:
    record = with_curves("loss")
    for entry in record["methods"].values():
        del entry["quality"]
    few_shots = found(record)
    point = few_shots.of(20)[1].points[5]
    assert (point.low, point.mean, point.high) == pytest.approx((1.71 - 0.02, 1.71, 1.71 + 0.02))
    assert (few_shots.unit, few_shots.frozen) == ("bits per character saved", 0.0)
    record["methods"]["melpa[shots=5,steps=0]"]["se"] = float("nan")
    assert found(record).of(5)[0].points[0].low == pytest.approx(1.3)


def test_options_and_formats_tell_curves_apart_and_single_points_are_none() -> None:
    record = made_up_record()
    entry = record["methods"]["dsa_t2"]
    names = [
        "melpa[steps=5]@fp16",
        "melpa[steps=20]@fp16",
        "melpa[steps=5,by=adam]@fp16",
        "melpa[by=adam,steps=9]@fp16",
    ]
    record["methods"] = dict.fromkeys(["base", *names, "melpa[steps=5]@int8", "shared_tuned[steps=7]"], entry)
    drawn = [(curve.name, curve.shots, list(curve.points)) for curve in found(record).curves]
    assert drawn == [("melpa@fp16", 0, [5, 20]), ("melpa[by=adam]@fp16", 0, [5, 9])]
    assert curves.curves_of_record(made_up_record()) is None
    assert curves.curves_of_record({"kind": "simulation"}) is None


def test_a_sweeps_curves_have_the_interval_of_gains_or_the_range_of_seeds() -> None:
    gain = {"mean": 0.3, "low": 0.1, "high": 0.6}
    method: dict[str, Any] = {"gain": gain, "quality": None, "seed_qualities": []}
    names = [f"melpa[steps={steps}]" for steps in (0, 1)]
    loss = curves.curves_of_summary({"methods": dict.fromkeys(names, method), "quality": "loss"})
    assert loss is not None
    assert (loss.curves[0].points[1].low, loss.curves[0].points[1].high) == (0.1, 0.6)
    measured = method | {"quality": 0.5, "seed_qualities": [0.45, 0.5, 0.58]}
    accuracy = curves.curves_of_summary({"methods": dict.fromkeys(names, measured), "quality": "accuracy"})
    assert accuracy is not None
    point = accuracy.curves[0].points[0]
    assert (point.low, point.mean, point.high) == pytest.approx((45, 50, 58))
    assert accuracy.band == "the range of the seeds"


def test_tables_have_a_dash_where_a_method_was_not_measured() -> None:
    head, rows = curves.table(found(with_curves()))
    assert head == ("examples owned", "method", "0 steps", "1 step", "5 steps")
    assert rows[1] == ("5 examples", "`shared_tuned`", "20.0%", "25.0%", "45.0%")
    assert rows[2] == ("5 examples", "`dense_lora`", "10.0%", NOTHING, "40.0%")
    assert len(rows) == len(CURVES)


def test_the_verdict_is_when_the_first_method_is_where_the_best_other_ever_is() -> None:
    others = [
        "the best of the others is shared_tuned with 45.0% after 5 steps; melpa is at least there with 50.0% after "
        "1 step",
        "the best of the others is shared_tuned with 71.0% after 5 steps; melpa does not get there, its best is 70.0% "
        "after 5 steps",
    ]
    sentences = [f"With 5 examples, {others[0]}.", f"With 20 examples, {others[1]}."]
    assert curves.verdicts(found(with_curves())) == sentences


def test_points_of_curves_are_no_rows_but_methods_asked_for_are() -> None:
    record = with_curves()
    assert [row.name for row in result_table(record).rows] == ["base", "dsa_t2"]
    assert without_curves(record)["comparisons"] == [
        pair for pair in made_up_record()["comparisons"] if {pair["a"], pair["b"]} == {"base", "dsa_t2"}
    ]
    record["config"]["evaluate"]["methods"].append("melpa[ shots = 5, steps=1]")
    rows = {row.name: row for row in result_table(record).rows}
    assert rows["melpa[shots=5,steps=1]"].cells[0] == "0.500"
    assert result_table(record).columns[0] == "accuracy"
    assert result_table(made_up_record()).columns[0] == "gain over base"
