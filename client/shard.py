"""One shard of a user store: an LMDB environment whose file may be damaged, or replaced by another process.

Opening a shard checks all of it, its pages (`client/environment.py`) and the crc of every record: about 1 us per user,
once in a process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import lmdb
import numpy as np

from client.environment import DAMAGE, DATA_NAME, data_file, make_environment, needed_bytes, open_environment
from client.state import Histories, RecordFault, RecordLayout, user_keys
from federation.errors import DamagedShardError, StoreError
from federation.files import set_damaged_aside
from federation.streams import UserIds

NO_ROUND = -1
_ROUNDS = b"rounds"
_BATCH_USERS = 1 << 14
_DAMAGE = (RecordFault, *DAMAGE)


@dataclass(frozen=True)
class Rounds:
    """What a shard notes. durable: the round it was compacted to. newest: the last round that may have records.

    Kept as two int64 and the crc32 of them, little-endian; NO_ROUND is -1.
    """

    durable: int = NO_ROUND
    newest: int = NO_ROUND

    def packed(self) -> bytes:
        body = struct.pack("<qq", self.durable, self.newest)
        return body + struct.pack("<I", crc32(body))

    @classmethod
    def unpacked(cls, note: bytes | None) -> Self:
        """Raises RecordFault."""
        if note is None or len(note) != 20 or crc32(note[:16]) != struct.unpack("<I", note[16:])[0]:
            raise RecordFault(f"the note of its rounds is {note!r}, which is none")
        return cls(*struct.unpack("<qq", note[:16]))


@dataclass(frozen=True)
class Transaction:
    """A transaction on one shard. place: the shard, for messages."""

    handle: Any
    records: Any
    layout: RecordLayout
    place: str

    @property
    def users(self) -> int:
        """Users with records."""
        return int(self.handle.stat(self.records)["entries"])

    @property
    def rounds(self) -> Rounds:
        return Rounds.unpacked(self.handle.get(_ROUNDS))

    def note(self, rounds: Rounds) -> None:
        """Replaces the noted rounds."""
        self.handle.put(_ROUNDS, rounds.packed())

    def read(self, ids: UserIds) -> Histories:
        """The records of the users. ids: in the order of their keys."""
        pairs = self.handle.cursor(db=self.records).getmulti(user_keys(ids))
        found = np.frombuffer(b"".join([key for key, _ in pairs]), ">u8")
        positions = np.searchsorted(ids.astype(np.uint64), found.astype(np.uint64))
        return self.layout.unpack(ids, positions, [value for _, value in pairs])

    def replace(self, ids: UserIds, histories: Histories) -> None:
        """Replaces the records of the users. ids: in the order of their keys."""
        pairs = list(zip(user_keys(ids), histories.packed(len(ids))))
        self.handle.cursor(db=self.records).putmulti([pair for pair in pairs if pair[1]])
        for key in [key for key, value in pairs if not value]:
            self.handle.delete(key, db=self.records)

    def batches(self) -> Iterator[tuple[UserIds, Histories]]:
        """All users and their records, some thousands at a time. Nothing may be replaced meanwhile."""
        pairs = self.handle.cursor(db=self.records).iternext()
        while batch := list(islice(pairs, _BATCH_USERS)):
            ids = np.frombuffer(b"".join([key for key, _ in batch]), ">i8").astype(np.int64)
            yield ids, self.layout.unpack(ids, np.arange(len(ids)), [value for _, value in batch])


class Shard:
    """A shard in `folder`, which is made when first needed. Used from one process, by one thread at a time.

    map_bytes: most bytes that it may take; address space, not disk, until used.
    """

    def __init__(self, number: int, folder: Path, layout: RecordLayout, map_bytes: int) -> None:
        self._number, self._folder, self._layout, self._map_bytes = number, folder, layout, map_bytes
        self._data = folder / DATA_NAME
        self._opened: tuple[Any, Any, tuple[int, int]] | None = None

    @property
    def exists(self) -> bool:
        return self._folder.is_dir()

    @property
    def place(self) -> str:
        return f"shard {self._number} ({self._folder})"

    @property
    def disk_bytes(self) -> int:
        """What its data takes on the disk."""
        return self._data.stat().st_blocks * 512

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Transaction]:
        """A transaction that commits at the end of the block, and changes nothing when the block raises.

        Raises DamagedShardError when the data is damaged, other StoreErrors when it cannot be used.
        """
        try:
            environment, records = self._current()
            with environment.begin(write=write) as handle:
                yield Transaction(handle, records, self._layout, self.place)
        except _DAMAGE as error:
            self.close()
            raise DamagedShardError(
                f"{self.place} is damaged ({error}); nothing of this call was kept in it; restore it from a copy, or "
                "set it aside so that its users start afresh",
                self._number,
            ) from error
        except lmdb.MapFullError as error:
            raise StoreError(
                f"{self.place} may take {self._map_bytes} bytes and is full; nothing of this call was kept in it; "
                "open the store with a larger map_bytes"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"{self.place} cannot be used ({error}); nothing of this call was kept in it; free space if the disk "
                "is full, see that its files may be read and written, and repeat the call"
            ) from error

    def set_aside(self) -> Path:
        """Renames the folder, so that the shard begins anew. Nothing is deleted.

        For one process at a time; others notice at their next transaction. Raises StoreError when it cannot be done.
        """
        self.close()
        try:
            return set_damaged_aside(self._folder)
        except OSError as error:
            raise StoreError(f"{self.place} is damaged and cannot be renamed ({error}); rename it by hand") from error

    def close(self) -> None:
        """Closes what is open. Using the shard again opens it again."""
        if self._opened is not None:
            self._opened[0].close()
        self._opened = None

    def _current(self) -> tuple[Any, Any]:
        """The environment and its records, opened anew when another file has taken the place or it was cut short."""
        if self._opened is not None:
            environment, records, file = self._opened
            found = self._data.stat() if self._data.exists() else None
            if found and (found.st_dev, found.st_ino) == file and found.st_size >= needed_bytes(environment):
                return environment, records
            self.close()
        if not self.exists:
            make_environment(self._folder, self._map_bytes, lambda handle: handle.put(_ROUNDS, Rounds().packed()))
        self._opened = environment, records, _ = self._open()
        return environment, records

    def _open(self) -> tuple[Any, Any, tuple[int, int]]:
        """The environment, its records, and which file they are in."""
        # Looked at before it is opened: should another file take its place meanwhile, `_current` sees it.
        found = data_file(self._folder).stat()
        environment, records = open_environment(self._folder, self._map_bytes)
        try:
            with environment.begin() as handle:
                for _ in Transaction(handle, records, self._layout, self.place).batches():
                    pass
        except BaseException:
            environment.close()
            raise
        return environment, records, (found.st_dev, found.st_ino)
