"""What the gate costs of a round on W2's model and data, and how much its estimators vary.

A round is `local_round` of one block of users in one process of one thread, in seconds of the processor: with random
masks, with masks that the gate chooses, and with a gate that learns too, by each estimator. They take turns.

    gate_share = (learning - random) / learning = choice_share + estimate_share
    choice_share = (choosing - random) / learning: gains, features, logits and a mask
    estimate_share = (learning - choosing) / learning: rewards of masks, the estimate, the gate's gradient

Where the gate learns in each n-th round only, `learning` is the mean over n rounds. Both kinds of masks have random
masks of their own to be compared with: Bernoulli ones are of any size, so more rows are trained. Shares by estimator
are those of a round in which it learns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from cProfile import Profile
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from client.adapt import sgd, unit_gains
from client.rewards import MaskReward
from client.round import RoundState, local_round, round_data
from federation.config import EstimatorConfig, GateConfig, RunConfig
from federation.data.registry import make_population
from federation.estimators.registry import ESTIMATORS
from federation.exploration import Exploration
from federation.gate import GateSpec
from federation.gate_config import DistributionKind
from federation.pool.model import PooledModel
from federation.settings import parse
from simulations.benchmarks.clock import one_thread
from simulations.benchmarks.estimators import Row, label, worst
from simulations.benchmarks.pipeline import code_of
from simulations.benchmarks.situations import Situation, variances
from simulations.benchmarks.workloads import ROUND, SEED, pool_values, workload
from simulations.setup import set_up, wrap

WORKLOAD = "w2"
EXAMPLES = 4
"""That gains, context and rewards are taken from: windows of 64 tokens."""

_PARTS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "gains": (unit_gains,),
    "context": (PooledModel.features,),
    "gate's network": (GateSpec.logits, GateSpec.vjp),
    "masks and their weights": (Exploration.sample,),
    "rewards": (MaskReward.reward,),
    "rewards' gradient": (MaskReward.reward_gradient,),
    "training": (sgd,),
}
"""Functions that share no time; each part's is theirs together."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a round: with random masks, with a gate that chooses, with one that learns too in each n-th round."""

    random: float
    choosing: float
    learning: float
    every: int = 1

    @property
    def seconds(self) -> float:
        """Of a round with the gate, mean over n rounds."""
        return self.choosing + (self.learning - self.choosing) / self.every

    @property
    def shares(self) -> Row:
        """As the head of this file has them; the first is the sum of the others."""
        return {
            "gate_share": (self.seconds - self.random) / self.seconds,
            "choice_share": (self.choosing - self.random) / self.seconds,
            "estimate_share": (self.seconds - self.choosing) / self.seconds,
        }


