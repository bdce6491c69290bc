"""The gate's benchmark: shares add up, variances are those of a case with a closed form, costs are a setting."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from client.state import UserBlock
from federation.config import GateConfig
from federation.errors import ConfigError
from federation.estimators.pathwise import StraightThrough
from federation.estimators.protocol import Estimator
from federation.estimators.score import MuProp, Reinforce, ReinforceGain, SelfCritical
from federation.exploration import Exploration
from federation.mask_distribution import Bernoulli
from federation.update import UpdateBlock
from simulations import runs
from simulations.benchmarks import situations
from simulations.benchmarks.commands import record_of
from simulations.benchmarks.estimators import (
    BASE,
    Given,
    Moments,
    Side,
    all_moments,
    averaged,
    compared,
    squared_bias,
    unbiased_mean,
    with_relatives,
    worst,
)
from simulations.benchmarks.figures import FIGURES, figures
from simulations.benchmarks.gate import Cost, GateBench, breakdown, config_of, in_turns, measure, rounds_of
from tests.simulations.tiny import tiny_config

WORTH_G = torch.tensor([1.0, -0.5, 2.0])
CHANCE_G = torch.tensor([0.3, 0.5, 0.8])
USERS, DRAWS = 400, 100


@dataclass(frozen=True)
class Polynomial:
    """R(m) = (v . m) ** power, the same for every user."""

    power: int

    def reward(self, masks_ukg: Tensor) -> Tensor:
        return (masks_ukg.to(WORTH_G) @ WORTH_G) ** self.power

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        worth_u = strength_ug @ WORTH_G
        return worth_u**self.power, self.power * worth_u[:, None] ** (self.power - 1) * WORTH_G


@dataclass(frozen=True)
class Numbers:
    label: str
    n: int

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(f"{self.label} {self.n} {purpose}".encode()))
        return torch.rand(USERS, *shape, generator=generator).clamp(1e-7, 1 - 1e-7)


def given_of(power: int) -> Given:
    distribution = Bernoulli(torch.logit(CHANCE_G).repeat(USERS, 1))
    return Given(distribution, Exploration(0.0, distribution.uniform()), Polynomial(power), Numbers)


# -------------------------------------------------------------------------------- variance


def test_the_variance_of_two_sample_leave_one_out_is_that_of_its_closed_form() -> None:
    """gamma_g = 1/2 d_g sum_h v_h d_h with d = m_1 - m_2, whose squares are 1 with probability q = 2 p (1 - p)."""
    (found,) = all_moments([Side("reinforce", Reinforce(), 2)], given_of(1), DRAWS)
    q_g = 2 * CHANCE_G * (1 - CHANCE_G)
    squares_g = WORTH_G.square()
    second_g = (squares_g * q_g + q_g * ((squares_g * q_g).sum() - squares_g * q_g)) / 4
    expected = second_g - (WORTH_G * q_g / 2).square()
    assert found.variance == pytest.approx(float(expected.sum()), rel=0.03)
    mean_g = found.mean_ug.mean(0).float()
    torch.testing.assert_close(mean_g, WORTH_G * CHANCE_G * (1 - CHANCE_G), atol=0.01, rtol=0)


def test_a_control_variate_that_explains_all_leaves_no_variance() -> None:
    sides = [Side("reinforce", Reinforce(), 2), Side("reinforce_gain", ReinforceGain(), 4)]
    table = with_relatives(compared(sides, given_of(1), 10))
    assert table["reinforce_gain, K = 4"]["variance"] < 1e-10 * table[BASE]["variance"]
    assert (table[BASE]["relative"], table[BASE]["relative_in_time"]) == (1.0, 1.0)


def test_every_pass_is_counted() -> None:
    sides = [
        Side("reinforce", Reinforce(), 2),
        Side("self_critical", SelfCritical(), 4),
        Side("muprop", MuProp(), 5),
        Side("straight_through", StraightThrough(), 2),
    ]
    table = compared(sides, given_of(2), 3)
    assert [row["evaluations"] for row in table.values()] == [2, 4 + 1, 5 + 3, 2 * 3]


def test_a_bias_is_that_of_its_closed_form() -> None:
    """For (v . m)^2, straight-through takes v_g^2 2 p_g for what is v_g^2: off by p (1 - p) v^2 (2 p - 1)."""
    sides = [Side("reinforce_gain", ReinforceGain(), 4), Side("straight_through", StraightThrough(), 4)]
    table = compared(sides, given_of(2), 400)
    expected = (CHANCE_G * (1 - CHANCE_G) * WORTH_G.square() * (2 * CHANCE_G - 1)).square().sum()
    assert table["straight_through, K = 4"]["squared_bias"] == pytest.approx(float(expected), rel=0.1)
    assert "squared_bias" not in table["reinforce_gain, K = 4"]


@pytest.mark.parametrize(("other", "samples"), [(MuProp(), 3), (Reinforce(), 2)])
def test_an_unbiased_estimator_has_no_bias_beyond_its_noise(other: Estimator, samples: int) -> None:
    """Also beside one that would draw the same masks, were its randomness the same."""
    first, second = all_moments([Side("a", Reinforce(), 2), Side("b", other, samples)], given_of(2), 100)
    truth_ug, variance = unbiased_mean([second], 100)
    noise = first.variance / 100
    assert variance == pytest.approx(second.variance / 100)
    assert abs(squared_bias(first, truth_ug, variance, 100)) < 0.3 * noise


def test_unbiased_means_are_weighed_by_the_inverse_of_their_variance() -> None:
    found = [
        Moments(torch.full((1, 1), mean).double(), variance, 1, 1.0) for mean, variance in ((0.0, 1.0), (4.0, 3.0))
    ]
    mean_ug, variance = unbiased_mean(found, draws=10)
    assert mean_ug.item() == pytest.approx(1.0)
    assert variance == pytest.approx(0.75 / 10)
    exact = [Moments(torch.zeros(1, 1).double(), 0.0, 1, 1.0), *found]
    assert unbiased_mean(exact, 10)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_a_ratio_weighs_variance_by_cost_and_the_worst_situation_counts() -> None:
    base = {"variance": 2.0, "evaluations": 2.0, "seconds": 1.0}
    other = {"variance": 0.5, "evaluations": 6.0, "seconds": 8.0}
    easy, hard = ({BASE: base, "x": {**other, "variance": variance}} for variance in (0.5, 1.5))
    table = with_relatives(averaged([easy, hard]))
    assert (table["x"]["variance"], table["x"]["relative"], table["x"]["relative_in_time"]) == (1.0, 1.5, 4.0)
    tables = {"easy": with_relatives(easy), "hard": with_relatives(hard), "without": {BASE: table[BASE]}}
    assert worst(tables, "x") == 1.5 * 6 / 4


# -------------------------------------------------------------------------------- situations


def test_all_estimators_that_suit_are_compared() -> None:
    situation = situations.synthetic("additive", 3, seed=1)
    tables = situations.variances([situation], draws=3)
    assert set(tables) == {"additive, budget", "additive, bernoulli"}
    budget, bernoulli = ({name.split(",")[0] for name in table} for table in tables.values())
    assert {"disarm", "hard_concrete"} == bernoulli - budget
    assert budget < bernoulli
    assert all(row["variance"] > 0 for table in tables.values() for row in table.values())


def test_what_needs_a_gradient_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    config = tiny_config("gate.reward.quality.name=accuracy", "gate.estimator.name=reinforce", "evaluate.methods=[]")
    runs.run(config, tmp_path)
    situation = situations.finished(tmp_path, 4)
    assert {side.name for side in situations.sides(situation, "bernoulli")} == {
        "reinforce",
        "self_critical",
        "disarm",
        "ppo",
    }
    given = situations.given(situation, "budget")
    assert given.distribution.logits_ug.shape == (4, 16)
    assert given.distribution.inclusion().sum(1).tolist() == pytest.approx([4.0] * 4)


def test_a_run_without_a_gate_has_nothing_to_compare(tmp_path: Path) -> None:
    runs.run(tiny_config("gate.policy=random", "federation.rounds=1", "evaluate.methods=[]"), tmp_path)
    with pytest.raises(ConfigError, match=r"chosen by 'random'; give a run with gate\.policy = 'gate'"):
        situations.finished(tmp_path, 4)


# -------------------------------------------------------------------------------- cost


def test_shares_add_up_and_a_gate_that_learns_less_often_takes_less() -> None:
    always, seldom = Cost(2.0, 3.0, 5.0).shares, Cost(2.0, 3.0, 5.0, every=4).shares
    assert always == {"gate_share": 0.6, "choice_share": 0.2, "estimate_share": 0.4}
    assert seldom["gate_share"] == pytest.approx(1.5 / 3.5)
    for shares in (always, seldom):
        assert shares["gate_share"] == pytest.approx(shares["choice_share"] + shares["estimate_share"])


def test_sides_take_turns_after_a_first_one_that_is_not_counted() -> None:
    log: list[str] = []
    times = in_turns({side: partial(log.append, side) for side in "ab"}, 3)
    assert "".join(log) == "ab" * 4
    assert {side: len(taken) for side, taken in times.items()} == {"a": 3, "b": 3}


def test_each_side_does_what_it_is_called() -> None:
    """By what it reports: a gate's metrics where it chooses, its rewards where it learns."""
    sides = rounds_of(2)
    for name, work in sides.items():
        update, users = cast(tuple[UpdateBlock, UserBlock], work())
        chooses, learns = "gate_entropy" in update.metrics, "reward" in update.metrics
        assert chooses == (not name.startswith("random"))
        assert learns == (chooses and not name.startswith("choosing"))
        assert len(users) == 2
    config = config_of(GateConfig().estimator.name, 2)
    assert (config.gate.budget, config.pool.rank) == (4, 32)
    assert (config.local.steps, config.local.gain_examples, config.local.query_examples) == (2, 4, 4)
    assert (config.gate.samples, config.gate.estimator) == (GateConfig().samples, GateConfig().estimator)
    parts = breakdown(sides[GateConfig().estimator.name])
    assert min(parts.values()) >= 0
    assert parts["rewards"] > 0
    assert parts["training"] > 0


