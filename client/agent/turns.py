"""Work that is done one piece at a time, and the short line before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from federation.errors import NodeError


class Turns:
    """One piece of work at a time, in the order in which they came. waiting: the most that wait for it."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._line: deque[object] = deque()
        self._closed = False
        self._changed = Condition()

    @contextmanager
    def turn(self, seconds: float, wanted: Callable[[], bool]) -> Iterator[None]:
        """Waits for its turn, and has it until the block ends.

        seconds: the longest wait. wanted: whether someone still wants the work; `wake` after it has changed.
        Raises NodeError: "busy" when the line is full, "late" when nobody wants the work any longer, "no agent" when
        the turns are closed.
        """
        ticket = self._queue()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not wanted() or self._line[0] is ticket, seconds)
                self._check_turn(ticket, wanted())
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def wake(self) -> None:
        """Those who wait look again whether they are wanted."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody gets a turn any more; who has one keeps it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def length(self) -> int:
        """How many work or wait."""
        with self._changed:
            return len(self._line)

    def _queue(self) -> object:
        with self._changed:
            if len(self._line) > self._waiting:
                raise NodeError(
                    "busy",
                    f"a node does one piece of work at a time and lets {self._waiting} wait, all places are taken; "
                    "ask again later",
                )
            ticket = object()
            self._line.append(ticket)
            return ticket

    def _check_turn(self, ticket: object, wanted: bool) -> None:
        if self._closed:
            raise NodeError("no agent", "the agent is being stopped; ask again when it is back")
        if not wanted or self._line[0] is not ticket:
            raise NodeError(
                "late", "the deadline passed before it was this work's turn; give it more time, or ask later"
            )
