"""The user store: what persists for every user, crash-safe, on the node that owns the user's shard.

One LMDB environment per shard (a fixed S-th of all users, by a hash of the id), opened when first needed. A user's
records are those of single rounds: round t reads the newest record before t and writes that of t. So a round, or
a part of one, that is done again reads what it read before and writes what it wrote before.

Durability: a write is one transaction per shard, flushed to the disk when it commits. A chunk of a cohort
lies in one shard, so this is one flush per chunk, and a committed chunk outlives both SIGKILL and a power
cut: the records that a later checkpoint rests on are there.

Compaction: `compact(durable_round)` only notes the round in each shard. When a user is next written, its
records that no read can ask for any more are left out. So the cost is O(users written), and no list of what changed
needs to be kept. A quiet user keeps its last few records.

Damage: a shard is checked when it is opened, and a record whenever it is read. A damaged shard raises
DamagedShardError from every call that needs it, until it is restored or set aside (`mended` does). A shard whose folder
is gone begins anew with fresh users; `simulations/audit.py` finds what visits they lack.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from client.private import PRIVATE_FILE, PRIVATE_FOLDER
from client.shard import NO_ROUND, Rounds, Shard, Transaction
from client.state import FORMAT_VERSION, RecordLayout, UserBlock, join
from federation.errors import DamagedShardError, StoreError
from federation.files import remove_leftovers, write_file
from federation.splitmix import mixed
from federation.streams import UserIds

T = TypeVar("T")

MANIFEST_NAME = "store.json"


def shard_of(user_ids: UserIds, shards: int) -> npt.NDArray[np.int64]:
    """The shard of each user, consecutive ids spread evenly: (U,) int64 -> (U,) in [0, shards)."""
    words = mixed(np.asarray(user_ids, dtype=np.int64).astype(np.uint64))
    return (words % np.uint64(shards)).astype(np.int64)


class UserStore:
    """Users' states by (user, round), in `folder`.

    shards: S, fixed for the life of the store.
    map_bytes: most bytes that one shard may take; address space, not disk, until used.

    Several processes may open one store, each with its own `UserStore`, used by one thread at a time; LMDB
    lets one process at a time write to a shard. A store that was used before a fork opens its shards anew in the child.

    Raises StoreError when the folder holds a store of another shape and, from every method, when a shard is full or
    cannot be used; DamagedShardError when its data is damaged.
    """

    def __init__(self, folder: Path, shards: int, layout: RecordLayout, map_bytes: int = 1 << 34) -> None:
        self.folder, self.shards, self.layout = folder, shards, layout
        self._map_bytes = map_bytes
        self._begin()
        _claim(folder, shards, layout)

    @classmethod
    def existing(cls, folder: Path, map_bytes: int = 1 << 34) -> Self:
        """The store that is in `folder`, of the shape that its manifest says. Raises StoreError where there is none."""
        path = folder / MANIFEST_NAME
        try:
            found = json.loads(path.read_bytes())
            shards, layout = int(found["shards"]), RecordLayout(**found["layout"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is no manifest of a user store ({error!r}); restore it") from error
        return cls(folder, shards, layout, map_bytes)

    def read(self, user_ids: UserIds, before_round: int) -> UserBlock:
        """Each user's newest state of a round before `before_round`, or a fresh one, in the order of the ids.

        Raises StoreError when `compact` may have dropped such records, or an id is there twice.
        """
        ids = np.asarray(user_ids, dtype=np.int64)
        _refuse_repeated(ids)
        blocks = [self.layout.fresh(ids[:0])]
        order, groups = self._by_shard(ids)
        for shard, ids_of_shard in groups:
            with shard.transaction(write=False) as transaction:
                _refuse_dropped(transaction, before_round - 1, f"reading before round {before_round}")
                newest = transaction.read(ids_of_shard).newest(before_round)
            blocks.append(self.layout.decode(ids_of_shard, newest))
        return join(blocks).take(np.argsort(order))

    def write(self, block: UserBlock, round_index: int) -> None:
        """Store the users' states as those of `round_index`, replacing what a redone round wrote before.

        Each shard takes all of its users' records or none; after a StoreError the call may be repeated.
        Raises StoreError when the block is not of the store's layout, or the round was compacted.
        """
        _refuse_repeated(block.ids)
        order, groups = self._by_shard(block.ids)
        rows, start = self.layout.encode(block.take(order), round_index), 0
        for shard, ids in groups:
            rows_of_shard, start = rows[start : start + len(ids)], start + len(ids)
            with shard.transaction(write=True) as transaction:
                rounds = _refuse_dropped(transaction, round_index - 1, f"writing round {round_index}")
                kept = transaction.read(ids).without_superseded(rounds.durable)
                transaction.replace(ids, kept.with_round(rows_of_shard))
                if round_index > rounds.newest:
                    transaction.note(replace(rounds, newest=round_index))

    def compact(self, durable_round: int) -> None:
        """Allow records to be dropped that a resume from `durable_round`, or from a later round, never reads.

        durable_round: the round of the *oldest* checkpoint that is kept, since a resume may fall back to it.
        Applies to the shards that exist in this folder.
        """
        for shard in self._existing():
            with shard.transaction(write=True) as transaction:
                rounds = transaction.rounds
                if durable_round > rounds.durable:
                    transaction.note(replace(rounds, durable=durable_round))

    def rewind(self, round_index: int) -> None:
        """Drop the records of rounds after `round_index`, of a history that a resume has given up.

        For the start of a run, by one process alone: a shard with such records is read whole, in about 1 us per user.
        Raises StoreError below the durable round.
        """
        remove_leftovers(self.folder)
        for shard in self._existing():
            with shard.transaction(write=True) as transaction:
                rounds = _refuse_dropped(transaction, round_index, f"rewinding to round {round_index}")
                if rounds.newest > round_index:
                    _drop_later(transaction, round_index)
                    transaction.note(replace(rounds, newest=round_index))

    def newest_round(self) -> int:
        """The last round that may have records, -1 for none. Costs O(shards)."""
        newest = NO_ROUND
        for shard in self._existing():
            with shard.transaction(write=False) as transaction:
                newest = max(newest, transaction.rounds.newest)
        return newest

    def forget(self, user_ids: UserIds) -> int:
        """Drop all records of the users. Returns how many of them had any."""
        known = 0
        _, groups = self._by_shard(np.asarray(user_ids, dtype=np.int64))
        for shard, ids in groups:
            if shard.exists:
                with shard.transaction(write=True) as transaction:
                    histories = transaction.read(ids)
                    transaction.replace(ids, histories.of(np.arange(0)))
                    known += len(np.unique(histories.user_r))
        return known

    def count(self) -> int:
        """Users held. Costs O(shards)."""
        total = 0
        for shard in self._existing():
            with shard.transaction(write=False) as transaction:
                total += transaction.users
        return total

    def bytes_per_user(self) -> float:
        """What the store takes on the disk, over the users held; 0 for an empty one. Costs O(shards)."""
        users = self.count()
        return sum(shard.disk_bytes for shard in self._existing()) / users if users else 0.0

    def set_aside(self, shard: int) -> Path:
        """Renames a shard's folder, and returns its new name: the shard begins anew, with fresh users.

        Nothing is deleted. For one process at a time; other processes notice when they next use the shard.
        Raises StoreError when it cannot be renamed.
        """
        return self._shards[shard].set_aside()

    def close(self) -> None:
        """Close the shards that this process opened. Using the store again opens them again."""
        if self._process == os.getpid():
            for shard in self._shards:
                shard.close()
        self._begin()

    def __enter__(self) -> UserStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        folders = [self.folder / f"shard-{number:04d}" for number in range(self.shards)]
        self._all = [Shard(number, folder, self.layout, self._map_bytes) for number, folder in enumerate(folders)]
        self._process = os.getpid()

    @property
    def _shards(self) -> list[Shard]:
        if self._process != os.getpid():  # an LMDB environment must not cross a fork
            self._begin()
        return self._all

    def _existing(self) -> Iterator[Shard]:
        return (shard for shard in self._shards if shard.exists)

    def _by_shard(self, ids: UserIds) -> tuple[npt.NDArray[np.int64], list[tuple[Shard, UserIds]]]:
        """The order of (shard, key) over the ids, and the ids in that order, cut by shard."""
        shard_u = shard_of(ids, self.shards)
        order = np.lexsort((ids.astype(np.uint64), shard_u))
        present, starts = np.unique(shard_u[order], return_index=True)
        return order, [(self._shards[number], part) for number, part in zip(present, np.split(ids[order], starts[1:]))]


def mended(store: UserStore, action: Callable[[], T]) -> tuple[T, tuple[int, ...]]:
    """What an action on the store gives, and the shards that were found damaged: each is set aside and the action done
    again, its users are fresh ones then.

    Raises DamagedShardError when the shard that took its place is damaged too: then the disk is.
    """
    aside: tuple[int, ...] = ()
    while True:
        try:
            return action(), aside
        except DamagedShardError as damage:
            if damage.shard in aside:
                raise
            store.set_aside(damage.shard)
            aside = (*aside, damage.shard)


def _drop_later(transaction: Transaction, round_index: int) -> None:
    """Drop all users' records of rounds after `round_index`."""
    changed = []
    for ids, histories in transaction.batches():
        late = np.unique(histories.user_r[histories.rows["round"] > round_index])
        if len(late):
            changed.append((ids[late], histories.of(late).until(round_index)))
    for ids, histories in changed:
        transaction.replace(ids, histories)


