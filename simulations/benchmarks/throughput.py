"""Users per second of the stacked engine, and of the loop that anyone would write, in one process.

The engine is the product's own path: `local_round`, `lift`, merge and finish, exactly as a worker and the
server call them. The naive side trains one user after the other by `torch.optim.SGD`, and averages as it goes.
Both do the same users' work from the same data and masks, in turns, so that a busy machine slows both; the
aggregated results are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.round import RoundData, RoundState, local_round
from client.state import UserBlock, join
from federation import masks
from federation.base import BaseModel
from federation.data.population import Batch
from federation.pool.spec import PoolSpec
from federation.update import Values
from server.round import lift
from simulations.benchmarks.workloads import SEED, Workload
from simulations.record import provenance
from simulations.setup import Setup, set_up, wrap
from simulations.worker import blocks
from strategies.protocol import Step

UP_DEVIATION = 0.02
"""Standard deviation of the pool's `up`. Not zero, as in a fresh pool: then `down` would have no gradient."""


@dataclass(frozen=True)
class Throughput:
    """Seconds that each side took for all users, by repetition.

    max_relative_difference: the largest difference between the two sides' aggregated rows, as a share of the
    largest entry of the same section.
    """

    workload: Workload
    users: int
    block: int
    engine_seconds: tuple[float, ...]
    naive_seconds: tuple[float, ...]
    max_relative_difference: float

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: users per second of both sides (medians), and how they compare."""
        engine, naive = self.users / median(self.engine_seconds), self.users / median(self.naive_seconds)
        return {
            "workload": self.workload.name,
            "engine_fp32": round(engine, 1),
            "naive": round(naive, 1),
            "ratio": round(engine / naive, 2),
            "max_relative_difference": self.max_relative_difference,
        }

    def record(self) -> dict[str, Any]:
        """The record of this measurement."""
        return {
            "kind": "throughput",
            "name": self.workload.name,
            **provenance(),
            "seed": SEED,
            "config": self.workload.config.model_dump(mode="json", include={"pool", "gate", "local"}),
            **self.line,
            "users": self.users,
            "block": self.block,
            "threads": 1,
            "engine_seconds": list(self.engine_seconds),
            "naive_seconds": list(self.naive_seconds),
        }


def measure(workload: Workload, users: int, block: int, repetitions: int) -> Throughput:
    """Both sides on one thread, in turns; a first round of the engine is not counted."""
    setup = set_up(workload.config, wrap(workload.config, workload.base()))
    data = users_data(workload, users)
    state = RoundState(pool_values(setup), 1, "benchmark")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step, trained = engine_round(setup, state, data, block)
        mask_ug = masks.unpack(trained.mask_ub, setup.model.spec.units)
        naive = NaiveRound(workload, setup.model.spec)
        engine_seconds, naive_seconds = [], []
        for _ in range(repetitions):
            engine_seconds.append(_seconds(lambda: engine_round(setup, state, data, block)))
            naive_seconds.append(_seconds(lambda: naive(state.values, mask_ug, data)))
        difference = max_relative_difference(step, naive(state.values, mask_ug, data))
    finally:
        torch.set_num_threads(threads)
    return Throughput(workload, users, block, tuple(engine_seconds), tuple(naive_seconds), difference)


def users_data(workload: Workload, users: int) -> Batch:
    """All users' examples, (U, N, ..)."""
    return workload.draw(users, workload.local.examples, torch.Generator().manual_seed(SEED))


def pool_values(setup: Setup) -> Values:
    """A pool in mid-training: `down` as it begins, `up` no longer zero."""
    generator = torch.Generator().manual_seed(SEED)
    values = setup.model.spec.init(generator)
    for m in setup.model.spec.modules:
        values[m.section][:, m.d_in :].normal_(std=UP_DEVIATION, generator=generator)
    return values


