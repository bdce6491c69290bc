"""How a run tells what it is doing: stages with a bar, in the terminal or nowhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


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

    def stage(self, name: str, total: int) -> Stage:
        """Begins a stage of `total` steps."""
        ...


class Silent:
    """Shows nothing: for tests and notebooks."""

    def stage(self, name: str, total: int) -> Stage:
        return _SilentStage()


class _SilentStage:
    def update(self, done: int, note: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """A bar per stage with the time that is left, then the time it took; fits 80 columns. On a pipe, one line each."""

    def __init__(self, console: Console) -> None:
        self._rich = RichProgress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Terminal:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def stage(self, name: str, total: int) -> Stage:
        return _TerminalStage(self._rich, self._rich.add_task(name, total=total, note=""))


class _TerminalStage:
    def __init__(self, rich: RichProgress, task: TaskID) -> None:
        self._rich, self._task = rich, task

    def update(self, done: int, note: str) -> None:
        self._rich.update(self._task, completed=done, note=note)

    def close(self) -> None:
        self._rich.stop_task(self._task)
