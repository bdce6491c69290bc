"""A peer's process: `python -m simulations.benchmarks.peers NAME WORKLOAD USERS ROUNDS FOLDER`, as `Peer` starts it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

from simulations.benchmarks.peers.turns import Turns
from simulations.benchmarks.workloads import task


def main() -> None:
    name, workload, users, rounds, folder = sys.argv[1:]
    turns = Turns(Path(folder))
    torch.set_num_threads(1)
    peer = import_module(f"simulations.benchmarks.peers.{name}")
    peer.run(task(workload, int(users)), int(rounds), turns)


main()
