"""The synthetic population: truth by enumeration, data by a loop over units, statistics by counting."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.data.population import Population
from federation.errors import ConfigError, PopulationError
from federation.streams import Streams
from simulations.populations.synthetic import SyntheticPopulation, f1

SMALL = SyntheticPopulation(100, 20, widths=(6, 5, 3), rank=4, budget=2, types=3, noise=0.0, examples=32, seed=1)
LARGE = SyntheticPopulation(1_000_000, 1_000)
STREAMS = Streams(3)


def outputs(population: SyntheticPopulation, inputs: Tensor, share_g: Tensor) -> Tensor:
    """One user's outputs (N, d_out) with each unit on by a share: one layer and one unit at a time."""
    module, hidden = population.base_model().module, inputs
    shares = iter(share_g)
    for j, spec in enumerate(population.pool_spec().modules):
        hidden = hidden.relu() if j else hidden
        after = module.get_submodule(spec.name)(hidden)
        for row in population.teacher_values()[spec.section]:
            after = after + next(shares) * torch.outer(hidden @ row[: spec.d_in], row[spec.d_in :])
        hidden = after
    return hidden


def loss(population: SyntheticPopulation, user: int, share_g: Tensor) -> Tensor:
    batch = population.batch(np.array([user]), "support", None, STREAMS)
    return (outputs(population, batch.inputs[0], share_g) - batch.targets[0]).square().mean() / 2


def gain(population: SyntheticPopulation, user: int) -> Tensor:
    """First-order gain of every unit, with all of them on at scale k / R: (G,)."""
    share_g = torch.full((population.pool_spec().units,), population.budget / population.rank, requires_grad=True)
    return -torch.autograd.grad(loss(population, user, share_g), share_g)[0]


@pytest.mark.parametrize("user", [0, 7, 110])
def test_the_best_mask_has_the_least_loss_of_all_masks(user: int) -> None:
    one_module = [m for m in itertools.product((0.0, 1.0), repeat=4) if sum(m) == 2]
    masks = torch.tensor([a + b for a, b in itertools.product(one_module, repeat=2)])
    losses = torch.stack([loss(SMALL, user, mask) for mask in masks])
    best = SMALL.best_mask(np.array([user]))[0]
    assert masks[losses.argmin()].bool().equal(best)
    assert losses.min() < 1e-10
    assert losses.sort().values[1] > 1e-3


def test_noise_is_what_the_best_mask_cannot_explain() -> None:
    noisy = SyntheticPopulation(300, 0, noise=0.3, examples=16)
    residual = []
    for user in range(20):
        batch = noisy.batch(np.array([user]), "test", None, STREAMS)
        residual.append(batch.targets[0] - outputs(noisy, batch.inputs[0], noisy.best_mask(np.array([user]))[0]))
    assert torch.stack(residual).std().item() == pytest.approx(0.3, rel=0.05)


def test_masks_have_the_budget_in_every_module() -> None:
    masks = LARGE.best_mask(np.arange(500))
    assert (masks.view(500, 2, 32).sum(2) == 4).all()


@pytest.mark.parametrize("flips", [0.0, 0.25, 0.6])
def test_the_asked_share_of_the_habit_is_swapped(flips: float) -> None:
    population = SyntheticPopulation(4_000, 0, flips=flips)
    ids = np.arange(4_000)
    kept = f1(population.best_mask(ids), population.state_best_mask(ids))
    standard_error = (flips * (1 - flips) / (8 * 4_000)) ** 0.5
    assert abs(kept.mean().item() - (1 - flips)) <= 4.5 * standard_error + 1e-6


