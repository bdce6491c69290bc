"""Users per second of the stacked engine and of its peers, all on one task in one run, with two processes each.

| side | what it is |
|---|---|
| engine_fp32, engine_bf16 | the product's round on its own workers, without the user store (`sides.Engine`) |
| naive | the loop that anyone would write, in the same workers (`peers/naive.py`) |
| flower | Flower's simulation, two Ray actors (`peers/flower.py`) |
| pfl | pfl-research's simulation, two processes of torchrun (`peers/pfl.py`) |

All have the same base weights, rows, masks, examples and steps, and processes of one environment and priority. Sides do
their rounds in turns, so that a busy machine slows all; each one's first round is not counted. Flower trains the first
users only, as many as suit it best (`peers/turns.py`).

What the first round aggregated is compared with the engine's: the mean difference of each of the pool's rows over the
users that train it. Flower and pfl average dense pools in fp32, and their row means are recovered from the average
(`Task.row_means_behind`). Its rounding costs them digits: W2's steps are a thousandth of the pool's entries, so there
Flower's means agree to 1e-2. That their users train as the loop's do, to the last digits, tests show.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from simulations.benchmarks.flops import flops_per_user, gemm_job
from simulations.benchmarks.peers.turns import PEERS, Peer, check_installed
from simulations.benchmarks.sides import Engine, Means, Naive, Side
from simulations.benchmarks.workloads import PROCESSES, SEED, Workload, task
from simulations.compute.workers import Workers, start_workers


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    users: how many each side trained, by side; seconds: of each of its counted rounds. differences: how far a side's
    row means lie from those of the engine in fp32 (`relative_difference`).
    flops_per_user: see `flops.flops_per_user`. peak_flops: of all processes at once, per second.
    """

    workload: Workload
    users: Mapping[str, int]
    seconds: Mapping[str, tuple[float, ...]]
    differences: Mapping[str, float]
    flops_per_user: int
    peak_flops: float

    def users_per_second(self, side: str) -> float | None:
        """The median of a side; None: not measured."""
        return self.users[side] / median(self.seconds[side]) if side in self.seconds else None

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: users per second (medians), and the engine's multiple of each other side.

        max_relative_difference: of the engine in fp32 and the loop, which ought to agree.
        """
        names = ("naive", "engine_fp32", "engine_bf16", *PEERS)
        rates = {name: self.users_per_second(name) for name in names}
        engine = rates["engine_fp32"]
        assert engine is not None
        others = {name: rate for name, rate in rates.items() if rate is not None and not name.startswith("engine")}
        ratios = {
            f"{precision}_over_{name}": round(rate / other, 2)
            for precision in ("engine_fp32", "engine_bf16")
            if (rate := rates[precision]) is not None
            for name, other in others.items()
        }
        return {
            "workload": self.workload.name,
            **{name: None if rate is None else round(rate, 1) for name, rate in rates.items()},
            "gemm_share": round(engine * self.flops_per_user / self.peak_flops, 3),
            "max_relative_difference": self.differences["naive"],
            **ratios,
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            "seed": SEED,
            "config": self.workload.config.model_dump(mode="json", include={"pool", "gate", "local"}),
            "users": self.workload.users,
            "users_by_side": dict(self.users),
            "block": self.workload.block,
            "processes": PROCESSES,
            "threads": 1,
            "seconds": {name: list(seconds) for name, seconds in self.seconds.items()},
            "differences": dict(self.differences),
            "flops_per_user": self.flops_per_user,
            "peak_gflops": round(self.peak_flops / 1e9, 1),
        }


def measure(workload: Workload, repetitions: int, peers: Collection[str] = tuple(PEERS)) -> Throughput:
    """Users of a workload trained by the engine, the plain loop and the peers, in turns.

    Raises RunError when a peer is not installed or fails.
    """
    check_installed(peers)
    given = task(workload.name, workload.users)
    with ExitStack() as stack:
        workers = start_workers(workload.config)
        stack.callback(workers.close)
        sides: dict[str, Side] = {**engines(workload, workers), "naive": Naive(workers, given)}
        for name in peers:
            sides[name] = stack.enter_context(Peer(name, given, repetitions + 1))
        means = {name: side.warm_up() for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = []
        for _ in range(repetitions):
            for name, side in sides.items():
                seconds[name].append(side.round())
            peaks.append(sum(flops for _, _, flops in workers.run(gemm_job, [()] * PROCESSES)))
        references = {
            users: Engine(workers, workload.config, task(workload.name, users)).warm_up()
            for users in {side.users for side in sides.values()}
        }
    return Throughput(
        workload,
        {name: side.users for name, side in sides.items()},
        {name: tuple(taken) for name, taken in seconds.items()},
        {name: relative_difference(references[sides[name].users], mean) for name, mean in means.items()},
        flops_per_user(workload.name),
        median(peaks),
    )


def engines(workload: Workload, workers: Workers) -> dict[str, Engine]:
    """The engine in each precision."""
    config, given = workload.config, task(workload.name, workload.users)
    return {
        f"engine_{precision}": Engine(
            workers,
            config.model_copy(update={"compute": config.compute.model_copy(update={"precision": precision})}),
            given,
        )
        for precision in ("fp32", "bf16")
    }


def relative_difference(reference: Means, other: Means) -> float:
    """The norm of a section's difference as a share of the section's norm; the largest of all sections.

    A norm, because single entries say more of storage than of training: a trained row is stored in fp32, and half a
    unit in the last place of an entry of 0.09 is 3e-5 of W2's largest step.
    """
    shares = [(other[name] - mean).norm() / mean.norm() for name, mean in reference.items()]
    return float(torch.stack(shares).max())


def sized(workload: Workload, users: int | None, block: int | None) -> Workload:
    """The workload with other users or another block."""
    return replace(workload, users=users or workload.users, block=block or workload.block)
