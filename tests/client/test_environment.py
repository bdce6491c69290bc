"""An LMDB environment is made whole or not at all, and opened only when it is whole."""

from __future__ import annotations

from pathlib import Path

import lmdb
import pytest

from client.environment import DAMAGE, DATA_NAME, data_file, make_environment, needed_bytes, open_environment
from client.pages import PageFault

MAP_BYTES = 1 << 20


def made(folder: Path, note: bytes = b"note") -> Path:
    make_environment(folder, MAP_BYTES, lambda handle: handle.put(b"key", note))
    return folder


def note_of(folder: Path) -> bytes:
    environment, _ = open_environment(folder, MAP_BYTES)
    with environment, environment.begin() as handle:
        return handle.get(b"key")


def test_what_was_filled_in_is_there(tmp_path: Path) -> None:
    assert note_of(made(tmp_path / "new" / "place")) == b"note"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place"]


def test_one_that_another_process_made_meanwhile_is_left(tmp_path: Path) -> None:
    def slowly(handle) -> None:
        made(tmp_path / "place", b"faster")
        handle.put(b"key", b"slower")

    make_environment(tmp_path / "place", MAP_BYTES, slowly)
    assert note_of(tmp_path / "place") == b"faster"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_one_that_could_not_be_filled_is_not_there(tmp_path: Path) -> None:
    def failing(handle) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        make_environment(tmp_path / "place", MAP_BYTES, failing)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_and_nothing_stays_open(tmp_path: Path) -> None:
    folder = made(tmp_path / "place")
    data = folder / DATA_NAME
    whole, faults = data.read_bytes(), []
    for damaged in (b"", whole[:5000], whole.replace(b"records", b"RECORDS"), whole[:8192] + bytes(len(whole) - 8192)):
        data.write_bytes(damaged)
        with pytest.raises(DAMAGE) as error:
            open_environment(folder, MAP_BYTES)
        faults.append(error)  # and with it all that the call had opened
    data.write_bytes(whole)
    assert note_of(folder) == b"note"
    data.unlink()
    with pytest.raises(PageFault, match=r"there is a data\.mdb"):
        data_file(folder)


def test_a_file_whose_unused_end_is_cut_is_whole(tmp_path: Path) -> None:
    folder = made(tmp_path / "place")
    data = folder / DATA_NAME
    with lmdb.open(str(folder), map_size=MAP_BYTES, max_dbs=1) as environment:
        for number in range(20):
            with environment.begin(write=True) as handle:
                handle.put(b"key", b"x" * 20_000 if number < 10 else b"note")
        length = needed_bytes(environment)
    assert data.stat().st_size <= length
    with data.open("r+b") as file:
        file.truncate(length - 4096)
    assert note_of(folder) == b"note"
    assert data.stat().st_size == length
