"""Hard synthetic populations: truth by enumeration and by Monte Carlo through the pooled model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.pool.model import PooledModel
from federation.streams import Streams, UserIds
from simulations.populations.habits import Groups
from simulations.populations.synthetic import SyntheticPopulation, f1
from simulations.setup import Teacher

STREAMS = Streams(3)
USUAL = SyntheticPopulation(3_000, 600, widths=(64, 24, 24), rank=24, budget=6, noise=1.0, kind="additive")
INTERACTING = replace(USUAL, kind="interacting")
SMALL = SyntheticPopulation(
    60, 12, widths=(6, 6, 6), rank=6, budget=2, types=3, noise=0.5, seed=1, kind="additive", distractors=1
)
SMALL_GROUPS = replace(SMALL, widths=(6, 9, 9), rank=9, budget=3, kind="interacting")
SMALL_CHAIN = SyntheticPopulation(60, 12, widths=(6, 5, 3), rank=4, budget=2, types=3, noise=0.5, seed=1)
ALL_KINDS = pytest.mark.parametrize("population", [SMALL, SMALL_GROUPS, SMALL_CHAIN], ids=lambda p: p.kind)


def pooled(population: SyntheticPopulation) -> PooledModel:
    return PooledModel.around(population.base_model(), population.rank, 1.0)


def losses(population: SyntheticPopulation, model: PooledModel, user: int, mask_g: Tensor) -> Tensor:
    """Loss of each example of a user's test part, (N,), through the pooled model."""
    batch = population.batch(np.array([user]), "test", None, STREAMS)
    with model.gated(population.teacher_values(), mask_g[None].float()):
        return model.base.loss(model.base.module, *batch.flat())


def gains(population: SyntheticPopulation, ids: UserIds, examples: int) -> Tensor:
    """First-order gain of every unit, with all of them on at scale k / R, by autograd: (U, G)."""
    model = pooled(population)
    gate_ug = torch.full((len(ids), model.spec.units), population.budget / population.rank, requires_grad=True)
    with model.gated(population.teacher_values(), gate_ug):
        loss_u = model.loss(population.batch(ids, "support", examples, STREAMS))
    return -torch.autograd.grad(loss_u.sum(), gate_ug)[0]


def of_highest(score_ug: Tensor, population: SyntheticPopulation) -> Tensor:
    score = score_ug.view(len(score_ug), -1, population.rank)
    chosen = score.topk(population.budget, dim=2).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(2, chosen, True).flatten(1)


def share_of_best(population: SyntheticPopulation, ids: UserIds, mask_ug: Tensor) -> float:
    none_u = population.expected_loss(ids, torch.zeros_like(mask_ug))
    best_u = population.expected_loss(ids, population.best_mask(ids))
    return float(((none_u - population.expected_loss(ids, mask_ug)) / (none_u - best_u)).mean())


def all_masks(population: SyntheticPopulation) -> Tensor:
    """Every mask with the budget in each of two modules: (M, G) bool."""
    one = [m for m in itertools.product((False, True), repeat=population.rank) if sum(m) == population.budget]
    return torch.tensor([a + b for a, b in itertools.product(one, repeat=2)])


def enumerated(population: SyntheticPopulation, user: int, masks_mg: Tensor) -> Tensor:
    """The expected loss of each mask for one user: (M,)."""
    return population.expected_loss(np.full(len(masks_mg), user), masks_mg)


# ------------------------------------------------------------------------------------- the expected loss is the truth


@ALL_KINDS
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_the_expected_loss_is_the_mean_of_the_test_loss(population: SyntheticPopulation, outliers: float) -> None:
    many = replace(population, examples=30_000, outliers=outliers)
    model, ids = pooled(many), np.array([3, 20, 65])
    best_ug = many.best_mask(ids)
    for mask_ug in (
        best_ug,
        ~best_ug,
        torch.zeros_like(best_ug),
        STREAMS.uniform("masks", ids, (many.pool_spec().units,)) < 0.5,
    ):
        for user, mask_g, best_g, expected in zip(ids, mask_ug, best_ug, many.expected_loss(ids, mask_ug), strict=True):
            loss_n = losses(many, model, user, mask_g)
            excess_n = loss_n - losses(many, model, user, best_g)
            measured_on = 256 if many.kind == "network" else 30_000
            error = (loss_n.var() / 30_000 + excess_n.var() / measured_on).sqrt()
            assert abs(loss_n.mean() - expected) < 4 * error


