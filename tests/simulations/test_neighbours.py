"""Votes of a user's own examples against a loop over users, examples and neighbours."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from federation.data.population import Batch, side_by_side
from federation.pool.model import PooledModel
from simulations.neighbours import classes_of, votes
from tests.simulations.sorters import CLASSES, OWNED, sorter_base, sorters


def part_of(part: str, examples: int = OWNED) -> Batch:
    return sorters().parts[part].take(torch.arange(4)).window(0, examples)


def chances(support: Batch, point: torch.Tensor, u: int, k: int) -> list[float]:
    """Of each class, by one vote after the other over the plain base's features, with 0.1 votes beforehand."""
    base = sorter_base()
    features = base.features(base.module, support.inputs[u])
    mine = base.features(base.module, point[None])[0]
    near = sorted(
        ((float(F.cosine_similarity(mine, f, dim=0)), int(t)) for f, t in zip(features, support.targets[u])),
        reverse=True,
    )[:k]
    found = [0.1] * CLASSES
    for similarity, target in near:
        found[target] += math.exp((similarity - near[0][0]) / 0.1)
    return [vote / sum(found) for vote in found]


@pytest.mark.parametrize(("k", "examples"), [(1, OWNED), (3, OWNED), (10, 4), (3, 1)])
def test_losses_and_right_answers_are_those_of_a_loop(k: int, examples: int) -> None:
    support, test = part_of("support", examples), part_of("test")
    model = PooledModel.around(sorter_base(), 5, 1.0)
    loss_u, right_u, seconds = votes(model, support, test, k)
    for u in range(4):
        own = [n for n in range(OWNED) if test.weight[u, n] > 0]
        assert len(own) == OWNED - 1 - (u + 1) % 2
        found = [chances(support, test.inputs[u, n], u, k) for n in own]
        targets = [int(test.targets[u, n]) for n in own]
        expected = sum(-math.log(chance[target]) for chance, target in zip(found, targets)) / len(own)
        right = sum(chance.index(max(chance)) == target for chance, target in zip(found, targets)) / len(own)
        assert float(loss_u[u]) == pytest.approx(expected, rel=1e-4)
        assert float(right_u[u]) == pytest.approx(right, abs=1e-6)
    assert seconds > 0
    assert loss_u.min() < loss_u.max()


def test_padding_has_no_vote() -> None:
    support, test = part_of("support", 6), part_of("test")
    echo = test.window(0, 4)
    wrong = Batch(echo.inputs, (echo.targets + 1) % CLASSES, torch.zeros(4, 4))
    model = PooledModel.around(sorter_base(), 5, 1.0)
    padded = votes(model, side_by_side([support, wrong]), test, 3)
    torch.testing.assert_close(padded[:2], votes(model, support, test, 3)[:2])


def test_the_head_says_how_many_classes_there_are() -> None:
    model = PooledModel.around(sorter_base(), 5, 1.0)
    assert classes_of(model) == CLASSES
