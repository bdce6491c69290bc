"""What the folder of a deployed run (`server/live/folder.py`) offers for release."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federation.config import RunConfig, identity
from federation.errors import CheckpointError, FedquiltWarning, RunError
from federation.pool.file import PoolFile
from federation.settings import parse
from server import checkpoint
from server.checkpoint import Checkpoint
from server.history import read_history
from server.live.folder import CHECKPOINTS_NAME, CONFIG_NAME, EVALUATIONS_NAME
from server.promotion import Evaluation
from server.releases import Candidate


def is_deployed(run: Path) -> bool:
    """Whether a folder is that of a deployed run that has begun."""
    return (run / CHECKPOINTS_NAME).is_dir()


def deployed_candidate(run: Path) -> Candidate:
    """The newest usable checkpoint whose very values were evaluated, with the last evaluation of them.

    A damaged one is passed over with a FedquiltWarning. Raises RunError when there is none, and for files of another
    run.
    """
    config = _config(run)
    lines = {line["version"]: line for line in read_history(run / EVALUATIONS_NAME) if line["metrics"] is not None}
    for pool in _pools(run / CHECKPOINTS_NAME, config, {line["round_index"] for line in lines.values()}):
        if pool.version in lines:
            return Candidate(pool, _evaluation(lines[pool.version]), identity(config))
    kept = ", ".join(map(str, checkpoint.rounds(run / CHECKPOINTS_NAME)))
    raise RunError(
        f"a release is of a checkpoint that is still kept, usable and evaluated; {run} keeps those of the rounds "
        f"{kept or 'none'} and has evaluations of {', '.join(lines) or 'none'} with metrics; let the run end, or start "
        "it again with a smaller deployment.evaluate_every"
    )


def _pools(checkpoints: Path, config: RunConfig, rounds: set[int]) -> Iterator[PoolFile]:
    """The values of the usable checkpoints of these rounds, newest first."""
    for round_index in reversed(checkpoint.rounds(checkpoints)):
        if round_index in rounds and (found := _usable(checkpoint.path_of(checkpoints, round_index))):
            if found.meta.get("config") != identity(config):
                raise RunError(
                    f"{checkpoints} and {CONFIG_NAME} beside it are of other configurations, or the run is an "
                    "older version's; restore the file that the run was started with, or release it with the version "
                    "that wrote it"
                )
            yield PoolFile(round_index, found.tensors["values"], config.task)


def _usable(path: Path) -> Checkpoint | None:
    """None, and a warning, for a damaged checkpoint."""
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        warnings.warn(f"{error}; looking for an evaluated one before it", FedquiltWarning, stacklevel=2)
        return None


def _config(run: Path) -> RunConfig:
    path = run / CONFIG_NAME
    try:
        return parse(RunConfig, json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise RunError(
            f"a run's folder holds its configuration, {path} cannot be read ({error}); give the folder of a run, or "
            "restore the file; a run of an older version is released with the version that wrote it"
        ) from error


def _evaluation(line: dict[str, Any]) -> Evaluation:
    return parse(Evaluation, {name: line[name] for name in Evaluation.model_fields})
