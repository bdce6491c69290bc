"""The million-user experiment, scaled down: everyone once, whatever is killed on the way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import simulations.federate
from federation.cohorts import rounds_per_epoch
from federation.config import RunConfig, load_config
from federation.experiments import EXPERIMENTS
from simulations.federate import read_history
from simulations.record import read_record
from simulations.runs import MAIN, run

PATIENCE_SECONDS = 250


def scaled(users: int, rounds: int, workers: int) -> tuple[str, ...]:
    """Overrides that keep all but the size."""
    return (
        f"population.options.train_users={users}",
        f"federation.cohort={users // rounds}",
        f"federation.rounds={rounds}",
        f"compute.workers={workers}",
    )


def million(*overrides: str) -> RunConfig:
    return load_config(EXPERIMENTS / "million.toml", overrides)


def assert_same_end(record: Any, undisturbed: Any, users: int) -> None:
    assert record["visits"] == undisturbed["visits"] == record["users"] == users
    assert record["bit_identical"]
    for digest in ("checksum", "users_checksum"):
        assert record[digest] == undisturbed[digest]


def test_a_million_users_take_part_once() -> None:
    config = million()
    assert config.population.options["train_users"] == 1_000_000
    assert config.federation.sampling == "epochs"
    assert rounds_per_epoch(1_000_000, config.federation.cohort) == config.federation.rounds


def test_stopped_and_resumed_everyone_has_taken_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = million(*scaled(1200, 8, workers=0))
    undisturbed = run(config, tmp_path / "undisturbed").record
    real, calls = simulations.federate.run_chunk, 0

    def pressing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:  # of eight a round: in the fourth
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(simulations.federate, "run_chunk", pressing)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "stopped")
    record = run(config, tmp_path / "stopped", resume=True).record
    assert_same_end(record, undisturbed, 1200)
    assert record["peak_mib"] == max(line["private_mib"] for line in read_history(tmp_path / "stopped" / MAIN)) > 100
    assert record["object_store_mib"] == 0
    assert 60 < record["bytes_per_user"] < 1000  # 60 without any of the store's own pages


def start(folder: Path, overrides: tuple[str, ...]) -> subprocess.Popen[bytes]:
    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "simulations.cli", "simulate", "million", "--resume", "--out", str(folder)]
    house = EXPERIMENTS.parents[1]
    return subprocess.Popen([*command, *settings], cwd=house, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for_round(child: subprocess.Popen[bytes], folder: Path, round_index: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_history(folder / MAIN)) < round_index:
        assert child.poll() is None, f"the driver ended before round {round_index}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(driver: int) -> set[int]:
    """The processes below a driver that have the user store open."""
    below, found = [driver], set()
    while below:
        parent = below.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            below += [int(pid) for pid in (task / "children").read_text().split()]
        found.add(parent)
    return {pid for pid in found if holds_store(pid)}


def holds_store(pid: int) -> bool:
    try:
        return "/shard-" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_killed_twice_and_stopped_once_it_ends_with_the_same_users(tmp_path: Path) -> None:
    users, chance = 20_000, random.Random(1)
    sizes, folder = scaled(users, 20, workers=2), tmp_path / "killed"
    for round_index, how in ((4, signal.SIGKILL), (9, signal.SIGKILL), (14, signal.SIGINT)):
        child = start(folder, sizes)
        wait_for_round(child, folder, round_index)
        time.sleep(chance.uniform(0.0, 0.2))
        workers = workers_of(child.pid)
        assert len(workers) == 2
        os.kill(child.pid, how)
        assert child.wait(PATIENCE_SECONDS) == (130 if how == signal.SIGINT else -how)
        deadline = time.monotonic() + 10
        while any(map(holds_store, workers)):
            assert time.monotonic() < deadline, "a worker outlives its driver"
            time.sleep(0.1)
    assert start(folder, sizes).wait(PATIENCE_SECONDS) == 0
    assert start(tmp_path / "undisturbed", sizes).wait(PATIENCE_SECONDS) == 0
    assert_same_end(read_record(folder), read_record(tmp_path / "undisturbed"), users)