@ALL_KINDS
def test_the_best_mask_is_the_best_of_all_masks_of_its_budget(population: SyntheticPopulation) -> None:
    masks = all_masks(population)
    for user in (0, 9, 65):
        loss_m = enumerated(population, user, masks)
        assert masks[loss_m.argmin()].equal(population.best_mask(np.array([user]))[0])
        assert loss_m.sort().values[:2].diff() > 1e-3


def test_additive_units_add_up() -> None:
    """The loss is a sum over units, each as a unit of strength 1 along its direction earns it."""
    ids = np.arange(20)
    best, masks = USUAL.best_mask(ids), STREAMS.uniform("masks", ids, (48,)) < 0.4
    floor = USUAL.expected_loss(ids, best)
    wrong = [USUAL.expected_loss(ids, best ^ (torch.arange(48) == g)) - floor for g in range(48)]
    wrong_ug = torch.stack(wrong, 1)
    summed = (wrong_ug * (masks ^ best)).sum(1)
    torch.testing.assert_close(USUAL.expected_loss(ids, masks) - floor, summed, rtol=1e-4, atol=1e-6)
    mean_ud = replace(USUAL, examples=10_000).batch(ids, "test", None, STREAMS).inputs.mean(1)
    down = torch.stack([rows[0, :64] for rows in USUAL.teacher_values().values()])
    law_uj = (1.0 + (mean_ud @ down.t()).square()) / (2 * 48)
    torch.testing.assert_close(wrong_ug, law_uj.repeat_interleave(24, 1), rtol=0.06, atol=0.0)


def test_additive_units_write_to_outputs_of_their_own() -> None:
    for rows in USUAL.teacher_values().values():
        up = rows[:, 64:]
        torch.testing.assert_close(up @ up.t(), torch.eye(24))


# ----------------------------------------------------------------------------------------------------- interactions


def flipped(population: SyntheticPopulation, user: int, mask_g: Tensor, *units: int) -> float:
    """What the expected loss gains where some units change sides, above what the mask alone has."""
    changed = mask_g.clone()
    changed[list(units)] ^= True
    return float(enumerated(population, user, torch.stack((changed, mask_g))).diff())


def test_complements_pay_only_together_and_substitutes_only_alone() -> None:
    best = INTERACTING.best_mask(np.arange(30))
    for user, best_g in enumerate(best):
        none, used = torch.zeros_like(best_g), best_g.view(2, 24)
        for j in range(2):
            for opener in [24 * j + n for n in range(0, 12, 2) if used[j, n]]:
                assert best_g[opener + 1]
                assert flipped(INTERACTING, user, none, opener) < 0
                assert flipped(INTERACTING, user, none, opener + 1) < 0
                assert flipped(INTERACTING, user, none, opener, opener + 1) > 0
            pairs = used[j, 12:].view(6, 2)
            assert (pairs.sum(1) <= 1).all()
            for pair in [24 * j + 12 + 2 * n for n in range(6) if pairs[n].any()]:
                alone = [flipped(INTERACTING, user, none, pair + n) for n in range(2)]
                assert min(alone) > 0.7 * max(alone) > 0
                assert flipped(INTERACTING, user, none, pair, pair + 1) < 0.1 * max(alone)


def test_first_order_gains_find_additive_masks_and_are_misled_by_interactions() -> None:
    ids = np.arange(100)
    found = {p.kind: share_of_best(p, ids, of_highest(gains(p, ids, 64), p)) for p in (USUAL, INTERACTING)}
    assert found["additive"] > 0.98
    assert found["interacting"] < 0.5


def test_swaps_keep_pairs_together() -> None:
    ids = np.arange(2_000)
    mine, habit = (m.view(2_000, 2, 24) for m in (INTERACTING.best_mask(ids), INTERACTING.state_best_mask(ids)))
    for mask in (mine, habit):
        assert mask[..., :12:2].equal(mask[..., 1:12:2])
        assert (mask[..., :12].sum(2) == 4).all()
        assert (mask[..., 12:].sum(2) == 2).all()
    kept = (mine & habit)[..., [*range(0, 12, 2), *range(12, 24)]].sum() / (2_000 * 2 * 4)
    assert abs(kept - 0.75) < 4.5 * (0.75 * 0.25 / (2_000 * 8)) ** 0.5


@pytest.mark.parametrize(("budget", "chosen"), [(1, (0, 1)), (2, (1, 0)), (3, (1, 1)), (6, (2, 2)), (8, (3, 2))])
def test_two_thirds_of_a_budget_are_for_complements(budget: int, chosen: tuple[int, int]) -> None:
    assert Groups(24, budget).chosen == chosen


