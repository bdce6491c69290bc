"""The whole of `fedquilt simulate` against the bare engine: what is left of its speed after everything around it.

A round draws a cohort, gives chunks to Ray workers, which read the user store, draw data, ask the gate, train, measure
rewards and lift admitted updates; then it merges, steps and writes a checkpoint. The bare engine is `sgd` alone, over
rows and batches that lie ready, in blocks of the same size on the same workers. They take turns, round by round.

A breakdown by a profiler, in one process, says where a round's time goes.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Mapping
from cProfile import Profile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import CodeType
from typing import Any

import numpy as np

from client.adapt import sgd, unit_gains
from client.policies import highest
from client.rewards import MaskReward
from client.round import local_round, round_data
from client.store import UserStore
from federation.config import RunConfig
from federation.exploration import Exploration
from federation.gate import GateSpec
from federation.pool.spec import gather, rows_of_mask
from federation.streams import UserIds
from federation.update import Values
from server import checkpoint
from server.round import lift
from simulations.benchmarks.federations import Federation, Laps, settings, started
from simulations.compute.worker import Worker, blocks

WARMUP = 1
"""Rounds that are not counted: in the first, workers make the parts of the federation."""

_PARTS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "data": (round_data,),
    "gains": (unit_gains,),
    "gate's network": (GateSpec.logits, GateSpec.vjp),
    "sampling of masks": (Exploration.sample,),
    "training": (sgd,),
    "rewards": (MaskReward.reward, MaskReward.reward_gradient),
    "admission and lift": (lift,),
    "store": (UserStore.read, UserStore.write, UserStore.compact),
    "checkpoint": (checkpoint.save,),
}
"""Functions that share no time; each part's is theirs together."""

_IN_LOCAL_ROUND = ("gains", "gate's network", "sampling of masks", "training", "rewards")


@dataclass(frozen=True)
class Pipeline:
    """Users per second of both sides, round by round, and seconds per user by part of a round.

    config: what both sides did. The breakdown is of fewer rounds, in one process.
    """

    config: RunConfig
    simulate: tuple[float, ...]
    engine: tuple[float, ...]
    breakdown: Mapping[str, float]

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints, from medians."""
        simulate, engine = median(self.simulate), median(self.engine)
        return {
            "simulate": round(simulate, 1),
            "engine": round(engine, 1),
            "share_of_engine": round(simulate / engine, 3),
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            **settings(self.config),
            "microseconds_per_user": {part: round(1e6 * taken, 1) for part, taken in self.breakdown.items()},
            "simulate_users_per_second": list(self.simulate),
            "engine_users_per_second": list(self.engine),
        }


def measure(config: RunConfig, rounds: int) -> Pipeline:
    """`rounds` counted rounds of both sides in turns; then the breakdown of a third as many others."""
    both = with_rounds(config, WARMUP + rounds)
    simulate, engine = alternating(both)
    alone = with_rounds(config, WARMUP + max(rounds // 3, 1))
    alone = alone.model_copy(update={"compute": config.compute.model_copy(update={"workers": 0})})
    return Pipeline(both, tuple(simulate[WARMUP:]), tuple(engine[WARMUP:]), breakdown(alone))


def with_rounds(config: RunConfig, rounds: int) -> RunConfig:
    """The federation, cut so that all of its rounds do the same: the gate learns in each, a checkpoint ends each."""
    federation = config.federation.model_copy(update={"rounds": rounds, "checkpoint_every": 1})
    gate = config.gate.model_copy(update={"warmup": 0, "every": 1})
    return config.model_copy(update={"federation": federation, "gate": gate})


def alternating(config: RunConfig) -> tuple[list[float], list[float]]:
    """Users per second of each round, and of the engine after each."""
    engine: list[float] = []
    with tempfile.TemporaryDirectory() as folder, started(config) as federation:
        values = federation.workers.share(federation.setup.begin().values)
        laps = Laps(lambda _: engine.append(bare_engine(federation, values)))
        federation.run(Path(folder), laps)
    return [config.federation.cohort / seconds for seconds in laps.seconds], engine


def bare_engine(federation: Federation, values: Any) -> float:
    """Users per second of all workers together, each of which trains its part of a cohort.

    values: the pool's, as the workers share it.
    """
    config = federation.setup.config
    users = np.asarray(federation.train_users[: config.federation.cohort], dtype=np.int64)
    parts = np.array_split(users, max(config.compute.workers, 1))
    finished = federation.workers.run(train_only, [(values, config, part) for part in parts])
    return float(sum(rate for _, _, rate in finished))


def train_only(worker: Worker, values: Values, config: RunConfig, user_ids: UserIds) -> tuple[None, float]:
    """Users per second of `sgd` over ready rows of random masks."""
    setup, local = worker.setup(config), config.local
    spec, streams = setup.model.spec, setup.streams.at("benchmark")
    ready = []
    for part in blocks(len(user_ids), config.compute.block):
        ids = user_ids[part]
        uniform_ug, budget = streams.uniform("mask", ids, (spec.units,)), config.gate.budget
        mask_ug = highest(uniform_ug, spec, config.gate, budget, budget / spec.rank)
        rows = gather(values, spec, *rows_of_mask(mask_ug, len(spec.modules), config.gate.max_rows(spec.rank)))
        support = round_data(worker, ids, setup.local, streams).support
        batches = [support.window(i * local.examples, (i + 1) * local.examples) for i in range(local.different_batches)]
        ready.append((rows, batches))
    started_at = time.perf_counter()
    for rows, batches in ready:
        sgd(setup.model, rows, batches, local.steps, local.learning_rate, local.factors(1))
    return None, len(user_ids) / (time.perf_counter() - started_at)


def breakdown(config: RunConfig) -> dict[str, float]:
    """Seconds per user of each part of a round, without the first round, in one process."""
    profile = Profile(builtins=False)
    laps = Laps(lambda report: profile.enable() if report.round_index == WARMUP else None)
    with tempfile.TemporaryDirectory() as folder, started(config) as federation:
        federation.run(Path(folder), laps)
        profile.disable()
    inclusive = {entry.code: entry.totaltime for entry in profile.getstats()}
    taken = {part: sum(inclusive.get(code_of(f), 0.0) for f in functions) for part, functions in _PARTS.items()}
    named = sum(taken[part] for part in _IN_LOCAL_ROUND)
    taken["rest of the local round"] = inclusive[code_of(local_round)] - named
    taken["all else"] = sum(laps.seconds[WARMUP:]) - sum(taken.values())
    users = config.federation.cohort * (config.federation.rounds - WARMUP)
    return {part: seconds / users for part, seconds in taken.items()}


def code_of(function: Callable[..., Any]) -> CodeType:
    """By which a profiler knows a function, below what decorates it."""
    code = inspect.unwrap(function).__code__
    assert isinstance(code, CodeType)
    return code
