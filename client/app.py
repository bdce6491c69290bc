"""The Flower ClientApp: translates messages to a node's work, and does it in this process or has an agent do it.

Flower starts a new process for every message. With an agent (node-config `agent`) that process only passes bytes on;
without one it loads the model each time, which is enough to begin with.

Node-config, all optional:

    agent           address of the agent: unix:/path/agent.sock, or host:port; the keys below are for nodes without
    data, base, window
                    the users' texts, the model, and tokens per example (see `federation/data/texts.py`)
    partition-id, num-partitions
                    which part of the users of one of our experiments this node holds, when it has no data
    state           folder for the users' states; by default one of its own in the user's state folder
    block, device, precision
                    how it computes, as the settings of `[compute]`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federation.errors import ConfigError, ExchangeError, FedquiltError
from federation.exchange import Answer, Letter, Refusal
from federation.records import answer_record, letter_of

if TYPE_CHECKING:
    from flwr.app import UserConfig

    from client.node import NodeConfig

app = ClientApp()

MOST_SECONDS = 86_400.0
"""An agent's calls last at most a day."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round's work."""
    return _reply(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures of the node's users."""
    return _reply(message, context)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """How many users the node has, and which pools."""
    return _reply(message, context)


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """Which release the node serves from now on."""
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    return Message(answer_record(_answer(message, context)), reply_to=message)


def _answer(message: Message, context: Context) -> Answer:
    try:
        letter = letter_of(message.content)
    except ExchangeError as error:
        return Refusal("failed", str(error))
    address = context.node_config.get("agent")
    if address:
        return _by_agent(str(address), letter, min(message.metadata.ttl, MOST_SECONDS))
    return _in_this_process(letter, context)


def _by_agent(address: str, letter: Letter, seconds: float) -> Answer:
    from client.agent.client import AgentClient

    try:
        agent = AgentClient(address)
    except ConfigError as error:
        return Refusal("no agent", f"node-config agent: {error}")
    with agent:
        return agent.answer(letter, seconds)


def _in_this_process(letter: Letter, context: Context) -> Answer:
    import torch

    from client.node import Node

    torch.set_num_threads(1)
    try:
        node = Node(node_config(context))
    except FedquiltError as error:
        return Refusal("failed", f"this node cannot start: {error}")
    try:
        return node.answer(letter)
    finally:
        node.close()


def node_config(context: Context) -> NodeConfig:
    """What a node without an agent works with. What it reads is its owner's choice: nothing that the run says names it.

    Raises ConfigError.
    """
    from client.node import NodeConfig
    from federation.data.cache import state_dir
    from federation.settings import parse

    said = context.node_config
    whose = _own_users(said) if "data" in said or "base" in said else _experiments_users(context)
    work: dict[str, Any] = {key: said[key] for key in ("block", "device", "precision") if key in said}
    state = said.get("state") or state_dir() / "nodes" / str(context.node_id)
    return parse(NodeConfig, {"state": state, **whose, **work})


def _own_users(said: UserConfig) -> dict[str, Any]:
    """All users of the node's own texts."""
    missing = [key for key in ("data", "base") if key not in said]
    if missing:
        raise ConfigError(f"users' own texts need data and base in the node-config, {missing[0]} is missing; give both")
    options = {key: said[key] for key in ("data", "base", "window") if key in said}
    return {"population": {"name": "texts", "options": options}}


def _experiments_users(context: Context) -> dict[str, Any]:
    """A part of the users of the run's experiment, if it is one of ours."""
    from federation.config import load_config
    from federation.experiments import our_experiments

    said, name = context.node_config, str(context.run_config["experiment"])
    ours = our_experiments()
    if name not in ours:
        raise ConfigError(
            f"a node without an agent or data has the users of an experiment of ours ({', '.join(sorted(ours))}), this "
            "run has one of its own; give data and base in the node-config, or start an agent"
        )
    config = load_config(ours[name])
    return {
        "population": config.population.model_dump(),
        "partition": said.get("partition-id", 0),
        "partitions": said.get("num-partitions", 1),
        "block": config.compute.block,
    }
