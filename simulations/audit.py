"""What the user store holds at the end of a federation, against the cohorts that were drawn: every visit, once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from client.store import mended, shard_of
from federation.config import RunConfig
from federation.data.population import as_array
from federation.streams import UserIds
from simulations.compute.worker import Worker, blocks
from simulations.compute.workers import Workers
from simulations.federate import STORE_NAME, cohort_of, cut, shards_of
from simulations.setup import Setup

_READ_USERS = 1 << 14


@dataclass(frozen=True)
class Visits:
    """Of the users who took part.

    users: how many of them the store knows. visits: how often they took part, as the store counts.
    rebuilt: by shard, the users who began anew, since the store counts fewer visits of theirs than they were drawn
    for: there are none, unless a shard was damaged or lost.
    checksum: SHA-256 of all ids and states, by shard and id. Equal for equal stores, whoever wrote them.
    """

    users: int
    visits: int
    rebuilt: Mapping[int, int]
    checksum: str


@dataclass(frozen=True)
class Audit:
    """The visits of everyone who took part, and what the store takes on the disk for each."""

    visits: Visits
    bytes_per_user: float


def audit(setup: Setup, workers: Workers, train_users: range | UserIds, folder: Path) -> Audit:
    """Reads the newest state of everyone who took part in the federation in `folder`."""
    federation, store_folder = setup.config.federation, folder / STORE_NAME
    cohorts = [cohort_of(setup, train_users, round_index) for round_index in range(1, federation.rounds + 1)]
    ids, drawn_u = np.unique(np.concatenate([as_array(range(0)), *cohorts]), return_counts=True)
    chunks = cut(ids, federation.shards)
    jobs = [
        (setup.config, store_folder, chunk, drawn_u[np.searchsorted(ids, chunk)], federation.rounds) for chunk in chunks
    ]
    shards = shards_of(chunks, store_folder, federation.shards)
    found = {position: part for position, _, part in workers.run(visits_of_shard, jobs, shards)}
    ((_, _, bytes_per_user),) = workers.run(disk_bytes_per_user, [(setup.config, store_folder)])
    return Audit(_together([found[position] for position in range(len(jobs))]), bytes_per_user)


def visits_of_shard(
    worker: Worker,
    config: RunConfig,
    store_folder: Path,
    user_ids: UserIds,
    drawn_u: npt.NDArray[np.int64],
    rounds: int,
) -> tuple[None, Visits]:
    """The visits of one shard's users, of whom each was drawn so often in so many rounds."""
    store = worker.store(worker.setup(config), store_folder)
    digest, known, visits, rebuilt = hashlib.sha256(), 0, 0, 0
    for part in blocks(len(user_ids), _READ_USERS):
        users, _ = mended(store, partial(store.read, user_ids[part], rounds + 1))
        visits_u = users.visits_u.numpy()
        known += int((visits_u > 0).sum())
        visits += int(visits_u.sum())
        rebuilt += int((visits_u < drawn_u[part]).sum())
        for column in (users.ids, visits_u, users.mask_ub.numpy(), users.embedding_ue.numpy()):
            digest.update(np.ascontiguousarray(column).data)
    shard = int(shard_of(user_ids[:1], store.shards)[0])
    return None, Visits(known, visits, {shard: rebuilt} if rebuilt else {}, digest.hexdigest())


def disk_bytes_per_user(worker: Worker, config: RunConfig, store_folder: Path) -> tuple[None, float]:
    """As of the store on this worker's node."""
    return None, worker.store(worker.setup(config), store_folder).bytes_per_user()


def _together(parts: list[Visits]) -> Visits:
    return Visits(
        users=sum(part.users for part in parts),
        visits=sum(part.visits for part in parts),
        rebuilt={shard: users for part in parts for shard, users in part.rebuilt.items()},
        checksum=hashlib.sha256("".join(part.checksum for part in parts).encode()).hexdigest(),
    )
