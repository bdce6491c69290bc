"""How much the estimators of the gate's gradient vary, at equal cost: the same users, the same data, many draws.

A draw is one estimate of gamma, dJ / d logits, from masks of its own. What it costs is counted in forward passes: one
for each mask tried, three for a gradient of the reward (a backward pass costs two). With half the variance an estimate
may cost twice as much, for then as many passes give as good a mean. So estimators are compared by

    relative = variance * evaluations / (variance * evaluations of leave-one-out with two masks),

and, weighed by measured seconds of the processor instead of evaluations, `relative_in_time`.

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from federation.estimators.protocol import Draws, Estimator, Objective
from federation.exploration import Exploration
from federation.mask_distribution import Bernoulli, FixedBudget

GRADIENT_EVALUATIONS = 3
BASE = "reinforce, K = 2"
"""The label of leave-one-out with two masks."""

Row = dict[str, float]


@dataclass(frozen=True)
class Side:
    """An estimator, by its name, that tries so many masks per user."""

    name: str
    estimator: Estimator
    samples: int


@dataclass(frozen=True)
class Given:
    """What every estimate of a situation is made from.

    draws: the randomness of a side, by its label, in the n-th draw. Each side has its own: means of several would else
    have errors in common.
    """

    distribution: Bernoulli | FixedBudget
    exploration: Exploration
    objective: Objective
    draws: Callable[[str, int], Draws]


@dataclass(frozen=True)
class Moments:
    """What many estimates of one side have in common.

    mean_ug: (U, G). variance: of one estimate, summed over units, mean over users. evaluations: forward passes of
    one estimate, per user. seconds: of one estimate, for all users; the median.
    """

    mean_ug: Tensor
    variance: float
    evaluations: int
    seconds: float


class Counted:
    """An objective that counts what it is asked for, in forward passes per user."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self.evaluations = objective, 0

    def reward(self, masks_ukg: Tensor) -> Tensor:
        self.evaluations += masks_ukg.shape[1]
        return self._objective.reward(masks_ukg)

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += GRADIENT_EVALUATIONS
        return self._objective.reward_gradient(strength_ug)


def all_moments(sides: Sequence[Side], given: Given, draws: int) -> list[Moments]:
    """Of each side, from so many draws, for which the sides take turns; in float64. One draw before is not counted.

    draws: at least 2.
    """
    evaluations, seconds = [], []
    sums: list[tuple[Tensor, Tensor]] = []
    for side in sides:
        counted = Counted(given.objective)
        gamma_ug, _ = _estimate(side, replace(given, objective=counted), draws)
        evaluations.append(counted.evaluations)
        seconds.append([0.0] * draws)
        sums.append((torch.zeros_like(gamma_ug), torch.zeros_like(gamma_ug)))
    for n in range(draws):
        for i, side in enumerate(sides):
            gamma_ug, seconds[i][n] = _estimate(side, given, n)
            sums[i] = _with(sums[i], gamma_ug, n + 1)
    return [
        Moments(mean_ug, float(squares_ug.sum(1).mean()) / (draws - 1), cost, median(taken))
        for (mean_ug, squares_ug), cost, taken in zip(sums, evaluations, seconds, strict=True)
    ]


def compared(sides: Sequence[Side], given: Given, draws: int) -> dict[str, Row]:
    """variance, evaluations and seconds of each side, squared_bias of the biased ones, by label.

    squared_norm: of the gradient itself, mean over users. Needs an unbiased estimator among the sides.
    """
    found = all_moments(sides, given, draws)
    truth_ug, truth_variance = unbiased_mean([m for side, m in zip(sides, found) if side.estimator.unbiased], draws)
    squared_norm = float(truth_ug.square().sum(1).mean()) - truth_variance
    table = {}
    for side, m in zip(sides, found):
        row = {"variance": m.variance, "squared_norm": squared_norm, "evaluations": m.evaluations, "seconds": m.seconds}
        if not side.estimator.unbiased:
            row["squared_bias"] = squared_bias(m, truth_ug, truth_variance, draws)
        table[label(side.name, side.samples)] = row
    return table


def averaged(tables: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    """The mean of several tables of the same sides."""
    return {
        name: {key: sum(table[name][key] for table in tables) / len(tables) for key in row}
        for name, row in tables[0].items()
    }


def with_relatives(table: Mapping[str, Row]) -> dict[str, Row]:
    """A table with `relative` and `relative_in_time`, against leave-one-out with two masks, which it holds.

    A squared bias that is below 0 by chance is 0 here.
    """
    base = table[BASE]
    return {
        name: {
            **row,
            **({"squared_bias": max(0.0, row["squared_bias"])} if "squared_bias" in row else {}),
            "relative": row["variance"] * row["evaluations"] / (base["variance"] * base["evaluations"]),
            "relative_in_time": row["variance"] * row["seconds"] / (base["variance"] * base["seconds"]),
        }
        for name, row in table.items()
    }


def worst(tables: Mapping[str, Mapping[str, Row]], name: str) -> float:
    """The largest `relative` of a side, by its label, over all situations that have it."""
    return max(table[name]["relative"] for table in tables.values() if name in table)


def label(name: str, samples: int) -> str:
    """A side in words."""
    return f"{name}, K = {samples}"


def unbiased_mean(found: Sequence[Moments], draws: int) -> tuple[Tensor, float]:
    """The mean of unbiased estimators, each weighed by the inverse of its variance, (U, G), and its own variance."""
    tiny = torch.finfo(torch.float64).tiny
    weights = torch.tensor([1 / max(m.variance, tiny) for m in found], dtype=torch.float64)
    share = weights / weights.max()  # the inverse of tiny times their number would overflow
    mean_ug = torch.einsum("n,nug->ug", share / share.sum(), torch.stack([m.mean_ug for m in found]))
    return mean_ug, 1 / float(weights.max()) / float(share.sum()) / draws


def squared_bias(biased: Moments, truth_ug: Tensor, truth_variance: float, draws: int) -> float:
    """Squared distance of the means, summed over units, mean over users, less what their own variances make of it.

    Unbiased itself, so that of a small bias may be below 0 by chance.
    """
    distance = float((biased.mean_ug - truth_ug).square().sum(1).mean())
    return distance - biased.variance / draws - truth_variance


def _estimate(side: Side, given: Given, n: int) -> tuple[Tensor, float]:
    """The n-th draw's gamma in float64, and its seconds. A new distribution: one keeps what it has computed."""
    distribution = replace(given.distribution)
    draws, started = given.draws(label(side.name, side.samples), n), time.process_time()
    found = side.estimator.estimate(distribution, given.objective, given.exploration, side.samples, draws)
    return found.gamma_ug.double(), time.process_time() - started


def _with(sums: tuple[Tensor, Tensor], gamma_ug: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations with one more value (Welford, 1962)."""
    mean_ug, squares_ug = sums
    before_ug = gamma_ug - mean_ug
    mean_ug = mean_ug + before_ug / count
    return mean_ug, squares_ug + before_ug * (gamma_ug - mean_ug)
