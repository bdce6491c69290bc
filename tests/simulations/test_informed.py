"""The best mask given a user's type and examples, against the posterior counted over all masks that a user can have."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from client.personal import known_of
from federation.config import RunConfig
from federation.data.population import Batch, Part
from federation.data.registry import make_population
from federation.errors import ConfigError, PopulationError
from federation.pool.model import PooledModel
from federation.streams import Streams, UserIds
from simulations.compute.worker import Worker
from simulations.evaluate import check_methods
from simulations.methods import Choice, methods_of
from simulations.populations.posterior import Noise, Residuals, log_evidence, posterior_chances
from simulations.populations.synthetic import SyntheticPopulation, f1
from simulations.runs import run
from tests.simulations.tiny import tiny_config, tiny_setup

STREAMS = Streams(3)
ADDITIVE = SyntheticPopulation(
    400, 12, (6, 5, 4), rank=4, budget=2, types=3, flips=0.4, noise=1.0, seed=1, kind="additive"
)
CROWDED = replace(ADDITIVE, budget=3, flips=0.25)
ECHOED = replace(ADDITIVE, budget=1, distractors=1)
PAIRS = replace(ADDITIVE, widths=(6, 13), rank=12, budget=4, flips=0.3, kind="interacting")
FOUR_PAIRS = replace(PAIRS, widths=(6, 17), rank=16, budget=3, flips=0.7, noise=3.0)
LARGE = SyntheticPopulation(3_000, 600, widths=(64, 24, 24), rank=24, budget=6, noise=1.0, kind="additive")
LARGE_PAIRS = replace(LARGE, kind="interacting")


def own_law(alternatives: int, habit: set[int], flips: float) -> dict[frozenset[int], float]:
    """The chance of every set that `swapped` can leave: each habitual one stays or not, the rest in random order."""
    others = [a for a in range(alternatives) if a not in habit]
    law: dict[frozenset[int], float] = {}
    for stays in itertools.product((False, True), repeat=len(habit)):
        chance = math.prod(1 - flips if stay else flips for stay in stays)
        kept = [a for a, stay in zip(sorted(habit), stays, strict=True) if stay]
        gone = [a for a in habit if a not in kept]
        orders = [a + b for a in itertools.permutations(others) for b in itertools.permutations(gone)]
        for order in orders:
            own = frozenset([*kept, *order][: len(habit)])
            law[own] = law.get(own, 0.0) + chance / len(orders)
    return law


def truths(population: SyntheticPopulation, user: int) -> tuple[Tensor, Tensor]:
    """Every mask that users of this one's type can have, (M, G) bool, and its chance, (M,)."""
    kind = population.type_of(np.array([user]))
    habit_jcn, second = population._habit[kind][0], population._second[kind]
    laws = [own_law(len(row), set(row.nonzero()[:, 0].tolist()), population.flips) for row in habit_jcn.flatten(0, 1)]
    masks, chances = [], []
    for owns in itertools.product(*laws):
        chosen = torch.zeros_like(habit_jcn).flatten(0, 1)
        for row, own in zip(chosen, owns, strict=True):
            row[list(own)] = True
        masks.append(population._arrangement.units(chosen.view_as(habit_jcn)[None], second)[0])
        chances.append(math.prod(law[own] for law, own in zip(laws, owns, strict=True)))
    return torch.stack(masks), torch.tensor(chances, dtype=torch.float64)


def posterior(population: SyntheticPopulation, masks_mg: Tensor, prior_m: Tensor, seen: Batch) -> Tensor:
    """The chance of each mask given one user's examples, through the pooled model: (M,)."""
    model = PooledModel.around(population.base_model(), population.rank, 1.0)
    log_m = prior_m.log()
    shares = ((1 - population.outliers, population.noise), (population.outliers, 20.0))
    for m, mask_g in enumerate(masks_mg):
        with model.gated(population.teacher_values(), mask_g[None].float()):
            error = (seen.targets[0] - model.base.module(seen.inputs[0])).double()
        normal = [torch.distributions.Normal(0.0, sd).log_prob(error).sum(1).exp() * share for share, sd in shares]
        log_m[m] += (normal[0] + normal[1]).log().sum()
    return log_m.softmax(0)


