"""A server's rounds over fake nodes, against a plain loop over their users, while nodes come, go, refuse and err."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.cohorts import draw_cohort
from federation.errors import RunError
from federation.exchange import Answer, Contribution, Letter, Refusal, Work
from federation.streams import Streams
from server.checkpoint import load_latest, rounds
from server.live import RoundLine
from tests.server.fake_nodes import FakeNode, FakeNodes, trained
from tests.server.replies import SCHEMA, bits
from tests.server.small_federation import (
    NODES,
    assert_same,
    audit,
    begun,
    cohort_of,
    fake_nodes,
    history,
    honest,
    in_round,
    live_config,
    missing_in,
    plain,
    rubbish,
    run,
    silent_in,
    users_of,
)

# -------------------------------------------------------------------------------- undisturbed


@pytest.mark.parametrize("sampling", ["uniform", "epochs"])
def test_a_federation_is_a_plain_loop_over_the_nodes_users(tmp_path: Path, sampling: str) -> None:
    config = live_config(f"federation.sampling={sampling}")
    seen: list[RoundLine] = []
    assert_same(run(fake_nodes(), tmp_path, config, on_round=seen.append), plain(config))
    assert [line.round_index for line in seen] == [1, 2, 3, 4, 5]
    assert all(line.admitted == line.users == len(cohort_of(config, line.round_index)) for line in seen)
    assert all((line.nodes, line.attempt, line.rejected) == (3, 1, {}) for line in seen)


@pytest.mark.parametrize("factor", ["down", "up", "alternate", "nothing"])
def test_factors_that_are_not_trained_stay_as_they_are(tmp_path: Path, factor: str) -> None:
    config = live_config(f"local.train={factor}", "federation.rounds=2", "pool_optimizer.name=sgd")
    _, first = begun(config)
    values = run(fake_nodes(), tmp_path, config).values
    for name in ("pool/a", "pool/b"):
        for part in ("down", "up"):
            columns = SCHEMA.sections[name].columns(part)
            moved = not torch.equal(values[name][:, columns], first.values[name][:, columns])
            assert moved == (factor in (part, "alternate")), (name, part)


def test_the_order_of_answers_and_the_window_change_no_bit(tmp_path: Path) -> None:
    expected = plain(live_config())
    for number, seconds in enumerate([(0.1, 3.0, 5.0), (5.0, 3.0, 0.1), (3.0, 5.0, 0.1)]):
        nodes = fake_nodes()
        for node, delay in zip(nodes.nodes.values(), seconds):
            node.seconds = delay
        config = live_config(f"deployment.replies={number + 1}")
        assert_same(run(nodes, tmp_path / str(number), config), expected)


def test_a_finished_round_is_a_line_of_history(tmp_path: Path) -> None:
    nodes = fake_nodes()
    run(nodes, tmp_path, live_config("federation.rounds=1"))
    (line,) = history(tmp_path)
    (train,) = {len(letter.pool) for letter in nodes.letters("train")}
    assert line["bytes_down"] == 3 * train
    assert line["bytes_up"] > 3 * 11
    assert line["nodes_asked"] == line["nodes"] == 3
    assert line["seconds"] == pytest.approx(1.4, abs=0.5)  # the slowest node, to the next look
    assert set(line["metrics"]) == {"active_share", "reward", "reward_spread", "support_loss"}
    assert line["suppressed"] == ""


def test_metrics_are_means_over_the_admitted_users(tmp_path: Path) -> None:
    config = live_config("federation.rounds=1")
    run(fake_nodes(), tmp_path, config)
    _, state = begun(config)
    work = Work("any", 1, 1, state.version)
    losses = [float(trained(u, work, state.values).metrics["support_loss"]) for u in cohort_of(config, 1)]
    assert history(tmp_path)[0]["metrics"]["support_loss"] == pytest.approx(sum(losses) / len(losses))


def test_of_fewer_than_three_users_no_metrics_are_written(tmp_path: Path) -> None:
    run(fake_nodes(), tmp_path, live_config("federation.rounds=1", "federation.cohort=2"))
    (line,) = history(tmp_path)
    assert (line["metrics"], line["admitted"]) == (None, 2)
    assert line["suppressed"] == "fewer than 3 users"


def test_nodes_are_told_what_they_need(tmp_path: Path) -> None:
    config = live_config("federation.checkpoint_every=2")
    nodes = fake_nodes()
    run(nodes, tmp_path, config)
    wishes = [letter.instructions for letter in nodes.letters("train", NODES[0])]
    assert [wish.round_index for wish in wishes] == [1, 2, 3, 4, 5]
    assert {wish.federation for wish in wishes} == {load_latest(tmp_path / "checkpoints").meta["federation"]}
    assert [wish.durable_round for wish in wishes] == [0, 0, 0, 0, 0]
    assert all(type(config.task).model_validate_json(wish.task) == config.task for wish in wishes)
    assert all(wish.split == "train" for wish in wishes)


def test_a_checkpoint_holds_the_ledger_of_its_round(tmp_path: Path) -> None:
    ended = run(fake_nodes(), tmp_path, live_config("federation.cohort=1000"))
    meta = load_latest(tmp_path / "checkpoints").meta
    assert meta["version"] == ended.version
    ledger = meta["desk"]["ledger"]
    assert (ledger["work"]["round_index"], ledger["work"]["federation"]) == (5, meta["federation"])
    assert set(ledger["digests"]) == {"31", "12", "23"}


def test_the_durable_round_is_that_of_the_oldest_checkpoint(tmp_path: Path) -> None:
    nodes = fake_nodes()
    run(nodes, tmp_path, live_config())
    assert [letter.instructions.durable_round for letter in nodes.letters("train", 31)] == [0, 0, 0, 1, 2]
    assert rounds(tmp_path / "checkpoints") == (3, 4, 5)


# -------------------------------------------------------------------------------- nodes come and go


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("window", [1, 8])
def test_a_silent_node_is_left_out_at_the_deadline(tmp_path: Path, node: int, window: int) -> None:
    nodes, config = fake_nodes(), live_config(f"deployment.replies={window}", "deployment.quorum=0.1")
    nodes.nodes[node].changed = silent_in(2, 4)
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(node, 2, 4)))
    lines = history(tmp_path)
    asked = len(set(cohort_of(config, 2)) & set(users_of(node)))
    assert (lines[1]["rejected"], lines[1]["nodes"]) == ({"late": asked}, 2)
    assert 20 <= lines[1]["seconds"] < 21
    assert lines[2]["seconds"] < 3


@pytest.mark.parametrize("fault", ["busy", "no agent", "late", "failed"])
def test_a_refusing_node_is_left_out_at_once(tmp_path: Path, fault: Any) -> None:
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.1")
    nodes.nodes[12].changed = lambda letter, answer: Refusal(fault, "no") if in_round(letter) == 3 else answer
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, 3)))
    line = history(tmp_path)[2]
    assert line["rejected"] == {fault: len(set(cohort_of(config, 3)) & set(users_of(12)))}
    assert line["seconds"] < 3
    assert not audit(tmp_path)  # a refusal is no offence


def test_a_node_that_takes_no_letter_is_left_out_at_once(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.1", "federation.rounds=2")
    said: list[int] = []

    def unplugged(line: RoundLine) -> None:
        said.append(line.nodes)
        nodes.unreachable = {23}

    assert_same(run(nodes, tmp_path, config, on_round=unplugged), plain(config, missing_in(23, 2)))
    assert said == [3, 2]


def test_a_node_that_goes_takes_its_users_out_of_the_row(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("deployment.nodes=2", "federation.rounds=2")
    for node in nodes.nodes.values():
        node.seconds = 0.4
    nodes.online_at = lambda node, now: node != 23 or now < 0.6  # it is asked, answers, and is gone by the next round
    run(nodes, tmp_path, config)
    assert [line["nodes_asked"] for line in history(tmp_path)] == [3, 2]
    positions = [letter.instructions.positions for letter in nodes.letters("train")[-2:]]
    assert sum(map(len, positions)) == min(11, 7 + 4)


def test_a_node_that_joins_later_is_asked_who_it_is_and_holds_nobody_up(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("deployment.nodes=2", "federation.rounds=4")
    nodes.nodes[23].seconds = 2.0
    nodes.online_at = lambda node, now: node != 23 or now > 1.0
    run(nodes, tmp_path, config)
    lines = history(tmp_path)
    assert [line["nodes_asked"] for line in lines] == [2, 2, 3, 3]
    assert lines[1]["seconds"] < 2.0
    assert nodes.asked_of("describe") == {31: 1, 12: 1, 23: 1}


def test_users_that_a_node_gains_are_drawn_in_the_next_round(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("federation.cohort=1000")

    def gains(line: RoundLine) -> None:
        nodes.nodes[23].users = {"train": 9 + line.round_index}

    run(nodes, tmp_path, config, on_round=gains)
    assert [line["users"] for line in history(tmp_path)] == [20, 20, 21, 22, 23]


def test_an_answer_to_other_work_tells_nothing_of_a_node(tmp_path: Path) -> None:
    def stale(letter: Letter, answer: Answer) -> Answer:
        if in_round(letter) != 2 or not isinstance(answer, Contribution):
            return answer
        return replace(answer, work=replace(answer.work, round_index=1), users={"train": 1000})

    nodes, config = fake_nodes(), live_config("deployment.quorum=0.1")
    nodes.nodes[23].changed = stale
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(23, 2)))


def test_a_node_that_lost_users_describes_itself_again(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("federation.cohort=1000")

    def loses(line: RoundLine) -> None:
        if line.round_index == 2:
            nodes.nodes[23].users = {"train": 5}

    run(nodes, tmp_path, config, on_round=loses)
    lines = history(tmp_path)
    assert [line["users"] for line in lines] == [20, 20, 20, 16, 16]
    assert lines[2]["rejected"] == {"unknown users": 9}
    assert nodes.asked_of("describe") == {31: 1, 12: 1, 23: 2}


# -------------------------------------------------------------------------------- the pool


def test_the_pool_goes_once_to_each_node_and_version(tmp_path: Path) -> None:
    """Silence of two nodes refuses the first try; the second one is of the same version, which 31 keeps by now."""
    nodes, config = fake_nodes(), live_config("federation.rounds=1", "deployment.quorum=0.9")
    for node in (12, 23):
        nodes.nodes[node].changed = first_try_silent
    run(nodes, tmp_path, config)
    assert [letter.pool is None for letter in nodes.letters("train", 31)] == [False, True]
    assert [letter.pool is None for letter in nodes.letters("train", 12)] == [False, False]
    evaluated = nodes.letters("evaluate")
    assert all(letter.pool is not None for letter in evaluated)  # the round made another version


def first_try_silent(letter: Letter, answer: Answer) -> Answer | None:
    return None if letter.kind == "train" and letter.instructions.attempt == 1 else answer


def test_a_node_that_lost_the_version_is_sent_it_at_once(tmp_path: Path) -> None:
    config = live_config("federation.rounds=2")
    nodes = fake_nodes()
    nodes.nodes[12].versions_said = (begun(config)[1].version,)
    assert_same(run(nodes, tmp_path, config), plain(config))
    assert [letter.pool is None for letter in nodes.letters("train", 12)] == [True, False, False]


def test_a_node_that_lacks_what_it_was_sent_is_left_out(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("federation.rounds=2", "deployment.quorum=0.1")
    nodes.nodes[12].changed = lambda letter, answer: (
        Refusal("lacks version", "again") if letter.kind == "train" else answer
    )
    nodes.nodes[12].versions_said = (begun(config)[1].version,)
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, 1, 2)))
    assert nodes.asked_of("train")[12] == 3  # twice in the first round, as it said that it kept that version
    assert all(set(line["rejected"]) == {"lacks version"} for line in history(tmp_path))


# -------------------------------------------------------------------------------- below the quorum


def test_a_round_below_its_quorum_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.9")
    tried: list[bytes] = []

    def losing(letter: Letter, answer: Answer) -> Answer | None:
        if in_round(letter) == 3 and letter.instructions.attempt == 1:
            tried.append(b"".join(bits(load_latest(tmp_path / "checkpoints").tensors)))
            return None
        return answer

    nodes.nodes[31].changed = losing
    with caplog.at_level(logging.ERROR):
        assert_same(run(nodes, tmp_path, config), plain(config))
    assert [line["attempt"] for line in history(tmp_path)] == [1, 1, 2, 1, 1]
    assert "try 1 of 3 is refused: round 3 needs 90% of the users it asks (deployment.quorum)" in caplog.text
    asked = [letter.instructions for letter in nodes.letters("train", 12) if in_round(letter) == 3]
    assert [wish.attempt for wish in asked] == [1, 2]
    assert asked[0].positions == asked[1].positions
    assert len(tried) == 1


def test_a_round_that_stays_below_its_quorum_ends_the_run_and_leaves_the_state(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.9", "federation.checkpoint_every=5")
    for node in (31, 12):
        nodes.nodes[node].changed = silent_in(3)
    with pytest.raises(RunError) as raised:
        run(nodes, tmp_path, config)
    there = len(set(cohort_of(config, 3)) & set(users_of(23)))
    said = str(raised.value)
    assert "round 3 needs 90% of the users it asks (deployment.quorum)" in said
    assert f"admitted are {there} of 11, from 1 of 3 nodes (not: {11 - there} late)" in said
    assert "3 tries (deployment.attempts) were no better" in said
    assert "The state is that of round 2" in said
    assert rounds(tmp_path / "checkpoints") == (0, 2)
    assert [line["round_index"] for line in history(tmp_path)] == [1, 2]
    for node in nodes.nodes.values():
        node.changed = honest
    assert_same(run(nodes, tmp_path, config), plain(config))


def test_without_any_user_no_round_is_finished(tmp_path: Path) -> None:
    nodes = FakeNodes({1: FakeNode(0, {"new": 4})})
    with pytest.raises(RunError, match="admitted are 0 of 0, from 0 of 0 nodes"):
        run(nodes, tmp_path, live_config("deployment.nodes=1"))


@pytest.mark.parametrize("quorum", [0.6, 0.61])
def test_the_quorum_is_a_share_of_the_users_that_are_asked(tmp_path: Path, quorum: float) -> None:
    nodes = fake_nodes(sizes=(3, 2, 5))
    nodes.nodes[31].changed = silent_in(1)
    config = live_config("federation.rounds=1", "federation.cohort=5", f"deployment.quorum={quorum}")
    cohort = draw_cohort(range(10), config.federation, Streams(config.seed), 1).tolist()
    there = sum(user >= 3 for user in cohort) / 5
    if there >= quorum:
        assert run(nodes, tmp_path, config).round_index == 1
    else:
        with pytest.raises(RunError):
            run(nodes, tmp_path, config)
    assert there == 0.6 or pytest.fail("choose another seed: the test is about the boundary")


# -------------------------------------------------------------------------------- quarantine


def test_a_node_in_quarantine_leaves_a_gap_and_nothing_else(tmp_path: Path) -> None:
    nodes = fake_nodes()
    config = live_config("deployment.quorum=0.1", "deployment.quarantine_rounds=2", "federation.rounds=6")
    nodes.nodes[31].changed = rubbish
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(31, 2, 3, 4)))
    assert [line["nodes_asked"] for line in history(tmp_path)] == [3, 3, 2, 2, 3, 3]
    assert [(line["node"], line["event"], line["until"]) for line in audit(tmp_path)] == [(31, "quarantined", 4)]


def test_whoever_is_in_quarantine_does_not_count_for_the_quorum(tmp_path: Path) -> None:
    """Else one bad node could end a federation of two."""
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.9", "federation.rounds=4")
    nodes.nodes[31].changed = rubbish
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(31, 2, 3, 4)))
    assert [line["attempt"] for line in history(tmp_path)] == [1, 2, 1, 1]


# -------------------------------------------------------------------------------- too few


def test_too_few_nodes_end_the_run_with_the_counts(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.online_at = lambda node, now: node != 31
    nodes.nodes[23].changed = lambda letter, answer: Refusal("no agent", "it is down")
    with pytest.raises(RunError) as raised:
        run(nodes, tmp_path)
    assert "needs 3 nodes (deployment.nodes), 2 are online and 1 of these have described themselves" in str(
        raised.value
    )
    assert "after 40 s (deployment.join_seconds); start more nodes" in str(raised.value)
    assert 40 <= nodes.time.now < 41
    assert rounds(tmp_path / "checkpoints") == (0,)
    assert not nodes.letters("train")


def test_nodes_that_vanish_end_the_run_with_the_last_round_kept(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("federation.checkpoint_every=5")
    ended: list[float] = []
    nodes.online_at = lambda node, now: len(ended) < 2
    with pytest.raises(RunError, match=r"0 are online .* the state is that of round 2"):
        run(nodes, tmp_path, config, on_round=lambda line: ended.append(nodes.time.now))
    assert rounds(tmp_path / "checkpoints") == (0, 2)


def test_a_node_that_comes_in_time_is_waited_for(tmp_path: Path) -> None:
    nodes = fake_nodes()
    nodes.online_at = lambda node, now: node != 31 or now > 30
    assert_same(run(nodes, tmp_path), plain(live_config()))
    assert nodes.asked_of("describe") == {31: 1, 12: 1, 23: 1}
