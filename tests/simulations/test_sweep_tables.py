"""Tables of a sweep: every cell is the record's figure, in the place that its head names."""

from __future__ import annotations

from typing import Any

import pytest

from simulations import sweep_tables
from simulations.tables import NOTHING


def gate(**changes: Any) -> dict[str, Any]:
    usual = {"estimator": "reinforce", "samples": 4, "inputs": ["gains", "context"], "distribution": "budget"}
    return {**usual, "budget": 8, "steps": 0, "price": 0.0, "target": None, "gate_entropy": 0.25, **changes}


def method(active: float, *seed_active: float) -> dict[str, Any]:
    gain = {"mean": active / 10, "low": 0.0, "high": 1.0}
    return {
        "gain": gain,
        "seed_gains": [0.01, 0.02],
        "harmed": 0.125,
        "bytes_per_user": 44.0,
        "active_share": active,
        "seed_active_shares": list(seed_active) or [active],
    }


def mask(share: float) -> dict[str, Any]:
    figures = {"f1": share / 2, "f1_of_type": share / 3, "reward_share": share}
    seeds = {name: [value - 0.05, value + 0.1] for name, value in figures.items()}
    return {**figures, "seeds": seeds, "by_type": {"0": figures, "3": {"reward_share": 0.5}}}


SUMMARY: dict[str, Any] = {
    "methods": {
        "dsa_t0": method(0.25),
        "dsa_t0[pool=low]": method(0.0504, 0.049, 0.061),
        "dsa_t0[budget=2]": method(0.0625),
        "random_mask": method(0.1),
        "dsa_t2": method(0.25),
        "shared": method(1.0),
    },
    "masks": {"dsa_t0": mask(0.9), "dsa_t0[pool=low]": mask(0.6)},
    "gate": {
        "pool": gate(revived=3.0, unused_share=0.125),
        "low": gate(inputs=[], distribution="bernoulli", price=0.5),
    },
    "claims": [
        {
            "better": "dsa_t0",
            "worse": "random_mask",
            "difference": -0.01,
            "se": 0.004,
            "low": -0.02,
            "high": 0.001,
            "z": -2.5,
            "seed_differences": [-0.03, 0.01],
        },
        {"better": "a", "worse": "b", "difference": 0.0, "se": 0.0, "low": 0.0, "high": 0.0, "z": None}
        | {"seed_differences": [0.0]},
    ],
}


@pytest.mark.parametrize("draw", ["seeds", "claims", "masks", "types", "gates", "curve"])
def test_every_row_has_as_many_cells_as_the_head(draw: str) -> None:
    head, rows = getattr(sweep_tables, draw)(SUMMARY)
    assert rows
    assert {len(row) for row in rows} == {len(head)}


def test_a_claim_shows_its_standard_errors_and_its_seeds() -> None:
    _, rows = sweep_tables.claims(SUMMARY)
    assert rows[0] == ("`dsa_t0` - `random_mask`", "-0.0100", "-2.5", "-0.0200 to +0.0010", "-0.0300, +0.0100")
    assert rows[1][2] == NOTHING


def test_the_points_of_curves_are_not_among_the_methods() -> None:
    points = ["dsa_t2[shots=2,steps=0]", "dsa_t2[shots=2,steps=5]"]
    summary = SUMMARY | {"methods": SUMMARY["methods"] | {name: method(0.25) for name in points}, "curves": points}
    assert sweep_tables.seeds(summary) == sweep_tables.seeds(SUMMARY)
    assert len(sweep_tables.seeds(summary | {"curves": []})[1]) == len(SUMMARY["methods"]) + 2


