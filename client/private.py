"""Folders that are their owner's alone: what a node keeps says what its users are interested in. No torch, no gRPC."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from federation.errors import ConfigError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
"""The modes of what a node makes."""


def private_folder(folder: Path) -> None:
    """Makes a node's state folder, if need be.

    Raises ConfigError when it cannot be made, or others than its owner may look into it.
    """
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"state names a node's folder, {folder} cannot be used ({error}); give another") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 or found.st_uid != os.geteuid():
        raise ConfigError(
            f"a node's state folder is for its owner alone (mode 700), {folder} belongs to user {found.st_uid} and "
            f"has mode {mode:o}; chmod 700 it, or give a new one"
        )