def expected_errors(population: SyntheticPopulation, masks_xg: Tensor, truths_mg: Tensor, chance_m: Tensor) -> Tensor:
    """By how much each mask's outputs miss the user's, squared, to expect over the posterior: (X, J)."""
    errors = []
    for j, m in enumerate(population.pool_spec().modules):
        up = population.teacher_values()[m.section][:, m.d_in :].double()
        units = slice(j * population.rank, (j + 1) * population.rank)
        difference = masks_xg[:, None, units].double() - truths_mg[None, :, units].double()
        errors.append((difference @ up).square().sum(2) @ chance_m)
    return torch.stack(errors, 1)


def all_masks(population: SyntheticPopulation) -> Tensor:
    """Every mask of the budget in one module, the same in all modules: (X, G) bool."""
    wanted = itertools.combinations(range(population.rank), population.budget)
    rows = [torch.zeros(population.rank, dtype=torch.bool).index_fill(0, torch.tensor(w), True) for w in wanted]
    return torch.stack(rows).repeat(1, len(population.widths) - 1)


def support(population: SyntheticPopulation, ids: UserIds, examples: int) -> Batch:
    return population.batch(ids, "support", examples, STREAMS)


# ------------------------------------------------------------------------------------------- against all of them


@pytest.mark.parametrize(
    ("population", "examples"),
    [(ADDITIVE, 1), (ADDITIVE, 4), (CROWDED, 2), (ECHOED, 2), (PAIRS, 3), (FOUR_PAIRS, 2)],
    ids=["additive-1", "additive-4", "crowded", "echoed", "pairs", "four-pairs"],
)
def test_no_mask_of_the_budget_has_a_smaller_expected_loss_given_the_examples(
    population: SyntheticPopulation, examples: int
) -> None:
    ids = np.arange(30)
    seen, masks = support(population, ids, examples), all_masks(population)
    informed, differ = population.informed_mask(ids, seen), 0
    for user in ids.tolist():
        own, prior = truths(population, user)
        chance = posterior(population, own, prior, seen.take(slice(user, user + 1)))
        (mine,) = expected_errors(population, informed[user, None], own, chance)
        least = expected_errors(population, masks, own, chance).min(0).values
        torch.testing.assert_close(mine, least, rtol=1e-4, atol=1e-5)
        differ += not informed[user].equal(population.state_best_mask(ids[user : user + 1])[0])
    assert differ > 3


def test_corrupted_examples_are_recognised_as_such() -> None:
    """Against all masks and the mixture of noises; what the rule neglects costs next to nothing."""
    population, ids = replace(ADDITIVE, outliers=0.3), np.arange(40)
    seen, masks = support(population, ids, 4), all_masks(population)
    informed, lost, prior_lost = population.informed_mask(ids, seen), 0.0, 0.0
    for user in ids.tolist():
        own, prior = truths(population, user)
        chance = posterior(population, own, prior, seen.take(slice(user, user + 1)))
        proposed = torch.stack((informed[user], population.state_best_mask(ids[user : user + 1])[0]))
        least = expected_errors(population, masks, own, chance).min(0).values.sum()
        above = expected_errors(population, proposed, own, chance).sum(1) - least
        lost, prior_lost = lost + float(above[0]), prior_lost + float(above[1])
    assert 0 <= lost < 0.01 * prior_lost


