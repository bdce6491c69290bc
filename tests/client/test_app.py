"""Whose users a Flower node without an agent has: its owner says so, never the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app, node_config
from client.node import NodeConfig
from federation.config import load_config
from federation.errors import ConfigError
from federation.exchange import Letter, Refusal
from federation.experiments import experiment_path
from federation.records import MESSAGE_TYPES, answer_of, letter_record


def configured(said: dict[str, Any], experiment: str = "deployed", **asked: str) -> NodeConfig:
    return node_config(context_of(said, experiment, **asked))


def context_of(said: dict[str, Any], experiment: str = "deployed", **asked: str) -> Context:
    run_config = {"experiment": experiment, "set": "", "state": "", **asked}
    return Context(run_id=1, node_id=77, node_config=said, state=RecordDict(), run_config=run_config)


def test_a_part_of_an_experiments_users(tmp_path: Path) -> None:
    found = configured({"partition-id": 1, "num-partitions": 4, "state": str(tmp_path)})
    ours = load_config(experiment_path("deployed"))
    assert found.population == ours.population
    assert (found.partition, found.partitions, found.state, found.block) == (1, 4, tmp_path, ours.compute.block)


def test_texts_of_the_nodes_own(tmp_path: Path) -> None:
    """All of them: the parts are those of an experiment's users."""
    said = {"data": "notes", "base": "gpt", "window": 32, "partition-id": 1, "num-partitions": 2, "block": 3}
    found = configured(said, "/a/file/of/the/server.toml")
    assert found.population.name == "texts"
    assert found.population.options == {"data": "notes", "base": "gpt", "window": 32}
    assert (found.partition, found.partitions, found.block) == (0, 1, 3)


def test_a_state_folder_for_each_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDQUILT_STATE", str(tmp_path))
    assert configured({}).state == tmp_path / "nodes" / "77"


def test_what_a_node_reads_is_not_for_the_run_to_say(tmp_path: Path) -> None:
    wanted = 'population.name=texts population.options={data="/home/ann",base="/b"}'
    assert configured({}, set=wanted).population == load_config(experiment_path("deployed")).population
    secret = tmp_path / "secret.toml"
    secret.write_text('seed = "hunter2"')
    with pytest.raises(ConfigError, match="start an agent") as raised:
        configured({}, str(secret))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ({"data": "notes"}, "base is missing"),
        ({"base": "gpt"}, "data is missing"),
        ({"partition-id": 3, "num-partitions": 2}, "3 is none of 2"),
        ({"partition-id": "first"}, "partition"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_a_node_config_that_cannot_be_is_refused(said: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        configured(said)


def answered(said: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> object:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(letter_record(Letter("describe")), 77, MESSAGE_TYPES["describe"])
    message.metadata.__dict__["_message_id"] = "m1"
    return answer_of(app(message, context_of(said)).content)


def test_a_node_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = answered({"data": "notes"}, monkeypatch)
    assert isinstance(answer, Refusal)
    assert answer.message.startswith("this node cannot start: users' own texts need data and base")


def test_an_agent_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = answered({"agent": f"unix:{tmp_path}/agent.sock"}, monkeypatch)
    assert isinstance(answer, Refusal)
    assert answer.fault == "no agent"


def test_an_address_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = answered({"agent": "somewhere"}, monkeypatch)
    assert isinstance(answer, Refusal)
    assert (answer.fault, answer.message[:18]) == ("no agent", "node-config agent:")


def test_a_message_that_is_no_letter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    message = Message(RecordDict({"other": ConfigRecord()}), 77, "train")
    message.metadata.__dict__["_message_id"] = "m1"
    answer = answer_of(app(message, context_of({})).content)
    assert isinstance(answer, Refusal)
    assert "a message has the records" in answer.message