def _refuse_repeated(ids: UserIds) -> None:
    unique, times = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        user, rows = unique[times.argmax()], times.max()
        raise StoreError(f"a block names a user once, got {rows} rows of user {user}; was it drawn twice?")


def _refuse_dropped(transaction: Transaction, round_index: int, what: str) -> Rounds:
    """The noted rounds. Refuses what rests on states after `round_index` when those may have been dropped."""
    rounds = transaction.rounds
    if round_index < rounds.durable:
        raise StoreError(
            f"{what} needs records of rounds that {transaction.place} has dropped: it was compacted to round "
            f"{rounds.durable}; resume from a checkpoint of that round or a later one"
        )
    return rounds


def _claim(folder: Path, shards: int, layout: RecordLayout) -> None:
    """Write the manifest of a new store, or check that of an old one."""
    wanted = {
        "format": "fedquilt user store",
        "version": FORMAT_VERSION,
        "shards": shards,
        "layout": asdict(layout),
    }
    path = folder / MANIFEST_NAME
    try:
        folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        holds_shards = any(folder.glob("shard-*"))  # asked first: other processes may be creating the store
        if not path.exists():
            if holds_shards:
                raise StoreError(f"{folder} holds shards but no {MANIFEST_NAME}; restore it, or use another folder")
            write_file(path, json.dumps(wanted, indent=1).encode(), PRIVATE_FILE)
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read or written ({error}); is this the folder of a user store?") from error
    match found:
        case {"format": form, "version": version} if form == wanted["format"] and version != FORMAT_VERSION:
            raise StoreError(
                f"{folder} was written by another version of fedquilt (format {version}, here {FORMAT_VERSION}); "
                "finish it with that one, or start in another folder"
            )
    if found != wanted:
        raise StoreError(
            f"{folder} holds a store of {found}, asked for {wanted}; open it as it is, or use another folder"
        )
