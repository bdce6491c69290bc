"""An update rule and a start that real agents teach through Flower have the bits of a simulation."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from client.agent.security import SOCKET_NAME
from federation.config import load_config
from federation.experiments import experiment_path
from server.history import read_history
from simulations.deployment import START_SECONDS, Deployment
from tests.deployment.conftest import CHANGES, differing, final_values
from tests.simulations.tiny import simulate

pytestmark = pytest.mark.slow

SECONDS = 240.0
META = (
    *CHANGES,
    "codec.rows=ternary",
    "meta.signal=maml",
    "meta.rule.name=rates",
    "meta.start.name=contextual",
    "limits.rates_norm=0.02",
    "limits.start_norm=0.002",
)


def test_agents_learn_the_bits_of_a_simulation(tmp_path: Path) -> None:
    simulate(load_config(experiment_path("deployed"), META), tmp_path / "simulation")
    with Deployment(tmp_path / "processes") as deployment:
        for node in range(2):
            state = tmp_path / f"node-{node}"
            words = ["--experiment", "deployed", "--partition", f"{node}/2", "--state", str(state)]
            deployment.start_agent(f"agent-{node}", words)
            deployment.until((state / SOCKET_NAME).exists, "an agent to listen", START_SECONDS)
            deployment.start_node(f"node-{node}", {"agent": f"unix:{state / SOCKET_NAME}"})
        deployment.wait_online(2)
        run = deployment.submit(set=shlex.join(META), state=str(tmp_path / "server"))
        deployment.wait_finished(run, SECONDS)
    found = final_values(tmp_path / "server")
    assert not differing(found, final_values(tmp_path / "simulation"))
    assert {"rates/units", "rates/shared", "start"} < found.keys()
    for line, report in zip(
        read_history(tmp_path / "server" / "rounds.jsonl"),
        read_history(tmp_path / "simulation" / "rounds.jsonl"),
        strict=True,
    ):
        assert line["metrics"] == report["metrics"]
