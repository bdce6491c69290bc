"""Runs a guide's commands as a reader would: what stays gets a terminal of its own, all else is typed into one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from simulations.deployment import HOUSE, QUIET, free_port

_BLOCK = re.compile(r"(?:<!-- stays: (?P<until>[^\n]*) -->\n)?```sh\n(?P<commands>.*?)```", re.DOTALL)
SECONDS = 300.0


@dataclass(frozen=True)
class Block:
    """Commands. until: what is there once they are at work, "" for those that end."""

    commands: str
    until: str


def blocks_of(text: str) -> list[Block]:
    """The shell blocks of a document, in order."""
    return [Block(found["commands"], found["until"] or "") for found in _BLOCK.finditer(text)]


def copied_house(folder: Path) -> Path:
    """A clone's files, with the environment that runs the tests."""
    house = folder / "fedquilt"
    for name in ("client", "federation", "server", "simulations", "strategies", "docs"):
        shutil.copytree(HOUSE / name, house / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy2(HOUSE / name, house / name)
    (house / ".venv").symlink_to(HOUSE / ".venv")
    return house


class Terminal:
    """A bash that is typed into, block by block. A command that fails ends it."""

    def __init__(self, cwd: Path, environment: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "-e", "-o", "pipefail"],
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def type(self, commands: str) -> str:
        """What they print. Fails with all of it when one of them fails."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{commands}\necho; echo all done\n")
        self._bash.stdin.flush()
        printed = ""
        for line in self._bash.stdout:
            if line == "all done\n":
                return printed
            printed += line
        raise AssertionError(f"a command failed:\n{commands}\nIt printed:\n{printed}")

    def close(self) -> None:
        end_session(self._bash)


class Reader:
    """Follows a guide in a copy of the repository."""

    def __init__(self, folder: Path) -> None:
        self.house = copied_house(folder)
        self._home = folder / "home"
        self._home.mkdir()
        path = f"{HOUSE / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, **QUIET, "HOME": str(self._home), "PATH": path}
        self._environment.setdefault("FEDQUILT_CACHE", str(Path.home() / ".cache" / "fedquilt"))
        self._main = Terminal(self.house, self._environment)
        self._staying: list[subprocess.Popen[bytes]] = []
        self._ports = {port: str(free_port()) for port in ("8000", "9094", "9095")}

    def do(self, block: Block) -> str:
        """What a block prints; "" for one that stays, once it is at work."""
        commands = re.sub("|".join(self._ports), lambda found: self._ports[found[0]], block.commands)
        if not block.until:
            return self._main.type(commands)
        log = self.house.parent / f"stays-{len(self._staying)}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["bash", "-c", commands],
                cwd=self.house,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._staying.append(child)
        what, wanted = block.until.split()
        until(lambda: self._at_work(what, wanted), lambda: f"{block.commands}:\n{log.read_text()}")
        return ""

    def close(self) -> None:
        """Ends all that was started, also what Flower leaves running."""
        for child in reversed(self._staying):
            end_session(child)
        self._main.close()
        end_processes_of(self._home)

    def _at_work(self, what: str, wanted: str) -> bool:
        if what == "file":
            return (self.house / wanted).exists()
        if what == "port":
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(self._ports[wanted])), 1.0):
                return True
            return False
        listed = json.loads(self._main.type("flwr supernode list trial --format json"))
        return sum(node["status"] == "online" for node in listed["nodes"]) >= int(wanted)


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A reader whose processes end with the context."""
    found = Reader(folder)
    try:
        yield found
    finally:
        found.close()


def until(ready: Callable[[], bool], what: Callable[[], str]) -> None:
    """Waits; fails with `what` when it takes too long."""
    end = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < end, what()
        time.sleep(0.5)


def end_session(child: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGTERM to a process and its children, then SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
        os.killpg(child.pid, signal.SIGKILL)


def end_processes_of(home: Path) -> None:
    """Ends what runs with this HOME: `flwr run` leaves a SuperLink in a session of its own."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"HOME={home}".encode() in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)


def options_of(command: str) -> tuple[str, list[str]]:
    """A command's name and its long options."""
    words = shlex.split(command)
    return Path(words[0]).name, [word for word in words if word.startswith("--")]
