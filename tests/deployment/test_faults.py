"""Real processes die, and the federation goes on: what was finished stays, nothing is applied twice."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from client.agent.security import SOCKET_NAME
from federation.errors import RunError
from server.history import read_history
from simulations.deployment import START_SECONDS, Deployment
from tests.deployment.conftest import CHANGES, differing, final_values

SECONDS = 240.0

pytestmark = pytest.mark.slow


def start_agent(deployment: Deployment, node: int) -> None:
    state = deployment.root / f"state-{node}"
    words = ["--experiment", "deployed", "--partition", f"{node}/2", "--state", str(state)]
    deployment.start_agent(f"agent-{node}", words)
    deployment.until(lambda: "ready at" in deployment.said(f"agent-{node}"), "an agent to be ready", START_SECONDS)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("faults")) as found:
        for node in range(2):
            start_agent(found, node)
            found.start_node(f"node-{node}", {"agent": f"unix:{found.root / f'state-{node}' / SOCKET_NAME}"})
        found.wait_online(2)
        yield found


def submitted(deployment: Deployment, server: Path, *changes: str) -> str:
    return deployment.submit(set=shlex.join([*CHANGES, *changes]), state=str(server))


def rounds(server: Path) -> list[dict[str, Any]]:
    return read_history(server / "rounds.jsonl")


def wait_for_round(deployment: Deployment, server: Path, number: int) -> None:
    deployment.until(lambda: len(rounds(server)) >= number, f"round {number}", SECONDS)


def test_the_server_is_killed_and_goes_on(
    deployment: Deployment, tmp_path: Path, simulated: Mapping[str, Tensor]
) -> None:
    server = tmp_path / "server"
    submitted(deployment, server)
    wait_for_round(deployment, server, 1)
    deployment.processes["superlink"].kill()  # and with it the ServerApp, at work on the next round
    deployment.start_superlink()
    deployment.wait_online(2)
    deployment.wait_finished(submitted(deployment, server), SECONDS)
    assert [line["round_index"] for line in rounds(server)] == [1, 2, 3]
    assert not differing(final_values(server), simulated)


def test_an_agent_is_killed_and_recovers(deployment: Deployment, tmp_path: Path) -> None:
    server = tmp_path / "server"
    run = submitted(deployment, server, "federation.rounds=6", "deployment.nodes=1", "deployment.quorum=0.4")
    wait_for_round(deployment, server, 1)
    deployment.processes["agent-1"].kill()
    wait_for_round(deployment, server, 3)
    start_agent(deployment, 1)
    deployment.wait_finished(run, SECONDS)
    found = rounds(server)
    without = [line for line in found if line["nodes_asked"] == 2 and line["nodes"] == 1]
    assert [line["round_index"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[2] in without  # the one after which it returned
    assert all(line["rejected"] == {"no agent": 32} for line in without)
    assert found[5]["admitted"] == 64


def test_too_few_nodes_are_refused_with_the_counts(deployment: Deployment, tmp_path: Path) -> None:
    server = tmp_path / "server"
    run = submitted(deployment, server, "deployment.nodes=3", "deployment.join_seconds=3")
    with pytest.raises(RunError, match="finished:failed"):
        deployment.wait_finished(run, SECONDS)
    assert "a round needs 3 nodes (deployment.nodes), 2 are online" in deployment.run_log(run)
    assert [path.name for path in (server / "checkpoints").iterdir()] == ["round-000000"]


def test_a_supernode_is_killed_in_mid_round(deployment: Deployment, tmp_path: Path) -> None:
    """The last of these tests: its SuperLink takes the node for alive for another minute, and refuses its return."""
    server = tmp_path / "server"
    few = ("federation.rounds=3", "deployment.quorum=0.4", "deployment.round_seconds=12")
    run = submitted(deployment, server, *few)
    wait_for_round(deployment, server, 1)
    deployment.processes["node-1"].kill()
    deployment.wait_finished(run, SECONDS)
    found = rounds(server)
    assert [line["admitted"] for line in found] == [64, 32, 32]
    assert {"late": 32} in [line["rejected"] for line in found[1:]]
