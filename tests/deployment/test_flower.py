"""Real Flower processes do what a simulation does, to the bit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from client.agent.security import SOCKET_NAME
from federation import keys
from federation.config import load_config
from federation.experiments import experiment_path
from server.history import read_history
from simulations.deployment import START_SECONDS, Deployment
from tests.deployment.conftest import CHANGES, configuration, differing, final_values
from tests.simulations.tiny import simulate

SECONDS = 240.0


def test_many_updates_are_clipped(tmp_path: Path, simulated: Mapping[str, Tensor]) -> None:
    """Otherwise parity would say nothing of clipping."""
    simulate(load_config(experiment_path("deployed"), [*CHANGES, "limits.pool_norm=1e6"]), tmp_path)
    assert differing(final_values(tmp_path), simulated)


def test_in_flowers_simulation_runtime(tmp_path: Path, simulated: Mapping[str, Tensor]) -> None:
    own = {"FEDQUILT_STATE": str(tmp_path / "nodes")}
    with Deployment(tmp_path / "processes", simulation=True, environment=own) as deployment:
        run = deployment.submit(set=shlex.join(CHANGES), state=str(tmp_path / "server"))
        deployment.wait_finished(run, SECONDS)
    assert not differing(final_values(tmp_path / "server"), simulated)
    (evaluation,) = read_history(tmp_path / "server" / "evaluations.jsonl")
    assert evaluation["users"] == configuration().evaluate.users


def test_over_tls_with_agents_and_node_keys(tmp_path: Path, simulated: Mapping[str, Tensor]) -> None:
    keys.make_keys(tmp_path / "keys", 2)
    with Deployment(tmp_path / "processes", keys=tmp_path / "keys") as deployment:
        for node in range(2):
            deployment.flwr("supernode", "register", str(keys.public_key(tmp_path / "keys", node)))
            state = tmp_path / f"node-{node}"
            words = ["--experiment", "deployed", "--partition", f"{node}/2", "--state", str(state)]
            deployment.start_agent(f"agent-{node}", words)
            deployment.until((state / SOCKET_NAME).exists, "an agent to listen", START_SECONDS)
            key = keys.private_key(tmp_path / "keys", node)
            deployment.start_node(f"node-{node}", {"agent": f"unix:{state / SOCKET_NAME}"}, key)
        deployment.wait_online(2)
        run = deployment.submit(set=shlex.join(CHANGES), state=str(tmp_path / "server"))
        deployment.wait_finished(run, SECONDS)
        assert not differing(final_values(tmp_path / "server"), simulated)