@dataclass(frozen=True)
class GateBench:
    """What was measured.

    users: of the block. seconds: of each counted round, by side. parts: seconds of a profiled round with the default
    estimator, by part. variance: by situation and side, see `estimators.compared`.
    """

    users: int
    seconds: Mapping[str, tuple[float, ...]]
    parts: Mapping[str, float]
    draws: int
    variance: Mapping[str, Mapping[str, Row]]

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: the default estimator's. variance_ratio: of the worst situation."""
        gate, side = GateConfig(), label(GateConfig().estimator.name, GateConfig().samples)
        shares = self.cost(gate.estimator.name, gate.every).shares
        return {
            "estimator": gate.estimator.name,
            "samples": gate.samples,
            "every": gate.every,
            **{name: round(share, 3) for name, share in shares.items()},
            "variance_ratio": round(worst(self.variance, side), 4),
            "variance_ratio_by_situation": {
                name: round(table[side]["relative"], 4) for name, table in self.variance.items() if side in table
            },
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        each = {name: self.cost(name, 1).shares for name in ESTIMATORS.builtin}
        return {
            "workload": WORKLOAD,
            "seed": SEED,
            "users": self.users,
            "gain_examples": EXAMPLES,
            "query_examples": EXAMPLES,
            "processes": 1,
            "threads": 1,
            "config": config_of(GateConfig().estimator.name, self.users).model_dump(
                mode="json", include={"pool", "gate", "local"}
            ),
            "gate_share_by_estimator": {name: round(shares["gate_share"], 3) for name, shares in each.items()},
            "estimate_share_by_estimator": {name: round(shares["estimate_share"], 3) for name, shares in each.items()},
            "seconds": {name: list(taken) for name, taken in self.seconds.items()},
            "seconds_by_part": dict(self.parts),
            "share_by_part": {part: round(t / sum(self.parts.values()), 3) for part, t in self.parts.items()},
            "draws": self.draws,
            "variance": self.variance,
        }

    def cost(self, estimator: str, every: int) -> Cost:
        """Of an estimator, in medians."""
        kind = kind_of(estimator)
        sides = (f"random, {kind}", f"choosing, {kind}", estimator)
        random, choosing, learning = (median(self.seconds[side]) for side in sides)
        return Cost(random, choosing, learning, every)


def measure(users: int, repetitions: int, situations: Iterable[Situation], draws: int) -> GateBench:
    """Rounds of a block of users, and the variance of the estimators in the given situations."""
    with one_thread():
        sides = rounds_of(users)
        taken = in_turns(sides, repetitions)
        parts = breakdown(sides[GateConfig().estimator.name])
        variance = variances(situations, draws)
    return GateBench(users, taken, parts, draws, variance)


def in_turns(sides: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, tuple[float, ...]]:
    """As `clock.in_turns`, in seconds of the processor: with one thread, what else runs then hardly counts."""
    for work in sides.values():
        work()
    turns = [[cpu_seconds(work) for work in sides.values()] for _ in range(repetitions)]
    return dict(zip(sides, zip(*turns, strict=True), strict=True))


def cpu_seconds(work: Callable[[], object]) -> float:
    """What it takes of this process's processor time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def rounds_of(users: int) -> dict[str, Callable[[], object]]:
    """A round of every side, by its name: random masks and a gate that only chooses by kind of masks, estimators."""
    default = GateConfig().estimator.name
    by_kind = {kind_of(name): name for name in (*ESTIMATORS.builtin, default)}
    sides = {}
    for kind, name in by_kind.items():
        sides[f"random, {kind}"] = _round(config_of(name, users, policy="random"), ROUND)
        # The second of every two rounds is one in which the gate chooses, and does not learn.
        sides[f"choosing, {kind}"] = _round(config_of(name, users, every=2), ROUND + 1)
    return sides | {name: _round(config_of(name, users, every=1), ROUND) for name in ESTIMATORS.builtin}


def kind_of(estimator: str) -> DistributionKind:
    """The kind of masks that an estimator is timed with: the default's, if it works for these."""
    kinds = ESTIMATORS.load(estimator).distributions  # type: ignore[attr-defined]
    return GateConfig().distribution if GateConfig().distribution in kinds else kinds[0]


def config_of(estimator: str, users: int, **gate: Any) -> RunConfig:
    """W2 with a gate in place of random masks, from the first round on; everything else of the gate is the default."""
    config = workload(WORKLOAD).config
    default = GateConfig().estimator
    chosen = default if default.name == estimator else EstimatorConfig(name=estimator)
    settings = config.model_dump()
    settings["population"]["options"]["train_users"] = users
    settings["local"] |= {"gain_examples": EXAMPLES, "query_examples": EXAMPLES}
    settings["gate"] = {
        "budget": config.gate.budget,
        "warmup": 0,
        "distribution": kind_of(estimator),
        "estimator": chosen.model_dump(),
        **gate,
    }
    return parse(RunConfig, settings)


def breakdown(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of each part of a round, under a profiler."""
    profile = Profile(time.process_time, builtins=False)
    profile.enable()
    total = cpu_seconds(work)
    profile.disable()
    inclusive = {entry.code: entry.totaltime for entry in profile.getstats()}
    taken = {part: sum(inclusive.get(code_of(f), 0.0) for f in functions) for part, functions in _PARTS.items()}
    return {**taken, "all else": total - sum(taken.values())}


def _round(config: RunConfig, round_index: int) -> Callable[[], object]:
    """The round of all training users in one block, everything else made before. It can be done again and again."""
    population = make_population(config.population)
    setup = set_up(config, wrap(config, population.base_model()))
    values = {**setup.begin().values, **pool_values(setup.model.spec)}
    ids = np.asarray(population.users("train"), dtype=np.int64)
    streams = setup.streams.at("round", ROUND)
    data = round_data(population, ids, setup.local, streams)
    state = RoundState(values, round_index, "benchmark")
    return partial(local_round, setup.model, state, setup.record_layout.fresh(ids), data, setup.local, streams)
