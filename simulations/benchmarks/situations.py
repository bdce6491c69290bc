"""Where estimators of the gate's gradient are compared: users, their data, a pool and a gate.

The synthetic ones have the teacher's pool and an untrained gate, which trusts the gains; a finished run has what it
trained. Rewards are taken before any adaptation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from client.gate_round import UserDraws, propose
from client.policies import Known, Signals
from client.rewards import Adaptation, MaskReward
from client.round import round_data
from federation.config import EstimatorConfig, GateConfig, RunConfig, load_config
from federation.data.population import Population
from federation.data.registry import make_population
from federation.errors import ConfigError
from federation.estimators.registry import ESTIMATORS
from federation.gate_config import DistributionKind
from federation.mask_distribution import Bernoulli, FixedBudget
from federation.update import Values
from server.round import from_checkpoint
from simulations.benchmarks.estimators import Given, Row, Side, averaged, compared, with_relatives
from simulations.candidates import recorded_checkpoint
from simulations.compute.worker import Worker
from simulations.record import read_record, recorded_config
from simulations.setup import Setup, first_pool, set_up, wrap

KINDS: tuple[DistributionKind, ...] = get_args(DistributionKind)

_SYNTHETIC: Mapping[str, tuple[str, ...]] = {
    "network": ("population.options={kind='network', new_users=0}", "pool.rank=32", "gate.budget=4"),
    **{
        kind: (
            f"population.options={{kind='{kind}', new_users=0, widths=[64, 24, 24], rank=24, budget=6, noise=1.0}}",
            "pool.rank=24",
            "gate.budget=6",
        )
        for kind in ("additive", "interacting")
    },
}
"""Settings by kind of population. The latter two: 48 units, of which a quarter is right, and gains in doubt."""

_COMMON = (
    "population.name='synthetic'",
    "pool={scale=1.0, start='teacher'}",
    "local={examples=4, gain_examples=4, query_examples=16}",
    "gate.warmup=0",
)


@dataclass(frozen=True)
class Situation:
    """users: of the training users, the first ones are asked."""

    name: str
    setup: Setup
    values: Values
    population: Population
    users: int

    @property
    def config(self) -> RunConfig:
        return self.setup.config


def synthetic_ones(users: int, seeds: int) -> Iterator[Situation]:
    """One of each kind of population and seed."""
    return (synthetic(kind, users, seed) for kind in _SYNTHETIC for seed in range(seeds))


def synthetic(kind: str, users: int, seed: int) -> Situation:
    """A population with a known teacher, another one for each seed; `users` of them."""
    own = (f"population.options.train_users={users}", f"population.options.seed={seed}", f"seed={seed}")
    config = load_config(overrides=(*_COMMON, *_SYNTHETIC[kind], *own))
    population = make_population(config.population)
    setup = set_up(config, wrap(config, population.base_model()), first_pool(config, population))
    return Situation(kind, setup, setup.begin().values, population, users)


def finished(run: Path, users: int) -> Situation:
    """The pool and the gate of a finished run, and its users. Raises ConfigError for a run without a gate."""
    record = read_record(run)
    config = recorded_config(record, run)
    if config.gate.policy != "gate":
        raise ConfigError(
            f"estimators are compared by what they tell a gate, the masks of {str(run)!r} are chosen by "
            f"{config.gate.policy!r}; give a run with gate.policy = 'gate'"
        )
    worker = Worker(config)
    setup = worker.setup(config)
    values = from_checkpoint(recorded_checkpoint(run, record), setup.rules).values
    return Situation(config.name, setup, values, worker.population, users)


def given(situation: Situation, kind: DistributionKind) -> Given:
    """What every estimate is made from, with this kind of distribution over the gate's logits."""
    setup, values = situation.setup, situation.values
    gate = _with_kind(situation.config.gate, kind)
    ids = np.asarray(situation.population.users("train")[: situation.users], dtype=np.int64)
    streams = setup.streams.at("estimators")
    data = round_data(situation.population, ids, setup.local, streams)
    embedding_ue = setup.record_layout.fresh(ids).embedding_ue
    uniform_ug = streams.uniform("mask", ids, (setup.model.spec.units,))
    examples = data.support.window(0, situation.config.local.gain_examples)
    reward = MaskReward(setup.model, values, data.query, setup.local.learning.quality, Adaptation((), 0, 0.0))
    share = situation.config.gate.share(gate.budget, setup.model.spec.rank)
    signals = Signals(setup.model, values, examples, gate.budget, share)
    proposed = propose(Known(signals, embedding_ue, uniform_ug), gate)
    assert isinstance(proposed.distribution, Bernoulli | FixedBudget)

    def draws(label: str, n: int) -> UserDraws:
        return UserDraws(streams.at(label, n), ids)

    return Given(proposed.distribution, proposed.exploration, reward, draws)


def variances(situations: Iterable[Situation], draws: int) -> dict[str, dict[str, Any]]:
    """The estimators' variances in each situation, for both kinds of masks; those of one name are averaged.

    Each of our estimators tries as many masks as the default does, and two-sample leave-one-out is beside them.
    """
    tables: dict[str, list[dict[str, Row]]] = {}
    for situation in situations:
        for kind in KINDS:
            found = compared(sides(situation, kind), given(situation, kind), draws)
            tables.setdefault(f"{situation.name}, {kind}", []).append(found)
    return {name: with_relatives(averaged(several)) for name, several in tables.items()}


def sides(situation: Situation, kind: DistributionKind) -> list[Side]:
    """Two-sample leave-one-out, then those of our estimators that work for these masks and the run's quality."""
    differentiable, samples = situation.setup.local.learning.quality.differentiable, GateConfig().samples
    found = [Side("reinforce", ESTIMATORS.make("reinforce"), 2)]
    for name in ESTIMATORS.builtin:
        config = GateConfig().estimator if name == GateConfig().estimator.name else EstimatorConfig(name=name)
        estimator = ESTIMATORS.make(config.name, **config.options)
        if kind in estimator.distributions and (differentiable or not estimator.differentiable):
            found.append(Side(name, estimator, samples))
    return found


def _with_kind(gate: GateConfig, kind: DistributionKind) -> GateConfig:
    """The same gate for masks of another kind. A price is no estimator's business, and has no place under a budget."""
    reward = gate.reward.model_copy(update={"price": 0.0, "target": None})
    return gate.model_copy(update={"distribution": kind, "reward": reward})
