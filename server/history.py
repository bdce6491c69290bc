"""A history of rounds: a file with one JSON line for each, which a run that goes on cuts back to where it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from federation.errors import RunError
from federation.files import write_file


class Line(Protocol):
    """A dataclass of JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def round_index(self) -> int:
        """The round that it is of, or after."""
        ...


class History:
    """A file with one JSON line per round.

    Lines of rounds after `finished` are dropped: those rounds are done again. `in` says whether a round has a line that
    counts; one that does not stays beside the line that makes up for it.
    Raises RunError when the file cannot be read or written.
    """

    def __init__(
        self, path: Path, finished: int, counts: Callable[[Mapping[str, Any]], bool] = lambda line: True
    ) -> None:
        self._path = path
        kept = [line for line in read_history(path) if line["round_index"] <= finished]
        self._rounds = {line["round_index"] for line in kept if counts(line)}
        with self._writing():
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def __contains__(self, round_index: int) -> bool:
        return round_index in self._rounds

    def add(self, line: Line) -> None:
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
                f"{self._path} cannot be written ({error}); free space or mend the folder, then run again"
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
