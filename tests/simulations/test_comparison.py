"""Several runs together: against loops over seeds, and the laws of a paired comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from federation.errors import RunError
from simulations.comparison import MeasuredRun, Setting, compare, comparison_table, differences_of
from tests.simulations.records import METHODS, made_up_record, made_up_users

GAINS = {name: gain_u for name, (gain_u, _, _) in METHODS.items()}
NAMES = [name for name in GAINS if name != "base"]


def measured(seed: int, budget: int = 2, shift: float = 0.0, **gains: list[float]) -> MeasuredRun:
    """A run whose gains over the base are those of the made-up record plus a shift, or as given."""
    record = made_up_record(seed)
    record["config"]["gate"]["budget"] = budget
    shifted = {n: (np.array(g) + shift).tolist() if n != "base" else g for n, g in GAINS.items()}
    return MeasuredRun(record, made_up_users(shifted | gains))


def by_name(setting: Setting) -> dict[str, Any]:
    return {method.name: method for method in setting.methods}


def test_means_are_those_of_a_loop_over_seeds_and_users() -> None:
    (setting,) = compare([measured(0), measured(1, shift=0.05), measured(2, shift=-0.15)])
    assert setting.seeds == (0, 1, 2)
    assert [method.name for method in setting.methods] == NAMES
    for method in setting.methods:
        total, harmed = 0.0, 0
        for shift in (0.0, 0.05, -0.15):
            for gain in GAINS[method.name]:
                total, harmed = total + gain + shift, harmed + (gain + shift < -1e-12)
        assert method.gain.mean == pytest.approx(total / 24)
        assert method.gain.low <= method.gain.mean <= method.gain.high
        means = [np.mean(GAINS[method.name]) + shift for shift in (0.0, 0.05, -0.15)]
        assert method.seed_gains == pytest.approx(means)
        assert method.bytes_per_user == METHODS[method.name][1]


def test_harmed_counts_users_and_seeds() -> None:
    (setting,) = compare([measured(0, dsa_t2=[-1.0] + [1.0] * 7), measured(1, dsa_t2=[-1.0, -1.0] + [1.0] * 6)])
    assert by_name(setting)["dsa_t2"].harmed == 3 / 16


def test_the_bootstrap_is_paired() -> None:
    """Users differ wildly, but one method beats the other by the same amount for each: no uncertainty is left."""
    wild = [0.1, 3.0, -2.0, 0.5, 7.0, 1.0, -4.0, 0.0]
    ahead = [gain + 0.25 for gain in wild]
    (setting,) = compare([measured(seed, dense_lora=wild, dsa_t2=ahead) for seed in (0, 1)])
    found = by_name(setting)["dsa_t2"]
    assert (found.over_dense.low, found.over_dense.high) == pytest.approx((0.25, 0.25))
    assert found.gain.high - found.gain.low > 1
    assert by_name(setting)["dense_lora"].over_dense is None


def test_opposite_seeds_cancel_for_each_user() -> None:
    """Seeds are averaged by user, so the interval is over users alone; the seeds' spread stands beside it."""
    (setting,) = compare([measured(0, dsa_t2=[0.5] * 8), measured(1, dsa_t2=[-0.1] * 8)])
    found = by_name(setting)["dsa_t2"]
    assert (found.gain.low, found.gain.high) == pytest.approx((0.2, 0.2))
    assert found.seed_gains == pytest.approx((0.5, -0.1))


def test_settings_are_told_apart_by_what_varies() -> None:
    runs = [measured(0, budget=4), measured(0, budget=2), measured(1, budget=4)]
    settings = compare(runs)
    assert [(s.label, s.seeds) for s in settings] == [("gate.budget = 4", (0, 1)), ("gate.budget = 2", (0,))]
    assert [s.label for s in compare(runs[:1])] == [""]


def test_only_methods_of_all_seeds_are_summarised() -> None:
    fewer = measured(1)
    del fewer.users["loss"]["dsa_t0"]
    (setting,) = compare([measured(0), fewer])
    assert [method.name for method in setting.methods] == [name for name in NAMES if name != "dsa_t0"]


def test_headroom_needs_both_methods() -> None:
    (setting,) = compare([measured(0, dense_lora=[0.3] * 8, shared=[0.1] * 8)])
    assert setting.headroom is not None
    assert setting.headroom.difference == pytest.approx(0.2)
    assert setting.headroom.enough
    alone = measured(0)
    del alone.users["loss"]["shared"]
    assert compare([alone])[0].headroom is None


def test_the_same_run_twice_is_refused() -> None:
    with pytest.raises(RunError, match=r"seeds \[3, 3\]; leave repeated"):
        compare([measured(3), measured(3)])


@pytest.mark.parametrize("key", ["ids", "groups"])
def test_other_users_are_refused(key: str) -> None:
    other = measured(1)
    other.users[key][0] = 77
    with pytest.raises(RunError, match="measure the same users"):
        compare([measured(0), other])


def test_other_units_are_refused() -> None:
    synthetic = measured(1)
    synthetic.record["population"].clear()
    with pytest.raises(RunError, match="compared in one unit"):
        compare([measured(0), synthetic])


def test_differences_turn_with_the_pair() -> None:
    record = made_up_record()
    of_t2 = differences_of(record, "dsa_t2")
    assert set(of_t2) == set(METHODS) - {"dsa_t2"}
    for other, gap in of_t2.items():
        assert gap.mean == pytest.approx(record["methods"]["dsa_t2"]["mean"] - record["methods"][other]["mean"])
        back = differences_of(record, other)["dsa_t2"]
        assert (back.mean, back.low, back.high) == pytest.approx((-gap.mean, -gap.high, -gap.low))


def test_table_shows_seeds_users_and_the_best() -> None:
    (setting,) = compare([measured(4), measured(9, shift=0.1)])
    table = comparison_table(setting, "bits per character")
    assert "8 new users and seeds 4, 9" in table.caption
    assert [row.name for row in table.rows if row.emphasised] == ["dense_lora"]
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert table.rows[NAMES.index("dense_lora")].cells[1] == "0.350 to 0.450"