def test_a_claim_has_a_row_for_the_runs_quality() -> None:
    reached = {"difference": 0.125, "se": 0.05, "low": 0.025, "high": 0.225, "z": 2.5, "seed_differences": [0.1, 0.15]}
    plain, other = SUMMARY["claims"]
    _, rows = sweep_tables.claims(SUMMARY | {"quality": "accuracy", "claims": [plain | {"quality": reached}, other]})
    assert [rows[0], rows[2]] == sweep_tables.claims(SUMMARY)[1]
    name = "`dsa_t0` - `random_mask`, accuracy"
    assert rows[1] == (name, "+0.1250", "+2.5", "+0.0250 to +0.2250", "+0.1000, +0.1500")


def test_masks_show_the_range_of_their_seeds() -> None:
    _, rows = sweep_tables.masks(SUMMARY)
    assert rows[0] == ("`dsa_t0`", "0.450", "0.400 to 0.550", "90.0%", "85.0% to 100.0%")


def test_masks_show_the_runs_quality_where_it_is_not_the_loss() -> None:
    reached = {"quality": 0.625, "seed_qualities": [0.6, 0.65]}
    methods = {"dsa_t0": SUMMARY["methods"]["dsa_t0"] | reached, "dsa_t0[pool=low]": {"quality": None}}
    head, rows = sweep_tables.masks(SUMMARY | {"methods": methods, "quality": "accuracy"})
    plain_head, plain = sweep_tables.masks(SUMMARY)
    assert tuple(head) == (*plain_head, "accuracy", "by seed")
    assert rows == [(*plain[0], "0.6250", "0.6000 to 0.6500"), (*plain[1], NOTHING, NOTHING)]


def test_types_have_a_column_each() -> None:
    head, rows = sweep_tables.types(SUMMARY)
    assert head[1:] == ("type 0", "type 3")
    assert rows[1] == ("`dsa_t0[pool=low]`", "60.0%", "50.0%")


def test_gates_show_what_they_see_and_how_they_ended() -> None:
    _, rows = sweep_tables.gates(SUMMARY)
    assert rows == [
        ("`pool`", "`reinforce`", "gains, context", "budget 8", "25.0%", "12.5%", "3"),
        ("`low`", "`reinforce`", "nothing", "price 0.5", "25.0%", NOTHING, NOTHING),
    ]


def test_the_curve_is_of_masks_alone_the_sparsest_first() -> None:
    _, rows = sweep_tables.curve(SUMMARY)
    assert rows == [
        ("`dsa_t0[pool=low]`", "price 0.5", "5.0%", "4.9% to 6.1%", "0.0050", "60.0%"),
        ("`dsa_t0[budget=2]`", "budget 2", "6.2%", "6.2% to 6.2%", "0.0063", NOTHING),
        ("`random_mask`", NOTHING, "10.0%", "10.0% to 10.0%", "0.0100", NOTHING),
        ("`dsa_t0`", "budget 8", "25.0%", "25.0% to 25.0%", "0.0250", "90.0%"),
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": 0.05, "price": 0.1, "distribution": "bernoulli"}, "target 0.05"),
        ({"price": 0.1, "distribution": "bernoulli"}, "price 0.1"),
        ({"distribution": "bernoulli"}, "no price"),
        ({"budget": 3}, "budget 3"),
    ],
)
def test_what_masks_were_asked_to_be(settings: dict[str, Any], words: str) -> None:
    assert sweep_tables.asked(gate(**settings)) == words


def test_variance_has_a_column_for_each_situation_and_names_bias() -> None:
    plain = {"variance": 4.0, "squared_norm": 4.0, "relative": 0.25}
    biased = {**plain, "squared_bias": 1.0}
    record = {"variance": {"additive, budget": {"a, K = 4": plain}, "hits, budget": {"a, K = 4": plain, "b": biased}}}
    head, rows = sweep_tables.variance(record)
    assert list(head) == ["estimator", "additive, budget", "hits, budget"]
    assert rows == [("`a, K = 4`", "0.25", "0.25"), ("`b`", NOTHING, "0.25, bias 50%")]
    lost = {"variance": {"s": {"b": {**biased, "squared_norm": -0.1}}}}
    assert sweep_tables.variance(lost)[1] == [("`b`", "0.25, biased")]