def test_one_example_is_as_much_evidence_as_counted_over_all_it_may_hold() -> None:
    """Three alternatives of two outputs, two idle outputs, corrupted or not: 16 cases for each of 20 users."""
    ids, chance = np.arange(20), torch.tensor([0.6, 0.3, 0.5], dtype=torch.float64)
    noise = Noise(1.0, 3.0, 0.4)
    own, idle, written = (
        2 * STREAMS.normal(n, ids, s).double() for n, s in (("o", (3, 2)), ("i", (2,)), ("w", (3, 2)))
    )
    shape = (20, 1, 1, 1, 3, 2)
    residuals = Residuals(own.view(shape), idle.view(20, 1, 2), written.view(shape), torch.ones(20, 1).double())
    found = log_evidence(residuals, chance.expand(20, 1, 1, 3), noise)[:, 0, 0]
    weights = []
    for share, sd in ((0.6, 1.0), (0.4, 3.0)):
        density = torch.distributions.Normal(0.0, torch.tensor(sd).double())
        used, unused = (density.log_prob(e).sum(2).exp() for e in (own - written, own))
        idle_u = density.log_prob(idle).sum(1).exp()
        for held in itertools.product((True, False), repeat=3):
            on = torch.tensor(held)
            each = torch.where(on, chance * used, (1 - chance) * unused)
            weights.append((on, share * idle_u * each.prod(1)))
    yes, no = (sum(torch.where(on == side, w[:, None], 0.0) for on, w in weights) for side in (True, False))
    torch.testing.assert_close(found, (yes / no).log() - chance.logit())


@pytest.mark.parametrize(("alternatives", "chosen"), [(5, 2), (5, 3), (4, 2), (3, 3), (3, 0)])
def test_chances_are_those_counted_over_all_sets(alternatives: int, chosen: int) -> None:
    flips = 0.0 if chosen == alternatives else 0.35
    habit = set(range(0, 2 * chosen, 2)) if 2 * chosen <= alternatives + 1 else set(range(chosen))
    evidence = 2.0 * STREAMS.normal("evidence", np.array([alternatives]), (alternatives,)).double()[0]
    counted, total = torch.zeros(alternatives, dtype=torch.float64), 0.0
    for own, chance in own_law(alternatives, habit, flips).items():
        weight = chance * math.exp(evidence[list(own)].sum())
        counted[list(own)] += weight
        total += weight
    held = torch.tensor([a in habit for a in range(alternatives)])
    found = posterior_chances(evidence.view(1, 1, 1, -1), held.view(1, 1, 1, -1), flips, (chosen,))
    torch.testing.assert_close(found[0, 0, 0], counted / total)


# --------------------------------------------------------------------------------------------- against other masks


def saved(population: SyntheticPopulation, ids: UserIds, mask_ug: Tensor) -> Tensor:
    """(U,): how much less is lost than with no unit at all."""
    return population.expected_loss(ids, torch.zeros_like(mask_ug)) - population.expected_loss(ids, mask_ug)


def saliency(population: SyntheticPopulation, seen: Batch) -> Tensor:
    """The units of the largest gain to first order, taken where all are on in part: (U, G) bool."""
    model = PooledModel.around(population.base_model(), population.rank, 1.0)
    gate = torch.full((seen.users, model.spec.units), population.budget / population.rank, requires_grad=True)
    with model.gated(population.teacher_values(), gate):
        (slope,) = torch.autograd.grad(model.loss(seen).sum(), gate)
    top = (-slope).view(seen.users, -1, population.rank).topk(population.budget, dim=2).indices
    mask = torch.zeros(seen.users, len(population.widths) - 1, population.rank, dtype=torch.bool)
    return mask.scatter_(2, top, True).flatten(1)


@pytest.mark.parametrize("population", [LARGE, LARGE_PAIRS], ids=lambda p: p.kind)
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_it_saves_more_than_type_or_saliency_whatever_is_seen(population: SyntheticPopulation, outliers: float) -> None:
    population, ids = replace(population, outliers=outliers), np.arange(400)
    for examples in (1, 4, 16):
        seen = support(population, ids, examples)
        mine = saved(population, ids, population.informed_mask(ids, seen))
        for other in (population.state_best_mask(ids), saliency(population, seen)):
            ahead = mine - saved(population, ids, other)
            assert ahead.mean() > 2 * ahead.std() / len(ids) ** 0.5


@pytest.mark.parametrize("population", [LARGE, LARGE_PAIRS], ids=lambda p: p.kind)
def test_more_examples_bring_it_to_the_best(population: SyntheticPopulation) -> None:
    population, ids = replace(population, distractors=4, examples=256), np.arange(200)
    best = population.best_mask(ids)
    near = [
        float(f1(population.informed_mask(ids, support(population, ids, n)), best).mean()) for n in (1, 4, 16, 64, 256)
    ]
    assert near == sorted(near)
    assert near[0] < 0.9
    assert near[-1] > 0.99