def test_a_swap_takes_any_other_unit_alike() -> None:
    population = SyntheticPopulation(20_000, 0, types=1, rank=8, budget=2, flips=0.5, widths=(4, 3))
    ids = np.arange(20_000)
    habit = population.state_best_mask(ids)[0]
    share_g = population.best_mask(ids).float().mean(0)
    expected = torch.where(habit, 0.5, 0.5 * 2 / 6)
    assert ((share_g - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_features_reveal_the_type() -> None:
    """Nearest type mean of a user's 16 inputs; the types are seen through their habits."""
    ids = np.arange(400)
    habit, means = LARGE.state_best_mask(ids), LARGE.batch(ids, "support", 16, STREAMS).inputs.mean(1)
    kinds, kind_u = torch.unique(habit, dim=0, return_inverse=True)
    assert len(kinds) == 8
    centre = torch.stack([means[:200][kind_u[:200] == kind].mean(0) for kind in range(8)])
    assert (torch.cdist(means[200:], centre).argmin(1) == kind_u[200:]).float().mean() > 0.99


def test_saliency_over_the_teachers_rows_is_better_than_chance_and_not_perfect() -> None:
    ids = np.arange(40)
    gains = torch.stack([gain(LARGE, user) for user in range(40)]).view(40, 2, 32)
    saliency = torch.zeros_like(gains, dtype=torch.bool).scatter_(2, gains.topk(4, 2).indices, True).flatten(1)
    assert 0.4 < f1(saliency, LARGE.best_mask(ids)).mean() < 0.95


def test_a_user_is_the_same_whoever_is_asked_for_along_with_it() -> None:
    far = np.array([999_999, 3, 1_000_500])
    together, alone = LARGE.batch(far, "query", 5, STREAMS), LARGE.batch(far[1:2], "query", 5, STREAMS)
    assert together.inputs[1].equal(alone.inputs[0])
    torch.testing.assert_close(together.targets[1], alone.targets[0], rtol=1e-5, atol=1e-5)
    assert LARGE.best_mask(far)[1].equal(LARGE.best_mask(far[1:2])[0])
    copy = pickle.loads(pickle.dumps(LARGE))
    assert copy.batch(far, "query", 5, STREAMS).targets.equal(together.targets)


def test_batches_are_drawn_from_what_the_user_owns() -> None:
    ids = np.array([4, 9])
    owned = SMALL.batch(ids, "support", None, STREAMS)
    assert owned.weight.equal(torch.ones(2, 32))
    all_of_it, more = SMALL.batch(ids, "support", 32, STREAMS), SMALL.batch(ids, "support", 80, STREAMS)
    for u in range(2):
        rows = {tuple(row) for row in owned.inputs[u].tolist()}
        assert {tuple(row) for row in all_of_it.inputs[u].tolist()} == rows
        assert {tuple(row) for row in more.inputs[u].tolist()} <= rows
    assert not all_of_it.inputs.equal(SMALL.batch(ids, "support", 32, STREAMS.at("round", 1)).inputs)


def test_an_example_is_the_same_however_it_is_chosen() -> None:
    ids = np.array([4, 9])
    few, owned = (SMALL.batch(ids, "test", size, STREAMS) for size in (5, None))
    examples, all_examples = (torch.cat((batch.inputs, batch.targets), 2) for batch in (few, owned))
    distances = torch.cdist(examples, all_examples, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(2).values.max() < 1e-5
    assert (distances.argmin(2).sort(1).values.diff(dim=1) > 0).all()


def test_of_a_thousand_million_examples_only_the_chosen_are_made() -> None:
    rich = SyntheticPopulation(100, 0, widths=(6, 5, 3), rank=4, budget=2, examples=10**9)
    inputs = rich.batch(np.array([4]), "support", 300, STREAMS).inputs
    assert len(torch.unique(inputs[0], dim=0)) > 285  # 300 out of a bank of 2**14: 3 of them meet another on average


def test_parts_share_no_noise_and_no_order() -> None:
    ids = np.arange(3)
    parts = [LARGE.batch(ids, part, None, STREAMS).inputs for part in ("support", "query", "test")]
    assert not any(a.equal(b) for a, b in itertools.combinations(parts, 2))


def test_splits_do_not_overlap_and_follow_the_protocol() -> None:
    population: Population = LARGE
    assert population.users("train") == range(1_000_000)
    assert population.users("new") == range(1_000_000, 1_001_000)
    with pytest.raises(PopulationError, match=r"\['train', 'new'\], got 'test'"):
        population.users("test")


def test_the_base_model_fits_the_pool_and_scores_examples_one_by_one() -> None:
    base, spec = SMALL.base_model(), SMALL.pool_spec()
    batch = SMALL.batch(np.arange(2), "test", 4, STREAMS)
    inputs, targets = batch.flat()
    assert base.target_modules == ("fc1", "fc2")
    assert {m.section: (4, m.width) for m in spec.modules} == {
        section: tuple(rows.shape) for section, rows in SMALL.teacher_values().items()
    }
    assert base.features(base.module, inputs).shape == (8, base.feature_width)
    bare = torch.stack([outputs(SMALL, x[None], torch.zeros(8))[0] for x in inputs])
    torch.testing.assert_close(base.loss(base.module, inputs, targets), (bare - targets).square().mean(1) / 2)
    assert base.module is not SMALL.base_model().module


def test_f1_of_known_masks() -> None:
    best = torch.tensor([[True, True, False, False]] * 3)
    mask = torch.tensor([[True, True, False, False], [False, False, True, True], [True, False, False, False]])
    torch.testing.assert_close(f1(mask, best), torch.tensor([1.0, 0.0, 2 / 3]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", 33), ("flips", 0.9), ("types", 0), ("noise", -0.1), ("widths", (5,)), ("examples", 0)],
)
def test_a_population_that_cannot_be_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SyntheticPopulation(**{"train_users": 10, "new_users": 2, field: value})  # type: ignore[arg-type]
