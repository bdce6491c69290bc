"""Private memory against memory taken on purpose: what counts, and what does not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from simulations.compute import memory
from simulations.compute.memory import largest, private_memory, total

TAKEN_MIB = 64


def mib() -> float:
    (held,) = private_memory().values()
    return held


def test_a_processes_own_pages_count() -> None:
    before = mib()
    taken = np.ones(TAKEN_MIB << 17)
    assert TAKEN_MIB - 2 < mib() - before < TAKEN_MIB + 8
    del taken
    assert mib() - before < 8


def test_pages_of_a_file_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(TAKEN_MIB << 20))
    before = mib()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        assert mib() - before < 8


def test_processes_are_told_apart_and_each_counts_once() -> None:
    (process,) = private_memory()
    assert process.endswith(f":{os.getpid()}")
    parts = [{"a": 3.0, "b": 1.0}, {"a": 2.0}, {"b": 4.5}]
    assert largest(parts) == {"a": 3.0, "b": 4.5}
    assert total(largest(parts)) == 7.5


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATM", tmp_path / "absent")
    assert private_memory() == {}
    assert total(largest([private_memory()])) is None
