"""Where the work is done: in this process, or in Ray actors. Jobs are given out as workers become free.

The result of a job (see `worker.py`) stays where it was made until it is folded; the report comes here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from federation.config import ComputeConfig, RunConfig
from federation.errors import FedquiltWarning, RunError
from server.tree import fold
from simulations.compute.placement import Shard
from simulations.compute.worker import Job, Worker, perform


def ignore(position: int, report: Any) -> None:
    """Takes no interest in jobs done again."""


class Workers(Protocol):
    """Something that runs jobs. replaced: how many workers have died and were replaced."""

    replaced: int

    def share(self, value: Any) -> Any:
        """A handle to a value that many jobs take as an argument."""
        ...

    def run(
        self, job: Job, arguments: Sequence[tuple[Any, ...]], shards: Sequence[Shard] = ()
    ) -> Iterator[tuple[int, Any, Any]]:
        """(position, handle of the result, report) of each job, in the order in which they finish.

        shards: the shard of the user store that each job reads and writes, where jobs do.
        """
        ...

    def on_every_node(self, job: Job, *arguments: Any) -> list[Any]:
        """The reports of a job that is done once on each node, one after the other."""
        ...

    def fold(
        self, results: Sequence[Any], merge: Callable[[Any, Any], Any], on_redone: Callable[[int, Any], None] = ignore
    ) -> Any:
        """All results merged, in their order. Needs handles that `run` gave.

        on_redone: told of each job that was done again, since its result was lost: its place in `results`, and the
        report that takes the place of its first one.
        """
        ...

    def object_store_mib(self) -> float:
        """What lies in the memory that processes share, which is no one's private memory."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class InProcess:
    """One worker in this process: for tests, notebooks and debugging."""

    def __init__(self, config: RunConfig) -> None:
        self.replaced = 0
        self._worker = Worker(config)

    def share(self, value: Any) -> Any:
        return value

    def run(
        self, job: Job, arguments: Sequence[tuple[Any, ...]], shards: Sequence[Shard] = ()
    ) -> Iterator[tuple[int, Any, Any]]:
        for position, args in enumerate(arguments):
            result, report = perform(self._worker, job, *args)
            yield position, result, report

    def on_every_node(self, job: Job, *arguments: Any) -> list[Any]:
        return [perform(self._worker, job, *arguments)[1]]

    def fold(
        self, results: Sequence[Any], merge: Callable[[Any, Any], Any], on_redone: Callable[[int, Any], None] = ignore
    ) -> Any:
        return fold(results, merge)

    def object_store_mib(self) -> float:
        return 0.0

    def close(self) -> None:
        self._worker.close()


def start_workers(config: RunConfig) -> Workers:
    """The workers that a configuration asks for. Warns of workers that can only be in each other's way."""
    config = on_device(config)
    if not config.compute.workers:
        return InProcess(config)
    _warn_of_idle_workers(config)
    from simulations.compute.ray_workers import RayWorkers

    return RayWorkers(config)


def on_device(config: RunConfig) -> RunConfig:
    """The configuration with the device that there is: "auto" becomes "cuda" or "cpu".

    Raises RunError for "cuda" without a GPU: asked before a run, it costs no work.
    """
    compute = config.compute
    if compute.device == "cpu":
        return config
    where, gpus = _gpus(compute)
    if compute.device == "cuda" and not gpus:
        raise RunError(
            f"compute.device = 'cuda' needs a GPU, {where} has none; set it to 'cpu', or to 'auto' for either"
        )
    found = compute.model_copy(update={"device": "cuda" if gpus else "cpu"})
    return config.model_copy(update={"compute": found})


def _gpus(compute: ComputeConfig) -> tuple[str, int]:
    """Where the work would be done, and how many GPUs there are."""
    if compute.workers and compute.ray_address is not None:
        from simulations.compute.cluster import cluster_gpus

        return f"the Ray cluster at {compute.ray_address}", cluster_gpus(compute)
    return "torch on this machine", torch.cuda.device_count() if torch.cuda.is_available() else 0


def _warn_of_idle_workers(config: RunConfig) -> None:
    workers, cores, shards = config.compute.workers, _cores(), config.federation.shards
    if config.compute.ray_address is None and workers > cores:
        warnings.warn(
            f"{workers} workers of one thread share {cores} cores, which is slower than {cores} workers; "
            "lower compute.workers",
            FedquiltWarning,
            stacklevel=3,
        )
    if workers > shards:
        warnings.warn(
            f"a round is cut into at most {shards} chunks, one per shard, so of {workers} workers {workers - shards} "
            "have nothing to do; lower compute.workers, or raise federation.shards in a new run",
            FedquiltWarning,
            stacklevel=3,
        )


def _cores() -> int:
    """The cores that this process may use; all of them where the system knows no such bound, as macOS."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
