"""A federation that ends anywhere goes on from its folder with the same bits, or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import server.live.loop as live_module
from federation.errors import RunError
from federation.exchange import Answer, Letter
from server import checkpoint
from server.checkpoint import checksum, load_latest, rounds
from server.history import History, read_history
from server.live.folder import StateFolder, opened
from server.live.loop import RoundLine
from tests.server.live.fake_nodes import FakeNodes
from tests.server.live.small_federation import (
    assert_same,
    fake_nodes,
    honest,
    in_round,
    live_config,
    missing_in,
    plain,
    rubbish,
    run,
)


def test_another_configuration_is_refused_and_the_state_kept(tmp_path: Path) -> None:
    run(fake_nodes(), tmp_path, live_config("federation.rounds=2"))
    before = checksum(load_latest(tmp_path / "checkpoints"))
    with pytest.raises(RunError) as raised:
        run(fake_nodes(), tmp_path, live_config("federation.rounds=3"))
    assert "goes on with the configuration it was started with" in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "or by an older version; give that configuration, another folder, or" in str(raised.value)
    assert checksum(load_latest(tmp_path / "checkpoints")) == before


def test_settings_that_decide_no_bits_may_change(tmp_path: Path) -> None:
    run(fake_nodes(), tmp_path, live_config("federation.rounds=2"))
    nodes = fake_nodes()
    run(nodes, tmp_path, live_config("federation.rounds=2", "deployment.quorum=0.7", "evaluate.users=3"))
    assert not nodes.posted
    assert json.loads((tmp_path / "config.json").read_text())["deployment"]["quorum"] == 0.7


def test_a_folder_of_a_simulation_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoints", 1, {}, {"config": {}})
    with pytest.raises(RunError, match="holds a simulation, no deployed federation; give another folder"):
        run(fake_nodes(), tmp_path)


def test_two_servers_do_not_work_in_one_folder(tmp_path: Path) -> None:
    def second(line: RoundLine) -> None:
        with pytest.raises(RunError, match=r"another one is at work in .*; end it first, or give another folder"):
            run(fake_nodes(), tmp_path)

    assert run(fake_nodes(), tmp_path, on_round=second).round_index == 5


# -------------------------------------------------------------------------------- interrupted


class Crash(Exception):
    """What a test raises in the middle of a run."""


@pytest.fixture
def one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two federations in different folders have the same id, so that their checkpoints can be compared."""
    monkeypatch.setattr(live_module, "uuid4", lambda: type("Id", (), {"hex": "0f" * 16}))


def third(letters: Iterable[Letter]) -> bool:
    return any(in_round(letter) == 3 for letter in letters)


def half_way(nodes: FakeNodes, tickets: Sequence[str]) -> bool:
    """The fastest node's answer to round 3 is taken in, the slowest one's is not there yet."""
    return third(letter for moment, _, letter in nodes.posted if moment + 0.8 < nodes.time.now)


POINTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "before letters are out": (FakeNodes, "post", lambda nodes, letters, seconds: third(letters.values())),
    "after letters are out": (FakeNodes, "post", lambda nodes, letters, seconds: third(letters.values())),
    "after some answers": (FakeNodes, "collect", half_way),
    "before the state changes": (live_module, "_applied", lambda session, state, outcome: state.round_index == 2),
    "after the state changes": (live_module, "_applied", lambda session, state, outcome: state.round_index == 2),
    "after the line of history": (History, "add", lambda history, line: line.round_index == 3),
    "before the checkpoint": (StateFolder, "save", lambda folder, record: record.state.round_index == 3),
    "after the checkpoint": (StateFolder, "save", lambda folder, record: record.state.round_index == 3),
    "before an evaluation": (live_module, "evaluate", lambda session, head: head.state.round_index == 4),
    "after an evaluation": (live_module, "evaluate", lambda session, head: head.state.round_index == 4),
}
"""What is called there, and in which call the run dies, before or after it."""


def kill_at(point: str, patch: pytest.MonkeyPatch) -> None:
    """The function at a point raises `Crash` in its time, and from then on nothing is saved: the process is dead."""
    owner, name, is_time = POINTS[point]
    real = getattr(owner, name)

    def dead(*arguments: Any) -> None:
        raise Crash

    def crashing(*arguments: Any) -> Any:
        if not is_time(*arguments):
            return real(*arguments)
        if point.startswith("after"):
            real(*arguments)
        patch.setattr(StateFolder, "save", dead)
        raise Crash

    patch.setattr(owner, name, crashing)


@pytest.mark.parametrize(
    ("point", "every"),
    [*((point, 1) for point in POINTS), *((point, 2) for point in POINTS if not point.endswith("checkpoint"))],
)
def test_killed_anywhere_and_started_again_it_ends_with_the_same_bits(
    tmp_path: Path, one_id: None, monkeypatch: pytest.MonkeyPatch, point: str, every: int
) -> None:
    config = live_config(f"federation.checkpoint_every={every}", "deployment.evaluate_every=2")
    run(fake_nodes(), tmp_path / "undisturbed", config)
    nodes = fake_nodes()
    with monkeypatch.context() as patch:
        kill_at(point, patch)
        with pytest.raises(Crash):
            run(nodes, tmp_path / "killed", config)
    run(nodes, tmp_path / "killed", config)  # the nodes have gone on living
    ended, undisturbed = (load_latest(tmp_path / name / "checkpoints") for name in ("killed", "undisturbed"))
    assert checksum(ended) == checksum(undisturbed)
    for name in ("rounds.jsonl", "evaluations.jsonl"):
        lines, expected = (read_history(tmp_path / folder / name) for folder in ("killed", "undisturbed"))
        assert [line["round_index"] for line in lines] == [line["round_index"] for line in expected]
        assert [line["metrics"] for line in lines] == [line["metrics"] for line in expected]


