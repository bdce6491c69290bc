"""The simulated federation: rounds over cohorts, one checkpoint after the other, resumable at any moment."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.round import RoundState
from client.store import UserStore, shard_of
from federation.cohorts import draw_cohort
from federation.config import identity
from federation.data.population import as_array
from federation.errors import FedquiltWarning, RunError
from federation.streams import UserIds
from server import checkpoint, history
from server.health import CollapseWatch, gate_health
from server.round import ServerState, close, from_checkpoint, frozen_factors, to_parts
from simulations.compute.memory import largest, private_memory, total
from simulations.compute.placement import Shard
from simulations.compute.worker import Broadcast, ChunkReport, merge_reports, run_chunk, run_on_store
from simulations.compute.workers import Workers
from simulations.setup import Setup

HISTORY_NAME = "rounds.jsonl"
CHECKPOINTS_NAME = "checkpoints"
STORE_NAME = "users"


@dataclass(frozen=True)
class RoundReport:
    """What is known of one finished round.

    metrics: means over the admitted users, and the gate's health (`server/health.py`).
    private_mib: the most memory that driver and workers held for themselves, together (see `memory`).
    object_store_mib: what lay in the workers' shared memory at the end.
    halved_blocks: how many blocks were trained in halves for want of memory; then the bits are others.
    rebuilt: the shards of the user store that were found damaged: their users began anew; then the bits are others too.
    replaced_workers: how many died and were replaced; the bits are the same.
    """

    round_index: int
    users: int
    rejected: dict[str, int]
    metrics: dict[str, float]
    seconds: float
    private_mib: float | None
    object_store_mib: float
    halved_blocks: int
    rebuilt: tuple[int, ...]
    replaced_workers: int

    @property
    def users_per_second(self) -> float:
        return self.users / self.seconds


def federate(
    setup: Setup,
    workers: Workers,
    train_users: range | UserIds,
    folder: Path,
    resume: bool,
    on_round: Callable[[RoundReport], None],
) -> ServerState:
    """All rounds of a federation in `folder`, or those that are left when `resume` finds a checkpoint.

    Killed at any moment and resumed, it ends with the same bits: users' records are keyed by round, a round's
    effects are one checkpoint, and randomness is addressed by round and user. Ctrl-C leaves a checkpoint of the last
    finished round.

    Raises RunError when the folder holds a federation and `resume` is off, or holds one of another configuration.
    """
    federation = setup.config.federation
    checkpoints, users_folder = folder / CHECKPOINTS_NAME, folder / STORE_NAME
    if checkpoint.rounds(checkpoints) and not resume:
        raise RunError(f"{folder} holds a federation already; resume it, or give another folder")
    started_as = {"config": identity(setup.config), "users": _fingerprint(train_users)}
    state = _last_state(setup, checkpoints, started_as) if resume else None
    if state is None:
        state = setup.begin()
        _save(state, checkpoints, started_as)
    _on_store(workers, setup, users_folder, UserStore.rewind, state.round_index)
    reports = history.History(folder / HISTORY_NAME, state.round_index)
    started, replaced, watch = time.perf_counter(), workers.replaced, CollapseWatch()
    try:
        for round_index in range(state.round_index + 1, federation.rounds + 1):
            cohort = cohort_of(setup, train_users, round_index)
            after, report, object_store_mib = _one_round(setup, workers, state, cohort, users_folder)
            ended = time.perf_counter()
            health, seconds = gate_health(state.values, after.values), ended - started
            finished = _finished(round_index, report, health, seconds, object_store_mib, workers.replaced - replaced)
            started, replaced = ended, workers.replaced  # so a checkpoint's time counts in the round after it
            reports.add(finished)  # before its checkpoint: a resume drops the rounds that it does again
            state = after
            if round_index % federation.checkpoint_every == 0 or round_index == federation.rounds:
                _save(state, checkpoints, started_as)
                _on_store(workers, setup, users_folder, UserStore.compact, min(checkpoint.rounds(checkpoints)))
            on_round(finished)
            watch.note(round_index, finished.metrics)
    except KeyboardInterrupt:
        if state.round_index not in checkpoint.rounds(checkpoints):
            _save(state, checkpoints, started_as)
        raise
    return state


def cohort_of(setup: Setup, train_users: range | UserIds, round_index: int) -> UserIds:
    """Who takes part in a round, ascending."""
    return draw_cohort(train_users, setup.config.federation, setup.streams, round_index)


def last_checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """The newest usable checkpoint of a federation in `folder`."""
    return checkpoint.load_latest(folder / CHECKPOINTS_NAME)


def load_state(setup: Setup, folder: Path) -> ServerState:
    """The state of a federation that has run in `folder`."""
    return from_checkpoint(last_checkpoint(folder), setup.rules)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The finished rounds of a federation, as `RoundReport`s; without a last line that a kill cut short."""
    return history.read_history(folder / HISTORY_NAME)


