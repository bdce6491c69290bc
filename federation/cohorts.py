"""Who takes part in a round: a function of the seed and the round alone, so a resume draws the same cohorts.

A cohort costs O(cohort), whatever the population: its members are positions of a keyed permutation
(`federation/permutation.py`).
"""

from __future__ import annotations

import numpy as np

from federation.config import FederationConfig
from federation.errors import PopulationError
from federation.permutation import permuted
from federation.streams import Streams, UserIds


def draw_cohort(
    train_users: range | UserIds, federation: FederationConfig, streams: Streams, round_index: int
) -> UserIds:
    """The training users of a round (counted from 1), ascending. `streams` is the run's.

    With sampling "uniform", `federation.cohort` different users of those who have joined by then, drawn anew each
    round: users join in the order of `train_users`. With "epochs", everyone takes
    part once in `rounds_per_epoch` rounds: an epoch's cohorts are dealt out from one permutation, and the last of
    them is what is left.

    Raises PopulationError when there are fewer users than a cohort.
    """
    size, count = federation.cohort, len(train_users)
    if size > count:
        raise PopulationError(
            f"a cohort of {size} needs as many training users, the population has {count}; "
            "lower federation.cohort or give more users"
        )
    if federation.sampling == "uniform":
        dealt, places = streams.at("round", round_index, "cohort"), np.arange(size)
        count = federation.joined(count, round_index)
    else:
        epoch, turn = divmod(round_index - 1, rounds_per_epoch(count, size))
        dealt, places = streams.at("epoch", epoch, "cohort"), np.arange(turn * size, min(count, (turn + 1) * size))
    positions = permuted(places, count, dealt)
    if isinstance(train_users, range):
        return np.sort(train_users.start + train_users.step * positions)
    return np.sort(train_users[positions])


def rounds_per_epoch(users: int, cohort: int) -> int:
    """Rounds in which everyone takes part once, with sampling "epochs"."""
    return -(-users // cohort)
