"""New users, served by every method and measured on the test part of their own data.

Tuning effort is equal: each method's rate and steps are chosen from one grid, on the test parts of training users
whose groups no federation has visited, so that a trained pool has no advantage there. New users never choose anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federation import masks
from federation.config import RunConfig
from federation.data.population import Population, as_array
from federation.errors import ConfigError, PopulationError
from federation.pool.model import PooledModel
from federation.pool.spec import SECTION_PREFIX
from federation.streams import UserIds
from simulations.cached import check_caches, fitted_weights, mixed_loss
from simulations.compute.worker import Job, blocks
from simulations.compute.workers import Workers
from simulations.methods import TEACHERS, Choice, Method, methods_of
from simulations.progress import Progress, Stage
from simulations.serve import Plan, Served, Trained, propose_masks, serve_block
from simulations.setup import Setup, Teacher
from simulations.statistics import Floats
from simulations.variants import MAIN, begins_as_the_teachers

NEIGHBOURS = (1, 3, 5, 10)
"""Numbers of neighbours to choose from, where a user's examples vote."""


@dataclass(frozen=True)
class MethodResult:
    """One row of the table, by user. loss_u: bits per character. quality_u: as in `Served`."""

    method: Method
    learning_rate: float
    steps: int
    loss_u: Floats
    bytes_u: Floats
    active_share: float
    seconds_per_user: float
    quality_u: Floats | None = None


@dataclass(frozen=True)
class Evaluation:
    """All rows, over the same users in the same order, and the users' masks (U, G) by each choice.

    usual: how the main federation itself chooses; its masks are always there. modules: the names of the adapted ones.
    """

    user_ids: UserIds
    groups_u: UserIds
    results: Sequence[MethodResult]
    masks: Mapping[Choice, Tensor]
    usual: Choice
    modules: Sequence[str]


def evaluate(workers: Workers, population: Population, trained: Trained, progress: Progress) -> Evaluation:
    """Chooses each method's tuning on training users, then serves `evaluate.users` new users by it."""
    config = trained.config
    methods = methods_of(config)
    tuning_ids, new_ids = evaluated_users(population, config)
    tuning_blocks, new_blocks = _cut(tuning_ids, config), _cut(new_ids, config)
    shared = workers.share(trained)

    usual = usual_choice(config)
    choices = list(dict.fromkeys([usual, *[method.choice for method in methods if method.choice is not None]]))

    tuning, serving = len(tuning_blocks), len(new_blocks)
    stage = progress.stage
    propose = partial(_propose, workers, shared, population, choices)
    tuning_masks = propose(tuning_ids, tuning_blocks, stage("propose masks", tuning))
    grid = [plan for method in methods for plan in plans_of(method, config)]
    trials = _serve(workers, shared, tuning_ids, tuning_blocks, tuning_masks, grid, stage("choose rates", tuning))
    chosen = [min(plans_of(method, config), key=lambda plan: _mean_loss(plan, trials[plan])) for method in methods]
    new_masks = propose(new_ids, new_blocks, stage("propose new masks", serving))
    served = _serve(workers, shared, new_ids, new_blocks, new_masks, chosen, stage("serve new users", serving))
    results = [_result(plan, served[plan], trials[plan]) for plan in chosen]
    modules = [name.removeprefix(SECTION_PREFIX) for name in trained.values[MAIN] if name.startswith(SECTION_PREFIX)]
    ranks = {name: trained.configs.get(name, config).pool.rank for name in {choice.pool for choice in choices}}
    proposed = {choice: masks.unpack(packed, ranks[choice.pool] * len(modules)) for choice, packed in new_masks.items()}
    return Evaluation(new_ids, population.groups(new_ids), results, proposed, usual, modules)


def usual_choice(config: RunConfig) -> Choice:
    """How the main federation's policy chooses; by saliency where it leaves no choice."""
    policy = config.gate.policy
    return Choice("saliency" if policy == "all" else policy, MAIN, config.evaluate.gain_examples, config.gate.budget)


def check_methods(methods: Sequence[Method], population: Population, federations: Mapping[str, Setup]) -> None:
    """Raises ConfigError when a method needs another population, or another pool: before anything is trained."""
    check_caches(methods, population)
    configs = {name: setup.config for name, setup in federations.items()}
    for method in methods:
        if method.mask == "head" or method.neighbours:
            _check_head(method, federations[MAIN].model)
        if method.shots:
            _check_shots(method, population, federations[MAIN])
        if method.mask not in (*TEACHERS, "informed"):
            continue
        if not isinstance(population, Teacher):
            raise ConfigError(
                f"the method {method.name!r} needs a population with known best masks, {population.name!r} has none; "
                "leave it out of evaluate.methods"
            )
        if not begins_as_the_teachers(configs, method.source):
            raise ConfigError(
                f"best masks are of the teacher's units, the pool of {method.source!r} has units of its own, in "
                f"{method.name!r}; set pool.start = 'teacher', or leave the method out"
            )
        setup = federations[method.source]
        units, known = setup.model.spec.units, _known_units(method, population, setup)
        if units != known:
            raise ConfigError(
                f"best masks are of {known} units, the pool of {method.source!r} has {units}, in {method.name!r}; "
                "give the pool the population's rank and modules, or leave the method out"
            )


def _check_head(method: Method, model: PooledModel) -> None:
    base = model.base
    if base.head is None:
        raise ConfigError(
            f"the method {method.name!r} needs a base with a head that classifies, {base.name!r} has none; "
            "leave it out of evaluate.methods"
        )
    if base.head not in {m.name for m in model.spec.modules}:
        raise ConfigError(
            f"the method {method.name!r} needs the base's head {base.head!r} among the adapted layers; "
            "add it to pool.target_modules, or leave the method out"
        )


