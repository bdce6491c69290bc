"""Twenty rounds over TLS while a SuperNode and the server are killed, beside the same rounds undisturbed.

Two nodes with agents hold the demo's users. In the disturbed run one SuperNode is killed in mid-round and started again
until the SuperLink takes it back; later the SuperLink is killed in mid-round, the ServerApp with it: another goes on
from the checkpoint. A third run is undisturbed and has another seed: what it differs by is noise. Then all pools serve
the same new users: what matters is whether they are worse off than noise makes them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.agent.security import SOCKET_NAME
from client.evaluate import user_losses
from client.node import Node, NodeConfig
from federation import keys
from federation.config import RunConfig, load_config
from federation.data.population import as_array
from federation.experiments import experiment_path
from federation.update import Values
from server.checkpoint import load_latest
from server.history import read_history
from server.live.folder import CHECKPOINTS_NAME, EVALUATIONS_NAME, ROUNDS_NAME
from simulations.deployment import START_SECONDS, Deployment
from simulations.statistics import Floats, clustered_error

NODES, RUN_SECONDS = 2, 1800.0
LOSSES = ("mask_loss", "tuned_loss")
Disturb = Callable[[Deployment, Path, Callable[[], str]], str]
"""What is done to a deployment, whose server keeps its state in a folder and whose run the last argument submits. Gives
the run that comes to the end."""
KILL_NODE, RETURN_NODE, KILL_SERVER = 5, 8, 13
"""The rounds after which it happens."""


@dataclass(frozen=True)
class Endurance:
    """What both runs left: their rounds and evaluations, and each new user's losses under either pool.

    loss_u: by run and loss, nats per token.
    """

    rounds: Mapping[str, Sequence[Mapping[str, Any]]]
    evaluations: Mapping[str, Mapping[str, Any]]
    loss_u: Mapping[str, Mapping[str, Floats]]
    groups_u: np.ndarray[Any, Any]

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints. difference: of losses, less those of the undisturbed run, paired by user: mean and
        standard error."""
        others = [run for run in self.loss_u if run != "undisturbed"]
        return {
            "rounds": {run: len(lines) for run, lines in self.rounds.items()},
            "users_admitted": {run: sum(line["admitted"] for line in lines) for run, lines in self.rounds.items()},
            "gain": {run: _gains(losses) for run, losses in self.loss_u.items()},
            "difference": {run: {name: self._difference(run, name) for name in LOSSES} for run in others},
        }

    def _difference(self, run: str, name: str) -> tuple[float, float]:
        differences = self.loss_u[run][name] - self.loss_u["undisturbed"][name]
        return round(float(differences.mean()), 5), round(clustered_error(differences, self.groups_u), 5)

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        config = demo(len(self.rounds["undisturbed"]))
        return {
            "seed": config.seed,
            "config": config.model_dump(mode="json", exclude={"evaluate"}),
            "new_users": len(self.groups_u),
            "killed_after": {"node": KILL_NODE, "node_returned": RETURN_NODE, "server": KILL_SERVER},
            "history": self.rounds,
            "evaluations": self.evaluations,
        }


def measure(rounds: int) -> Endurance:
    """The runs, one after the other."""
    lines, evaluations, pools = {}, {}, {}
    for name, disturb, seed in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            state = _federation(Path(folder), _overrides(rounds, seed), disturb)
            lines[name] = read_history(state / ROUNDS_NAME)
            evaluations[name] = read_history(state / EVALUATIONS_NAME)[-1]
            pools[name] = load_latest(state / CHECKPOINTS_NAME).tensors["values"]
    loss_u, groups_u = _served(demo(rounds), pools)
    return Endurance(lines, evaluations, loss_u, groups_u)


def demo(rounds: int) -> RunConfig:
    """The demo's model and users, every user visited often."""
    return load_config(experiment_path("code"), _overrides(rounds, 0))


