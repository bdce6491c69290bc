"""A cached folder is there whole or not at all."""

from pathlib import Path

import pytest

from federation.data.cache import cache_dir, whole_folder


def write(final, content):
    with whole_folder(final) as work:
        (work / "a").write_text(content)
        assert not (final / "a").exists() or (final / "a").read_text() != content


def test_a_folder_appears_when_its_block_ends_and_replaces_the_old_one(tmp_path):
    final = tmp_path / "deep" / "final"
    write(final, "one")
    write(final, "two")
    assert (final / "a").read_text() == "two"
    assert list(final.parent.iterdir()) == [final]


def test_a_failed_block_leaves_the_old_folder_and_no_trace(tmp_path):
    final = tmp_path / "final"
    write(final, "one")
    with pytest.raises(FileNotFoundError), whole_folder(final) as work:
        (work / "no folder" / "a").write_text("half")
    assert (final / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [final]


def test_two_writers_at_once_leave_one_whole_folder(tmp_path):
    final = tmp_path / "final"
    with whole_folder(final) as slow:
        (slow / "a").write_text("slow")
        write(final, "fast")
        assert (final / "a").read_text() == "fast"
    assert (final / "a").read_text() == "slow"
    assert list(tmp_path.iterdir()) == [final]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FEDQUILT_CACHE", raising=False)
    assert cache_dir() == Path("/h/.cache/fedquilt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/fedquilt")
    monkeypatch.setenv("FEDQUILT_CACHE", "/own")
    assert cache_dir() == Path("/own")
