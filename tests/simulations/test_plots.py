"""Figures show the record's numbers: each once, in the right place."""

from __future__ import annotations

import numpy as np
import pytest

from simulations import plots
from simulations.comparison import MeasuredRun, compare
from tests.simulations.records import METHODS, made_up_record, made_up_users


def test_every_method_is_a_point_or_a_level_line() -> None:
    figure = plots.quality_against_bytes(plots.points_of_record(made_up_record()), "bits per character")
    drawn = {}
    for trace in figure.data:
        assert list(trace.x) == sorted(trace.x)
        for name, x, y, above, below in zip(
            trace.hovertext, trace.x, trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True
        ):
            drawn[name] = (x, y)
            assert (above, below) == pytest.approx((2 * 0.012, 2 * 0.012))
    expected = {name: (kept, np.mean(gain_u)) for name, (gain_u, kept, _) in METHODS.items() if kept}
    assert drawn == {name: pytest.approx(point) for name, point in expected.items()}
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx([0.05, 0.6])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("dsa_t2@ternary:0.2", plots.DSA),
        ("dense_lora_full_rank", plots.DENSE),
        ("shared_tuned@int8", plots.SHARED),
        ("other_mask", plots.MASKS),
        ("random_mask[pool=random]", plots.MASKS),
        ("dsa_t2_cache", plots.CACHE),
        ("ngram_cache", plots.CACHE),
        ("melpa[steps=5,by=adam]@fp16", plots.META),
        ("maml", plots.META),
        ("head_only", plots.CONTROLS),
        ("neighbours[shots=5]", plots.CONTROLS),
    ],
)
def test_families(name: str, family: str) -> None:
    assert plots.family(name) == family


def test_gains_by_user_are_base_minus_loss() -> None:
    figure = plots.gains_by_user(made_up_users(), "bits per character")
    assert [trace.name for trace in figure.data] == [name for name in METHODS if name != "base"]
    for trace in figure.data:
        assert list(trace.x) == pytest.approx(METHODS[trace.name][0])


def test_units_lie_at_module_and_rank() -> None:
    share_g = [0.0, 0.25, 0.75, 1.0, 0.5, 0.5, 1.0, 0.0]
    heat = plots.shared_units(share_g, ["h.0", "h.1"]).data[0]
    for j in range(2):
        for r in range(4):
            assert heat.z[j][r] == 100 * share_g[j * 4 + r]
    assert list(heat.y) == ["h.0", "h.1"]


def test_a_metric_is_drawn_for_the_rounds_that_have_it() -> None:
    history = made_up_record()["history"]
    rounds = [tuple(trace.x) for trace in plots.learning_curves(history).data]
    assert rounds == [(1, 2, 3), (1, 2, 3), (2, 3), (2, 3)]
    without_gate = [{"round": line["round"], "support_loss": line["support_loss"]} for line in history]
    assert len(plots.learning_curves(without_gate).data) == 2


@pytest.mark.parametrize("rounds", [1, 19, 20, 57])
def test_smoothing_is_the_mean_of_a_window(rounds: int) -> None:
    values_t = np.random.default_rng(rounds).normal(size=rounds)
    history = [{"round": t, "support_loss": value} for t, value in enumerate(values_t)]
    half = rounds // 20
    slow = [np.mean(values_t[max(0, t - half) : t + half + 1]) for t in range(rounds)]
    assert plots.learning_curves(history).data[1].y == pytest.approx(slow)


def test_seeds_stand_beside_their_mean() -> None:
    runs = [MeasuredRun(made_up_record(seed), made_up_users()) for seed in (0, 1, 2)]
    seeds, means = plots.gains_over_seeds(compare(runs), "bits per character").data
    assert len(seeds.x) == 3 * len(means.x)
    expected = [np.mean(gain_u) for name, (gain_u, _, _) in METHODS.items() if name != "base"]
    assert list(means.x) == pytest.approx(expected)


def test_the_gates_health_is_drawn_for_the_rounds_that_have_it() -> None:
    history = [
        {"round": 1, "unused_share": 0.5},
        {"round": 2, "unused_share": 0.25, "gate_entropy": 0.9},
        {"round": 3, "unused_share": 0.0, "gate_entropy": 0.4},
    ]
    drawn = [(tuple(trace.x), tuple(trace.y)) for trace in plots.gate_curves(history).data[::2]]
    assert drawn == [((2, 3), (0.9, 0.4)), ((1, 2, 3), (0.5, 0.25, 0.0))]
    assert plots.has_gate(history)
    assert not plots.has_gate(history[:1])
