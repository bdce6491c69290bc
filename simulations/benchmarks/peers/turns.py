"""A peer in a process of its own, which does a round whenever it is told to.

The parent writes a line to the peer's input and reads one from its output: the round's seconds, as the peer took them.
So sides can work in turns, and a busy machine slows all. While they wait, all processes of Flower together take 2.5% of
a core, those of pfl-research nothing. What the first round aggregated is left in a file.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

from federation.errors import RunError
from simulations.benchmarks.workloads import PROCESSES, Task
from simulations.compute.environment import WORKER_ENVIRONMENT

MEANS_NAME = "means.safetensors"
ROUND_SECONDS = 1800.0
"""How long a peer may take to begin and do one round. At the sizes of `make bench` it takes less than a minute."""
_PATIENCE_SECONDS = 20.0


class Turns:
    """The peer's end. What anything else prints goes to stderr, so that the parent reads answers only."""

    def __init__(self, folder: Path) -> None:
        self._means = folder / MEANS_NAME
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Returns when the next round may begin. Raises RunError when the parent has gone."""
        if not sys.stdin.readline():
            raise RunError("a peer works for a benchmark, which has ended; start the benchmark again")

    def first(self, means: Mapping[str, Tensor]) -> None:
        """Leaves what the first round aggregated, means over each row's users."""
        save_file({name: mean.contiguous() for name, mean in means.items()}, self._means)

    def done(self, seconds: float) -> None:
        """Answers for a round."""
        print(json.dumps(seconds), file=self._answers, flush=True)


@dataclass(frozen=True)
class PeerKind:
    """How a peer is started: the packages it needs, the arguments of Python that start its processes, and most_users,
    how many users it trains fastest."""

    packages: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    most_users: int | None = None


PEERS: Mapping[str, PeerKind] = {
    # On W1 210 users per second with 256 clients, 170 with 1,024.
    "flower": PeerKind(("flwr", "ray"), most_users=256),
    "pfl": PeerKind(("pfl",), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))),
}


def check_installed(names: Iterable[str]) -> None:
    """Raises RunError for a peer whose packages are missing."""
    for name in names:
        if missing := [package for package in PEERS[name].packages if find_spec(package) is None]:
            raise RunError(
                f"the peer {name!r} needs {' and '.join(missing)}, not installed here; run `make bench`, or "
                "`pip install -c constraints.txt 'fedquilt[bench]'`, or do without peers: --only engine"
            )


class Peer:
    """The parent's end, a context in which the process lives. It trains the first of a task's users, `self.users`.

    Raises RunError when it ends before its time, with the error it said, or when a round takes longer than
    `ROUND_SECONDS`; then it leaves the file with all it said.
    """

    def __init__(self, name: str, given: Task, rounds: int) -> None:
        self.name, self._kind = name, PEERS[name]
        self.users = min(given.users, self._kind.most_users or given.users)
        self._arguments = [given.workload.name, str(self.users), str(rounds)]

    def __enter__(self) -> Peer:
        self._folder = Path(tempfile.mkdtemp(prefix=f"fedquilt-bench-{self.name}-"))
        self._log = self._folder / "stderr.log"
        module = ["-m", __package__, self.name, *self._arguments, str(self._folder)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._kind.launcher, *module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that Ctrl-C comes to the parent alone, which then ends the whole group
                env=os.environ | WORKER_ENVIRONMENT,
            )
        return self

    def warm_up(self) -> dict[str, Tensor]:
        """The first round: what it aggregated, means over each row's users, (R, d_in + d_out) by section."""
        self.round()
        means: dict[str, Tensor] = load_file(self._folder / MEANS_NAME)
        return means

    def round(self) -> float:
        """One round, in seconds."""
        answer = self._answer()
        if not answer:
            code, log = self._process.wait(), self._log.read_text(errors="replace")
            raise RunError(
                f"a peer answers in every round, {self.name} ended with exit code {code} ({_error_in(log)}); "
                f"all it said is in {self._log}; --only engine measures without peers"
            )
        return float(json.loads(answer))

    def _answer(self) -> str:
        """What the peer says when it is told to do a round: a line, nothing when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # then there is nothing to read either
            print(file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], ROUND_SECONDS)[0]:
            raise RunError(
                f"a round takes at most {ROUND_SECONDS:g} s, {self.name} has not answered by then; all it said is in "
                f"{self._log}; give fewer --users, or measure without peers: --only engine"
            )
        return self._process.stdout.readline()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # one that has ended already
            self._process.stdin.close()  # one that waits for its turn ends by itself
        for last_word in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(_PATIENCE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, last_word)
        self._process.wait()
        self._process.stdout.close()
        if not isinstance(error, RunError):
            shutil.rmtree(self._folder)


def _error_in(log: str) -> str:
    """The first error that a log names; torchrun says much after it."""
    found = re.search(r"\w+(Error|Exception): .*", log)
    return found[0] if found else "it named no error"