@pytest.mark.parametrize("population", [SMALL, SMALL_GROUPS], ids=lambda p: p.kind)
def test_the_habit_is_the_best_mask_given_the_type(population: SyntheticPopulation) -> None:
    """Mean expected loss over the users of one type, of every mask."""
    many = replace(population, train_users=60_000, types=1, flips=0.4)
    masks = all_masks(many)
    own_ug, count_u = torch.unique(many.best_mask(np.arange(60_000)), dim=0, return_counts=True)
    first = {tuple(mask.tolist()): user for user, mask in reversed(list(enumerate(many.best_mask(np.arange(60_000)))))}
    loss_um = torch.stack([enumerated(many, first[tuple(own.tolist())], masks) for own in own_ug])
    mean_m = (loss_um * count_u[:, None]).sum(0) / 60_000
    assert masks[mean_m.argmin()].equal(many.state_best_mask(np.array([0]))[0])


# ----------------------------------------------------------------------------------------------------- distractors


@pytest.mark.parametrize("population", [USUAL, INTERACTING], ids=lambda p: p.kind)
def test_distractors_look_good_and_hurt(population: SyntheticPopulation) -> None:
    with_them = replace(population, distractors=4, flips=0.0)
    ids = np.arange(400)
    best = with_them.best_mask(ids)
    assert not best.view(400, 2, 24)[..., 20:].any()
    gain_ug, type_u = gains(with_them, ids, 64), with_them.type_of(ids)
    floor_u = with_them.expected_loss(ids, best)
    for kind in range(8):  # 4 distractors in each of 2 modules: one for each type
        j, unit = kind // 4, 24 * (kind // 4) + 20 + kind % 4
        of_type = torch.from_numpy(type_u == kind)
        right = best[of_type].view(-1, 2, 24)[:, j]
        gain_of_right = gain_ug[of_type].view(-1, 2, 24)[:, j][right].mean()
        assert gain_ug[of_type, unit].mean() > gain_of_right
        beside = best.clone()
        beside[:, unit] = True
        assert (with_them.expected_loss(ids, beside) - floor_u > 1e-3)[of_type].all()


# ----------------------------------------------------------------------------------------- a quality without gradient


@pytest.mark.parametrize("population", [SMALL, SMALL_GROUPS], ids=lambda p: p.kind)
def test_the_best_mask_hits_most_often_whatever_the_outliers(population: SyntheticPopulation) -> None:
    many = replace(population, examples=20_000, outliers=0.1, hit=0.3)
    model, user = pooled(many), 7
    assert model.base.accuracy is not None
    masks, best = all_masks(many), many.best_mask(np.array([user]))[0]
    some = torch.cat((best[None], masks[STREAMS.distinct("masks", np.array([0]), len(masks), 90)[0]]))
    batch = many.batch(np.array([user]), "test", None, STREAMS)
    hits = []
    for mask in some:
        with model.gated(many.teacher_values(), mask[None].float()):
            hits.append(float(model.base.accuracy(model.base.module, *batch.flat()).mean()))
    others = [rate for rate, mask in zip(hits, some, strict=True) if not mask.equal(best)]
    assert 0.5 < hits[0] < 0.9
    assert hits[0] > max(others) + 0.01


def test_a_hit_is_a_small_mean_squared_error() -> None:
    base = replace(SMALL, hit=0.5).base_model()
    ids = np.arange(50)
    inputs, size = STREAMS.normal("inputs", ids, (6,)), 2.0 * STREAMS.uniform("size", ids, (1,))
    error = size * STREAMS.normal("errors", ids, (12,))
    assert base.accuracy is not None
    hits = base.accuracy(base.module, inputs, base.module(inputs) + error)
    assert hits.equal((error.square().mean(1) <= 0.5).float())
    assert 0 < hits.sum() < 50


def test_outliers_are_the_asked_share_and_fill_the_gains_with_noise() -> None:
    ids = np.arange(200)
    corrupted = replace(USUAL, outliers=0.1)
    plain, noisy = (p.batch(ids, "support", None, STREAMS).targets for p in (USUAL, corrupted))
    share = ((noisy - plain).abs().amax(2) > 1).float().mean()
    assert abs(share - 0.1) < 4.5 * (0.1 * 0.9 / (200 * 64)) ** 0.5
    found = [share_of_best(p, ids, of_highest(gains(p, ids, 16), p)) for p in (USUAL, corrupted)]
    assert found[0] > 0.9
    assert found[1] < 0.5


# ------------------------------------------------------------------------------------------------ what a state shows


