"""The Flower ClientApp: translates messages to a node's work, and does it in this process or has an agent do it.

Flower starts a new process for every message. With an agent (node-config `agent`) that process only passes bytes on;
without one it loads the model each time, which is enough to begin with.

Node-config, all optional:

    agent           address of the agent: unix:/path/agent.sock, or host:port
    data, base      the users' texts and the model (see `federation/data/texts.py`); else the experiment's population
    partition-id, num-partitions
                    which part of the population's users this node holds
    state           folder for the users' states; by default one of its own in the user's state folder
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from federation.errors import ConfigError, ExchangeError, FedquiltError
from federation.exchange import Answer, Letter, Refusal
from federation.records import answer_record, letter_of

if TYPE_CHECKING:
    from client.node import NodeConfig

app = ClientApp()

SECONDS = 3600.0
"""Longest that an agent may take for one letter; the server gives up on a node earlier."""


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
    return _by_agent(str(address), letter) if address else _in_this_process(letter, context)


def _by_agent(address: str, letter: Letter) -> Answer:
    from client.agent.client import AgentClient

    try:
        agent = AgentClient(address)
    except ConfigError as error:
        return Refusal("no agent", f"node-config agent: {error}")
    with agent:
        return agent.answer(letter, SECONDS)


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
    """What a node without an agent works with. Raises ConfigError."""
    import shlex

    from client.node import NodeConfig
    from federation.config import load_config, parse
    from federation.data.cache import state_dir
    from federation.experiments import experiment_path

    said, asked = context.node_config, context.run_config
    config = load_config(experiment_path(str(asked["experiment"])), shlex.split(str(asked["set"])))
    population = config.population.model_dump()
    if "data" in said:
        own = {key: said[key] for key in ("data", "base") if key in said}
        options = population["options"] if population["name"] == "texts" else {}
        population = {"name": "texts", "options": {**options, **own}}
    settings = {
        "population": population,
        "state": said.get("state") or state_dir() / "nodes" / str(context.node_id),
        "partition": said.get("partition-id", 0),
        "partitions": said.get("num-partitions", 1),
        "block": config.compute.block,
        "device": config.compute.device,
        "precision": config.compute.precision,
    }
    return parse(NodeConfig, settings)
