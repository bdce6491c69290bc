"""Releases: whole or absent, never changed, damaged ones refused by name, and the current one always known."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.config import RunConfig, identity
from federation.errors import ConfigError, RunError
from federation.pool.file import PoolFile, pool_file
from server.promotion import Evaluation
from server.releases import Candidate, Releases, released
from tests.child import exit_code

CONFIG = RunConfig(seed=3)


def candidate(round_index: int) -> Candidate:
    torch.manual_seed(round_index)
    values = {"pool/h.0": torch.randn(3, 5), "gate": torch.randn(1, 7)}
    evaluation = Evaluation(split="new", users=9, nodes=2, metrics={"tuned_loss": 1.5, "base_loss": 2.0})
    return Candidate(PoolFile(round_index, values, CONFIG.task), evaluation, identity(CONFIG))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    """r1, r2 and r3, promoted in this order."""
    made = Releases(tmp_path)
    for round_index in (1, 2, 3):
        made.add(candidate(round_index), f"r{round_index}")
        made.promote(f"r{round_index}", "rule", "better")
    return made


def test_a_release_holds_its_pool_its_evaluation_and_where_it_comes_from(tmp_path: Path) -> None:
    offered = candidate(4)
    Releases(tmp_path).add(offered, "first")
    folder = tmp_path / "releases" / "first"
    payload = (folder / "pool.safetensors").read_bytes()
    said = json.loads((folder / "release.json").read_text())
    assert pool_file(payload).version == offered.pool.version
    assert said["sha256"] == hashlib.sha256(payload).hexdigest()
    assert (said["name"], said["round"], said["version"]) == ("first", 4, offered.pool.version)
    assert said["evaluation"] == {
        "split": "new",
        "users": 9,
        "nodes": 2,
        "metrics": {"tuned_loss": 1.5, "base_loss": 2.0},
    }
    assert said["config"] == identity(CONFIG)
    assert {path.name for path in folder.iterdir()} == {"pool.safetensors", "release.json"}


def test_what_is_read_is_what_was_released(releases: Releases) -> None:
    assert releases.names() == ("r1", "r2", "r3")
    for round_index in (1, 2, 3):
        found, offered = releases.pool(f"r{round_index}"), candidate(round_index).pool
        assert (found.version, found.round_index, found.task) == (offered.version, round_index, CONFIG.task)
        assert all(torch.equal(found.values[name], offered.values[name]) for name in offered.values)
        assert releases.read(f"r{round_index}").evaluation == candidate(round_index).evaluation


def test_a_release_never_changes(releases: Releases) -> None:
    before = contents(releases.folder)
    with pytest.raises(RunError, match=r"never changes, 'r2' is there already \(r2-\w+\); promote it with .*--name"):
        releases.add(candidate(4), "r2")
    assert contents(releases.folder) == before


@pytest.mark.parametrize("name", ["", "R1", "../r1", "a/b", "-a", "a.b", ".partial-r1", "a" * 65, "current.json"])
def test_what_cannot_be_a_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="choose another --name") as caught:
        Releases(tmp_path).add(candidate(1), name)
    assert repr(name) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_lists_the_known_ones(releases: Releases) -> None:
    for ask in (releases.read, releases.pool, lambda name: releases.promote(name, "hand")):
        with pytest.raises(RunError, match=r"no release 'r9'; .*known: r1, r2, r3"):
            ask("r9")
    assert [promotion.name for promotion in releases.history()] == ["r1", "r2", "r3"]


# -------------------------------------------------------------------------------- what is current


def test_the_last_promotion_is_current_and_rollbacks_go_back(releases: Releases, tmp_path: Path) -> None:
    def current() -> str:
        pool, said = released(tmp_path), releases.current()
        assert pool is not None
        assert said is not None
        assert pool.version == said.version
        return said.name

    assert current() == "r3"
    assert releases.roll_back() == current() == "r2"
    assert releases.roll_back() == current() == "r1"
    with pytest.raises(RunError, match="goes back to what was current before"):
        releases.roll_back()
    releases.promote("r3", "hand")
    assert releases.roll_back("r1") == current() == "r1"
    told = [(promotion.name, promotion.how) for promotion in releases.history()]
    assert told[2:] == [("r3", "rule"), ("r2", "rollback"), ("r1", "rollback"), ("r3", "hand"), ("r1", "rollback")]
    assert releases.history()[3].why == "back from r3"


def test_without_promotions_nothing_is_current(tmp_path: Path) -> None:
    assert released(tmp_path) is None
    releases = Releases(tmp_path)
    releases.add(candidate(1), "r1")
    assert (releases.current(), releases.history(), released(tmp_path)) == (None, (), None)
    with pytest.raises(RunError, match="nothing was"):
        releases.roll_back()


# -------------------------------------------------------------------------------- damage


def assert_refused(releases: Releases, message: str) -> None:
    """Loading r2 is refused, and so is making it current; r3 stays so."""
    for act in (lambda: releases.pool("r2"), lambda: releases.promote("r2", "hand"), lambda: releases.roll_back("r2")):
        with pytest.raises(RunError, match=message):
            act()
    assert releases.history()[-1].name == "r3"


def test_every_flipped_bit_and_cut_of_the_pool_is_refused(releases: Releases) -> None:
    path = releases.folder / "r2" / "pool.safetensors"
    payload = path.read_bytes()
    for at in range(0, len(payload), 7):
        changed = bytearray(payload)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(RunError, match=r"r2/pool.safetensors is damaged: .*sha256.*restore it"):
            releases.pool("r2")
    for cut in (b"", payload[:-1], payload + b"x"):
        path.write_bytes(cut)
        assert_refused(releases, r"r2/pool.safetensors is damaged: .*sha256")
    path.unlink()
    assert_refused(releases, r"r2/pool.safetensors is damaged: .*No such file.*roll back")


def forged(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_pool_with_a_forged_checksum_is_refused(releases: Releases) -> None:
    other = (releases.folder / "r1" / "pool.safetensors").read_bytes()
    (releases.folder / "r2" / "pool.safetensors").write_bytes(other)
    forged(releases.folder / "r2" / "release.json", sha256=hashlib.sha256(other).hexdigest())
    assert_refused(releases, rf"is of {pool_file(other).version}, its release of r2-")


def test_no_pool_with_a_forged_checksum_is_refused(releases: Releases) -> None:
    (releases.folder / "r2" / "pool.safetensors").write_bytes(b"no pool")
    forged(releases.folder / "r2" / "release.json", sha256=hashlib.sha256(b"no pool").hexdigest())
    assert_refused(releases, r"r2/pool.safetensors is damaged: 7 bytes are no pool file")


@pytest.mark.parametrize(
    "changes", [{"format": "fedquilt release 2"}, {"extra": 1}, {"round": -1}, {"evaluation": {"split": "new"}}]
)
def test_a_description_of_another_form_is_refused(releases: Releases, changes: dict[str, Any]) -> None:
    forged(releases.folder / "r2" / "release.json", **changes)
    assert_refused(releases, r"r2/release.json is not what was written .*restore it")


def test_a_renamed_release_is_refused(releases: Releases) -> None:
    (releases.folder / "r2").rename(releases.folder / "better")
    with pytest.raises(RunError, match=r"better holds the release 'r2'; give the folder its name back"):
        releases.pool("better")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"history": [{"name": "r1"}]}', "\xff"])
def test_a_damaged_history_is_named(releases: Releases, text: str) -> None:
    (releases.folder / "current.json").write_text(text, encoding="latin-1")
    for act in (releases.history, releases.current, releases.roll_back, lambda: releases.promote("r1", "hand")):
        with pytest.raises(RunError, match=r"current.json is not what was written .*restore it"):
            act()
    assert (releases.folder / "current.json").read_text(encoding="latin-1") == text


# -------------------------------------------------------------------------------- several writers


def test_one_process_writes_at_a_time_and_readers_do_not_wait(releases: Releases, tmp_path: Path) -> None:
    before = contents(releases.folder)
    with (releases.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for act in (
            lambda: releases.add(candidate(4), "r4"),
            lambda: releases.promote("r1", "hand"),
            lambda: releases.roll_back(),
        ):
            with pytest.raises(RunError, match=r"one process at a time .*at work in .*releases; see .*try again"):
                act()
        assert released(tmp_path) is not None
        assert releases.names() == ("r1", "r2", "r3")
    assert contents(releases.folder) == before
    assert releases.roll_back() == "r2"


def test_promotions_of_many_are_all_kept_or_refused(releases: Releases, tmp_path: Path) -> None:
    """Without a lock, two that read the same history would each write their own line over the other's."""
    refused = []

    def promote() -> None:
        for _ in range(20):
            try:
                Releases(tmp_path).promote("r1", "hand")
            except RunError:
                refused.append(1)

    threads = [threading.Thread(target=promote) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(releases.history()) + len(refused) == 3 + 4 * 20


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "releases").write_text("a file")
    with pytest.raises(RunError, match=r"written to .*releases, which must be writable .*free space or mend"):
        Releases(tmp_path).add(candidate(1), "r1")


