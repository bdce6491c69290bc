"""A store shard damaged on disk: set aside, its users begun anew from the population and named, and the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.round import RoundState
from client.state import UserBlock
from client.store import UserStore, shard_of
from federation.cohorts import draw_cohort
from federation.errors import DamagedShardError, FedquiltWarning
from simulations.compute.worker import Broadcast, ChunkReport, Worker, merge_reports, perform, run_chunk
from tests.simulations.tiny import Interrupt, interrupt_at, simulate, tiny_config, tiny_setup

DAMAGED = 1
USERS = np.arange(60)
OURS = USERS[shard_of(USERS, 3) == DAMAGED]
OTHERS = USERS[shard_of(USERS, 3) != DAMAGED]

DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut short": lambda data: os.truncate(data, 3 * 4096),
    "meta pages zeroed": lambda data: overwrite(data, 0, bytes(2 * 4096)),
    "another file": lambda data: overwrite(data, 0, b"no database " * 4096),
    "flipped in the middle": lambda data: flip_records(data),
}


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def flip_records(data: Path) -> None:
    """One byte at the end of each page, where the first record of a leaf lies; meta pages have none."""
    for end in range(3 * 4096, data.stat().st_size + 1, 4096):
        overwrite(data, end - 6, b"\x55")


def states(folder: Path, users: np.ndarray, before_round: int) -> UserBlock:
    config = tiny_config()
    with UserStore(folder / "users", config.federation.shards, tiny_setup(config).record_layout) as store:
        return store.read(users, before_round)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_without_a_damaged_shard(undisturbed: str, tmp_path: Path, damage: str) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config(), tmp_path, on_round=interrupt_at(4))
    before = states(tmp_path, OTHERS, 5)
    DAMAGE[damage](tmp_path / "users" / f"shard-{DAMAGED:04d}" / "data.mdb")
    seen: list[int] = []
    with pytest.warns(
        FedquiltWarning, match=rf"shard {DAMAGED} of .*users .*shard-{DAMAGED:04d}\.damaged-.*begin anew"
    ):
        simulate(tiny_config(), tmp_path, resume=True, on_round=lambda report: seen.append(report.round_index))
    assert seen == [5, 6]
    assert [folder.name for folder in (tmp_path / "users").glob("*damaged*")] == [f"shard-{DAMAGED:04d}.damaged-1"]
    assert states(tmp_path, OTHERS, 5).visits_u.tolist() == before.visits_u.tolist()
    config = tiny_config()
    after = np.concatenate([draw_cohort(range(60), config.federation, tiny_setup(config).streams, r) for r in (5, 6)])
    assert states(tmp_path, OURS, 7).visits_u.tolist() == np.bincount(after, minlength=60)[OURS].tolist()


def chunk(worker: Worker, folder: Path, round_index: int, users: np.ndarray) -> ChunkReport:
    config = tiny_config()
    begun = worker.setup(config).begin()
    broadcast = Broadcast(RoundState(begun.values, round_index, "v"), begun.strategy)
    report: ChunkReport = perform(worker, run_chunk, broadcast, config, folder, users)[1]
    return report


def test_a_shard_is_named_once_by_the_chunk_that_finds_it_damaged_whoever_is_in_it(tmp_path: Path) -> None:
    worker = Worker(tiny_config())
    assert chunk(worker, tmp_path, 1, OURS[:6]).rebuilt == ()
    assert chunk(worker, tmp_path, 1, OTHERS[:1]).rebuilt == ()
    overwrite(tmp_path / f"shard-{DAMAGED:04d}" / "data.mdb", 0, bytes(2 * 4096))
    worker.close()
    reports = [
        chunk(worker, tmp_path, 2, OURS[6:8]),  # who were never there before, and lost nothing
        chunk(worker, tmp_path, 3, OURS[2:6]),
        chunk(worker, tmp_path, 3, OTHERS[:1]),
    ]
    assert [report.rebuilt for report in reports] == [(DAMAGED,), (), ()]
    assert merge_reports(reports).rebuilt == (DAMAGED,)
    worker.close()


def test_damage_found_when_writing_keeps_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(tiny_config())
    chunk(worker, tmp_path, 1, OURS[:6])
    real, refusals = UserStore.write, iter([DamagedShardError("shard 1 is damaged", DAMAGED)])

    def write(store: UserStore, block: UserBlock, round_index: int) -> None:
        for refusal in refusals:
            raise refusal
        real(store, block, round_index)

    monkeypatch.setattr(UserStore, "write", write)
    assert chunk(worker, tmp_path, 2, OURS[:6]).rebuilt == (DAMAGED,)
    store = worker.store(worker.setup(tiny_config()), tmp_path)
    assert store.read(OURS[:6], 3).visits_u.tolist() == [2] * 6
    worker.close()
