"""Atomic writes: dying at any step leaves the old content or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from federation.files import new_folder, remove_folder, remove_leftovers, write_file


def dies_at(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is gone, as if by SIGKILL, right before its `step`-th flush or rename.

    False when the action has fewer steps, so that it ended.
    """
    child = os.fork()
    if child == 0:
        steps_left = step

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                nonlocal steps_left
                steps_left -= 1
                if steps_left == 0:
                    os._exit(9)
                return original(*arguments)

            return call

        os.fsync, Path.rename, Path.replace = counted(os.fsync), counted(Path.rename), counted(Path.replace)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fill(path: Path, content: str) -> None:
    with new_folder(path) as folder:
        (folder / "a").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text(content)


def contents(path: Path) -> tuple[str, str]:
    return (path / "a").read_text(), (path / "deep" / "b").read_text()


def test_a_file_is_old_or_new_wherever_the_writer_dies(tmp_path: Path) -> None:
    path, step, seen = tmp_path / "f", 1, set()
    path.write_bytes(b"old")
    while dies_at(step, lambda: write_file(path, b"new")):
        seen.add(path.read_bytes())
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["f"]
        step += 1
    assert step == 4  # flush the file, rename it, flush the folder
    assert seen == {b"old", b"new"}
    assert path.read_bytes() == b"new"


def test_a_folder_is_absent_or_whole_wherever_the_writer_dies(tmp_path: Path) -> None:
    path, step = tmp_path / "d", 1
    while dies_at(step, lambda: fill(path, "new")):
        if path.exists():
            assert contents(path) == ("new", "new")
            remove_folder(path)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == []
        step += 1
    assert step == 7  # flush two files and two folders, rename, flush the parent
    assert contents(path) == ("new", "new")


def test_everything_is_flushed_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def traced_fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split("-")[0])
        fsync(descriptor)

    def traced_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    fill(tmp_path / "d", "x")
    assert sorted(events[:3]) == ["a", "b", "deep"]
    assert events[3:] == [".partial", "rename", tmp_path.name.split("-")[0]]


def test_a_folder_replaces_the_one_that_has_its_name(tmp_path: Path) -> None:
    fill(tmp_path / "d", "old")
    fill(tmp_path / "d", "new")
    assert contents(tmp_path / "d") == ("new", "new")
    assert names(tmp_path) == ["d"]


def test_an_error_while_filling_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "d", "old")

    def fail() -> None:
        with new_folder(tmp_path / "d") as folder:
            (folder / "a").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert contents(tmp_path / "d") == ("old", "old")
    assert names(tmp_path) == ["d"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(OSError, match="f"):
        write_file(tmp_path / "f", b"x")
    assert names(tmp_path) == ["f"]


def test_removing_never_leaves_half_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "d", "x")
    assert dies_at(2, lambda: remove_folder(tmp_path / "d"))
    assert not (tmp_path / "d").exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
