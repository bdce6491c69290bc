"""Evaluations: who is asked, what is summed, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.exchange import MEASURES, Answer, Description, Letter, Measures, Refusal, Work
from server.history import read_history
from server.live.evaluation import dealt
from tests.server.live.fake_nodes import FakeNode, FakeNodes, sums_of
from tests.server.live.small_federation import (
    fake_nodes,
    honest,
    live_config,
    rubbish,
    run,
)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return read_history(folder / "evaluations.jsonl")


# -------------------------------------------------------------------------------- when
@pytest.mark.parametrize(("every", "wanted"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5])])
def test_evaluations_come_as_often_as_asked_and_after_the_last_round(
    tmp_path: Path, every: int, wanted: list[int]
) -> None:
    nodes = fake_nodes()
    run(nodes, tmp_path, live_config(f"deployment.evaluate_every={every}"))
    assert [line["round_index"] for line in evaluations(tmp_path)] == wanted
    lines = {line["version"] for line in evaluations(tmp_path)}
    assert lines == {letter.instructions.version for letter in nodes.letters("evaluate")}


def test_the_last_evaluation_is_made_up_for(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.nodes[23].changed = interrupted_in_evaluation
    with pytest.raises(KeyboardInterrupt):
        run(nodes, tmp_path)
    assert evaluations(tmp_path) == []
    nodes.nodes[23].changed = honest
    run(nodes, tmp_path)
    assert [line["round_index"] for line in evaluations(tmp_path)] == [5]


def interrupted_in_evaluation(letter: Letter, answer: Answer) -> Answer:
    if letter.kind == "evaluate":
        raise KeyboardInterrupt
    return answer


def test_after_the_last_round_those_who_are_left_are_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = fake_nodes()
    gone: list[int] = []
    nodes.online_at = lambda node, now: node == 23 or len(gone) < 5
    run(nodes, tmp_path, on_round=lambda line: gone.append(line.round_index))
    (line,) = evaluations(tmp_path)
    assert (line["nodes"], line["users"]) == (1, 6)
    assert "1 are online" in caplog.text


# -------------------------------------------------------------------------------- who


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 40))
def test_nodes_give_one_user_in_turn_until_there_are_enough(holdings: list[int], most: int) -> None:
    """The closed form: a level such that all give so many, or all that they have; the first ones one more."""
    counts = dealt(holdings, most)
    assert sum(counts) == min(most, sum(holdings))
    level = max(counts, default=0)
    for place, (count, users) in enumerate(zip(counts, holdings)):
        assert count == min(users, level) or (count == level - 1 and not any(c == level for c in counts[place:]))


def asked(nodes: FakeNodes) -> dict[int, tuple[str, tuple[int, ...]]]:
    return {
        node: (letter.instructions.split, letter.instructions.positions)
        for _, node, letter in nodes.posted
        if letter.kind == "evaluate"
    }


def test_new_users_are_measured_where_there_are_any(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.nodes[31].users["new"], nodes.nodes[23].users["new"] = 1, 8
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    assert asked(nodes) == {31: ("new", (0,)), 23: ("new", (0, 1, 2, 3, 4))}
    assert evaluations(tmp_path)[0]["split"] == "new"


def test_without_new_users_those_that_train_are_measured(tmp_path: Path) -> None:
    nodes = fake_nodes()
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    assert asked(nodes) == dict.fromkeys((31, 12, 23), ("train", (0, 1)))


def test_whoever_is_in_quarantine_is_not_asked(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.nodes[31].changed = rubbish
    run(nodes, tmp_path, live_config("federation.rounds=3", "deployment.quorum=0.1"))
    assert asked(nodes) == dict.fromkeys((12, 23), ("train", (0, 1, 2)))


# -------------------------------------------------------------------------------- what is summed


def test_metrics_are_means_over_the_measured_users(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("federation.rounds=1", "evaluate.users=12")
    ended = run(nodes, tmp_path, config)
    (line,) = evaluations(tmp_path)
    users = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14]  # four of each node, which hold 0 to 6, 7 to 10, 11 to 19
    assert line["metrics"] == pytest.approx({name: total / 12 for name, total in sums_of(users).items()})
    assert (line["users_asked"], line["users"], line["nodes"], line["rejected"]) == (12, 12, 3, {})
    assert (line["round_index"], line["version"], line["suppressed"]) == (1, ended.version, "")


def test_fewer_measured_users_than_asked_for_weigh_as_many_as_they_are(tmp_path: Path) -> None:
    def measures(measured: int, total: float) -> Callable[[Letter, Answer], Answer]:
        sums = dict.fromkeys(("base_loss", "mask_loss", "tuned_loss"), total)
        return lambda letter, answer: (
            replace(answer, measured=measured, sums=sums) if isinstance(answer, Measures) else answer
        )

    nodes = fake_nodes()
    for node, (measured, total) in {31: (2, 10.0), 12: (1, 2.0), 23: (0, 0.0)}.items():
        nodes.nodes[node].changed = measures(measured, total)
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    (line,) = evaluations(tmp_path)
    assert set(line["metrics"].values()) == {4.0}  # (10 + 2) / 3; who measured nobody adds nothing
    assert (line["users_asked"], line["users"]) == (6, 3)


def test_the_order_of_answers_changes_no_bit_of_the_means(tmp_path: Path) -> None:
    """These sums are other ones in other orders, by their last bit."""
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)

    def measuring(total: float) -> Callable[[Letter, Answer], Answer]:
        sums = dict.fromkeys(MEASURES, total)
        return lambda letter, answer: replace(answer, sums=sums) if isinstance(answer, Measures) else answer

    found = []
    for number, seconds in enumerate([(0.1, 0.6, 1.1), (1.1, 0.1, 0.6), (0.6, 1.1, 0.1)]):
        nodes = fake_nodes()
        for node, taken, total in zip(nodes.nodes.values(), seconds, (0.1, 0.2, 0.3)):
            node.seconds, node.changed = taken, measuring(total)
        run(nodes, tmp_path / str(number), live_config("federation.rounds=1"))
        found += [line["metrics"] for line in evaluations(tmp_path / str(number))]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("reason", "spoilt"),
    {
        "a sum that is no measure": [
            {"sums": {"base_loss": math.nan, "mask_loss": 1.0, "tuned_loss": 1.0}},
            {"sums": {"base_loss": 1.0, "mask_loss": -math.inf, "tuned_loss": 1.0}},
            {"sums": {"base_loss": 1.0, "mask_loss": 1.0, "tuned_loss": 200.1}},  # two users, 100 nats each at most
            {"sums": {"base_loss": 1.0, "mask_loss": -1e-9, "tuned_loss": 1.0}},
            {"sums": {"base_loss": 1.0, "mask_loss": 1.0, "tuned_loss": 1.0}, "measured": 0},
        ],
        "other metrics": [
            {"sums": {"base_loss": 1.0, "mask_loss": 1.0}},
            {"sums": {"base_loss": 1.0, "mask_loss": 1.0, "tuned_loss": 1.0, "name": 1.0}},
        ],
        "more users than asked for": [{"measured": 3}, {"measured": -1}],
        "foreign work": [{"work": Work("other", 1, 1, "r1-abc")}],
    }.items(),
)
def test_measures_that_cannot_be_true_are_left_out(
    tmp_path: Path, reason: str, spoilt: Sequence[dict[str, Any]]
) -> None:
    for number, changes in enumerate(spoilt):
        nodes, folder = fake_nodes(), tmp_path / str(number)
        nodes.nodes[12].changed = lambda letter, answer, changes=changes: (
            replace(answer, **changes) if isinstance(answer, Measures) else answer
        )
        run(nodes, folder, live_config("federation.rounds=1"))
        (line,) = evaluations(folder)
        assert line["metrics"] == pytest.approx({name: s / 4 for name, s in sums_of([0, 1, 11, 12]).items()})
        assert (line["users"], line["nodes"], line["rejected"]) == (4, 2, {reason: 1})


def test_the_largest_losses_are_measures(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.nodes[12].changed = lambda letter, answer: (
        replace(answer, sums={**answer.sums, "base_loss": 200.0, "mask_loss": 0.0})
        if isinstance(answer, Measures)
        else answer
    )
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    (line,) = evaluations(tmp_path)
    assert (line["nodes"], line["rejected"]) == (3, {})


@pytest.mark.parametrize(("measured", "believed"), [(2, True), (81, False)])
def test_measures_that_are_taken_tell_how_many_users_their_node_has(
    tmp_path: Path, measured: int, believed: bool
) -> None:
    def grown(letter: Letter, answer: Answer) -> Answer:
        return replace(answer, users={"train": 9}, measured=measured) if isinstance(answer, Measures) else answer

    nodes = fake_nodes()
    nodes.nodes[12].changed = grown
    config = live_config("federation.rounds=2", "federation.cohort=1000", "deployment.evaluate_every=1")
    run(nodes, tmp_path, config)
    asked_of_it = [len(letter.instructions.positions) for letter in nodes.letters("train", 12)]
    assert asked_of_it == [4, 9 if believed else 4]


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        (Refusal("busy", "later"), "busy"),
        (None, "late"),
        ("nothing that a node sends", "no measures"),
        (Description({"train": 4}), "no measures"),
    ],
)
def test_who_gives_no_measures_is_left_out(tmp_path: Path, answered: Any, reason: str) -> None:
    nodes = fake_nodes()
    nodes.nodes[23].changed = lambda letter, answer: answered if letter.kind == "evaluate" else answer
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    (line,) = evaluations(tmp_path)
    assert line["metrics"] == pytest.approx({name: s / 4 for name, s in sums_of([0, 1, 7, 8]).items()})
    assert line["rejected"] == {reason: 1}


def test_of_fewer_than_three_users_no_means_are_written(tmp_path: Path) -> None:
    for users, shown in ((2, False), (3, True)):
        folder = tmp_path / str(users)
        run(fake_nodes(), folder, live_config("federation.rounds=1", f"evaluate.users={users}"))
        (line,) = evaluations(folder)
        assert (line["metrics"] is not None) == shown
        assert line["suppressed"] == ("" if shown else "fewer than 3 users")


def test_when_nobody_answers_that_is_what_is_written(tmp_path: Path) -> None:
    nodes = fake_nodes()
    for node in nodes.nodes.values():
        node.changed = lambda letter, answer: None if letter.kind == "evaluate" else answer
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    (line,) = evaluations(tmp_path)
    assert (line["metrics"], line["users"], line["nodes"], line["rejected"]) == (None, 0, 0, {"late": 3})


def test_an_evaluation_that_measured_nobody_is_done_again_after_a_restart(tmp_path: Path) -> None:
    nodes = fake_nodes()
    for node in nodes.nodes.values():
        node.changed = lambda letter, answer: Refusal("no agent", "") if letter.kind == "evaluate" else answer
    run(nodes, tmp_path)
    for node in nodes.nodes.values():
        node.changed = honest
    for _ in range(2):
        run(nodes, tmp_path)
    assert [(line["round_index"], line["users"]) for line in evaluations(tmp_path)] == [(5, 0), (5, 6)]


def test_measures_are_collected_a_few_at_a_time(tmp_path: Path) -> None:
    nodes = FakeNodes({number: FakeNode(number, {"train": 1}, order=number) for number in range(9)})
    config = live_config("federation.rounds=1", "federation.cohort=1", "evaluate.users=9", "deployment.quorum=0.1")
    run(nodes, tmp_path, config)
    assert evaluations(tmp_path)[0]["nodes"] == 9
    assert nodes.most_at_once == 2  # deployment.replies
    assert not nodes.waiting
