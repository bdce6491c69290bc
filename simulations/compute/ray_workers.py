"""Workers as Ray actors: given chunks as they become free, on the node that owns the users, replaced when they die."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

from simulations.compute.cluster import PATIENCE_SECONDS, Cluster, nodes_of  # isort: skip (sets what ray reads when imported)

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from federation.config import RunConfig
from federation.errors import FedquiltWarning, RunError
from server.tree import fold
from simulations.compute.environment import WORKER_ENVIRONMENT
from simulations.compute.placement import Backlog, FileIdentity, Place, Shard, deal, deal_again, resources_of, shards_in
from simulations.compute.worker import Job, Worker, perform
from simulations.compute.workers import ignore

ATTEMPTS = 3
"""How often a job, a start or a fold may fail with a dead worker before we give up: it may well be what kills them."""

DEATHS = (RayActorError, NodeDiedError, OutOfMemoryError)
"""What is raised instead of a result when a worker, or its node, is no more."""

FAULTS = (*DEATHS, ObjectLostError)
"""The same, and when what a worker left with its node is no more."""

SHORT_OF_MEMORY = ("OOM", "out of memory", "memory pressure", "low on memory")
"""Words of Ray about a worker that it, or the kernel, may have killed for its memory. It cannot always tell."""


@dataclass(frozen=True)
class _Work:
    """One job: what is done, and the shard that it is done on (None: none)."""

    job: Job
    arguments: tuple[Any, ...]
    shard: Shard | None


@dataclass(frozen=True)
class _Made:
    """A result that lies where it was made, and the work that makes it again should it be lost."""

    reference: Any
    work: _Work


@dataclass(frozen=True)
class _Running:
    """A job that a worker is doing. Its report comes to us, its result stays where it is made."""

    number: int
    position: int
    result: Any
    report: Any


class _Actor:
    """A worker in a process of its own."""

    def begin(self, config: RunConfig) -> Place:
        """Loads the base model. Not done when the actor is made, so that an error comes as it was raised."""
        self._worker = Worker(config)
        return self.place()

    def place(self) -> Place:
        gpus = ray.get_gpu_ids()
        return Place(ray.get_runtime_context().get_node_id(), tuple(map(str, gpus)))

    def run(self, job: Job, *arguments: Any) -> tuple[Any, Any]:
        return perform(self._worker, job, *arguments)

    def merge(self, merge: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        return merge(a, b)

    def receive(self, _: Any) -> None:
        """Fails when its argument is lost."""


class RayWorkers:
    """One Ray actor of one thread per worker. One that dies is replaced, and what it was doing is given out again.

    Raises RunError when the cluster cannot hold the workers.
    """

    def __init__(self, config: RunConfig) -> None:
        self.replaced = 0
        self._config = config
        self._owners: dict[Path, dict[int, str]] = {}
        self._failed_starts: Counter[int] = Counter()
        self._starting: dict[Any, int] = {}
        self._actors: dict[int, Any] = {}
        self._cluster = Cluster(config.compute)
        try:
            self._group = self._cluster.reserve()
            self._nodes = nodes_of(self._group)
            for number in range(config.compute.workers):
                self._start(number)
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> list[Place]:
        """Where each worker is."""
        found: list[Place] = ray.get([actor.place.remote() for actor in self._actors.values()])
        return found

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def run(
        self, job: Job, arguments: Sequence[tuple[Any, ...]], shards: Sequence[Shard] = ()
    ) -> Iterator[tuple[int, Any, Any]]:
        on = shards or repeat(None, len(arguments))
        works = [_Work(job, args, shard) for args, shard in zip(arguments, on, strict=True)]
        yield from self._do(works, [self._home(work.shard) for work in works])

    def on_every_node(self, job: Job, *arguments: Any) -> list[Any]:
        nodes = self._living_nodes()  # one after the other: those of one machine see the same files
        return [report for node in nodes for _, _, report in self._do([_Work(job, arguments, None)], [node])]

    def fold(
        self, results: Sequence[Any], merge: Callable[[Any, Any], Any], on_redone: Callable[[int, Any], None] = ignore
    ) -> Any:
        # On the actors, not as Ray tasks: those start processes of their own, which load torch anew (2 s of work each).
        leaves: list[_Made] = list(results)
        failures = 0
        while True:
            try:
                if failures:
                    self._replace_the_dead("merging partials")
                    for position in self._lost(leaves):
                        leaves[position], report = self._remade(leaves[position])
                        on_redone(position, report)
                return _value(fold([leaf.reference for leaf in leaves], self._merging(merge)))
            except FAULTS as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise _given_up(f"partials could not be merged in {ATTEMPTS} attempts", error) from error

    def object_store_mib(self) -> float:
        return self._cluster.object_store_mib()

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._cluster.close()

    # Giving out work

    def _do(self, works: Sequence[_Work], homes: Sequence[str | None]) -> Iterator[tuple[int, _Made, Any]]:
        """Works done on their home nodes by workers as they become free; done again when a worker dies of one."""
        backlog = Backlog(homes)
        failures: Counter[int] = Counter()
        running: dict[Any, _Running] = {}
        while backlog or running:
            for number in self._free(running):
                if (position := backlog.take(self._nodes[number])) is not None:
                    started = self._give(number, position, works[position])
                    running[started.report] = started
            done = self._next(running)
            if done is None:
                backlog.rehome(self._homes_left(works))
            elif done in self._starting:
                self._welcome(done)
            else:
                task = running.pop(done)
                try:
                    report = _value(done)
                except FAULTS as error:
                    failures[task.position] += 1
                    self._recover(task, f"job {task.position} of {len(works)}", failures[task.position], error)
                    backlog.put_back(task.position)
                else:
                    yield task.position, _Made(task.result, works[task.position]), report

    def _recover(self, task: _Running, job: str, failures: int, error: Exception) -> None:
        """Makes ready to give out a job again: its worker died of it, or its report was lost with the node."""
        if isinstance(error, DEATHS):
            self._replace(task.number, f"in {job}", failures, error)
        elif failures >= ATTEMPTS:
            raise _given_up(f"the report of {job} was lost {failures} times", error) from error

    def _merging(self, merge: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Merges two references on the workers, in turns."""
        turns = cycle(self._ready())
        return lambda a, b: next(turns).merge.remote(merge, a, b)

    def _ready(self) -> list[Any]:
        """The actors that have begun; when none has, the first that does. Raises RunError when none ever can."""
        while not (free := self._free({})):
            began = self._next({})
            if began is None:
                raise _deserted()
            self._welcome(began)
        return [self._actors[number] for number in free]

    def _free(self, running: Mapping[Any, _Running]) -> list[int]:
        busy = {*self._starting.values(), *(task.number for task in running.values())}
        return [number for number in self._actors if number not in busy]

    def _give(self, number: int, position: int, work: _Work) -> _Running:
        result, report = self._actors[number].run.options(num_returns=2).remote(work.job, *work.arguments)
        return _Running(number, position, result, report)

    def _next(self, running: Mapping[Any, _Running]) -> Any | None:
        """What is done next, a job or a start. None when there is nothing to wait for."""
        while running or self._starting:
            done, _ = ray.wait([*running, *self._starting], timeout=PATIENCE_SECONDS)
            if done:
                return done[0]
            if not running and not self._cluster.nodes & {self._nodes[number] for number in self._starting.values()}:
                break  # their nodes are gone, and no other has room for them
        return None

    # Workers that begin and end

    def _start(self, number: int) -> None:
        needed = resources_of(self._config.compute)
        options = {
            "num_cpus": needed["CPU"],
            "num_gpus": needed.get("GPU", 0),
            "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, number),
        }
        self._actors[number] = ray.remote(_Actor).options(**options).remote()
        self._starting[self._actors[number].begin.remote(self._config)] = number

    def _welcome(self, began: Any) -> None:
        """A worker has begun, or could not. An error that it raised, such as of a missing base, is raised as it was."""
        number = self._starting[began]
        try:
            self._nodes[number] = _value(began).node
        except DEATHS as error:
            del self._starting[began]
            self._failed_starts[number] += 1
            self._replace(number, "while it started", self._failed_starts[number], error)
        else:
            del self._starting[began]
            self._failed_starts[number] = 0

    def _replace(self, number: int, when: str, deaths: int, error: Exception) -> None:
        """Starts a worker in the place of a dead one. deaths: how many workers have died so by now."""
        if deaths >= ATTEMPTS:
            raise _given_up(f"worker {number} died {when}, as {deaths - 1} before it", error) from error
        self.replaced += 1
        warnings.warn(
            f"worker {number} died {when} ({error.__class__.__name__}); another takes its place, nothing is lost",
            FedquiltWarning,
            stacklevel=2,
        )
        ray.kill(self._actors[number])  # it may only be out of reach
        self._start(number)

    def _replace_the_dead(self, when: str) -> None:
        asked = {n: actor.place.remote() for n, actor in self._actors.items() if n not in self._starting.values()}
        for number, answer in asked.items():
            try:
                _value(answer)
            except DEATHS as error:
                self._replace(number, when, 1, error)

    def _lost(self, leaves: Sequence[_Made]) -> list[int]:
        """The positions of results that were lost with the node that they were made on."""
        turns = cycle(self._ready())
        asked = [next(turns).receive.remote(leaf.reference) for leaf in leaves]
        return [position for position, answer in enumerate(asked) if _is_lost(answer)]

    def _remade(self, leaf: _Made) -> tuple[_Made, Any]:
        """The result made again, and its report."""
        ((_, made, report),) = self._do([leaf.work], [self._home(leaf.work.shard)])
        return made, report

    # Which node has whose users

    def _living_nodes(self) -> list[str]:
        living = self._cluster.nodes
        return [node for node in dict.fromkeys(self._nodes) if node in living]

    def _home(self, shard: Shard | None) -> str | None:
        """The node that a shard's work is done on; which node owns what is settled when a store is first used."""
        if shard is None:
            return None
        if shard.store_folder not in self._owners:
            found = self._found(shard.store_folder, self._living_nodes())
            workers = Counter(node for node in self._nodes if node in found)
            self._owners[shard.store_folder] = deal(shard.of, found, workers)
        return self._owners[shard.store_folder][shard.number]

    def _found(self, store_folder: Path, nodes: Sequence[str]) -> dict[str, dict[int, FileIdentity]]:
        """The shards that each node has."""
        works = [_Work(find_shards, (store_folder,), None)] * len(nodes)
        return {nodes[position]: report for position, _, report in self._do(works, nodes)}

    def _homes_left(self, works: Sequence[_Work]) -> list[str | None]:
        """Where the works can be done now that their homes have no workers. Raises RunError when nowhere."""
        nodes = list({self._nodes[number] for number in self._free({})})
        if not nodes:
            raise _deserted()
        for folder in {work.shard.store_folder for work in works if work.shard is not None}:
            self._owners[folder] = deal_again(self._owners[folder], self._found(folder, nodes), folder)
        return [self._home(work.shard) for work in works]


def find_shards(worker: Worker, store_folder: Path) -> tuple[None, dict[int, FileIdentity]]:
    """The shards on the worker's node."""
    return None, shards_in(store_folder)


def _value(reference: Any) -> Any:
    """What is behind a reference. An error that a job raised is raised as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause: Any = error
        while isinstance(cause, RayTaskError):  # a merge of what could not be merged
            cause = cause.cause
        raise cause from error


def _is_lost(answer: Any) -> bool:
    try:
        _value(answer)
    except ObjectLostError:
        return True
    return False


def _deserted() -> RunError:
    return RunError("no node of the Ray cluster is left to work on; start one and run again with --resume")


def _given_up(what: str, error: Exception) -> RunError:
    short = isinstance(error, OutOfMemoryError) or any(word in str(error) for word in SHORT_OF_MEMORY)
    remedy = "; if memory ran out, lower compute.workers, or compute.block in a new run" if short else ""
    return RunError(
        f"{what} ({error.__class__.__name__}){remedy}; "
        "nothing that was checkpointed is lost: run the same command with --resume"
    )