def test_what_cannot_be_rolled_back_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing was"):
        Releases(tmp_path).roll_back("r1")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- kills


def _dying(step: int, act: Callable[[], object]) -> Callable[[], None]:
    """`act`, gone as if by SIGKILL before its step-th flush."""

    def run() -> None:
        fsync, steps_left = os.fsync, step

        def counted(descriptor: int) -> None:
            nonlocal steps_left
            steps_left -= 1
            if steps_left == 0:
                os._exit(9)
            fsync(descriptor)

        os.fsync = counted
        act()

    return run


def test_a_release_killed_at_any_step_is_absent_or_whole(tmp_path: Path) -> None:
    step, seen = 1, set()
    while True:
        releases = Releases(tmp_path / str(step))
        ended = exit_code(_dying(step, lambda releases=releases: releases.add(candidate(1), "r1"))) == 0
        seen.add(releases.names())
        if not releases.names():
            releases.add(candidate(1), "r1")
        assert releases.pool("r1").version == candidate(1).pool.version
        if ended:
            break
        step += 1
    assert seen == {(), ("r1",)}
    assert step > 3


def test_a_promotion_killed_at_any_step_is_made_or_not(releases: Releases) -> None:
    for step in (1, 2):
        before = len(releases.history())
        assert exit_code(_dying(step, lambda: releases.promote("r1", "hand"))) == 9
        assert len(releases.history()) == before + (step == 2)
    assert contents(releases.folder).keys() >= {"current.json"}
    releases.add(candidate(4), "r4")
    assert not [name for name in contents(releases.folder) if name.startswith(".partial")]
