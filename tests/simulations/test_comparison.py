"""Several runs together: against loops over seeds, and the laws of a paired comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from federation.errors import RunError
from simulations.comparison import (
    MeasuredRun,
    Setting,
    claims_over_seeds,
    compare,
    comparison_table,
    differences_of,
    gates_over_seeds,
    masks_over_seeds,
)
from tests.simulations.records import GROUPS, METHODS, made_up_record, made_up_users

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


def test_claims_make_no_other_setting() -> None:
    runs = [measured(0), measured(1)]
    runs[1].record["config"]["evaluate"] = {"claims": [["dsa_t2", "shared"]]}
    assert [s.label for s in compare(runs)] == [""]


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


def test_a_claim_is_paired_and_its_error_clustered() -> None:
    """The error against a loop over groups: sqrt(C / (C - 1) * sum of squared sums of deviations) / U."""
    runs = [measured(0, dsa_t2=[0.9] * 8), measured(1)]
    (claim,) = claims_over_seeds(runs, [("dsa_t2", "shared")])
    ahead = [(0.9 + mine) / 2 - other for mine, other in zip(GAINS["dsa_t2"], GAINS["shared"])]
    mean = sum(ahead) / 8
    squares = sum(sum(a - mean for a, g in zip(ahead, GROUPS) if g == group) ** 2 for group in set(GROUPS))
    se = (5 / 4 * squares) ** 0.5 / 8
    assert (claim["better"], claim["worse"]) == ("dsa_t2", "shared")
    assert (claim["difference"], claim["se"]) == pytest.approx((mean, se), abs=1e-6)
    assert claim["z"] == pytest.approx(mean / se, abs=1e-5)
    assert claim["low"] < mean < claim["high"]
    seeds = [0.9 - np.mean(GAINS["shared"]), np.mean(GAINS["dsa_t2"]) - np.mean(GAINS["shared"])]
    assert claim["seed_differences"] == pytest.approx(seeds, abs=1e-6)


def test_a_claim_turned_around_changes_its_sign_and_the_base_is_a_method() -> None:
    runs = [measured(0), measured(1, shift=0.2)]
    one, other, base = claims_over_seeds(runs, [("dsa_t2", "shared"), ("shared", "dsa_t2"), ("dsa_t2", "base")])
    assert (one["difference"], one["z"], one["low"]) == (-other["difference"], -other["z"], -other["high"])
    assert base["difference"] == pytest.approx(np.mean(GAINS["dsa_t2"]) + 0.1, abs=1e-6)


def test_without_an_error_a_claim_has_no_z() -> None:
    same = measured(0, dsa_t2=GAINS["shared"])
    (claim,) = claims_over_seeds([same], [("dsa_t2", "shared")])
    assert (claim["difference"], claim["se"], claim["z"]) == (0, 0, None)


def with_quality(seed: int, **quality: list[float]) -> MeasuredRun:
    """A run with the quality of each user, by method."""
    run = measured(seed)
    return MeasuredRun(run.record, {**run.users, "quality": quality})


def test_a_claim_is_of_the_runs_quality_too_where_it_is_not_the_loss() -> None:
    """Higher is better, so the difference is not turned; its error against a loop over groups."""
    generator = np.random.default_rng(4)
    better_su, worse_su = generator.random((2, 8)), generator.random((2, 8))
    runs = [with_quality(s, dsa_t2=better_su[s].tolist(), shared=worse_su[s].tolist()) for s in (0, 1)]
    (claim,) = claims_over_seeds(runs, [("dsa_t2", "shared")])
    ahead = [sum(better_su[s][u] - worse_su[s][u] for s in (0, 1)) / 2 for u in range(8)]
    mean = sum(ahead) / 8
    squares = sum(sum(a - mean for a, g in zip(ahead, GROUPS) if g == group) ** 2 for group in set(GROUPS))
    se = (5 / 4 * squares) ** 0.5 / 8
    found = claim["quality"]
    assert (found["difference"], found["se"]) == pytest.approx((mean, se), abs=1e-6)
    assert found["z"] == pytest.approx(mean / se, abs=1e-5)
    assert found["seed_differences"] == pytest.approx((better_su - worse_su).mean(1), abs=1e-6)
    (plain,) = claims_over_seeds([measured(0), measured(1)], [("dsa_t2", "shared")])
    assert {name: value for name, value in claim.items() if name != "quality"} == plain


@pytest.mark.parametrize("lacking", [{}, {"dsa_t2": [0.5] * 8}, {"shared": [0.5] * 8}])
def test_without_the_quality_of_both_in_every_run_a_claim_is_of_the_loss(lacking: dict[str, list[float]]) -> None:
    both = with_quality(0, dsa_t2=[0.5] * 8, shared=[0.25] * 8)
    (claim,) = claims_over_seeds([both, with_quality(1, **lacking)], [("dsa_t2", "shared")])
    assert "quality" not in claim


def quality(f1: float, late: float | None = None) -> dict[str, Any]:
    """As `mask_quality` says it, of users of one type or two."""
    figures = {"f1": f1, "f1_of_type": f1 / 2, "reward_share": f1 - 0.1}
    by_type = {"0": {name: value + 0.05 for name, value in figures.items()}}
    if late is not None:
        by_type["10"] = {"f1": late, "f1_of_type": late, "reward_share": late}
    return {**figures, "by_type": by_type}


def test_masks_are_averaged_over_seeds_and_types_over_the_seeds_that_have_them() -> None:
    runs = [measured(0), measured(1)]
    runs[0].record["masks"] = {"dsa_t0": quality(0.5, late=0.3), "random_mask": quality(0.2)}
    runs[1].record["masks"] = {"dsa_t0": quality(0.8)}
    found = masks_over_seeds(runs)
    assert set(found) == {"dsa_t0"}
    mask = found["dsa_t0"]
    assert (mask["f1"], mask["f1_of_type"], mask["reward_share"]) == pytest.approx((0.65, 0.325, 0.55))
    assert mask["seeds"]["reward_share"] == pytest.approx([0.4, 0.7])
    assert mask["by_type"]["0"]["f1"] == pytest.approx(0.7)
    assert mask["by_type"]["10"]["f1"] == pytest.approx(0.3)
    assert masks_over_seeds([measured(0)]) == {}


def with_gate(seed: int, entropy: float, revived: int) -> MeasuredRun:
    """A run with a variant that has a gate of its own, and one whose masks are random."""
    run = measured(seed)
    run.record["config"]["variants"] = {
        "muprop": {"gate": {"estimator": {"name": "muprop"}, "inputs": ["gains"]}},
        "priced": {"gate": {"distribution": "bernoulli", "reward": {"price": 0.01, "target": 0.1}}},
    }
    lines = [
        {"round": 1, "support_loss": 3.0, "unused_share": 0.9, "revived": 0},
        {"round": 2, "reward": -2.0, "gate_entropy": 0.9, "unused_share": 0.5, "revived": revived},
        {"round": 3, "gate_entropy": entropy, "unused_share": 0.25, "revived": 1},
    ]
    run.record["history"] = lines
    run.record["federations"] = {name: {"history": lines[:2]} for name in ("muprop", "priced", "random")}
    return run


def test_gates_end_with_their_last_figures_and_count_all_that_was_revived() -> None:
    found = gates_over_seeds([with_gate(0, 0.2, revived=3), with_gate(1, 0.4, revived=6)])
    assert list(found) == ["pool", "muprop", "priced"]
    main, other, priced = found.values()
    ended = {name: main[name] for name in ("gate_entropy", "unused_share", "reward", "revived")}
    assert ended == pytest.approx({"gate_entropy": 0.3, "unused_share": 0.25, "reward": -2.0, "revived": 5.5})
    assert (other["estimator"], other["inputs"], other["gate_entropy"], other["revived"]) == (
        "muprop",
        ["gains"],
        0.9,
        4.5,
    )
    assert (priced["distribution"], priced["price"], priced["target"]) == ("bernoulli", 0.01, 0.1)


def test_a_gate_that_never_chose_has_no_end() -> None:
    run = measured(0)
    run.record["history"] = []
    assert "gate_entropy" not in gates_over_seeds([run])["pool"]


def test_qualities_are_those_of_the_seeds() -> None:
    runs = [measured(0), measured(1)]
    assert (by_name(compare(runs)[0])["dsa_t0"].quality, by_name(compare(runs)[0])["dsa_t0"].seed_qualities) == (
        None,
        (),
    )
    for run, quality in zip(runs, (0.5, 0.25), strict=True):
        run.record["methods"]["dsa_t0"]["quality"] = quality
    method = by_name(compare(runs)[0])["dsa_t0"]
    assert (method.quality, method.seed_qualities) == (0.375, (0.5, 0.25))


def test_active_shares_are_those_of_the_seeds() -> None:
    runs = [measured(0), measured(1)]
    runs[1].record["methods"]["dsa_t0"]["active_share"] = 0.1
    method = by_name(compare(runs)[0])["dsa_t0"]
    assert method.seed_active_shares == (0.5, 0.1)
    assert method.active_share == pytest.approx(0.3)
