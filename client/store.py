"""The user store: what persists for every user, crash-safe, on the node that owns the user's shard.

One LMDB environment per shard (a fixed S-th of all users, by a hash of the id), opened when first needed.
Records are keyed (user, round): round t reads the newest record before t and writes (user, t). So a round, or
a part of one, that is done again reads what it read before and writes what it wrote before.

Durability: a write is one transaction per shard, flushed to the disk when it commits. A chunk of a cohort
lies in one shard, so this is one flush per chunk, and a committed chunk outlives both SIGKILL and a power
cut: the records that a later checkpoint rests on are there.

Compaction: `compact(durable_round)` only notes the round in each shard. When a user is next written, its
records that no read can ask for any more are dropped in the same transaction, next to the new one. So the
cost is O(users written), and no list of what changed needs to be kept. A quiet user keeps its last few
records.

Damage: a changed bit in a record is found by its crc, a lost page by LMDB. LMDB has no checksums of its own,
so a changed bit in the index of a shard can hide a record; a file system with checksums guards against that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from client.state import FORMAT_VERSION, RecordLayout, UserBlock, join, user_key
from federation.errors import StoreError
from federation.files import sync, write_file
from federation.streams import UserIds

MANIFEST_NAME = "store.json"
_USER_BYTES = 8
_DURABLE_ROUND = b"durable_round"
_NONE_DURABLE = -1


def shard_of(user_ids: UserIds, shards: int) -> npt.NDArray[np.int64]:
    """The shard of each user: (U,) int64 -> (U,) in [0, shards).

    The finaliser of SplitMix64 spreads consecutive ids evenly (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014).
    """
    z = np.asarray(user_ids, dtype=np.int64).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(shards)).astype(np.int64)


@dataclass(frozen=True)
class _Shard:
    """An open environment: the users' records, and what the store notes about them."""

    environment: Any
    records: Any
    notes: Any


@dataclass(frozen=True)
class _Transaction:
    """A transaction on one shard. `cursor` moves over the users' records."""

    handle: Any
    cursor: Any
    shard: _Shard
    place: str

    @property
    def durable_round(self) -> int:
        noted = self.handle.get(_DURABLE_ROUND, db=self.shard.notes)
        return _NONE_DURABLE if noted is None else int.from_bytes(noted, "big")

    @property
    def records(self) -> int:
        return int(self.handle.stat(self.shard.records)["entries"])


class UserStore:
    """Users' states by (user, round), in `folder`.

    shards: S, fixed for the life of the store.
    map_bytes: most bytes that one shard may take; address space, not disk, until used.

    Several processes may open one store, each with its own `UserStore` used from one thread; LMDB lets one at
    a time write to a shard. A store that was used before a fork opens its shards anew in the child.

    Raises StoreError when the folder holds a store of another shape and, from every method, when a shard is
    damaged, full or cannot be opened.
    """

    def __init__(self, folder: Path, shards: int, layout: RecordLayout, map_bytes: int = 1 << 34) -> None:
        self.folder, self.shards, self.layout = folder, shards, layout
        self._map_bytes = map_bytes
        self._opened: dict[int, _Shard] = {}
        self._process = os.getpid()
        _claim(folder, shards, layout)

    def read(self, user_ids: UserIds, before_round: int) -> UserBlock:
        """Each user's newest state of a round before `before_round`, or a fresh one, in the order of the ids.

        Raises StoreError when `compact` may have dropped such records, or one of them is damaged.
        """
        ids = np.asarray(user_ids, dtype=np.int64)
        blocks = [self.layout.fresh(ids[:0])]
        order, groups = self._by_shard(ids)
        for shard, ids_of_shard in groups:
            with self._transaction(shard, write=False) as transaction:
                _refuse_dropped(transaction, before_round - 1, f"reading before round {before_round}")
                records = [_newest(transaction.cursor, user, before_round) for user in ids_of_shard.tolist()]
                blocks.append(self.layout.decode(ids_of_shard, records, transaction.place))
        return join(blocks).take(np.argsort(order))

    def write(self, block: UserBlock, round_index: int) -> None:
        """Store the users' states as those of `round_index`, replacing what a redone round wrote before.

        Each shard takes all of its users' records or none; after a StoreError the call may be repeated.
        Raises StoreError when the block is not of the store's layout, or the round was compacted.
        """
        unique, times = np.unique(block.ids, return_counts=True)
        if len(unique) != len(block):
            user, rows = unique[times.argmax()], times.max()
            raise StoreError(f"a block names a user once, got {rows} rows of user {user}; was it drawn twice?")
        order, groups = self._by_shard(block.ids)
        pairs = iter(self.layout.encode(block.take(order), round_index))
        for shard, ids in groups:
            pairs_of_shard = [next(pairs) for _ in ids]
            with self._transaction(shard, write=True) as transaction:
                _refuse_dropped(transaction, round_index - 1, f"writing round {round_index}")
                transaction.cursor.putmulti(pairs_of_shard)
                _drop_superseded(transaction, ids)

    def compact(self, durable_round: int) -> None:
        """Allow records to be dropped that a resume from `durable_round`, or from a later round, never reads.

        durable_round: the round of the *oldest* checkpoint that is kept, since a resume may fall back to it.
        Applies to the shards that exist in this folder.
        """
        for shard in self._existing():
            with self._transaction(shard, write=True) as transaction:
                if durable_round > transaction.durable_round:
                    noted = durable_round.to_bytes(4, "big")
                    transaction.handle.put(_DURABLE_ROUND, noted, db=transaction.shard.notes)

    def rewind(self, round_index: int) -> None:
        """Drop the records of rounds after `round_index`, of a history that a resume has given up.

        Scans all keys, so it is for the start of a run. Raises StoreError below the durable round.
        """
        for shard in self._existing():
            with self._transaction(shard, write=True) as transaction:
                _refuse_dropped(transaction, round_index, f"rewinding to round {round_index}")
                keys = transaction.cursor.iternext(keys=True, values=False)
                late = [key for key in keys if int.from_bytes(key[_USER_BYTES:], "big") > round_index]
                for key in late:
                    transaction.cursor.set_key(key)
                    transaction.cursor.delete()

    def count(self) -> int:
        """Records held, of all users and rounds. Costs O(shards)."""
        total = 0
        for shard in self._existing():
            with self._transaction(shard, write=False) as transaction:
                total += transaction.records
        return total

    def close(self) -> None:
        """Close the shards that this process opened. Using the store again opens them again."""
        if self._process == os.getpid():
            for shard in self._opened.values():
                shard.environment.close()
        self._opened = {}

    def __enter__(self) -> UserStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _by_shard(self, ids: UserIds) -> tuple[npt.NDArray[np.int64], list[tuple[int, UserIds]]]:
        """The order of (shard, key) over the ids, and the ids in that order, cut by shard."""
        shard_u = shard_of(ids, self.shards)
        order = np.lexsort((ids.astype(np.uint64), shard_u))
        present, starts = np.unique(shard_u[order], return_index=True)
        return order, list(zip(present.tolist(), np.split(ids[order], starts[1:])))

    def _folder_of(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:04d}"

    def _existing(self) -> list[int]:
        return [shard for shard in range(self.shards) if self._folder_of(shard).is_dir()]

    def _shard(self, shard: int) -> _Shard:
        if self._process != os.getpid():  # an LMDB environment must not cross a fork
            self._opened, self._process = {}, os.getpid()
        if shard not in self._opened:
            self._opened[shard] = _open(self._folder_of(shard), self._map_bytes)
        return self._opened[shard]

    @contextmanager
    def _transaction(self, shard: int, *, write: bool) -> Iterator[_Transaction]:
        """A transaction that commits at the end of the block, and changes nothing when the block raises."""
        place = f"shard {shard} ({self._folder_of(shard)})"
        try:
            opened = self._shard(shard)
            with opened.environment.begin(write=write) as handle:
                yield _Transaction(handle, handle.cursor(db=opened.records), opened, place)
        except lmdb.MapFullError as error:
            raise StoreError(
                f"{place} may take {self._map_bytes} bytes and is full; nothing of this call was kept in it; "
                "open the store with a larger map_bytes"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"{place} cannot be used ({error}); nothing of this call was kept in it. If the disk is "
                "full, free space and repeat the call; if the file is damaged, restore the shard from a "
                "copy, or remove its folder so that its users start afresh"
            ) from error


