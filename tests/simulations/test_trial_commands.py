"""What `fedquilt keys` prints, typed into a shell: real processes, TLS and node keys."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from federation.keys import make_keys
from simulations.trial_commands import FIRST_NODE_PORT, SERVER_PORT, trial_commands

NODES = 2
SECONDS = 90.0


class Shell:
    """Runs commands with one FLWR_HOME; those in the background end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.background = folder, list[subprocess.Popen[bytes]]()
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def run(self, command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start(self, command: str) -> subprocess.Popen[bytes]:
        home = self.folder / f"process-{len(self.background)}"
        home.mkdir()
        environment = {**self.environment, "FLWR_HOME": str(home)}
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                command, shell=True, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.background.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self.background):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < end
        time.sleep(0.5)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [[], ["127.0.0.1"]], ids=["loopback", "all interfaces"])
def test_what_is_printed_brings_all_nodes_online(tmp_path: Path, hosts: list[str]) -> None:
    make_keys(tmp_path / "my keys", NODES + 1, hosts)
    text, server_port = trial_commands(tmp_path / "my keys", NODES + 1, hosts), free_port()
    text = text.replace(str(SERVER_PORT), str(server_port))
    for node in range(NODES + 1):
        text = text.replace(str(FIRST_NODE_PORT + node), str(free_port()))
    commands = re.findall(r"^(?:mkdir[^']+'END'\n[^']+\nEND|flwr|flower)(?:.*\\\n)*.*$", text, re.MULTILINE)
    superlink, connect, *registrations, stranger = commands[: NODES + 3]
    nodes, (listing, _) = commands[NODES + 3 : -2], commands[-2:]
    shell = Shell(tmp_path)

    def online() -> int:
        return sum(node["status"] == "online" for node in json.loads(shell.run(f"{listing} --format json"))["nodes"])

    try:
        shell.start(superlink)
        until(lambda: listens(server_port))
        shell.run(connect)
        for registration in registrations:
            shell.run(registration)
        started = [shell.start(node) for node in nodes]
        until(lambda: online() == NODES)
        assert started[-1].wait(SECONDS) != 0, f"not registered with {stranger!r}"
        assert online() == NODES
    finally:
        shell.close()
