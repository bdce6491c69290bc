"""New users, served by every method and measured on the test part of their own data.

Tuning effort is equal: each method's rate and steps are chosen from one grid, on the test parts of training users
whom no federation has visited, so that a trained pool has no advantage there. New users never choose anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federation import masks
from federation.config import RunConfig
from federation.data.population import Population, as_array
from federation.errors import PopulationError
from federation.pool.spec import SECTION_PREFIX
from federation.streams import UserIds
from simulations.cached import fitted_weights, mixed_loss
from simulations.methods import Method, methods_of
from simulations.serve import Plan, Served, Trained, propose_masks, serve_block
from simulations.statistics import Floats
from simulations.worker import blocks
from simulations.workers import Workers

Progress = Callable[[int, int], None]
"""Told how much of the work is done, and how much there is, in blocks of users."""


@dataclass(frozen=True)
class MethodResult:
    """One row of the table, by user. loss_u: bits per character."""

    method: Method
    learning_rate: float
    steps: int
    loss_u: Floats
    bytes_u: Floats
    active_share: float
    seconds_per_user: float


@dataclass(frozen=True)
class Evaluation:
    """All rows, over the same users in the same order, and what masks each rule proposed (U, G).

    modules: the names of the adapted modules.
    """

    user_ids: UserIds
    groups_u: UserIds
    results: Sequence[MethodResult]
    masks: Mapping[str, Tensor]
    modules: Sequence[str]


def evaluate(workers: Workers, population: Population, trained: Trained, progress: Progress) -> Evaluation:
    """Chooses each method's tuning on training users, then serves `evaluate.users` new users by it."""
    config = trained.config
    methods = methods_of(config)
    tuning_ids, new_ids = evaluated_users(population, config)
    tuning_blocks, new_blocks = _cut(tuning_ids, config), _cut(new_ids, config)
    done = _Counter(progress, 2 * len(tuning_blocks) + 2 * len(new_blocks))
    shared = workers.share(trained)
    tuning_masks = _propose(workers, shared, tuning_ids, tuning_blocks, done)
    new_masks = _propose(workers, shared, new_ids, new_blocks, done)
    grid = [plan for method in methods for plan in plans_of(method, config)]
    trials = _serve(workers, shared, tuning_ids, tuning_blocks, tuning_masks, grid, done)
    chosen = [min(plans_of(method, config), key=lambda plan: _mean_loss(trials[plan])) for method in methods]
    served = _serve(workers, shared, new_ids, new_blocks, new_masks, chosen, done)
    modules = [name.removeprefix(SECTION_PREFIX) for name in trained.values["pool"] if name.startswith(SECTION_PREFIX)]
    units = config.pool.rank * len(modules)
    results = [_result(plan, served[plan], trials[plan]) for plan in chosen]
    proposed = {name: masks.unpack(mask, units) for name, mask in new_masks.items()}
    return Evaluation(new_ids, population.groups(new_ids), results, proposed, modules)


def federated_users(population: Population, config: RunConfig) -> range | UserIds:
    """The training users that take part in federations: all but those that later choose rates and steps.

    Raises PopulationError when there are too few to evaluate: before a federation spends its time.
    """
    train = population.users("train")
    if not config.evaluate.methods:
        return train
    tuning_ids, _ = evaluated_users(population, config)
    return train[: len(train) - len(tuning_ids)]


def evaluated_users(population: Population, config: RunConfig) -> tuple[UserIds, UserIds]:
    """The training users that choose rates and steps, kept out of the federations, and the new users measured.

    Raises PopulationError when the population has fewer.
    """
    chosen = []
    for split, key in (("train", "tuning_users"), ("new", "users")):
        users, wanted = population.users(split), getattr(config.evaluate, key)
        if len(users) < wanted:
            raise PopulationError(
                f"evaluation wants {wanted} {split} users, the population {population.name!r} has {len(users)}; "
                f"lower evaluate.{key} or give more users"
            )
        chosen.append(as_array(users[len(users) - wanted :]))
    return chosen[0], chosen[1]


def plans_of(method: Method, config: RunConfig) -> list[Plan]:
    """Every rate and number of steps that a method may choose from."""
    if method.tuned == "nothing":
        return [Plan(method, 0.0, 0)]
    return [Plan(method, rate, steps) for rate in config.evaluate.learning_rates for steps in config.evaluate.steps]


class _Counter:
    """Counts finished blocks for the progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _cut(ids: UserIds, config: RunConfig) -> list[slice]:
    return list(blocks(len(ids), config.evaluate.block))


def _propose(workers: Workers, trained: Any, ids: UserIds, parts: Sequence[slice], done: _Counter) -> dict[str, Tensor]:
    """Every kind of mask for every user, packed; "other" is the gate's mask of a user half the list away."""
    found: dict[int, Mapping[str, Tensor]] = {}
    for position, _, proposals in workers.run(propose_masks, [(trained, ids[part]) for part in parts]):
        found[position] = proposals
        done.step()
    packed = {name: torch.cat([found[i][name] for i in range(len(parts))]) for name in found[0]}
    return packed | {"other": packed["gate"].roll(len(ids) // 2, 0)} if "gate" in packed else packed


def _serve(
    workers: Workers,
    trained: Any,
    ids: UserIds,
    parts: Sequence[slice],
    packed: Mapping[str, Tensor],
    plans: Sequence[Plan],
    done: _Counter,
) -> dict[Plan, list[Served]]:
    """Each plan's results, block after block."""
    jobs = [(trained, ids[part], {name: mask[part] for name, mask in packed.items()}, plans) for part in parts]
    found: dict[int, Mapping[Plan, Served]] = {}
    for position, _, served in workers.run(serve_block, jobs):
        found[position] = served
        done.step()
    return {plan: [found[i][plan] for i in range(len(parts))] for plan in plans}


def _mean_loss(served: Sequence[Served]) -> float:
    """Infinite for a plan that diverged: a NaN would compare as the best."""
    return float(np.nan_to_num(np.concatenate([s.loss_u for s in served]), nan=np.inf, posinf=np.inf).mean())


def _result(plan: Plan, served: Sequence[Served], trial: Sequence[Served]) -> MethodResult:
    users = sum(len(s.loss_u) for s in served)
    loss = [s.loss_u for s in served]
    if plan.method.cache:
        weight_l = fitted_weights([s.figures for s in trial if s.figures is not None])
        loss = [mixed_loss(s.figures, weight_l) for s in served if s.figures is not None]
    return MethodResult(
        method=plan.method,
        learning_rate=plan.learning_rate,
        steps=plan.steps,
        loss_u=np.concatenate(loss),
        bytes_u=np.concatenate([s.bytes_u for s in served]).astype(np.float64),
        active_share=sum(s.active_share * len(s.loss_u) for s in served) / users,
        seconds_per_user=sum(s.seconds for s in served) / users,
    )