def test_padding_and_examples_drawn_twice_say_nothing() -> None:
    ids = np.arange(100)
    seen = support(ADDITIVE, ids, 3)
    twice = Batch(*(torch.cat((x, x.flip(1)), 1) for x in (seen.inputs, seen.targets, seen.weight)))
    padding = torch.cat((torch.ones(100, 3), torch.zeros(100, 5)), 1)
    padded = replace(support(ADDITIVE, ids, 8), weight=padding)
    first = padded.window(0, 3)
    assert ADDITIVE.informed_mask(ids, twice).equal(ADDITIVE.informed_mask(ids, seen))
    assert ADDITIVE.informed_mask(ids, padded).equal(ADDITIVE.informed_mask(ids, first))
    assert not ADDITIVE.informed_mask(ids, first).equal(ADDITIVE.informed_mask(ids, padded.window(3, 8)))


@pytest.mark.parametrize("population", [LARGE, LARGE_PAIRS], ids=lambda p: p.kind)
def test_without_noise_or_without_flips_nothing_is_in_doubt(population: SyntheticPopulation) -> None:
    ids = np.arange(50)
    for certain in (replace(population, noise=0.0), replace(population, flips=0.0)):
        assert certain.informed_mask(ids, support(certain, ids, 2)).equal(certain.best_mask(ids))


# ---------------------------------------------------------------------------------------------------- as a method


def small(*overrides: str) -> RunConfig:
    options = "{train_users=60, new_users=20, widths=[8, 8, 8], rank=8, budget=2, types=3, examples=16, noise=1.0"
    names = "['informed_mask[windows=2]', 'informed_mask', 'type_mask', 'best_mask']"
    return tiny_config(
        f"population.options={options}, kind='additive'}}",
        "pool.start=teacher",
        f"evaluate.methods={names}",
        "federation.rounds=0",
        *overrides,
    )


def test_new_users_are_served_the_best_masks_given_what_a_policy_sees(tmp_path: Path) -> None:
    config = small("gate.policy=saliency")
    found = run(config, tmp_path / "run")
    evaluation, worker = found.evaluation, Worker(config)
    population = worker.population
    assert evaluation is not None
    assert isinstance(population, SyntheticPopulation)
    ids, setup = evaluation.user_ids, worker.setup(config)
    drawn: list[Batch] = []

    class Watched:
        def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
            drawn.append(worker.batch(user_ids, part, size, streams))
            return drawn[-1]

    for windows, name in ((2, "informed_mask[windows=2]"), (8, "informed_mask")):
        known_of(setup, setup.begin().values, Watched(), ids, windows, 2)
        expected = population.informed_mask(ids, drawn[-1])
        assert drawn[-1].weight.shape == (8, windows)
        assert evaluation.masks[Choice("informed", "pool", windows, 2)].equal(expected)
        quality = found.record["masks"][name]
        assert quality["f1"] == pytest.approx(float(f1(expected, population.best_mask(ids)).mean()), abs=1e-6)
        assert name in found.record["methods"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["population.options={train_users=9, new_users=9}"], "got kind = 'network'; set kind = 'additive'"),
        (["pool.rank=6"], "best masks are of 16 units, the pool of 'pool' has 12, in 'informed_mask"),
        (["evaluate.methods=['informed_mask[budget=1]']"], "no option 'budget'.*known: pool, windows"),
    ],
)
def test_a_method_that_the_population_cannot_serve_is_refused(overrides: list[str], message: str) -> None:
    config = small(*overrides)
    with pytest.raises(ConfigError, match=message):
        check_methods(methods_of(config), make_population(config.population), {"pool": tiny_setup(config)})


def test_in_a_network_it_is_not_known() -> None:
    chain = SyntheticPopulation(60, 12, widths=(6, 5, 3), rank=4, budget=2, types=3)
    with pytest.raises(PopulationError, match="outputs of their own, got kind = 'network'"):
        chain.informed_mask(np.arange(2), support(chain, np.arange(2), 2))
