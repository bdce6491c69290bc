"""What a deployed federation writes of its rounds and evaluations: one JSON line each, nothing of a small group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from federation.errors import RunError
from federation.files import write_file

FEWEST_USERS = 3
"""Of fewer users no mean is written: it would tell of one of them."""


@dataclass(frozen=True)
class RoundLine:
    """What is known of one finished round.

    attempt: which try it was, counted from 1. nodes_asked, nodes: how many were asked, and answered in time.
    users, admitted: how many were asked, and had a part in the result. rejected: users by reason.
    metrics: means over the admitted users, None when they are suppressed (why).
    seconds: from its letters to the new state.
    bytes_down, bytes_up: of the pools sent, and of the contributions received.
    """

    round_index: int
    attempt: int
    nodes_asked: int
    nodes: int
    users: int
    admitted: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, float] | None
    suppressed: str
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class EvaluationLine:
    """What is known of one evaluation. users, nodes: how many were measured, and by how many nodes.

    rejected: nodes by reason. metrics, suppressed: as in `RoundLine`, over the measured users.
    """

    round_index: int
    version: str
    split: str
    users_asked: int
    users: int
    nodes: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, float] | None
    suppressed: str


def means(sums: Mapping[str, float], users: int) -> tuple[dict[str, float] | None, str]:
    """The means over `users`, or None and why they are not shown."""
    if users < FEWEST_USERS:
        return None, f"fewer than {FEWEST_USERS} users"
    return {name: total / users for name, total in sums.items()}, ""


class History:
    """A file with one JSON line per round.

    Lines of rounds after `finished` are dropped: those rounds are done again.
    Raises RunError when the file cannot be read or written.
    """

    def __init__(self, path: Path, finished: int) -> None:
        self._path = path
        kept = [line for line in read_history(path) if line["round_index"] <= finished]
        self._rounds = {line["round_index"] for line in kept}
        with self._writing():
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def __contains__(self, round_index: int) -> bool:
        return round_index in self._rounds

    def add(self, line: RoundLine | EvaluationLine) -> None:
        """Appends a line."""
        with self._writing(), self._path.open("a") as file:
            file.write(json.dumps(asdict(line), allow_nan=False) + "\n")
        self._rounds.add(line.round_index)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written ({error}); free space or mend the folder, then start again"
            ) from error


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history as dicts, without a last one that a kill cut short.

    Raises RunError for a file that is damaged elsewhere.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not lines of JSON ({error}); move it away, then start again") from error
