"""Figures over users, with errors that respect that users of one group (a project, a play) are not independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]

BOOTSTRAP_SAMPLES = 2000


def clustered_error(values_u: Floats, groups_u: Groups) -> float:
    """Standard error of the mean, clustered: sqrt(C / (C - 1) * sum_c (sum_{u in c} (v_u - mean))^2) / U.

    Liang & Zeger (1986) for a mean, with the small-sample factor. With one user per group it is the usual error.
    NaN for fewer than two groups.
    """
    _, index = np.unique(groups_u, return_inverse=True)
    sums = np.bincount(index, weights=values_u - values_u.mean())
    clusters = len(sums)
    if clusters < 2:
        return float("nan")
    return float(np.sqrt(clusters / (clusters - 1) * np.square(sums).sum()) / len(values_u))


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def bootstrap(values_u: Floats, groups_u: Groups, seed: int = 0) -> Interval:
    """95% percentile interval of the mean, groups drawn with replacement (Efron, 1979; Davison & Hinkley, 3.8).

    For a paired comparison, give the differences.
    """
    _, index = np.unique(groups_u, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values_u), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (BOOTSTRAP_SAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values_u.mean()), float(low), float(high))