def _check_shots(method: Method, population: Population, setup: Setup) -> None:
    first = as_array(population.users("new")[:1])
    owned = int((population.batch(first, "support", None, setup.streams).weight > 0).sum())
    if method.shots > owned:
        raise ConfigError(
            f"a user owns {owned} support examples (user {first[0]} of {population.name!r}), got shots = "
            f"{method.shots} in {method.name!r}; lower it, or give users more"
        )


def _known_units(method: Method, population: Population, setup: Setup) -> int:
    """How many units the masks of a method are of. Raises ConfigError where the population does not know them."""
    assert isinstance(population, Teacher), population.name
    first = as_array(population.users("train")[:1])
    if method.mask != "informed":
        return population.best_mask(first).shape[1]
    example = population.batch(first, "support", 1, setup.streams)
    try:
        return population.informed_mask(first, example).shape[1]
    except PopulationError as error:
        raise ConfigError(f"the method {method.name!r} cannot be measured here: {error}, or leave it out") from error


def federated_users(population: Population, config: RunConfig) -> range | UserIds:
    """The training users that take part in federations: all but those that later choose rates and steps, and those
    of the same groups.

    Raises PopulationError when there are too few to evaluate: before a federation spends its time.
    """
    train = population.users("train")
    if not config.evaluate.methods:
        return train
    tuning_ids, _ = evaluated_users(population, config)
    rest = train[: len(train) - len(tuning_ids)]
    related = np.isin(population.groups(as_array(rest)), population.groups(tuning_ids))
    return as_array(rest)[~related] if related.any() else rest


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
    """Every rate and number of steps, or of neighbours, that a method may choose from."""
    if method.neighbours:
        return [Plan(method, 0.0, neighbours) for neighbours in NEIGHBOURS]
    if method.tuned == "nothing" or method.steps == 0:
        return [Plan(method, 0.0, 0)]
    rates = (0.0,) if method.by == "rule" else config.evaluate.learning_rates
    many = config.evaluate.steps if method.steps is None else (method.steps,)
    return [Plan(method, rate, steps) for rate in rates for steps in many]


def _cut(ids: UserIds, config: RunConfig) -> list[slice]:
    return list(blocks(len(ids), config.evaluate.block))


def _run_all(workers: Workers, job: Job, arguments: Sequence[tuple[Any, ...]], stage: Stage) -> list[Any]:
    """Every job's report, in the jobs' order."""
    found: dict[int, Any] = {}
    for position, _, report in workers.run(job, arguments):
        found[position] = report
        stage.update(len(found), "")
    stage.close()
    return [found[position] for position in range(len(arguments))]


def _propose(
    workers: Workers,
    trained: Any,
    population: Population,
    choices: Sequence[Choice],
    ids: UserIds,
    parts: Sequence[slice],
    stage: Stage,
) -> dict[Choice, Tensor]:
    """Every user's mask by every choice, packed; "other" is the gate's mask of a user half the list away."""
    own = {choice: replace(choice, rule="gate") if choice.rule == "other" else choice for choice in choices}
    asked = list(dict.fromkeys(choice for choice in own.values() if choice.rule not in TEACHERS))
    proposals = _run_all(workers, propose_masks, [(trained, ids[part], asked) for part in parts], stage)
    packed = {choice: torch.cat([proposal[choice] for proposal in proposals]) for choice in asked}
    if isinstance(population, Teacher):
        best = {"best": population.best_mask, "type": population.state_best_mask}
        packed |= {choice: masks.pack(best[choice.rule](ids)) for choice in choices if choice.rule in best}
    return {
        choice: packed[own[choice]].roll(len(ids) // 2, 0) if choice.rule == "other" else packed[choice]
        for choice in choices
    }


def _serve(
    workers: Workers,
    trained: Any,
    ids: UserIds,
    parts: Sequence[slice],
    packed: Mapping[Choice, Tensor],
    plans: Sequence[Plan],
    stage: Stage,
) -> dict[Plan, list[Served]]:
    """Each plan's results, block after block."""
    jobs = [(trained, ids[part], {name: mask[part] for name, mask in packed.items()}, plans) for part in parts]
    served = _run_all(workers, serve_block, jobs, stage)
    return {plan: [block[plan] for block in served] for plan in plans}


def _loss(plan: Plan, served: Sequence[Served], trial: Sequence[Served]) -> Floats:
    """What each served user gets, with the cache if the method has one: its weights are fitted on the trial's users."""
    if not plan.method.cache:
        return np.concatenate([s.loss_u for s in served])
    weight_l = fitted_weights([s.figures for s in trial if s.figures is not None])
    return np.concatenate([mixed_loss(s.figures, weight_l) for s in served if s.figures is not None])


def _mean_loss(plan: Plan, trial: Sequence[Served]) -> float:
    """Of the users that choose; infinite where a rate diverged."""
    mean = float(_loss(plan, trial, trial).mean())
    return mean if math.isfinite(mean) else math.inf


def _result(plan: Plan, served: Sequence[Served], trial: Sequence[Served]) -> MethodResult:
    users = sum(len(s.loss_u) for s in served)
    quality = [s.quality_u for s in served if s.quality_u is not None]
    return MethodResult(
        method=plan.method,
        learning_rate=plan.learning_rate,
        steps=plan.steps,
        loss_u=_loss(plan, served, trial),
        bytes_u=np.concatenate([s.bytes_u for s in served]).astype(np.float64),
        active_share=sum(s.active_share * len(s.loss_u) for s in served) / users,
        seconds_per_user=sum(s.seconds for s in served) / users,
        quality_u=np.concatenate(quality) if quality else None,
    )
