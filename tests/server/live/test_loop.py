"""A server's rounds over fake nodes, against a plain loop over their users, while nodes come, go, refuse and err."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.errors import FedquiltWarning
from federation.exchange import Answer, Contribution, Description, Letter, Refusal, Work
from federation.update import Values
from server.checkpoint import load_latest, rounds
from server.live.loop import RoundLine
from tests.server.admission.replies import SCHEMA, bits
from tests.server.live.fake_nodes import FakeNode, FakeNodes, trained
from tests.server.live.small_federation import (
    NODES,
    assert_same,
    at_once,
    audit,
    begun,
    cohort_of,
    fake_nodes,
    history,
    in_round,
    live_config,
    missing_in,
    plain,
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
    assert set(line["metrics"]) == {"active_share", "gate_entropy", "reward", "reward_spread", "support_loss"}
    assert line["suppressed"] == ""
    assert line["repeats"] == 0


def test_a_reply_that_comes_again_is_counted(tmp_path: Path) -> None:
    nodes, config = fake_nodes(), live_config("deployment.quorum=0.1")
    taken: list[Answer] = []

    def again(letter: Letter, answer: Answer) -> Answer:
        if in_round(letter) == 2:
            taken.append(answer)
        return taken[0] if in_round(letter) == 3 else answer

    nodes.nodes[12].changed = again
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, 3)))
    assert [line["repeats"] for line in history(tmp_path)] == [0, 0, 1, 0, 0]


def test_metrics_are_means_over_the_admitted_users(tmp_path: Path) -> None:
    config = live_config("federation.rounds=1")
    run(fake_nodes(), tmp_path, config)
    _, state = begun(config)
    work = Work("any", 1, 1, state.version)
    losses = [float(trained(u, work, state.values).metrics["support_loss"]) for u in cohort_of(config, 1)]
    assert history(tmp_path)[0]["metrics"]["support_loss"] == pytest.approx(sum(losses) / len(losses))


def test_the_gates_health_is_a_part_of_the_metrics_and_a_collapse_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Values, Values]] = []

    def health(before: Values, after: Values) -> dict[str, float]:
        seen.append((before, after))
        return {"unused_share": 0.9, "revived": 2.0, "gate_entropy": 0.01}

    monkeypatch.setattr("server.live.loop.gate_health", health)
    with pytest.warns(FedquiltWarning, match="the gate collapses: in round 1 ") as caught:
        state = run(fake_nodes(), tmp_path, live_config("federation.rounds=3"))
    assert len([warning for warning in caught if issubclass(warning.category, FedquiltWarning)]) == 1
    assert [line["metrics"]["unused_share"] for line in history(tmp_path)] == [0.9] * 3
    assert {"revived", "support_loss"} < set(history(tmp_path)[0]["metrics"])
    assert [bits(after) for _, after in seen[:-1]] == [bits(before) for before, _ in seen[1:]]
    assert bits(seen[-1][1]) == bits(state.values)


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


@pytest.mark.parametrize(("every", "kept"), [(1, (3, 4, 5)), (2, (2, 4, 5)), (4, (0, 4, 5)), (9, (0, 5))])
def test_checkpoints_come_as_often_as_asked_and_after_the_last_round(
    tmp_path: Path, every: int, kept: tuple[int, ...]
) -> None:
    run(fake_nodes(), tmp_path, live_config(f"federation.checkpoint_every={every}"))
    assert rounds(tmp_path / "checkpoints") == kept


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
    assert [line["attempt"] for line in history(tmp_path)] == [1, 1, 1, 1, 1]


def other_kind(answer: Contribution) -> Answer:
    return Description(answer.users)


def cut_short(answer: Contribution) -> Answer:
    return replace(answer, payload=answer.payload[:-1])


def one_bad_update(answer: Contribution) -> Answer:
    return replace(answer, payload=answer.payload[:-1] + bytes([answer.payload[-1] ^ 1]))


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [(other_kind, "no contribution"), (cut_short, "malformed frames"), (one_bad_update, "malformed update")],
)
def test_a_contribution_that_is_refused_tells_nothing_of_its_node(
    tmp_path: Path, spoilt: Callable[[Contribution], Answer], reason: str
) -> None:
    """It says that it has 90 users. What it sends is refused at once, or when its updates are decoded."""

    def boasting(letter: Letter, answer: Answer) -> Answer:
        if in_round(letter) != 1 or not isinstance(answer, Contribution):
            return answer
        return spoilt(replace(answer, users={"train": 90}))

    nodes = fake_nodes()
    config = live_config("deployment.quorum=0.1", "deployment.quarantine_rounds=1", "federation.rounds=3")
    nodes.nodes[12].changed = boasting
    run(nodes, tmp_path, config)
    assert [(line["node"], line["reason"]) for line in audit(tmp_path)] == [(12, reason)]
    assert [in_round(letter) for letter in nodes.letters("train", 12)] == [1, 3]
    for letter in nodes.letters("train", 12):
        drawn = [user - 7 for user in cohort_of(config, in_round(letter)) if user in users_of(12)]
        assert list(letter.instructions.positions) == drawn


def test_more_users_than_a_node_may_have_are_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = live_config("federation.cohort=1000", "federation.rounds=3", "deployment.users_per_node=9")
    nodes = fake_nodes()
    nodes.nodes[12].changed = lambda letter, answer: (
        replace(answer, users={"train": 10 if in_round(letter) == 2 else 5})
        if isinstance(answer, Contribution)
        else answer
    )
    nodes.nodes[12].users = {"train": 5}
    run(nodes, tmp_path, config)
    assert [line["users"] for line in history(tmp_path)] == [21, 21, 21]
    assert caplog.text.count("node 12 is not believed") == 1


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


def test_what_has_come_is_collected_a_few_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    nodes = FakeNodes({number: FakeNode(number, {"train": 1}, order=number) for number in range(9)})
    nodes.nodes[3].changed = silent_in(1)
    run(nodes, tmp_path, live_config("federation.rounds=1", "federation.cohort=9", "deployment.nodes=9"))
    assert history(tmp_path)[0]["nodes"] == 8
    assert nodes.most_at_once == 2  # deployment.replies
    assert not nodes.waiting


# -------------------------------------------------------------------------------- silence


def always_silent(letter: Letter, answer: Answer) -> Answer | None:
    return None if letter.kind == "train" else answer


def test_a_node_that_is_always_silent_rests_longer_and_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = live_config("deployment.nodes=2", "federation.rounds=12", "federation.cohort=20", "deployment.quorum=0.1")
    nodes = at_once(fake_nodes())
    nodes.nodes[12].changed = always_silent
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, *range(13))))
    lines = history(tmp_path)
    asked = [line["round_index"] for line in lines if line["nodes_asked"] == 3]
    assert asked == [1, 2, 4, 7, 12]  # it rests for 1, 2 and 4 rounds
    assert asked == [line["round_index"] for line in lines if line["seconds"] >= 20]
    assert "node 12 was silent 2 times in a row, it rests until round 3" in caplog.text


def test_a_node_that_answers_again_is_asked_in_every_round(tmp_path: Path) -> None:
    config = live_config("deployment.nodes=2", "federation.rounds=8", "federation.cohort=20", "deployment.quorum=0.1")
    nodes = at_once(fake_nodes())
    nodes.nodes[12].changed = silent_in(1, 2, 5)
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, 1, 2, 3, 5)))


def test_nobody_rests_where_too_few_would_be_left(tmp_path: Path) -> None:
    config = live_config("deployment.nodes=3", "federation.cohort=20", "deployment.quorum=0.1")
    nodes = at_once(fake_nodes())
    nodes.nodes[12].changed = silent_in(1, 2, 3)
    assert_same(run(nodes, tmp_path, config), plain(config, missing_in(12, 1, 2, 3)))
    assert [line["nodes_asked"] for line in history(tmp_path)] == [3] * 5


def test_who_rests_is_not_evaluated(tmp_path: Path) -> None:
    config = live_config("deployment.nodes=2", "federation.rounds=2", "federation.cohort=20", "deployment.quorum=0.1")
    nodes = at_once(fake_nodes())
    nodes.nodes[12].changed = always_silent
    run(nodes, tmp_path, config)
    assert nodes.asked_of("evaluate") == {31: 1, 23: 1}


# -------------------------------------------------------------------------------- the pool


def test_the_pool_goes_once_to_each_node_and_version(tmp_path: Path) -> None:
    """Silence of two nodes refuses the first try; the second one is of the same version, which 31 keeps by now."""
    nodes, config = fake_nodes(), live_config("federation.rounds=1", "deployment.quorum=0.9")
    for node in (12, 23):
        nodes.nodes[node].hears = lambda letter: letter.kind != "train" or letter.instructions.attempt > 1
    run(nodes, tmp_path, config)
    assert [letter.pool is None for letter in nodes.letters("train", 31)] == [False, True]
    assert [letter.pool is None for letter in nodes.letters("train", 12)] == [False, False]
    evaluated = nodes.letters("evaluate")
    assert all(letter.pool is not None for letter in evaluated)  # the round made another version


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
