"""The personal values of a node's users, and which users the node has forgotten: one LMDB environment, crash-safe.

A user is one key. A forgotten user's value is empty; others are

    part     bytes  field
    key      8      user id, int64, big-endian
    value    1      format version, 2
             1 + n  pool version that the values refer to: its length, its characters (ASCII)
             4 + m  memory, as `client/continual/kept.py` writes it: its length, uint32, little-endian; its bytes
             ..     payload, as `encode_personal` of `federation/codec.py` writes it
             4      crc32 of the key and of the value before it, uint32, little-endian

Format 1 had no memory. It is read as a user without one, and written as format 2 when the user is stored again.

Damage is found when the environment is opened (`client/pages.py`) and when a value is read. LMDB leaves what was
deleted in pages that are free until they are used again: it can be read from the disk for that long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zlib import crc32

import lmdb
import numpy as np

from client.environment import DAMAGE, make_environment, open_environment
from federation.errors import DamagedValuesError, StoreError
from federation.streams import UserIds

FORMAT_VERSION = 2
_WITHOUT_MEMORY = 1
_FORGOTTEN = b""
_LENGTH_BYTES = 4
_CRC_BYTES = 4


@dataclass(frozen=True)
class Kept:
    """What one user keeps. version: of the pool that its payload refers to, ASCII of at most 255 characters.

    memory: what it remembers of its tasks, empty for one without any.
    """

    version: str
    payload: bytes
    memory: bytes = b""


class PersonalStore:
    """The store in `folder`, which is made and opened when first needed. May be used from several threads.

    A process may open a folder once; several processes may use one at the same time.
    map_bytes: most bytes that it may take; address space, not disk, until used.

    Every method raises StoreError when the store cannot be used, or is full.
    """

    def __init__(self, folder: Path, map_bytes: int = 1 << 34) -> None:
        self._folder, self._map_bytes = folder, map_bytes
        self._opening = threading.Lock()
        self._opened: tuple[Any, Any] | None = None

    def put(self, user_id: int, kept: Kept) -> None:
        """Stores a user's values, in place of those before. On the disk when it returns.

        Raises StoreError for a user that was forgotten, were it while its values were made.
        """
        with self._transaction(write=True) as handle:
            if handle.get(_key(user_id)) == _FORGOTTEN:
                raise StoreError(
                    f"user {user_id} was forgotten, and nothing is kept of it in {str(self._folder)!r}; "
                    "give its data another name, should it take part again"
                )
            handle.put(_key(user_id), _packed(user_id, kept))

    def get(self, user_id: int) -> Kept | None:
        """A user's values; None for one that was never personalised, or was forgotten.

        Raises DamagedValuesError when they are damaged, StoreError when they are of another format.
        """
        with self._transaction(write=False) as handle:
            value = bytes(handle.get(_key(user_id), _FORGOTTEN))
        return _unpacked(user_id, value) if value else None

    def forget(self, user_id: int) -> bool:
        """Deletes a user's values, and notes that the user was forgotten. Returns whether there were any."""
        with self._transaction(write=True) as handle:
            found = bool(handle.get(_key(user_id)))
            handle.put(_key(user_id), _FORGOTTEN)
        return found

    def users(self) -> UserIds:
        """The users with values, ascending as their keys do."""
        with self._transaction(write=False) as handle:
            return _ids(key for key, value in handle.cursor() if value)

    def forgotten(self) -> UserIds:
        """The users that were forgotten, ascending as their keys do."""
        with self._transaction(write=False) as handle:
            return _ids(key for key, value in handle.cursor() if not value)

    def versions(self) -> frozenset[str]:
        """The pools that users' values refer to. Nothing of a value but this is looked at, damaged or not."""
        with self._transaction(write=False) as handle:
            return frozenset(_version(value) for _, value in handle.cursor() if value)

    def close(self) -> None:
        """Closes what is open, when nothing uses it any longer. Using the store again opens it again."""
        with self._opening:
            if self._opened is not None:
                self._opened[0].close()
            self._opened = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Any]:
        """A transaction whose values are views, for as long as it lasts."""
        with self._explained():
            environment, records = self._current()
            with environment.begin(db=records, write=write, buffers=True) as handle:
                yield handle

    def _current(self) -> tuple[Any, Any]:
        """The environment and its records."""
        with self._opening:
            if self._opened is None:
                if not self._folder.is_dir():
                    make_environment(self._folder, self._map_bytes, lambda handle: None)
                self._opened = open_environment(self._folder, self._map_bytes)
            return self._opened

    @contextmanager
    def _explained(self) -> Iterator[None]:
        place = f"the store of personal values {str(self._folder)!r}"
        try:
            yield
        except DAMAGE as error:
            raise StoreError(
                f"{place} is damaged ({error}); restore it from a copy, or rename it and personalise its users again"
            ) from error
        except lmdb.MapFullError as error:
            raise StoreError(
                f"{place} may take {self._map_bytes} bytes and is full; forget users, or open it with more map_bytes"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"{place} cannot be used ({error}); free space if the disk is full, see that its files may be read "
                "and written and that this process opens it once"
            ) from error


def _key(user_id: int) -> bytes:
    return user_id.to_bytes(8, "big", signed=True)


def _ids(keys: Iterable[memoryview]) -> UserIds:
    return np.frombuffer(b"".join(keys), ">i8").astype(np.int64)


def _version(value: memoryview) -> str:
    length = int.from_bytes(value[1:2], "big")
    return bytes(value[2 : 2 + length]).decode("ascii", "replace")


def _packed(user_id: int, kept: Kept) -> bytes:
    name = kept.version.encode("ascii")
    memory = len(kept.memory).to_bytes(_LENGTH_BYTES, "little") + kept.memory
    body = bytes([FORMAT_VERSION, len(name)]) + name + memory + kept.payload
    return body + crc32(_key(user_id) + body).to_bytes(_CRC_BYTES, "little")


def _unpacked(user_id: int, value: bytes) -> Kept:
    body, checksum = value[:-_CRC_BYTES], value[-_CRC_BYTES:]
    if len(body) < 2 or int.from_bytes(checksum, "little") != crc32(_key(user_id) + body):
        raise DamagedValuesError(
            f"the personal values of user {user_id} ({len(value)} bytes) fail their checksum; personalise it again"
        )
    if body[0] not in (_WITHOUT_MEMORY, FORMAT_VERSION):
        raise StoreError(
            f"personal values of user {user_id} are of format {body[0]}, this fedquilt reads up to {FORMAT_VERSION}; "
            "upgrade it, or use the release that wrote them"
        )
    end = 2 + body[1]
    version, rest = body[2:end].decode("ascii"), body[end:]
    if body[0] == _WITHOUT_MEMORY:
        return Kept(version, rest)
    end = _LENGTH_BYTES + int.from_bytes(rest[:_LENGTH_BYTES], "little")
    return Kept(version, rest[end:], rest[_LENGTH_BYTES:end])
