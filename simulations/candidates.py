"""What the folder of any run offers for release: a deployed one, or a simulation that was evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation.config import identity
from federation.errors import RunError
from federation.pool.file import PoolFile
from federation.settings import parse
from server.candidates import deployed_candidate, is_deployed
from server.checkpoint import Checkpoint, checksum
from server.promotion import Evaluation
from server.releases import Candidate
from simulations.federate import last_checkpoint
from simulations.record import read_record, recorded_config
from simulations.runs import MAIN

METHODS = {"base_loss": "base", "mask_loss": "dsa_t0", "tuned_loss": "dsa_t2"}
"""What nodes measure, and the methods whose losses it is in a simulation's table."""


def candidate_of(run: Path) -> Candidate:
    """Raises RunError when the folder is not that of a run, or nothing in it was evaluated."""
    return deployed_candidate(run) if is_deployed(run) else _simulated_candidate(run)


def recorded_checkpoint(run: Path, record: Mapping[str, Any]) -> Checkpoint:
    """The last checkpoint of a finished simulation. Raises RunError when it is not the one of the record."""
    found = last_checkpoint(run / MAIN)
    if checksum(found) != record["checksum"]:
        raise RunError(
            f"a record and its pool belong together, the newest usable checkpoint in {str(run / MAIN)!r} "
            f"(round {found.round_index}) is another one; finish the run with `fedquilt simulate --resume`"
        )
    return found


def _simulated_candidate(run: Path) -> Candidate:
    record = read_record(run)
    measured = record.get("methods", {})
    losses = {metric: measured[method]["loss"] for metric, method in METHODS.items() if method in measured}
    if not losses:
        raise RunError(
            f"a release comes with its evaluation, {str(run)!r} has none; simulate with 'dsa_t2' in evaluate.methods"
        )
    config = recorded_config(record, run)
    found = recorded_checkpoint(run, record)
    pool = PoolFile(found.round_index, found.tensors["values"], config.task)
    evaluation = parse(Evaluation, {"split": "new", "users": record["splits"]["measured"], "metrics": losses})
    return Candidate(pool, evaluation, identity(config))