def test_a_quarantine_outlives_the_server(tmp_path: Path) -> None:
    nodes = fake_nodes()
    config = live_config("deployment.quorum=0.1", "deployment.quarantine_rounds=2", "federation.rounds=6")
    nodes.nodes[31].changed = rubbish

    def crash(line: RoundLine) -> None:
        if line.round_index == 3:
            raise Crash

    with pytest.raises(Crash):
        run(nodes, tmp_path, config, on_round=crash)
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(31, 2, 3, 4)))


def sigint(nodes: FakeNodes) -> None:
    raise KeyboardInterrupt


def sigterm(nodes: FakeNodes) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def error(nodes: FakeNodes) -> None:
    raise OSError("the SuperLink is gone")


@pytest.mark.parametrize(("stop", "raised"), [(sigint, KeyboardInterrupt), (sigterm, SystemExit), (error, OSError)])
@pytest.mark.parametrize("place", ["train", "evaluate", "describe"])
def test_a_polite_end_leaves_a_checkpoint_of_the_last_finished_round(
    tmp_path: Path, one_id: None, stop: Callable[[FakeNodes], None], raised: type[BaseException], place: str
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    config = live_config("federation.checkpoint_every=5", "deployment.evaluate_every=4")
    run(fake_nodes(), tmp_path / "undisturbed", config)
    nodes, kept = fake_nodes(), {"train": 2, "evaluate": 4, "describe": 0}[place]

    def stopped(letter: Letter, answer: Answer) -> Answer:
        if letter.kind == place and (place != "train" or in_round(letter) == 3):
            stop(nodes)
        return answer

    nodes.nodes[23].changed = stopped
    with pytest.raises(raised):
        run(nodes, tmp_path / "ended", config)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert rounds(tmp_path / "ended" / "checkpoints")[-1] == kept
    nodes.nodes[23].changed = honest
    run(nodes, tmp_path / "ended", config)
    ended, undisturbed = (load_latest(tmp_path / name / "checkpoints") for name in ("ended", "undisturbed"))
    assert checksum(ended) == checksum(undisturbed)


def test_sigterm_goes_on_to_the_handler_that_was_there_once_all_is_saved(tmp_path: Path) -> None:
    """Flower's handler tells how the run has ended, and ends the process."""
    seen: list[tuple[int, ...]] = []

    def flowers(number: int, frame: Any) -> None:
        with opened(tmp_path, config):  # the lock is free again
            seen.append(rounds(tmp_path / "checkpoints"))

    config, nodes = live_config("federation.checkpoint_every=5"), fake_nodes()
    nodes.nodes[23].changed = lambda letter, answer: sigterm(nodes) if in_round(letter) == 3 else answer
    before = signal.signal(signal.SIGTERM, flowers)
    try:
        with pytest.raises(SystemExit):
            run(nodes, tmp_path, config)
        assert signal.getsignal(signal.SIGTERM) is flowers
        run(fake_nodes(), tmp_path, config)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [(0, 2)]


def test_an_end_in_a_round_does_not_shorten_a_quarantine(tmp_path: Path) -> None:
    """What is saved is of the last finished round, not of the one in hand."""
    nodes = fake_nodes()
    config = live_config(
        "deployment.quorum=0.1",
        "deployment.quarantine_rounds=2",
        "federation.rounds=6",
        "federation.checkpoint_every=6",
    )
    nodes.nodes[31].changed = rubbish
    nodes.nodes[12].changed = interrupted_in(4)
    with pytest.raises(KeyboardInterrupt):
        run(nodes, tmp_path, config)
    nodes.nodes[12].changed = honest
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(31, 2, 3, 4)))


def interrupted_in(wanted: int) -> Callable[[Letter, Answer], Answer]:
    def changed(letter: Letter, answer: Answer) -> Answer:
        if in_round(letter) == wanted:
            raise KeyboardInterrupt
        return answer

    return changed


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, one_id: None) -> None:
    config = live_config()
    run(fake_nodes(), tmp_path / "undisturbed", config)
    run(fake_nodes(), tmp_path / "damaged", config)
    (tmp_path / "damaged/checkpoints/round-000005/values.safetensors").write_bytes(b"")
    nodes = fake_nodes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run(nodes, tmp_path / "damaged", config)
    assert nodes.asked_of("train") == {31: 1, 12: 1, 23: 1}
    ended, undisturbed = (load_latest(tmp_path / name / "checkpoints") for name in ("damaged", "undisturbed"))
    assert checksum(ended) == checksum(undisturbed)
