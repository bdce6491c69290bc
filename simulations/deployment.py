"""A federation of real processes on this machine: a SuperLink, SuperNodes and agents, for benchmarks, trials and tests.

Each process has a folder of its own, with its log and its FLWR_HOME: a daemon's working folder comes before the app
on Python's path, so it must hold no packages.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from federation import keys
from federation.errors import RunError

BIN = Path(sys.executable).parent
HOUSE = Path(__file__).parent.parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "COLUMNS": "200",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS, STOP_SECONDS, CLI_SECONDS = 90.0, 10.0, 120.0
T = TypeVar("T")


@dataclass
class Process:
    """A running child in a session of its own."""

    name: str
    child: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def kill(self) -> None:
        """SIGKILL to it and to all that it started, some of it in sessions of its own."""
        for pid in [self.child.pid, *descendants(self.child.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is left."""
        started = descendants(self.child.pid)
        self.child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(STOP_SECONDS)
        self.kill()
        for pid in started:  # whom their parent has left behind
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Deployment:
    """A SuperLink and what joins it. Use it as a context: all processes end with it.

    root: a new folder for logs and states. keys: made by `fedquilt keys`; without, all is insecure and on loopback.
    """

    root: Path
    keys: Path | None = None
    simulation: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    port: int = 0

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        try:
            self.start_superlink()
        except BaseException:
            self.__exit__()
            raise
        self._write_connection()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):  # nodes before the SuperLink
            process.stop()

    def start_superlink(self) -> None:
        """Starts it, or starts it again after it was killed: what it knew is in its database."""
        extra = ["--simulation"] if self.simulation else ["--database", str(self.root / "superlink.db")]
        if self.keys is None:
            extra.append("--insecure")
        else:
            certificate, key = keys.certificate(self.keys, "server"), keys.certificate_key(self.keys, "server")
            extra += ["--ssl-ca-certfile", str(self.keys / keys.CA), "--ssl-certfile", str(certificate)]
            extra += ["--ssl-keyfile", str(key), "--enable-supernode-auth"]
        self._start("superlink", ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), *extra])
        self._until_accepting("superlink", self.port)

    def start_node(self, name: str, config: Mapping[str, object], key: Path | None = None) -> None:
        """Starts a SuperNode with this node-config, and does not wait for it to be online."""
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        joined = ["--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1", "--port", str(free_port())]
        secure = ["--insecure"]
        if self.keys is not None and key is not None:
            secure = ["--root-certificates", str(self.keys / keys.CA), "--auth-supernode-private-key", str(key)]
        self._start(name, ["flower-supernode", *joined, *secure, *(["--node-config", words] if words else [])])

    def start_agent(self, name: str, arguments: Sequence[str]) -> None:
        """Starts `fedquilt agent`, and does not wait for it to be ready."""
        self._start(name, ["fedquilt", "agent", *arguments])

    def wait_online(self, nodes: int, seconds: float = START_SECONDS) -> None:
        """Waits until so many SuperNodes are online."""

        self.until(lambda: self.online() >= nodes, f"{nodes} SuperNodes to be online", seconds)

    def online(self) -> int:
        """How many SuperNodes are online."""
        return sum(node["status"] == "online" for node in self.flwr("supernode", "list")["nodes"])

    def submit(self, app: Path = HOUSE, **run_config: object) -> str:
        """Submits the app at `app`, with `state-x` for a keyword `state_x`; the run's id."""
        words = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in run_config.items())
        return str(
            self.flwr("run", str(app.absolute()), "trial", *(["--run-config", words] if words else []))["run-id"]
        )

    def wait_finished(self, run_id: str, seconds: float) -> None:
        """Waits for a run's end. Raises RunError with its log when it failed."""

        def finished() -> str | None:
            status = str(self.flwr("list", "--run-id", run_id)["runs"][0]["status"])
            return status if status.startswith("finished") else None

        status = self.until(finished, f"run {run_id} to finish", seconds)
        if status != "finished:completed":
            raise RunError(f"run {run_id} ended as {status}; its log:\n{self.run_log(run_id)}")

    def run_log(self, run_id: str) -> str:
        """What the ServerApp of a run has said."""
        return self._cli("log", run_id, "--show", "trial")

    def said(self, name: str) -> str:
        """What a process has written to its log since it was first started."""
        return self.processes[name].log.read_text()

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """A `flwr` command's answer."""
        where = [] if arguments[0] == "run" else ["trial"]
        found: dict[str, Any] = json.loads(self._cli(*arguments, *where, "--format", "json"))
        if not found["success"]:
            raise RunError(f"`flwr {shlex.join(arguments)}` failed: {found.get('error-message')}")
        return found

    def until(self, ready: Callable[[], T | None], what: str, seconds: float) -> T:
        """Looks twice a second until something is there. Raises RunError when it takes too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := ready():
                return found
            time.sleep(0.5)
        raise RunError(f"waited {seconds:.0f} s for {what}; the logs are in {self.root}")

    def _start(self, name: str, command: Sequence[str]) -> None:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        log = self.root / f"{name}.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=folder,
                env=self._environment(folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = Process(name, child, log)

    def _until_accepting(self, name: str, port: int) -> None:
        def accepting() -> bool:
            if not self.processes[name].alive:
                raise RunError(f"{name} ended at once; its log:\n{self.said(name)}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                return True
            return False

        self.until(accepting, f"{name} to accept connections", START_SECONDS)

    def _environment(self, folder: Path) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **QUIET, **self.environment, "PATH": path, "FLWR_HOME": str(folder)}

    def _write_connection(self) -> None:
        folder = self.root / "cli"
        folder.mkdir(exist_ok=True)
        secure = "insecure = true" if self.keys is None else f'root-certificates = "{self.keys / keys.CA}"'
        text = f'[superlink]\ndefault = "trial"\n[superlink.trial]\naddress = "127.0.0.1:{self.port}"\n{secure}\n'
        (folder / "config.toml").write_text(text)

    def _cli(self, *arguments: str) -> str:
        folder = self.root / "cli"
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(
            command, cwd=folder, env=self._environment(folder), capture_output=True, text=True, timeout=CLI_SECONDS
        )
        if done.returncode:
            raise RunError(f"`{shlex.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; as /proc tells."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.parent.name))
    found, open_ = [], [pid]
    while open_:
        children = parents.get(open_.pop(), [])
        found += children
        open_ += children
    return found


def free_port() -> int:
    """A TCP port of loopback that no one listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
