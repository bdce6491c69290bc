"""The line before work: one at a time, in order, and never longer than agreed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from client.agent.turns import Turns
from federation.errors import NodeError

SECONDS = 30.0
"""More than any test takes; no wait is without an end."""


class Line:
    """Work that is held up until the test lets it go on; `done` lists it in the order in which it began."""

    def __init__(self, waiting: int, places: int = 1) -> None:
        self.turns = Turns(waiting, places)
        self.done: list[str] = []
        self.go_on = threading.Event()
        self.threads = ThreadPoolExecutor(8)

    def add(self, name: str, wanted: Callable[[], bool] = lambda: True, seconds: float = 3600.0) -> Future[None]:
        """Returns when the work has its place in the line."""
        before = self.length
        future = self.threads.submit(self._work, name, wanted, seconds)
        while self.length == before and not future.done():
            threading.Event().wait(0.001)
        return future

    @property
    def length(self) -> int:
        """How many work or wait."""
        return len(self.turns._line)

    def _work(self, name: str, wanted: Callable[[], bool], seconds: float) -> None:
        with self.turns.turn(seconds, wanted):
            self.done.append(name)
            assert self.go_on.wait(SECONDS)


def fault_of(future: Future[None]) -> str:
    error = future.exception(SECONDS)
    assert isinstance(error, NodeError)
    return error.fault


def test_work_is_done_one_after_the_other_in_the_order_it_came() -> None:
    line = Line(waiting=3)
    added = [line.add(name) for name in "abcd"]
    assert line.done == ["a"]
    line.go_on.set()
    for future in added:
        future.result(SECONDS)
    assert line.done == ["a", "b", "c", "d"]
    assert line.length == 0


def test_a_full_line_is_busy_until_there_is_a_place_again() -> None:
    line = Line(waiting=1)
    added = [line.add("a"), line.add("b")]
    with pytest.raises(NodeError, match="on 1 at a time and 1 may wait, all these places are taken; ask") as refused:
        line.add("c").result(SECONDS)
    assert refused.value.fault == "busy"
    line.go_on.set()
    for future in added:
        future.result(SECONDS)
    line.add("d").result(SECONDS)
    assert line.done == ["a", "b", "d"]


def test_as_many_work_at_a_time_as_there_are_places() -> None:
    line = Line(waiting=1, places=2)
    gone = threading.Event()
    first, second, waiting = line.add("a"), line.add("b"), line.add("c", lambda: not gone.is_set())
    wait_until(lambda: len(line.done) == 2)
    assert set(line.done) == {"a", "b"}
    assert fault_of(line.add("d")) == "busy"
    gone.set()
    line.turns.wake()
    assert fault_of(waiting) == "late"
    last = line.add("e")
    assert set(line.done) == {"a", "b"}
    line.go_on.set()
    for future in (first, second, last):
        future.result(SECONDS)
    assert sorted(line.done) == ["a", "b", "e"]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_who_has_gone_gives_up_its_place() -> None:
    line = Line(waiting=2)
    here = threading.Event()
    here.set()
    first, gone, last = line.add("a"), line.add("b", here.is_set), line.add("c")
    here.clear()
    line.turns.wake()
    assert fault_of(gone) == "late"
    line.go_on.set()
    last.result(SECONDS)
    assert first.done()
    assert line.done == ["a", "c"]


def test_a_wait_ends_at_its_deadline() -> None:
    line = Line(waiting=1)
    first = line.add("a")
    assert fault_of(line.add("b", seconds=0.01)) == "late"
    line.go_on.set()
    first.result(SECONDS)
    assert line.done == ["a"]


def test_work_that_fails_gives_up_its_place() -> None:
    turns = Turns(waiting=0)
    with pytest.raises(ZeroDivisionError), turns.turn(SECONDS, lambda: True):
        raise ZeroDivisionError
    with turns.turn(SECONDS, lambda: True):
        pass


def test_closed_turns_let_go_who_waits_and_keep_who_works() -> None:
    line = Line(waiting=2)
    working, waiting = line.add("a"), line.add("b")
    line.turns.close()
    assert fault_of(waiting) == "no agent"
    assert fault_of(line.add("c")) == "no agent"
    line.go_on.set()
    working.result(SECONDS)
    assert line.done == ["a"]