def _overrides(rounds: int, seed: int) -> list[str]:
    learning = [f"seed={seed}", "gate.warmup=5", "codec.rows=int8"]
    federation = ["federation.cohort=16", f"federation.rounds={rounds}", "federation.shards=1"]
    deployment = ["deployment.nodes=1", "deployment.quorum=0.3", "deployment.round_seconds=30"]
    return [*learning, *federation, *deployment, "evaluate.users=64", "evaluate.methods=[]"]


def _federation(folder: Path, overrides: Sequence[str], disturb: Disturb) -> Path:
    """Runs the federation to its end; the folder of its state."""
    state = folder / "server"
    keys.make_keys(folder / "keys", NODES)
    with Deployment(folder / "processes", keys=folder / "keys") as deployment:
        for node in range(NODES):
            deployment.flwr("supernode", "register", str(keys.public_key(folder / "keys", node)))
            words = ["--experiment", "code", "--partition", f"{node}/{NODES}", "--state", str(folder / f"node-{node}")]
            deployment.start_agent(f"agent-{node}", words)
            _start_node(deployment, node)
        deployment.wait_online(NODES)

        def submit() -> str:
            return deployment.submit(experiment="code", set=" ".join(overrides), state=str(state))

        deployment.wait_finished(disturb(deployment, state, submit), RUN_SECONDS)
    return state


def _leave_alone(deployment: Deployment, state: Path, submit: Callable[[], str]) -> str:
    return submit()


def _kill(deployment: Deployment, state: Path, submit: Callable[[], str]) -> str:
    """Kills a node and the server on the way; the run that goes on."""
    submit()
    _until_round(deployment, state, KILL_NODE)
    deployment.processes["node-1"].kill()
    _until_round(deployment, state, RETURN_NODE)
    deployment.until(lambda: _returned(deployment), "the killed SuperNode to return", RUN_SECONDS)
    _until_round(deployment, state, KILL_SERVER)
    deployment.processes["superlink"].kill()
    deployment.start_superlink()
    deployment.wait_online(NODES, RUN_SECONDS)
    return submit()


def _until_round(deployment: Deployment, state: Path, round_index: int) -> None:
    deployment.until(
        lambda: len(read_history(state / ROUNDS_NAME)) >= round_index, f"round {round_index} to finish", RUN_SECONDS
    )


def _returned(deployment: Deployment) -> bool:
    """Starts the node again if it is not there: the SuperLink refuses it for about a minute after it was killed."""
    if not deployment.processes["node-1"].alive:
        _start_node(deployment, 1)
        time.sleep(5.0)
    return deployment.processes["node-1"].alive and deployment.online() >= NODES


def _start_node(deployment: Deployment, node: int) -> None:
    folder = deployment.root.parent
    socket = folder / f"node-{node}" / SOCKET_NAME
    deployment.until(socket.exists, f"agent {node} to listen", START_SECONDS)
    key = keys.private_key(folder / "keys", node)
    deployment.start_node(f"node-{node}", {"agent": f"unix:{socket}"}, key)


def _served(config: RunConfig, pools: Mapping[str, Values]) -> tuple[dict[str, dict[str, Floats]], Any]:
    """Each new user's losses under each pool, and the users' groups."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            node = Node(NodeConfig(population=config.population, state=Path(folder), block=8))
            ids = as_array(node.population.users("new"))[: config.evaluate.users]
            task = node.task(config.task)
            blocks = np.array_split(ids, max(1, len(ids) // 8))
            found = {}
            for name, values in pools.items():
                parts = [user_losses(task, values, node, block) for block in blocks]
                found[name] = {metric: torch.cat([p[metric] for p in parts]).double().numpy() for metric in parts[0]}
            return found, node.population.groups(ids)
    finally:
        torch.set_num_threads(threads)


def _gains(losses: Mapping[str, Floats]) -> dict[str, float]:
    """What masks and tuning save against the frozen model, nats per token."""
    return {name: round(float((losses["base_loss"] - losses[name]).mean()), 5) for name in LOSSES}


RUNS: Sequence[tuple[str, Disturb, int]] = (
    ("undisturbed", _leave_alone, 0),
    ("disturbed", _kill, 0),
    ("another seed", _leave_alone, 1),
)
