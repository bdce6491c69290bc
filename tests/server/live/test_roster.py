"""Who is asked to describe itself, when, and what is believed."""

from __future__ import annotations

import logging

import pytest

from federation.config import DeploymentConfig
from federation.exchange import Answer, Contribution, Description, Letter, Measures, Refusal, Work
from server.live.roster import Roster, in_words
from server.plan import Holding
from tests.server.live.fake_nodes import FakeNode, FakeNodes

DEPLOYMENT = DeploymentConfig(nodes=2, join_seconds=40, poll_seconds=0.5)


def roster_of(nodes: FakeNodes) -> Roster:
    return Roster(nodes, nodes.time.clock, DEPLOYMENT)


def two_nodes() -> FakeNodes:
    return FakeNodes({5: FakeNode(0, {"train": 3, "new": 1}, order=1), 4: FakeNode(3, {"train": 2}, order=0)})


def asked_at(nodes: FakeNodes, node: int) -> list[float]:
    return [moment for moment, to, _ in nodes.posted if to == node]


def test_nodes_are_there_once_they_have_described_themselves() -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.look()
    assert not roster.present()
    assert roster.gather()
    assert list(roster.present()) == [4, 5]
    assert roster.holdings("train") == [Holding(4, 0, 2), Holding(5, 1, 3)]
    assert roster.holdings("new") == [Holding(4, 0, 0), Holding(5, 1, 1)]
    assert nodes.time.now == 0.5


def test_whoever_is_offline_is_not_there_and_is_not_asked_again_when_it_is_back() -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.gather()
    nodes.online_at = lambda node, now: node != 5
    roster.look()
    assert list(roster.present()) == [4]
    nodes.online_at = lambda node, now: True
    roster.look()
    assert list(roster.present()) == [4, 5]
    assert nodes.asked_of("describe") == {4: 1, 5: 1}


def test_a_silent_node_is_asked_again_after_a_quarter_of_the_time() -> None:
    nodes = two_nodes()
    nodes.nodes[5].changed = lambda letter, answer: None
    assert not roster_of(nodes).gather()
    assert nodes.time.now == 40
    assert asked_at(nodes, 5) == [0, 10, 20, 30, 40]
    assert asked_at(nodes, 4) == [0]


def test_an_answer_that_comes_after_the_next_question_counts() -> None:
    nodes = two_nodes()
    nodes.nodes[5].seconds = 25.0
    assert roster_of(nodes).gather()
    assert nodes.time.now == 25


def test_a_refusing_node_is_asked_again_soon(caplog: pytest.LogCaptureFixture) -> None:
    nodes, refused = two_nodes(), []

    def refusing(letter: Letter, answer: Answer) -> Answer:
        refused.append(letter)
        return Refusal("no agent", "it starts") if len(refused) < 3 else answer

    nodes.nodes[5].changed = refusing
    assert roster_of(nodes).gather()
    assert asked_at(nodes, 5) == [0, 5.5, 11]
    assert "node 5 does not describe itself: no agent" in caplog.text
    assert "it starts" not in caplog.text


@pytest.mark.parametrize("users", [{"train": -1}, {"train": 10_001}, {"train": 3, "other": -5}])
def test_counts_that_cannot_be_true_are_not_believed(users: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    nodes = two_nodes()
    nodes.nodes[5].users = users
    roster = roster_of(nodes)
    assert not roster.gather()
    assert list(roster.present()) == [4]
    said = "node 5 is not believed: it counts its users outside 0..10000 (deployment.users_per_node); raise the setting"
    assert said in caplog.text


def test_as_many_users_as_a_node_may_have_are_believed() -> None:
    nodes = two_nodes()
    nodes.nodes[5].users = {"train": 10_000, "new": 10_000}
    assert roster_of(nodes).gather()


def test_the_shortage_is_told_with_its_counts() -> None:
    nodes = two_nodes()
    nodes.nodes[5].changed = lambda letter, answer: None
    roster = roster_of(nodes)
    roster.gather()
    assert roster.shortage == (
        "a round needs 2 nodes (deployment.nodes), 2 are online and 1 of these have described themselves, after 40 s "
        "(deployment.join_seconds)"
    )


WORK = Work("quilt", 3, 1, "r2-abc")


@pytest.mark.parametrize("answer", [Contribution(WORK, {"train": 8}, b""), Measures(WORK, {"train": 8}, 0, {})])
def test_an_answer_tells_of_the_version_and_the_users(answer: Answer) -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.gather()
    assert not roster.keeps(5, "r2-abc")
    roster.learn(5, answer)
    assert roster.keeps(5, "r2-abc")
    assert not roster.keeps(4, "r2-abc")
    assert roster.holdings("train") == [Holding(4, 0, 2), Holding(5, 1, 8)]


def test_what_nobody_was_asked_for_makes_no_node_known() -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.look()
    roster.learn(77, Contribution(WORK, {"train": 8}, b""))
    assert not roster.keeps(77, "r2-abc")


def test_unknown_users_make_a_node_unknown_until_it_describes_itself_again() -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.gather()
    roster.learn(5, Refusal("busy", "later"))
    assert list(roster.present()) == [4, 5]
    roster.learn(5, Refusal("unknown users", "it has 2"))
    assert list(roster.present()) == [4]
    assert roster.gather()
    assert nodes.asked_of("describe") == {4: 1, 5: 2}
    assert nodes.time.now == 1.0  # asked at once, and not when a silent node would be


def test_who_is_forgotten_describes_itself_again() -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    roster.gather()
    roster.forget([5, 77])
    assert list(roster.present()) == [4]
    roster.watch(3.0)
    assert list(roster.present()) == [4, 5]
    assert nodes.asked_of("describe") == {4: 1, 5: 2}
    assert nodes.time.now == 3.5


def test_descriptions_are_collected_a_few_at_a_time_and_old_questions_dropped() -> None:
    nodes = FakeNodes({number: FakeNode(number, {"train": 1}) for number in range(20)})
    nodes.nodes[7].changed = lambda letter, answer: None
    roster = roster_of(nodes)
    roster.watch(60.0)
    assert len(roster.present()) == 19
    assert nodes.most_at_once == 8  # deployment.replies
    assert len(nodes.waiting) == 4  # asked in the last 40 seconds, every 10


def test_a_log_line_holds_nothing_that_an_answer_carries() -> None:
    assert in_words(Contribution(WORK, {}, b"secret")) == "it answers with a contribution"
    assert in_words(Refusal("failed", "secret")) == "failed"
    assert in_words("secret") == "its answer cannot be read"
    assert in_words(Description({})) == "it answers with a description"


def test_who_takes_part_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nodes = two_nodes()
    roster = roster_of(nodes)
    with caplog.at_level(logging.INFO):
        roster.gather()
        roster.learn(4, Description({"train": 3}))
    assert caplog.text.count("node 4 takes part from now on") == 1