@pytest.mark.parametrize("population", [USUAL, INTERACTING], ids=lambda p: p.kind)
def test_four_examples_show_the_type_and_some_of_the_swaps(population: SyntheticPopulation) -> None:
    ids = np.arange(400)
    type_u = torch.from_numpy(population.type_of(ids))
    feature_uf = pooled(population).features(population.batch(ids, "support", 4, STREAMS))
    centre = torch.stack([feature_uf[:200][type_u[:200] == kind].mean(0) for kind in range(8)])
    assert (torch.cdist(feature_uf[200:], centre).argmin(1) == type_u[200:]).float().mean() > 0.97
    gain_ug, best, habit = gains(population, ids, 4), population.best_mask(ids), population.state_best_mask(ids)
    kept, swapped = gain_ug[habit & best], gain_ug[habit & ~best]
    assert kept.mean() > swapped.mean() + 0.3 * gain_ug.std()


def test_type_and_gains_together_are_better_than_either() -> None:
    ids = np.arange(300)
    habit = USUAL.state_best_mask(ids)
    gain_ug = gains(USUAL, ids, 4)
    both = of_highest(habit.float() + 0.8 * gain_ug / gain_ug.std(1, keepdim=True), USUAL)
    scores = [float(f1(m, USUAL.best_mask(ids)).mean()) for m in (habit, of_highest(gain_ug, USUAL), both)]
    assert max(scores[:2]) + 0.05 < scores[2] < 0.95


# ------------------------------------------------------------------------------------------------------- who is there


def test_late_types_come_with_the_last_third_and_with_new_users() -> None:
    population = replace(USUAL, train_users=9_000, new_users=3_000, late_types=2)
    early, late, new = (population.type_of(np.arange(*span)) for span in ((6_000,), (6_000, 9_000), (9_000, 12_000)))
    assert set(early) == set(range(6))
    for type_u in (late, new):
        share_t = np.bincount(type_u, minlength=8) / 3_000
        assert np.abs(share_t - 1 / 8).max() < 4.5 * (1 / 8 * 7 / 8 / 3_000) ** 0.5


@pytest.mark.parametrize("kind", ["additive", "interacting"])
def test_a_user_is_the_same_whoever_is_asked_for_along_with_it(kind: Any) -> None:
    million = replace(USUAL, train_users=1_000_000, kind=kind, distractors=4, outliers=0.1, late_types=1)
    far = np.array([999_999, 3, 1_000_500])
    together, alone = million.batch(far, "query", 5, STREAMS), million.batch(far[1:2], "query", 5, STREAMS)
    assert together.inputs[1].equal(alone.inputs[0])
    torch.testing.assert_close(together.targets[1], alone.targets[0], rtol=1e-5, atol=1e-5)
    assert million.best_mask(far)[1].equal(million.best_mask(far[1:2])[0])
    assert million.type_of(far)[1] == million.type_of(far[1:2])[0]


def test_types_are_those_of_the_habits_and_all_is_in_the_protocol() -> None:
    teacher: Teacher = USUAL
    ids = np.arange(300)
    habit, type_u = teacher.state_best_mask(ids), teacher.type_of(ids)
    for kind in range(8):
        assert len(torch.unique(habit[type_u == kind], dim=0)) == 1
    assert len(torch.unique(habit, dim=0)) == 8


def test_the_recorded_experiment_still_has_its_users() -> None:
    """`SyntheticPopulation(20000, 500).best_mask(np.array([0, 20100])).nonzero()`, when it was first recorded."""
    mask = SyntheticPopulation(20_000, 500).best_mask(np.array([0, 20_100]))
    recorded = [[7, 8, 13, 20, 34, 41, 44, 53], [0, 7, 13, 20, 34, 44, 49, 52]]
    assert [m.nonzero()[:, 0].tolist() for m in mask] == recorded


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "other"}, "kind is one of"),
        ({"kind": "network", "distractors": 2}, "distractors need kind"),
        ({"widths": (64, 24, 10)}, r"at least 24 outputs.*\(64, 24, 24\)"),
        ({"kind": "interacting", "distractors": 2}, "multiple of 4"),
        ({"distractors": 20}, r"within 1\.\.4 units"),
        ({"kind": "interacting", "budget": 20}, "7 pairs of complements and 6 of substitutes, of 6 each"),
        ({"kind": "interacting", "flips": 0.7}, r"within 0\.\.0.66"),
        ({"distractors": 8, "flips": 0.7}, r"within 0\.\.0.625"),
        ({"distractors": -1}, "distractors must be at least 0"),
        ({"late_types": 8}, "fewer than the 8 types"),
        ({"outliers": 1.0}, "outliers are a share"),
        ({"hit": -1.0}, "hit must be at least 0"),
    ],
)
def test_a_population_that_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        replace(USUAL, **options)
