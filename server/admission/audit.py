"""The audit log: one JSON line for each reply that is refused, node that is left out, and round that is refused.

    {"time": "2030-01-01T00:00:00+00:00", "round": 3, "attempt": 1, "node": 7, "event": "quarantined",
     "reason": "malformed update", "until": 13}

It says what was done and under which rule, and nothing that a node said: a reply may hold what is private.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from federation.errors import RunError
from federation.exchange import Work

Event = Literal["refused", "repeated", "quarantined", "round refused"]


def utc_now() -> datetime:
    return datetime.now(UTC)


class AuditLog:
    """Appends to a file; every line is on its way to the disk before `write` returns.

    Raises RunError when the file cannot be written: a federation does not run unaudited.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = utc_now) -> None:
        self._path = path
        self._now = now
        self._append(_end_of_cut_line(path))

    def write(self, asked: Work, node: int | None, event: Event, reason: str, until: int | None = None) -> None:
        """asked: the work in hand. node: None for the round itself. until: the last round to be left out of."""
        line = {
            "time": self._now().isoformat(timespec="seconds"),
            "round": asked.round_index,
            "attempt": asked.attempt,
            "node": node,
            "event": event,
            "reason": reason,
            "until": until,
        }
        self._append(json.dumps(line) + "\n")

    def _append(self, text: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise RunError(
                f"the audit log {self._path} must be writable ({error}); free space or mend the folder, then run again"
            ) from error


def _end_of_cut_line(path: Path) -> str:
    """What ends a last line that a kill cut short."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return "" if file.read() == b"\n" else "\n"
    except OSError:
        return ""  # there is no line yet
