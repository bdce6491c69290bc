"""Whatever dies, fills up or is damaged while simulating: a clear end, and a resume that ends with the same bits."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

import server.checkpoint
from client.state import RecordLayout
from client.store import UserStore
from federation.config import RunConfig
from federation.errors import CheckpointError, FedquiltError, RunError
from server.checkpoint import checksum, rounds
from simulations.federate import HISTORY_NAME, RoundReport, last_checkpoint, read_history
from simulations.runs import MAIN, run
from tests.simulations.tiny import TINY, Interrupt, interrupt_at, simulate, tiny_config

PATIENCE_SECONDS = 120


# -------------------------------------------------------------------------------- killed


def run_or_resume(config: RunConfig, folder: Path, file_bytes: int | None) -> None:
    """What a child process does; a clear error is written to `error`. file_bytes: no file may grow beyond it."""
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        run(config, folder, resume=True)
    except FedquiltError as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")


def start(config: RunConfig, folder: Path, file_bytes: int | None = None) -> BaseProcess:
    """A child forked from a server that has imported everything, so that it is at work at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.runs", "simulations.populations.synthetic"])
    child = context.Process(target=run_or_resume, args=(config, folder, file_bytes))
    child.start()
    return child


def finish(child: BaseProcess) -> int | None:
    """The exit code of a child that ends by itself."""
    child.join(PATIENCE_SECONDS)
    if child.is_alive():
        child.kill()
    child.join()
    return child.exitcode


