"""Where the work is done: in this process, or in Ray actors. Jobs are given out as workers become free.

A job is a module-level function `job(worker, *args) -> (result, report)`. The result stays where it was made until it
is folded; the report comes to the driver.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, Protocol

from federation.config import RunConfig
from federation.errors import RunError
from server.tree import fold
from simulations.worker import Worker

Job = Callable[..., tuple[Any, Any]]


class Workers(Protocol):
    """Something that runs jobs."""

    def share(self, value: Any) -> Any:
        """A handle to a value that many jobs take as an argument."""
        ...

    def run(self, job: Job, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any, Any]]:
        """(position, handle of the result, report) of each job, in the order in which they finish."""
        ...

    def fold(self, results: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
        """All results merged, in their order."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class InProcess:
    """One worker in this process: for tests, notebooks and debugging."""

    def __init__(self, config: RunConfig) -> None:
        self._worker = Worker(config)

    def share(self, value: Any) -> Any:
        return value

    def run(self, job: Job, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any, Any]]:
        for position, args in enumerate(arguments):
            result, report = job(self._worker, *args)
            yield position, result, report

    def fold(self, results: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
        return fold(results, merge)

    def close(self) -> None:
        self._worker.close()


class RayWorkers:
    """One Ray actor of one thread per worker, on a local cluster that ends with this object."""

    def __init__(self, config: RunConfig) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else ray.init warns of a future change
        import ray

        self._ray = ray
        count = config.compute.workers
        ray.init(
            address="local",
            num_cpus=count,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}},
        )

        class Actor:
            """A Worker that runs whatever job it is handed."""

            def __init__(self) -> None:
                self._worker = Worker(config)

            def run(self, job: Job, *args: Any) -> tuple[Any, Any]:
                return job(self._worker, *args)

            def merge(self, merge: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
                return merge(a, b)

        actor = ray.remote(num_cpus=1)(Actor)
        self._actors = [actor.remote() for _ in range(count)]

    def share(self, value: Any) -> Any:
        return self._ray.put(value)

    def run(self, job: Job, arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any, Any]]:
        waiting = list(enumerate(arguments))[::-1]
        running: dict[Any, tuple[int, Any, int]] = {}
        idle = list(range(len(self._actors)))[::-1]
        while waiting or running:
            while waiting and idle:
                position, args = waiting.pop()
                number = idle.pop()
                result, report = self._actors[number].run.options(num_returns=2).remote(job, *args)
                running[report] = (position, result, number)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            position, result, number = running.pop(done)
            report = self._get(done, f"worker {number} died in job {position} of {len(arguments)}")
            idle.append(number)
            yield position, result, report

    def fold(self, results: Sequence[Any], merge: Callable[[Any, Any], Any]) -> Any:
        # On the actors, not as Ray tasks: those start processes of their own, which load torch anew (2 s of work each).
        turns = cycle(self._actors)
        whole = fold(results, lambda a, b: next(turns).merge.remote(merge, a, b))
        return self._get(whole, "a worker died merging partials")

    def close(self) -> None:
        self._ray.shutdown()

    def _get(self, reference: Any, if_dead: str) -> Any:
        """The value behind a reference. An error that a job raised is raised here as it was."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise RunError(
                f"{if_dead} ({error.__class__.__name__}); "
                "nothing that was checkpointed is lost: run the same command with --resume"
            ) from error
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error


def start_workers(config: RunConfig) -> Workers:
    """The workers that a configuration asks for."""
    return RayWorkers(config) if config.compute.workers else InProcess(config)
