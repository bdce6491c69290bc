"""Where files are kept: the cache of what is built once, whole or not at all, and the state that must not be lost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_dir() -> Path:
    """`FEDQUILT_CACHE`, or `fedquilt` below `XDG_CACHE_HOME`, or `~/.cache/fedquilt`. Not created here."""
    if own := os.environ.get("FEDQUILT_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "fedquilt"
    return Path.home() / ".cache" / "fedquilt"


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill; it becomes `final` when the block ends without an exception, else it vanishes.

    Two processes may fill the same folder at once: the last one wins, and a reader sees a complete folder.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield work
        _replace_folder(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_folder(work: Path, final: Path) -> None:
    """Rename `work` to `final`; an old folder is moved aside first, since a rename does not replace one."""
    old = work.with_name(work.name + ".old")
    with suppress(FileNotFoundError):
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was faster, with the same content
            raise
    shutil.rmtree(old, ignore_errors=True)


def state_dir() -> Path:
    """The folder for what must not be lost: `FEDQUILT_STATE`, or `fedquilt` below `XDG_STATE_HOME` (~/.local/state)."""
    if own := os.environ.get("FEDQUILT_STATE"):
        return Path(own)
    if shared := os.environ.get("XDG_STATE_HOME"):
        return Path(shared) / "fedquilt"
    return Path.home() / ".local" / "state" / "fedquilt"
