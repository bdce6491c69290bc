"""An LMDB environment of one tree, `RECORDS`, whose keys are users: made whole or not at all, checked when opened.

It is its owner's alone.

Its folder is made beside its place and renamed, so a folder that is there has held a whole environment: a file in it
that is missing, empty or short is damage, never a beginning.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from client.pages import PageFault, check_pages, checked_metas
from client.private import PRIVATE_FOLDER
from federation.files import sync

DATA_NAME = "data.mdb"
RECORDS = b"records"
DAMAGE = (PageFault, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.NotFoundError)
"""What is raised where a file is damaged."""


def make_environment(folder: Path, map_bytes: int, fill: Callable[[Any], None]) -> None:
    """An environment that holds what `fill` writes in one transaction. One that another process made first is left.

    Raises OSError and lmdb.Error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".partial-{folder.name}-", dir=folder.parent) as partial:
        whole = Path(partial) / folder.name
        with lmdb.open(str(whole), map_size=map_bytes, max_dbs=1, mode=PRIVATE_FOLDER) as environment:
            environment.open_db(RECORDS)
            with environment.begin(write=True) as handle:
                fill(handle)
        sync(whole)  # LMDB flushes its files, not the folder that names them
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # it was not another process that was faster
                raise
    sync(folder.parent)


def open_environment(folder: Path, map_bytes: int) -> tuple[Any, Any]:
    """The environment, all of its pages checked, and its tree. A process may open it once.

    Raises what `DAMAGE` lists, other lmdb.Errors, and OSError.
    """
    data = data_file(folder)
    checked_metas(data)
    environment = lmdb.open(str(folder), map_size=map_bytes, max_dbs=1, readahead=False, mode=PRIVATE_FOLDER)
    try:
        environment.reader_check()  # a killed reader's slot would keep old pages from being used again
        with environment.begin(write=True):  # which keeps other writers out
            _restore_length(environment, data)
            check_pages(data)
        return environment, environment.open_db(RECORDS, create=False)
    except BaseException:
        environment.close()
        raise


def data_file(folder: Path) -> Path:
    """The file that holds an environment. Raises PageFault when the folder has none."""
    data = folder / DATA_NAME
    if not data.exists():
        raise PageFault(f"in a whole environment there is a {DATA_NAME}")
    return data


def needed_bytes(environment: Any) -> int:
    """How long the data file must be: up to its last page."""
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])


def _restore_length(environment: Any, data: Path) -> None:
    """Give a data file that is too short its full length, so that reading it cannot end in SIGBUS.

    LMDB leaves out unused pages at the end of a file now and then, so a short file need not be damaged. If it is, the
    pages that it lost now read as zeros, which are no pages.
    """
    if data.stat().st_size < needed_bytes(environment):
        os.truncate(data, needed_bytes(environment))
