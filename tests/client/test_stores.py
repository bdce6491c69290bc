"""The stores of many federations: each keeps its own, and few are open at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from client.state import RecordLayout
from client.stores import MAP_BYTES, MOST_OPEN, UserStores
from federation.errors import StoreError
from tests.client.test_store import LAYOUT, assert_equal, block_of

IDS = np.arange(5)


def files_open(folder: Path) -> set[str]:
    """The stores, by federation, that this process has files of open."""
    links = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    ]
    return {Path(link).relative_to(folder).parts[0] for link in links if link.startswith(str(folder))}


def mapped_bytes(folder: Path) -> int:
    """Address space that files of the stores take."""
    taken = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line and line.endswith(".mdb"):
            start, end = line.split()[0].split("-")
            taken += int(end, 16) - int(start, 16)
    return taken


def test_few_are_open_at_a_time_and_all_keep_what_they_hold(tmp_path: Path) -> None:
    stores = UserStores(tmp_path)
    names = [f"fed{number}" for number in range(3 * MOST_OPEN)]
    for stamp, name in enumerate(names):
        stores.of(name, LAYOUT).write(block_of(IDS, stamp), 1)
        stores.of(names[0], LAYOUT).count()  # which is therefore never the one that is closed
    assert files_open(tmp_path) == {names[0], *names[1 - MOST_OPEN :]}
    assert mapped_bytes(tmp_path) <= MOST_OPEN * (MAP_BYTES + (1 << 20))
    for stamp, name in enumerate(names):
        assert_equal(stores.of(name, LAYOUT).read(IDS, 2), block_of(IDS, stamp))
    stores.close()
    assert files_open(tmp_path) == set()
    assert_equal(stores.of(names[3], LAYOUT).read(IDS, 2), block_of(IDS, 3))
    stores.close()


def test_those_of_earlier_processes_are_found_a_few_at_a_time(tmp_path: Path) -> None:
    first, names = UserStores(tmp_path), [f"fed{number}" for number in range(MOST_OPEN + 2)]
    for name in names:
        first.of(name, LAYOUT).write(block_of(IDS, 1), 1)
    first.close()
    again = UserStores(tmp_path)
    again.of("another", LAYOUT)
    found = [(store.folder.parent.name, store.forget(IDS[:2])) for store in again.existing()]
    assert sorted(found) == sorted([("another", 0), *((name, 2) for name in names)])
    assert len(files_open(tmp_path)) <= MOST_OPEN
    again.close()


def test_a_federation_has_one_layout(tmp_path: Path) -> None:
    stores = UserStores(tmp_path)
    stores.of("fed", LAYOUT).write(block_of(IDS, 1), 1)
    with pytest.raises(StoreError, match="use another folder"):
        stores.of("fed", RecordLayout(4, 2))
    assert_equal(stores.of("fed", LAYOUT).read(IDS, 2), block_of(IDS, 1))
    stores.close()
