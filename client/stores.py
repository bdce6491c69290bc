"""The user stores of a node, one for each federation that it takes part in.

federations/<id>/users/      as `client/store.py` keeps it, in one shard
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from client.state import RecordLayout
from client.store import MANIFEST_NAME, UserStore

STORE_SHARDS = 1
"""A block of users is one flush to the disk."""
MAP_BYTES = 1 << 32
"""Most bytes of a store; address space, not disk, until used."""
MOST_OPEN = 4
"""Stores that are open at a time; the one whose use is the longest ago is closed first."""


class UserStores:
    """The stores in `folder`. Used by one thread at a time, and by one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, UserStore] = {}  # the one used last comes last

    def of(self, federation: str, layout: RecordLayout) -> UserStore:
        """The store of a federation, a new one for its first work. Raises StoreError for another layout than it has."""
        store = self._opened.get(federation)
        if store is None or store.layout != layout:
            folder = self._folder / federation / "users"
            store = UserStore(folder, STORE_SHARDS, layout, MAP_BYTES)
        return self._used(federation, store)

    def existing(self) -> Iterator[UserStore]:
        """The stores of all federations that the node ever took part in, one after the other."""
        for manifest in sorted(self._folder.glob(f"*/users/{MANIFEST_NAME}")):
            federation = manifest.parent.parent.name
            store = self._opened.get(federation) or UserStore.existing(manifest.parent, MAP_BYTES)
            yield self._used(federation, store)

    def close(self) -> None:
        """Closes what is open. Using the stores again opens them again."""
        while self._opened:
            self._opened.popitem()[1].close()

    def _used(self, federation: str, store: UserStore) -> UserStore:
        before = self._opened.pop(federation, store)
        if before is not store:
            before.close()
        self._opened[federation] = store
        for oldest in list(self._opened)[:-MOST_OPEN]:
            self._opened.pop(oldest).close()
        return store