def test_the_record_has_its_figures() -> None:
    bench = measure(2, 1, [situations.synthetic("additive", 2, seed=0)], draws=3)
    record = json.loads(json.dumps(record_of(bench, "gate", "gate")))
    assert {"gate_share", "estimate_share", "variance_ratio", "variance", "share_by_part", "commit"} <= record.keys()
    assert len(figures(record, "gate")) >= len(FIGURES["gate"])
    assert record["gate_share"] == pytest.approx(record["choice_share"] + record["estimate_share"], abs=2e-3)
    assert sum(record["share_by_part"].values()) == pytest.approx(1, abs=5e-3)
    default = f"{GateConfig().estimator.name}, K = {GateConfig().samples}"
    ratios = [table[default]["relative"] for table in record["variance"].values()]
    assert record["variance_ratio"] == pytest.approx(max(ratios), abs=1e-4)


def test_ratios_are_those_of_medians() -> None:
    seconds = {"random, budget": (1.0, 9.0, 1.0), "choosing, budget": (2.0, 2.0, 0.0), "reinforce": (4.0, 4.0, 8.0)}
    cost = GateBench(1, seconds, {}, 0, {}).cost("reinforce", every=2)
    assert cost == Cost(1.0, 2.0, 4.0, 2)
    assert cost.seconds == 3.0


def test_the_command_asks_for_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations.benchmarks.commands import bench

    asked: dict[str, Any] = {}

    def fake(users: int, repetitions: int, found: list[situations.Situation], draws: int) -> GateBench:
        asked.update(users=users, repetitions=repetitions, draws=draws, names=[s.name for s in found])
        raise ConfigError("enough")

    monkeypatch.setattr("simulations.benchmarks.gate.measure", fake)
    CliRunner().invoke(bench, ["gate", "--users", "2", "--draws", "7", "--seeds", "2", "--out", str(tmp_path)])
    kinds = ["network", "additive", "interacting"]
    assert asked == {"users": 2, "repetitions": 5, "draws": 7, "names": [kind for kind in kinds for _ in range(2)]}
