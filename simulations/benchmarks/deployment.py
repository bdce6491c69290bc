"""A deployed federation, measured: a real SuperLink, SuperNodes and agents on loopback, and the server's intake alone.

Round seconds: the median round after the first, by the number of SuperNodes, over the demo's model and users; with an
agent on each node; without, where each message loads the model anew; and of an app that does nothing but exchange
messages. Our share is a round with agents, less one that does nothing.

Bytes: what one user sends in a round, beside a dense LoRA of rank k; what a node is sent of a new pool.

Memory, and replies taken in per second, are the server's alone (`simulations/benchmarks/intake.py`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from client.agent.security import SOCKET_NAME
from federation.config import RunConfig, load_config
from federation.experiments import experiment_path
from federation.pool.spec import SECTION_PREFIX
from server.checkpoint import load_latest
from server.history import read_history
from server.live.folder import CHECKPOINTS_NAME, ROUNDS_NAME
from simulations.benchmarks.intake import REPLIES, Seconds, memory, speeds
from simulations.deployment import START_SECONDS, Deployment

EMPTY_APP = Path(__file__).parent / "empty_app"
USERS_PER_NODE = 4
RUN_SECONDS = 1200.0


@dataclass(frozen=True)
class Measured:
    """Seconds of each counted round by side and number of nodes; bytes by name; MiB by number of replies; seconds of
    the intake."""

    rounds: Mapping[str, Mapping[int, tuple[float, ...]]]
    sizes: Mapping[str, int]
    memory: Mapping[int, float | None]
    intake: Seconds

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: medians, one for each number of nodes."""
        taken = {side: [median(seconds) for seconds in of.values()] for side, of in self.rounds.items()}
        share = [agent - empty for agent, empty in zip(taken["agent"], taken["empty_app"], strict=True)]
        return {
            "nodes": list(self.rounds["agent"]),
            **{f"round_seconds_{side}": [round(seconds, 2) for seconds in of] for side, of in taken.items()},
            "our_share_seconds": [round(seconds, 2) for seconds in share],
            **self.sizes,
            **{f"server_mib_{replies}": mib for replies, mib in self.memory.items()},
            **{
                f"{side}_per_second": {kind: round(REPLIES / median(seconds)) for kind, seconds in of.items()}
                for side, of in self.intake.items()
            },
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            "seed": demo(2, 1).seed,
            "config": demo(2, 1).model_dump(mode="json", exclude={"evaluate"}),
            "users_per_node": USERS_PER_NODE,
            "rounds": {
                side: {str(n): list(of) for n, of in by_nodes.items()} for side, by_nodes in self.rounds.items()
            },
            "intake_seconds": {
                side: {kind: list(seconds) for kind, seconds in of.items()} for side, of in self.intake.items()
            },
        }


def measure(nodes: Sequence[int], rounds: int, repetitions: int) -> Measured:
    """All of it. rounds: counted ones of each federation. repetitions: of the measurement of the intake."""
    sizes: dict[str, int] = {}
    by_side: dict[str, dict[int, tuple[float, ...]]] = {"empty_app": {}, "agent": {}, "embedded": {}}
    for count in nodes:
        by_side["empty_app"][count] = empty_rounds(count, rounds)
        by_side["agent"][count], sizes = federation_rounds(count, rounds, agents=True)
        by_side["embedded"][count], _ = federation_rounds(count, rounds, agents=False)
    return Measured(by_side, sizes, {replies: memory(replies) for replies in (0, 10, 500)}, speeds(repetitions))


def demo(nodes: int, rounds: int) -> RunConfig:
    """The demo's model and users, so many of them on each node in each round; the gate chooses in each round."""
    return load_config(experiment_path("code"), overrides(nodes, rounds))


def overrides(nodes: int, rounds: int) -> list[str]:
    """How the demo's experiment is changed."""
    users = nodes * USERS_PER_NODE
    federation = [f"federation.cohort={users}", f"federation.rounds={rounds}", "federation.shards=1", "gate.warmup=0"]
    return [
        *federation,
        f"deployment.nodes={nodes}",
        "codec.rows=int8",
        f"evaluate.users={users}",
        "evaluate.methods=[]",
    ]


def empty_rounds(nodes: int, rounds: int) -> tuple[float, ...]:
    """Seconds of rounds of the app that does nothing, after the first."""
    with tempfile.TemporaryDirectory() as folder, Deployment(Path(folder)) as deployment:
        for node in range(nodes):
            deployment.start_node(f"node-{node}", {"partition-id": node})
        deployment.wait_online(nodes)
        out = Path(folder) / "seconds.json"
        run = deployment.submit(EMPTY_APP, rounds=1 + rounds, nodes=nodes, out=str(out))
        deployment.wait_finished(run, RUN_SECONDS)
        return tuple(json.loads(out.read_text())[1:])


def federation_rounds(nodes: int, rounds: int, agents: bool) -> tuple[tuple[float, ...], dict[str, int]]:
    """Seconds of the rounds of the demo's federation after the first, and what travelled in one of them."""
    with tempfile.TemporaryDirectory() as name, Deployment(Path(name)) as deployment:
        start = _start_with_agent if agents else _start_embedded
        for node in range(nodes):
            start(deployment, node, nodes)
        deployment.wait_online(nodes)
        state = Path(name) / "server"
        settings = " ".join(overrides(nodes, 1 + rounds))
        run = deployment.submit(experiment="code", set=settings, state=str(state))
        deployment.wait_finished(run, RUN_SECONDS)
        lines = read_history(state / ROUNDS_NAME)[1:]
        values = load_latest(state / CHECKPOINTS_NAME).tensors["values"]
    assert all(line["admitted"] == nodes * USERS_PER_NODE for line in lines)
    return tuple(line["seconds"] for line in lines), _sizes(lines[-1], values, demo(nodes, rounds).gate.budget)


def _start_with_agent(deployment: Deployment, node: int, nodes: int) -> None:
    state = deployment.root / f"state-{node}"
    words = ["--experiment", "code", "--partition", f"{node}/{nodes}", "--state", str(state)]
    deployment.start_agent(f"agent-{node}", words)
    socket = state / SOCKET_NAME
    deployment.until(socket.exists, f"agent {node} to listen", START_SECONDS)
    deployment.start_node(f"node-{node}", {"agent": f"unix:{socket}"})


def _start_embedded(deployment: Deployment, node: int, nodes: int) -> None:
    state = str(deployment.root / f"state-{node}")
    deployment.start_node(f"node-{node}", {"partition-id": node, "num-partitions": nodes, "state": state})


def _sizes(line: Mapping[str, Any], values: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Bytes up for one user, those of a dense LoRA of the same rank in fp32, and down for one node and version."""
    width = sum(rows.shape[1] for name, rows in values.items() if name.startswith(SECTION_PREFIX))
    return {
        "update_bytes": round(line["bytes_up"] / line["users"]),
        "dense_lora_bytes": 4 * budget * width,
        "download_bytes": round(line["bytes_down"] / line["nodes"]),
    }