def wait_for_round(child: BaseProcess, folder: Path, round_index: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(read_history(folder / MAIN)) < round_index:
        assert child.is_alive(), f"the child ended before round {round_index}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_three_random_moments_and_resumed_it_ends_with_the_same_checksum(tmp_path: Path) -> None:
    config, folder, chance = tiny_config("federation.rounds=40"), tmp_path / "killed", random.Random(0)
    for round_index in sorted(chance.sample(range(1, 11), 3)):
        child = start(config, folder)
        wait_for_round(child, folder, round_index)
        time.sleep(chance.uniform(0.0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert finish(start(config, folder)) == 0
    assert checksum(last_checkpoint(folder / MAIN)) == simulate(config, tmp_path / "undisturbed")
    assert [line["round_index"] for line in read_history(folder / MAIN)] == [*range(1, 41)]


STEPS: dict[str, tuple[Any, str]] = {
    "users are written": (UserStore, "write"),
    "a checkpoint is saved": (server.checkpoint, "save"),
    "the store is compacted": (UserStore, "compact"),
    "the store is rewound": (UserStore, "rewind"),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_dead_before_or_after_any_step_it_resumes_to_the_same_bits(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, moment: str
) -> None:
    owner, name = STEPS[step]
    real, calls = getattr(owner, name), 0
    last = 1 if step == "the store is rewound" else 8 if step == "users are written" else 4

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and moment == "before":
            raise Interrupt
        result = real(*arguments)
        if calls == last:
            raise Interrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Interrupt):
            simulate(tiny_config(), tmp_path)
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed
    assert [line["round_index"] for line in read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]


def hold_a_shard(shard: Path) -> None:
    with lmdb.open(str(shard), max_dbs=2).begin(write=True):
        (shard / "held").touch()
        time.sleep(PATIENCE_SECONDS)


def test_a_writer_that_is_killed_in_a_transaction_keeps_nobody_waiting(tmp_path: Path) -> None:
    layout = RecordLayout(embedding_width=1, mask_bytes=1)
    users = layout.fresh(np.arange(5))
    with UserStore(tmp_path, 1, layout) as store:
        store.write(users, 1)
    (shard,) = tmp_path.glob("shard-*")
    holder = os.fork()
    if holder == 0:
        hold_a_shard(shard)
        os._exit(0)
    while not (shard / "held").exists():
        time.sleep(0.01)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)

    def write() -> None:
        with UserStore(tmp_path, 1, layout) as store:
            store.write(users, 2)

    with ThreadPoolExecutor() as pool:
        pool.submit(write).result(PATIENCE_SECONDS)


# -------------------------------------------------------------------------------- Ctrl-C

ENDLESS = (*TINY, "compute.workers=1", "federation.rounds=1000000", "federation.checkpoint_every=1000")


def processes_with(variable: bytes) -> list[int]:
    """All processes that inherited a variable of the environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is not ours
            if variable in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_ctrl_c_leaves_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    experiment, out = tmp_path / "endless.toml", tmp_path / "out"
    experiment.touch()
    command = [sys.executable, "-m", "simulations.cli", "simulate", str(experiment), "--out", str(out)]
    settings = [argument for override in ENDLESS for argument in ("--set", override)]
    environment = os.environ | {"FEDQUILT_TEST": str(tmp_path)}
    child = subprocess.Popen(
        command + settings, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline, tag = time.monotonic() + PATIENCE_SECONDS, f"FEDQUILT_TEST={tmp_path}"
    while not read_history(out / MAIN):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(processes_with(tag.encode())) > 3
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    _, said = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, said) == (130, b"stopped; continue with --resume\n")
    while processes_with(tag.encode()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    behind = read_history(out / MAIN)[-1]["round_index"] - rounds(out / MAIN / "checkpoints")[-1]
    assert behind in (0, 1)  # 1: stopped between a round's line and its end


# -------------------------------------------------------------------------------- damaged


def flip(path: Path) -> None:
    """Turns one bit in the middle of a file around."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("values.safetensors", "part 'values' does not match its sha256"),
        ("optimizer-pool.safetensors", "part 'optimizer-pool' does not match its sha256"),
        ("manifest.json", "manifest.json "),
    ],
)
def test_with_a_flipped_bit_in_the_newest_checkpoint_the_one_before_is_used_loudly(
    undisturbed: str, tmp_path: Path, name: str, fault: str
) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config(), tmp_path, on_round=interrupt_at(4))
    flip(tmp_path / "checkpoints" / "round-000004" / name)
    seen: list[int] = []
    with pytest.warns(RuntimeWarning, match=rf"round-000004 is damaged: {fault}.*falling back"):
        found = simulate(tiny_config(), tmp_path, resume=True, on_round=lambda r: seen.append(r.round_index))
    assert found == undisturbed
    assert seen == [4, 5, 6]
    assert [line["round_index"] for line in read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:.*falling back:RuntimeWarning")
def test_with_all_checkpoints_damaged_nothing_is_started_over(tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config(), tmp_path, on_round=interrupt_at(4))
    for round_index in rounds(tmp_path / "checkpoints"):
        flip(tmp_path / "checkpoints" / f"round-{round_index:06d}" / "values.safetensors")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*round-000004.*round-000003.*round-000002"):
        simulate(tiny_config(), tmp_path, resume=True)
    assert rounds(tmp_path / "checkpoints") == (2, 3, 4)


# -------------------------------------------------------------------------------- full


@pytest.mark.parametrize("writes", [0, 3, 5, 6, 17])
def test_a_disk_that_fills_up_is_said_and_resume_goes_on(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """At a part of a checkpoint (5 writes each), at the store's manifest (the 6th), at the history (the 7th)."""
    real, done = Path.write_bytes, 0

    def write_bytes(path: Path, payload: bytes) -> int:
        nonlocal done
        if done == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        done += 1
        return real(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(FedquiltError, match="No space left on device"):
            simulate(tiny_config(), tmp_path)
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed


def test_a_disk_that_fills_up_in_a_line_of_the_history_is_said_and_resume_goes_on(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == HISTORY_NAME:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:

        def fill_up(report: RoundReport) -> None:
            if report.round_index == 3:
                patch.setattr(Path, "open", refuse)

        with pytest.raises(RunError, match=r"rounds\.jsonl .*No space left.*free space"):
            simulate(tiny_config(), tmp_path, on_round=fill_up)
    with (tmp_path / HISTORY_NAME).open("a") as history:
        history.write('{"round_index": 4, "us')
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed
    assert [line["round_index"] for line in read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("file_bytes", "words"), [(3_850, "CheckpointError: .*free space"), (40_000, "StoreError: .*free space")]
)
def test_files_that_may_not_grow_end_the_run_with_words_and_resume_goes_on(
    undisturbed: str, tmp_path: Path, file_bytes: int, words: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert finish(start(tiny_config(), folder, file_bytes)) == 0
    assert re.match(words, (folder / "error").read_text())
    assert run(tiny_config(), folder, resume=True).record["checksum"] == undisturbed
