"""Files and folders that are either wholly there, or not there at all.

Everything is written to a temporary sibling, flushed to the disk, renamed, and the parent folder flushed. A
process that dies on the way leaves at most a temporary, which `remove_leftovers` clears. A place written with
these functions has one writer at a time.

A full disk or a missing permission is an `OSError`: callers turn it into the error of what they store.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_TEMPORARY_PREFIX = ".partial-"


def write_file(path: Path, payload: bytes, mode: int = 0o666) -> None:
    """Write or replace a file; readers see the old content or the new one, never a part.

    mode: who may open it, less what the process's umask takes away.
    """
    temporary = _temporary_sibling(path)
    try:
        temporary.touch(mode)
        temporary.write_bytes(payload)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends, and vanishes when the block raises.

    A folder that already has the name is replaced.

    >>> with new_folder(Path("out/result")) as folder:  # doctest: +SKIP
    ...     (folder / "table.json").write_bytes(b"{}")
    """
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            sync(entry)
        sync(temporary)
        replaced = _set_aside(path) if path.exists() else None
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def remove_folder(path: Path) -> None:
    """Remove a folder; one that dies half-way leaves a temporary, never a folder with missing files."""
    shutil.rmtree(_set_aside(path))


def remove_leftovers(parent: Path) -> None:
    """Remove the temporaries that writers which died have left in `parent`."""
    for entry in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def set_damaged_aside(path: Path) -> Path:
    """Renames a damaged file or folder, so that its place is free, and returns its new name. Nothing is deleted."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    sync(aside.parent)
    return aside


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> Path:
    temporary = _temporary_sibling(path)
    path.rename(temporary)
    sync(path.parent)
    return temporary


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