def _open(folder: Path, map_bytes: int) -> _Shard:
    folder.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(folder), map_size=map_bytes, max_dbs=2, readahead=False)
    try:
        environment.reader_check()  # a killed reader's slot would keep old pages from being used again
        _restore_length(environment, folder / "data.mdb")
        shard = _Shard(environment, environment.open_db(b"records"), environment.open_db(b"notes"))
        sync(folder)  # LMDB flushes its files, not the folder that names them
        sync(folder.parent)
    except BaseException:
        environment.close()
        raise
    return shard


def _restore_length(environment: Any, data: Path) -> None:
    """Give a data file that is too short its full length, so that reading it cannot end in SIGBUS.

    LMDB leaves out unused pages at the end of a file now and then, so a short file need not be damaged. If it
    is, the pages that it lost now read as zeros, and LMDB refuses those. The write transaction keeps other
    writers out meanwhile.
    """
    with environment.begin(write=True):
        needed_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if data.stat().st_size < needed_bytes:
            os.truncate(data, needed_bytes)


def _seek(cursor: Any, user: int, before_round: int) -> bool:
    """Put the cursor on the user's newest record before a round; False when there is none."""
    key = user_key(user, before_round)
    found = cursor.prev() if cursor.set_range(key) else cursor.last()
    return bool(found) and cursor.key()[:_USER_BYTES] == key[:_USER_BYTES]


def _newest(cursor: Any, user: int, before_round: int) -> tuple[bytes, bytes] | None:
    return cursor.item() if _seek(cursor, user, before_round) else None


def _drop_superseded(transaction: _Transaction, ids: UserIds) -> None:
    """Drop each user's records that are older than its newest durable one."""
    durable_round, cursor = transaction.durable_round, transaction.cursor
    for user in ids.tolist():
        if _seek(cursor, user, durable_round + 1):
            while _seek(cursor, user, int.from_bytes(cursor.key()[_USER_BYTES:], "big")):
                cursor.delete()


def _refuse_dropped(transaction: _Transaction, round_index: int, what: str) -> None:
    """Refuse what rests on states as they were after `round_index`, when those may have been dropped."""
    if round_index < transaction.durable_round:
        raise StoreError(
            f"{what} needs records of rounds that {transaction.place} has dropped: it was compacted to round "
            f"{transaction.durable_round}; resume from a checkpoint of that round or a later one"
        )


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
        folder.mkdir(parents=True, exist_ok=True)
        holds_shards = any(folder.glob("shard-*"))  # asked first: other processes may be creating the store
        if not path.exists():
            if holds_shards:
                raise StoreError(f"{folder} holds shards but no {MANIFEST_NAME}; restore it, or use another folder")
            write_file(path, json.dumps(wanted, indent=1).encode())
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read or written ({error}); is this the folder of a user store?") from error
    if found != wanted:
        raise StoreError(
            f"{folder} holds a store of {found}, asked for {wanted}; open it as it is, or use another folder"
        )