def engine_round(setup: Setup, state: RoundState, data: Batch, block: int) -> tuple[Step, UserBlock]:
    """A round of all users by the product's own functions: the aggregated step, the users' new state."""
    strategy, streams = setup.rules.strategy, setup.streams.at("round", state.round_index)
    strategy_state = strategy.init(setup.schema)
    fresh = setup.record_layout.fresh(np.arange(data.users, dtype=np.int64))
    partial, trained = None, []
    for part in blocks(data.users, block):
        examples = data.take(part)
        support = _every_step(examples, setup.config.local.steps)
        update, users = local_round(
            setup.model, state, fresh.take(part), RoundData(support, examples), setup.local, streams
        )
        lifted, _ = lift(update, strategy_state, setup.rules)
        partial = lifted if partial is None else strategy.merge(partial, lifted)
        trained.append(users)
    step, _ = strategy.finish(partial, strategy_state)
    return step, join(trained)


class LowRank(nn.Module):
    """A frozen linear layer plus one user's k units, as anyone would write it."""

    def __init__(self, base: nn.Module, d_in: int, d_out: int, k: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(torch.zeros(k, d_in)), nn.Parameter(torch.zeros(k, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.base(x)) + (x @ self.down.t()) @ self.up * self.scale


class NaiveRound:
    """A round as a loop over users: load the active units, train them, add the differences."""

    def __init__(self, workload: Workload, spec: PoolSpec) -> None:
        self._base: BaseModel = workload.base()
        self._local, self._spec = workload.local, spec
        self._layers = {}
        for m in spec.modules:
            parent_name, _, child = m.name.rpartition(".")
            parent = self._base.module.get_submodule(parent_name)
            layer = LowRank(getattr(parent, child), m.d_in, m.d_out, workload.config.gate.budget, spec.scale)
            setattr(parent, child, layer)
            self._layers[m.section] = layer

    def __call__(self, values: Values, mask_ug: Tensor, data: Batch) -> dict[str, Tensor]:
        """The mean difference of each row over the users whose mask has it, (R, d_in + d_out) by section."""
        sums = {name: torch.zeros_like(rows) for name, rows in values.items()}
        counts = {name: torch.zeros(len(rows)) for name, rows in values.items()}
        by_module = mask_ug.view(data.users, len(self._spec.modules), -1)
        for user in range(data.users):
            active = {m.section: by_module[user, j].nonzero()[:, 0] for j, m in enumerate(self._spec.modules)}
            self._train(values, active, data.inputs[user], data.targets[user])
            for name, layer in self._layers.items():
                trained = torch.cat((layer.down.detach(), layer.up.detach()), 1)
                sums[name].index_add_(0, active[name], trained - values[name][active[name]])
                counts[name][active[name]] += 1
        return {name: sums[name] / counts[name].clamp_min(1)[:, None] for name in values}

    def _train(self, values: Values, active: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        with torch.no_grad():
            for name, layer in self._layers.items():
                rows = values[name][active[name]]
                layer.down.copy_(rows[:, : layer.down.shape[1]])
                layer.up.copy_(rows[:, layer.down.shape[1] :])
        parameters = [p for layer in self._layers.values() for p in (layer.down, layer.up)]
        optimizer = torch.optim.SGD(parameters, lr=self._local.learning_rate)
        for _ in range(self._local.steps):
            optimizer.zero_grad(set_to_none=True)
            self._base.loss(self._base.module, inputs, targets).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def max_relative_difference(step: Step, naive: Mapping[str, Tensor]) -> float:
    """The largest difference of the two means, each section's as a share of its largest entry."""
    gaps = [(step.sections[name].mean - mean).abs().max() / mean.abs().max() for name, mean in naive.items()]
    return float(torch.stack(gaps).max())


def _every_step(examples: Batch, steps: int) -> Batch:
    """The same examples for every step of a round: (U, N, ..) -> (U, steps * N, ..)."""
    parts = (examples.inputs, examples.targets, examples.weight)
    return Batch(*(torch.cat([part] * steps, 1) for part in parts))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