def _one_round(
    setup: Setup, workers: Workers, state: ServerState, cohort: UserIds, users_folder: Path
) -> tuple[ServerState, ChunkReport, float]:
    """The state after a round, what is known of it, and the MiB in the object store when it is fullest."""
    broadcast = workers.share(Broadcast(RoundState(state.values, state.round_index + 1, state.version), state.strategy))
    chunks = cut(cohort, setup.config.federation.shards)
    jobs = [(broadcast, setup.config, users_folder, chunk) for chunk in chunks]
    shards = shards_of(chunks, users_folder, setup.config.federation.shards)
    finished = {position: (partial, report) for position, partial, report in workers.run(run_chunk, jobs, shards)}
    partials = [finished[position][0] for position in range(len(jobs))]
    reports = {position: finished[position][1] for position in range(len(jobs))}
    partial = workers.fold(partials, setup.rules.strategy.merge, reports.__setitem__)
    object_store_mib = workers.object_store_mib()
    frozen = frozen_factors(setup.config, state.round_index + 1)
    report = merge_reports(list(reports.values()))
    _warn_of_rebuilt(report.rebuilt, users_folder)
    return close(state, partial, setup.rules, frozen), report, object_store_mib


def _finished(
    round_index: int,
    report: ChunkReport,
    health: Mapping[str, float],
    seconds: float,
    object_store_mib: float,
    replaced_workers: int,
) -> RoundReport:
    admitted = max(1, report.users - sum(report.rejected.values()))
    metrics = {name: value / admitted for name, value in report.metric_sums.items()}
    private_mib = total(largest((report.memory, private_memory())))
    return RoundReport(
        round_index=round_index,
        users=report.users,
        rejected=report.rejected,
        metrics={**metrics, **health},
        seconds=seconds,
        private_mib=private_mib,
        object_store_mib=object_store_mib,
        halved_blocks=report.halved_blocks,
        rebuilt=report.rebuilt,
        replaced_workers=replaced_workers,
    )


def cut(cohort: UserIds, shards: int) -> Sequence[UserIds]:
    """The cohort by shard: one chunk for each shard that has users in it, each ascending."""
    shard_u = shard_of(cohort, shards)
    return [cohort[shard_u == shard] for shard in np.unique(shard_u)]


def shards_of(chunks: Sequence[UserIds], users_folder: Path, shards: int) -> list[Shard]:
    """The shard of the user store that each chunk lies in."""
    return [Shard(users_folder, int(shard_of(chunk[:1], shards)[0]), shards) for chunk in chunks]


def _on_store(
    workers: Workers, setup: Setup, folder: Path, action: Callable[[UserStore, int], None], round_index: int
) -> None:
    """Runs a method of the user store on a worker of each node: a process may open a shard once only."""
    for rebuilt in workers.on_every_node(run_on_store, setup.config, folder, action, round_index):
        _warn_of_rebuilt(rebuilt, folder)


def _warn_of_rebuilt(shards: Sequence[int], folder: Path) -> None:
    for shard in shards:
        warnings.warn(
            f"shard {shard} of {folder} was damaged and is now shard-{shard:04d}.damaged-*; its users begin anew",
            FedquiltWarning,
            stacklevel=2,
        )


def _last_state(setup: Setup, checkpoints: Path, started_as: Mapping[str, Any]) -> ServerState | None:
    if not checkpoint.rounds(checkpoints):
        return None
    found = checkpoint.load_latest(checkpoints)
    if other := [key for key, value in started_as.items() if found.meta.get(key) != value]:
        raise RunError(
            "a run resumes with the configuration and the training users it was started with, "
            f"{checkpoints.parent} was started with other {' and '.join(other)}; give those, or another --out"
        )
    return from_checkpoint(found, setup.rules)


def _save(state: ServerState, checkpoints: Path, started_as: Mapping[str, Any]) -> None:
    checkpoint.save(checkpoints, state.round_index, to_parts(state), {"version": state.version, **started_as})


def _fingerprint(train_users: range | UserIds) -> str:
    """Tells the users that cohorts are drawn from apart from others."""
    if isinstance(train_users, range):
        return repr(train_users)
    return hashlib.blake2b(np.ascontiguousarray(as_array(train_users)).data, digest_size=8).hexdigest()
