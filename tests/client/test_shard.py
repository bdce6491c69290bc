"""Damaged shards: always said, never followed, set aside whole; and files that change under an open shard."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from client.pages import PageFault, check_pages, checked_metas
from client.shard import DATA_NAME, Rounds
from client.state import RecordFault, RecordLayout, UserBlock, user_keys
from client.store import UserStore
from federation.errors import DamagedShardError, StoreError
from tests.child import exit_code
from tests.client.test_store import LAYOUT, assert_equal, block_of

PAGE = 4096
MANY = np.arange(5000)
FEW = block_of(MANY[:150], 2)


def data_file(folder: Path, shard: int = 0) -> Path:
    return folder / f"shard-{shard:04d}" / DATA_NAME


def filled(folder: Path) -> bytes:
    """A store of one shard with two rounds of all users, and its data."""
    with UserStore(folder, 1, LAYOUT) as opened:
        opened.write(block_of(MANY[:3000], 1), 1)
        opened.write(block_of(MANY, 2), 2)
    return data_file(folder).read_bytes()


# -------------------------------------------------------------------------------- damage


def zeroed(start: int, stop: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:start] + bytes(stop - start) + data[stop:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "half a meta page": lambda data: data[:100],
    "a twentieth": lambda data: data[: len(data) // 20],
    "a half": lambda data: data[: len(data) // 2],
    "all but the last pages": lambda data: data[: -len(data) // 20],
    "zeros for the first meta page": zeroed(0, PAGE),
    "zeros for the second meta page": zeroed(PAGE, 2 * PAGE),
    "zeros for both meta pages": zeroed(0, 2 * PAGE),
    "another program's file": lambda data: b"not a database " * 1000,
    "random bytes": lambda data: random.Random(0).randbytes(len(data)),
    "random bytes after the meta pages": lambda data: data[: 2 * PAGE] + random.Random(0).randbytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_shard_goes_on_without_it(tmp_path: Path, damage: str) -> None:
    damaged = DAMAGE[damage](filled(tmp_path))
    data_file(tmp_path).write_bytes(damaged)

    def child() -> None:  # in a child, since a crash inside LMDB would end the tests
        with UserStore(tmp_path, 1, LAYOUT) as opened:
            for call in (
                lambda: opened.read(MANY, 3),
                lambda: opened.write(block_of(MANY, 3), 3),
                lambda: opened.rewind(1),
                lambda: opened.compact(1),
                opened.count,
            ):
                with pytest.raises(DamagedShardError, match=r"^shard 0 .* is damaged .*set it aside") as raised:
                    call()
                assert raised.value.shard == 0
            aside = opened.set_aside(0)
            assert aside.name == "shard-0000.damaged-1"
            assert_equal(opened.read(MANY, 3), LAYOUT.fresh(MANY))
            opened.write(block_of(MANY, 3), 3)
            assert_equal(opened.read(MANY, 4), block_of(MANY, 3))

    assert exit_code(child) == 0
    kept = (tmp_path / "shard-0000.damaged-1" / DATA_NAME).read_bytes()
    assert kept[: len(damaged)] == damaged
    assert not any(kept[len(damaged) :])


def test_a_lost_file_in_a_shard_is_damage_until_the_shard_is_set_aside(tmp_path: Path) -> None:
    filled(tmp_path)
    data_file(tmp_path).unlink()
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        with pytest.raises(DamagedShardError, match=r"there is a data.mdb"):
            opened.read(MANY, 3)
        opened.set_aside(0)
        assert_equal(opened.read(MANY, 3), LAYOUT.fresh(MANY))


def test_a_shard_whose_folder_is_gone_begins_anew(tmp_path: Path) -> None:
    filled(tmp_path)
    shutil.rmtree(data_file(tmp_path).parent)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(MANY, 3), LAYOUT.fresh(MANY))


def test_the_second_damage_takes_the_second_name(tmp_path: Path) -> None:
    with UserStore(tmp_path, 2, LAYOUT) as opened:
        opened.write(block_of(MANY, 1), 1)
        before = opened.read(MANY, 2)
        assert opened.set_aside(1).name == "shard-0001.damaged-1"
        opened.read(MANY, 2)
        assert opened.set_aside(1).name == "shard-0001.damaged-2"
    with UserStore(tmp_path, 2, LAYOUT) as opened:
        after = opened.read(MANY, 2)
    fresh = (after.visits_u == 0).numpy()
    assert 2300 < fresh.sum() < 2700
    assert_equal(after.take(np.flatnonzero(~fresh)), before.take(np.flatnonzero(~fresh)))


def outcome(folder: Path, expected: UserBlock) -> None:
    """Reads and writes a store that may be damaged: the truth or DamagedShardError, nothing else."""
    try:
        with UserStore(folder, 1, LAYOUT) as opened:
            assert_equal(opened.read(MANY, 3), expected)
            opened.write(block_of(MANY[::7], 3), 3)
            assert_equal(opened.read(MANY[::7], 4), block_of(MANY[::7], 3))
    except DamagedShardError:
        pass


@pytest.mark.parametrize("width", [1, 16, 1024])
def test_bytes_flipped_anywhere_are_found_or_harmless(tmp_path: Path, width: int) -> None:
    """Pages hold pointers: without the check of pages, one flip in fifty hides users, and one of a kilobyte kills."""
    data, chance = filled(tmp_path), random.Random(width)
    for trial in range(25):
        page = chance.randrange(len(data) // PAGE) if trial % 2 else chance.randrange(2)
        at = page * PAGE + chance.randrange(160 if trial % 3 else PAGE)
        flipped = bytes(byte ^ chance.randrange(1, 256) for byte in data[at : at + width])
        data_file(tmp_path).write_bytes(data[:at] + flipped + data[at + width :])
        assert exit_code(lambda: outcome(tmp_path, block_of(MANY, 2))) == 0, f"{width} bytes flipped at {at}"


def is_found_damaged(folder: Path, expected: UserBlock) -> bool:
    """Whether the shard is called damaged. If not, it holds what is expected."""
    try:
        with UserStore(folder, 1, LAYOUT) as opened:
            assert_equal(opened.read(expected.ids, 3), expected)
    except DamagedShardError:
        return True
    return False


def small(folder: Path) -> tuple[bytes, int, int, int]:
    """A store of FEW: its data, and where the MDB_db of its records, their top page and the node of the last start."""
    with UserStore(folder, 1, LAYOUT) as opened:
        opened.write(FEW, 2)
    data = data_file(folder).read_bytes()
    tree, branch = next(  # the newest, of some that are left in the file
        (at, root * PAGE)
        for at in (found.end() for found in re.finditer(b"records", data))
        for *_, entries, root in [struct.unpack_from("<IHH5Q", data, at)]
        if entries == len(FEW)
    )
    return data, tree, branch, data.index(user_keys(FEW.ids[-1:])[0] + LAYOUT.encode(FEW, 2)[-1:].tobytes()) - 8


def test_every_bit_of_every_flag_is_looked_at(tmp_path: Path) -> None:
    data, tree, _, last = small(tmp_path)
    newest = PAGE * (data[PAGE + 144] > data[144])
    for at in (newest + 44, newest + 92, tree + 4, tree - 11, last + 4):  # three trees and two nodes
        for bit in range(16):
            flags = int.from_bytes(data[at : at + 2], "little") ^ 1 << bit
            data_file(tmp_path).write_bytes(data[:at] + flags.to_bytes(2, "little") + data[at + 2 :])
            with pytest.raises(PageFault):
                check_pages(data_file(tmp_path))


@pytest.mark.parametrize(
    ("part", "told"), [("trees of meta pages", 500), ("tree of records", 400), ("branch page", 200), ("node", 100)]
)
def test_every_bit_flipped_in_what_lmdb_follows_is_found_or_harmless(tmp_path: Path, part: str, told: int) -> None:
    """told: how many flips are found at least, so that something is tried."""
    data, tree, branch, last = small(tmp_path)
    lower, upper = struct.unpack_from("<HH", data, branch + 12)
    ranges = {
        "trees of meta pages": [range(at + 40, at + 136) for at in (0, PAGE)],
        "tree of records": [range(tree - 15, tree + 48)],
        "branch page": [range(branch, branch + lower), range(branch + upper, branch + PAGE)],
        "node": [range(last, last + 16)],
    }

    def child() -> None:  # one for all flips, since a crash inside LMDB would end the tests
        found = 0
        with data_file(tmp_path).open("r+b", buffering=0) as file:
            for at, bit in product(chain(*ranges[part]), range(8)):
                os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit]), at)
                found += is_found_damaged(tmp_path, FEW)
                os.pwrite(file.fileno(), data[at : at + 1], at)
        assert found >= told

    assert exit_code(child) == 0


def test_a_flipped_bit_in_a_record_names_its_user(tmp_path: Path) -> None:
    data = filled(tmp_path)
    record = LAYOUT.encode(block_of(MANY[7:8], 2), 2).tobytes()
    assert data.count(record) == 1
    data_file(tmp_path).write_bytes(data.replace(record, record[:-9] + bytes([record[-9] ^ 4]) + record[-8:]))
    with UserStore(tmp_path, 1, LAYOUT) as opened, pytest.raises(DamagedShardError, match=r"user 7 fails its crc32"):
        opened.read(MANY[:7], 3)


@pytest.mark.parametrize("note", [None, b"", b"\0" * 20, Rounds(3, 5).packed()[:-1]])
def test_a_note_of_rounds_that_is_none_is_refused(note: bytes | None) -> None:
    assert Rounds.unpacked(Rounds(3, 2**32 - 1).packed()) == Rounds(3, 2**32 - 1)
    with pytest.raises(RecordFault, match="note of its rounds"):
        Rounds.unpacked(note)


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedShardError("shard 3 is damaged", 3)))
    assert (type(error), str(error), error.shard) == (DamagedShardError, "shard 3 is damaged", 3)


def test_a_shard_that_cannot_be_renamed_is_said(tmp_path: Path) -> None:
    with UserStore(tmp_path, 1, LAYOUT) as opened, pytest.raises(StoreError, match=r"shard 0 .*rename it by hand"):
        opened.set_aside(0)


# -------------------------------------------------------------------------------- no damage


def test_a_file_that_only_lacks_unused_pages_is_whole(tmp_path: Path) -> None:
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        opened.write(block_of(MANY[:40], 1), 1)
        opened.write(block_of(MANY, 2), 2)
        opened.rewind(1)
        opened.write(block_of(MANY[:40], 2), 2)
    os.truncate(data_file(tmp_path), data_file(tmp_path).stat().st_size - 3 * PAGE)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(MANY[:40], 3), block_of(MANY[:40], 2))
        opened.write(block_of(MANY, 3), 3)
        assert_equal(opened.read(MANY, 4), block_of(MANY, 3))


def test_meta_pages_read_between_commits_are_whole_each(tmp_path: Path) -> None:
    """Others may write while a file is opened; the rule that joins both pages is for who has locked them out."""
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        opened.write(block_of(MANY[:40], 1), 1)
        before = data_file(tmp_path).read_bytes()
        for round_index in range(2, 6):
            opened.write(block_of(MANY[:40], round_index), round_index)
    after, read = data_file(tmp_path).read_bytes(), tmp_path / "read"
    read.write_bytes(before[:PAGE] + after[PAGE:])
    checked_metas(read)
    with pytest.raises(PageFault, match="in turn"):
        check_pages(read)


def test_a_file_that_may_not_be_read_is_an_error_and_no_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    data_file(tmp_path).rename(data_file(tmp_path).with_name("elsewhere"))
    data_file(tmp_path).mkdir()
    with UserStore(tmp_path, 1, LAYOUT) as opened, pytest.raises(StoreError, match="cannot be used") as raised:
        opened.read(MANY, 3)
    assert not isinstance(raised.value, DamagedShardError)


def test_any_history_of_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    """Pages split, freed, reused and overflowing: what LMDB writes is never taken for damage."""
    layout, chance = RecordLayout(embedding_width=90, mask_bytes=7), np.random.default_rng(0)
    for round_index in range(1, 25):
        ids = chance.choice(3000, chance.integers(1, 900), replace=False)
        with UserStore(tmp_path, 1, layout) as opened:
            opened.write(layout.fresh(ids), round_index)
            if round_index % 9 == 0:
                opened.compact(round_index - 3)
            if round_index % 7 == 0:
                opened.rewind(round_index - 1)


# -------------------------------------------------------------------------------- under an open shard


def replace_shard(folder: Path) -> None:
    with UserStore(folder, 1, LAYOUT) as other:
        other.set_aside(0)
        other.write(block_of(MANY[:10], 1), 1)


def test_a_shard_that_another_process_set_aside_is_opened_anew(tmp_path: Path) -> None:
    filled(tmp_path)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(MANY, 3), block_of(MANY, 2))
        assert exit_code(lambda: replace_shard(tmp_path)) == 0
        assert_equal(opened.read(MANY[:10], 3), block_of(MANY[:10], 1))
        assert_equal(opened.read(MANY[10:], 3), LAYOUT.fresh(MANY[10:]))


def test_a_shard_set_aside_while_it_is_opened_takes_no_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    open_environment = lmdb.open

    def opened_too_late(*place: Any, **options: Any) -> Any:
        environment = open_environment(*place, **options)
        monkeypatch.undo()
        assert exit_code(lambda: replace_shard(tmp_path)) == 0
        return environment

    monkeypatch.setattr(lmdb, "open", opened_too_late)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(MANY, 3), block_of(MANY, 2))
        opened.write(block_of(MANY[:10], 3), 3)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(MANY[:10], 4), block_of(MANY[:10], 3))
        assert_equal(opened.read(MANY[:10], 3), block_of(MANY[:10], 1))


def test_a_file_cut_short_under_an_open_shard_is_found(tmp_path: Path) -> None:
    size = len(filled(tmp_path))

    def child() -> None:
        with UserStore(tmp_path, 1, LAYOUT) as opened:
            opened.read(MANY, 3)
            os.truncate(data_file(tmp_path), size // 2)
            with pytest.raises(DamagedShardError):
                opened.read(MANY, 3)

    assert exit_code(child) == 0


def test_a_record_that_changes_under_an_open_shard_is_found(tmp_path: Path) -> None:
    data = filled(tmp_path)
    record = LAYOUT.encode(block_of(MANY[7:8], 2), 2).tobytes()
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        opened.read(MANY, 3)
        with data_file(tmp_path).open("r+b") as file:
            file.seek(data.index(record) + 5)
            file.write(bytes([record[5] ^ 1]))
        for call in (lambda: opened.read(MANY[7:8], 3), lambda: opened.write(block_of(MANY[7:8], 3), 3)):
            with pytest.raises(DamagedShardError, match=r"user 7 fails its crc32"):
                call()
