"""How a run tells what it is doing: stages with a bar in a terminal, lines on a pipe, or nothing."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

_TENTHS = 10
_SPEED_SECONDS = 600.0
"""The time left is told from the speed of so many seconds: a round may take minutes."""


class Stage(Protocol):
    """One stage of a run."""

    def update(self, done: int, note: str) -> None:
        """So much is done, and what there is to say."""
        ...

    def close(self) -> None:
        """The stage has ended."""
        ...


class Progress(Protocol):
    """Where stages are shown."""

    def stage(self, name: str, total: int, done: int = 0) -> Stage:
        """Begins a stage of `total` steps, of which `done` were done by an earlier run."""
        ...


class Silent:
    """Shows nothing: for tests and notebooks."""

    def stage(self, name: str, total: int, done: int = 0) -> Stage:
        return _SilentStage()


class _SilentStage:
    def update(self, done: int, note: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """A bar per stage with the time that is left, then the time it took; one line of 80 columns, of which the note
    gives way. On a pipe, a line of text per tenth of a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=20)),
            BarColumn(bar_width=8, table_column=Column(no_wrap=True, min_width=8)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            speed_estimate_period=_SPEED_SECONDS,
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> Stage:
        if not self._console.is_terminal:
            return _Lines(self._console, name, total, done)
        return _Bar(self._bars, self._bars.add_task(name, total=total, completed=done, note=""))


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def update(self, done: int, note: str) -> None:
        self._bars.update(self._task, completed=done, note=note)

    def close(self) -> None:
        self._bars.stop_task(self._task)


class _Lines:
    """A line whenever another tenth is done, and one at the end wherever that is."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self._console, self._name, self._total = console, name, total
        self._first, self._done, self._printed = done, done, done
        self._note, self._started = "", time.monotonic()

    def update(self, done: int, note: str) -> None:
        self._done, self._note = done, note
        if done > self._printed and done * _TENTHS // self._total > self._printed * _TENTHS // self._total:
            self._print()

    def close(self) -> None:
        if self._done > self._printed:
            self._print()

    def _print(self) -> None:
        self._printed = self._done
        seconds = time.monotonic() - self._started
        left = self._total - self._done
        clock = f"{_clock(seconds / (self._done - self._first) * left)} left" if left else f"took {_clock(seconds)}"
        parts = [f"{self._name} {self._done}/{self._total}", clock, self._note]
        self._console.print(", ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
