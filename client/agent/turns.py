"""Work that is done a few pieces at a time, and the short line before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Condition

from federation.errors import NodeError


class Turns:
    """Turns to work, in the order in which they are asked for.

    waiting: the most that wait for one. places: the most that have one at a time.
    """

    def __init__(self, waiting: int, places: int = 1) -> None:
        self._waiting, self._places = waiting, places
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
                self._changed.wait_for(lambda: self._closed or not wanted() or self._has_place(ticket), seconds)
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

    def _queue(self) -> object:
        with self._changed:
            if len(self._line) >= self._places + self._waiting:
                raise NodeError(
                    "busy",
                    f"such calls are worked on {self._places} at a time and {self._waiting} may wait, all these places "
                    "are taken; ask again later",
                )
            ticket = object()
            self._line.append(ticket)
            return ticket

    def _has_place(self, ticket: object) -> bool:
        """Whether it is among the first of the line, who work."""
        return ticket in islice(self._line, self._places)

    def _check_turn(self, ticket: object, wanted: bool) -> None:
        if self._closed:
            raise NodeError("no agent", "the agent is being stopped; ask again when it is back")
        if not wanted or not self._has_place(ticket):
            raise NodeError(
                "late", "the deadline passed before it was this work's turn; give it more time, or ask later"
            )
