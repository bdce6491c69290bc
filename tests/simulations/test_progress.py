"""What a terminal and a pipe show of a run, line by line."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from simulations.progress import Terminal

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NOTE = "1,234,567 users/s, loss 0.123"


def shown(terminal: bool, name: str, total: int, done: list[int], begun: int = 0) -> list[str]:
    """The lines that a stage leaves: the last picture of the bar, or all lines of a pipe."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    with Terminal(console) as progress:
        stage = progress.stage(name, total, begun)
        for number in done:
            stage.update(number, NOTE)
        stage.close()
    return [line.rstrip() for line in _ESCAPE.sub("", file.getvalue()).replace("\r", "\n").split("\n") if line.strip()]


def test_a_bar_is_one_line_of_80_columns_with_everything_in_it() -> None:
    lines = shown(True, "federate random_pool", 100_000, [41_000, 41_234])
    assert max(map(len, lines)) <= 80
    assert re.match(r"federate random_pool ━\S* +41234/100000 +\d+:\d\d:\d\d ", lines[-1])
    assert lines[-1].endswith("…")  # the note gives way, not the numbers


def test_a_bar_with_room_shows_all_of_the_note() -> None:
    line = shown(True, "federate pool", 50, [24, 25])[-1]
    assert re.match(rf"federate pool +━\S* +25/50 +\d+:\d\d:\d\d {re.escape(NOTE)}$", line)


def test_a_pipe_gets_a_line_for_each_tenth() -> None:
    lines = shown(False, "federate pool", 1000, list(range(1, 1001)))
    assert [re.match(r"federate pool (\d+)/1000, ", line)[1] for line in lines] == [
        str(n) for n in range(100, 1001, 100)
    ]
    assert lines[0].endswith(f" left, {NOTE}")
    assert re.search(r", took \d+:\d\d:\d\d, ", lines[-1])


def test_a_pipe_gets_a_line_for_each_step_of_few_and_one_where_a_stage_breaks_off() -> None:
    assert len(shown(False, "federate pool", 3, [1, 2, 3])) == 3
    assert [line.split(",")[0] for line in shown(False, "x", 100, [10, 11, 12])] == ["x 10/100", "x 12/100"]
    assert shown(False, "x", 100, []) == shown(False, "x", 0, [0]) == []


def test_what_an_earlier_run_did_is_not_taken_for_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 of 50 were done before. Then 5 take ten seconds, as will the 5 that are left."""
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert shown(False, "federate pool", 50, [45], begun=40) == [f"federate pool 45/50, 0:00:10 left, {NOTE}"]
    monkeypatch.undo()
    assert shown(False, "federate pool", 50, [50], begun=50) == []
