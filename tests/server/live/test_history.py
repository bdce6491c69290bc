"""Lines of a history are written once, dropped when their rounds are done again, and tell nothing of a few users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation.errors import RunError
from server.history import History, read_history
from server.live.lines import EvaluationLine, means


def line(round_index: int) -> EvaluationLine:
    return EvaluationLine(round_index, f"r{round_index}", "new", 9, 8, 3, {"late": 1}, {"loss": 0.1 + round_index}, "")


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl", 0)
    history.add(line(1))
    history.add(line(2))
    assert [found["metrics"] for found in read_history(tmp_path / "history.jsonl")] == [{"loss": 1.1}, {"loss": 2.1}]
    assert [number in history for number in range(4)] == [False, True, True, False]


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_lines_of_rounds_that_are_done_again_are_dropped(tmp_path: Path, finished: int) -> None:
    history = History(tmp_path / "history.jsonl", 0)
    for number in (1, 2, 3):
        history.add(line(number))
    again = History(tmp_path / "history.jsonl", finished)
    assert [found["round_index"] for found in read_history(tmp_path / "history.jsonl")] == [1, 2, 3][:finished]
    assert [number in again for number in (1, 2, 3)] == [number <= finished for number in (1, 2, 3)]


def test_a_line_that_does_not_count_is_kept_but_its_round_is_still_to_be_done(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, 0)
    history.add(line(1))
    history.add(line(2))
    again = History(path, 2, counts=lambda found: found["version"] != "r2")
    assert [number in again for number in (1, 2)] == [True, False]
    again.add(line(2))
    assert [found["round_index"] for found in read_history(path)] == [1, 2, 2]


def test_a_line_that_a_kill_cut_short_is_dropped_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, 0)
    history.add(line(1))
    whole = path.stat().st_size
    history.add(line(2))
    text = path.read_bytes()
    for end in range(whole, len(text)):
        path.write_bytes(text[:end])
        assert [found["round_index"] for found in read_history(path)] == [1]
    History(path, 2).add(line(2))
    assert path.read_bytes() == text


def test_no_history_is_an_empty_one(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none.jsonl") == []


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"round_index": 1}\n{"round\n{"round_index": 3}\n')
    with pytest.raises(RunError, match=r"history\.jsonl is not lines of JSON .*; move it away, then start again"):
        History(path, 3)


def test_a_history_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none/history\.jsonl cannot be written .*; free space or mend the folder"):
        History(tmp_path / "none" / "history.jsonl", 0)


@pytest.mark.parametrize(("users", "shown"), [(0, False), (2, False), (3, True), (4, True)])
def test_means_of_a_few_are_not_shown(users: int, shown: bool) -> None:
    metrics, suppressed = means({"loss": 12.0}, users)
    assert metrics == ({"loss": 12.0 / users} if shown else None)
    assert json.dumps(suppressed) == ('""' if shown else '"fewer than 3 users"')
