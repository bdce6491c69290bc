"""The gate's health: against a count by hand, and over a load that collapses and recovers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch

from federation.config import load_config
from federation.errors import FedquiltWarning
from federation.state import LOAD_SECTION
from federation.update import Schema, Section, SectionSpec, UpdateBlock, Values
from server.health import CollapseWatch, collapsed, gate_health
from server.round import begin, close, lift, rules_of

UNITS, USERS = 20, 16
SCHEMA = Schema({LOAD_SECTION: SectionSpec(rows=1, factors={"units": UNITS}, max_rows=1)})


def load_of(*loads: float) -> Values:
    return {LOAD_SECTION: torch.tensor([loads], dtype=torch.float32)}


def health(loads_before: Sequence[float], loads_after: Sequence[float]) -> tuple[float, float]:
    found = gate_health(load_of(*loads_before), load_of(*loads_after))
    assert set(found) == {"unused_share", "revived"}
    return found["unused_share"], found["revived"]


# -------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0, 0, 0, 0), (0, 0, 0, 0), (0.0, 0)),  # nothing was chosen yet
        ((0, 0, 0, 0), (0.1, 0, 0.1, 0), (0.5, 0)),
        ((0.5, 0, 0.5, 0), (0.5, 0.5, 0.5, 0), (0.25, 1)),
        ((1, 0, 0, 0), (0.5, 0.5, 0.5, 0.5), (0.0, 3)),
        ((0.5, 0.5, 0.5, 0.5), (1, 0, 0, 0), (0.75, 0)),
        # The mean is 0.5, so the bound is 0.05: 0.04 is below it, 0.06 is not.
        ((0.5, 0.5, 0.5, 0.5), (0.04, 0.06, 0.9, 1.0), (0.25, 0)),
        ((0.04, 0.06, 0.9, 1.0), (0.06, 0.04, 0.9, 1.0), (0.25, 1)),
    ],
)
def test_units_below_a_tenth_of_the_mean_are_unused(
    before: tuple[float, ...], after: tuple[float, ...], expected: tuple[float, float]
) -> None:
    assert health(before, after) == expected


@pytest.mark.parametrize("factor", [0.01, 0.3, 7.0])
def test_how_much_is_chosen_in_all_does_not_count(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(1, UNITS, generator=generator) ** 6 for _ in range(2))
    plain = gate_health({LOAD_SECTION: before}, {LOAD_SECTION: after})
    assert 0 < plain["unused_share"] < 1
    assert plain["revived"] > 0
    assert gate_health({LOAD_SECTION: factor * before}, {LOAD_SECTION: factor * after}) == plain


def test_without_a_trained_gate_there_is_no_health() -> None:
    assert gate_health({"pool/a": torch.ones(2, 2)}, {"pool/a": torch.ones(2, 2)}) == {}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"gate_entropy": 0.04, "unused_share": 0.6}, True),
        ({"gate_entropy": 0.06, "unused_share": 0.6}, False),  # tries others
        ({"gate_entropy": 0.04, "unused_share": 0.5}, False),  # sure, and users differ
        ({"unused_share": 1.0}, False),  # no gate chose in this round
        ({"gate_entropy": 0.0}, False),
        ({}, False),
    ],
)
def test_a_collapse_is_sure_of_itself_and_leaves_most_units_unused(
    metrics: Mapping[str, float], expected: bool
) -> None:
    assert collapsed(metrics) is expected


# -------------------------------------------------------------------------------- over rounds


def rounds_of(masks: Sequence[torch.Tensor]) -> list[Values]:
    """The loads after each round in which all users have the units of these masks, and before the first."""
    rules = rules_of(load_config(overrides=["strategy.name=fedavg"]), SCHEMA)
    state = begin(rules, SCHEMA.zeros())
    loads = [state.values]
    for mask_ug in masks:
        row_ukw = (mask_ug.float() - state.values[LOAD_SECTION])[:, None]
        sent = Section(torch.zeros(USERS, 1, dtype=torch.int32), torch.ones(USERS, 1, dtype=torch.bool), row_ukw)
        block = UpdateBlock({LOAD_SECTION: sent}, torch.ones(USERS), {}, 1, "v")
        state = close(state, lift(block, state.strategy, rules)[0], rules)
        loads.append(state.values)
    return loads


def spread(seed: int) -> torch.Tensor:
    """Every user has another quarter of the units."""
    return torch.rand(USERS, UNITS, generator=torch.Generator().manual_seed(seed)).argsort(1) < UNITS // 4


def test_a_load_that_collapses_and_recovers_is_seen_to_do_so() -> None:
    few = torch.arange(UNITS).expand(USERS, UNITS) < UNITS // 4
    sound, fallen = 30, 60
    masks = [spread(r) for r in range(sound)] + [few] * fallen + [spread(100 + r) for r in range(30)]
    loads = rounds_of(masks)
    found = [gate_health(before, after) for before, after in pairwise(loads)]
    shares = [round_health["unused_share"] for round_health in found]
    revived = [round_health["revived"] for round_health in found]
    assert max(shares[5:sound]) == 0
    # A unit with the load 1/4 that nobody chooses has 1/4 * 0.9^t after t rounds: below 1/40 from t = 22 on.
    falls = [r for r in range(1, len(shares)) if shares[r - 1] <= 0.5 < shares[r]]
    assert len(falls) == 1
    assert 15 <= falls[0] + 1 - sound <= 30
    assert shares[sound + fallen - 1] == 0.75
    assert revived[sound : sound + fallen] == [0] * fallen
    assert shares[sound + fallen + 5] == 0
    assert sum(revived[sound + fallen :]) == 15

    watch = CollapseWatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for round_index, share in enumerate(shares, 1):
            watch.note(round_index, {"gate_entropy": 0.01, "unused_share": share})
    (warning,) = caught
    assert issubclass(warning.category, FedquiltWarning)
    assert f"in round {falls[0] + 1} " in str(warning.message)


def test_the_load_is_the_running_mean_of_what_is_chosen() -> None:
    masks = [spread(r) for r in range(12)]
    expected = sum(0.1 * 0.9 ** (11 - r) * mask_ug.float().mean(0) for r, mask_ug in enumerate(masks))
    torch.testing.assert_close(rounds_of(masks)[-1][LOAD_SECTION][0], expected)


# -------------------------------------------------------------------------------- the warning


def test_a_collapse_is_warned_of_once_with_its_figures_and_remedies() -> None:
    watch, bad = CollapseWatch(), {"gate_entropy": 0.034, "unused_share": 0.8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.note(6, {"gate_entropy": 0.9, "unused_share": 0.0})
    wanted = (
        r"in round 7 the entropy of its masks is 3\.4% .* 80% of the units .* raise gate\.exploration, gate\.entropy "
        r"or gate\.balance, or lower gate_optimizer\.learning_rate"
    )
    with pytest.warns(FedquiltWarning, match=wanted):
        watch.note(7, bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.note(8, bad)
        watch.note(9, {"gate_entropy": 0.9, "unused_share": 0.0})
        watch.note(10, bad)
