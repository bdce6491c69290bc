"""The folder of a deployed federation:

config.json         its `RunConfig`
checkpoints/        the state of record (`server/checkpoint.py`)
rounds.jsonl        a line for each finished round (`server/history.py`)
evaluations.jsonl   a line for each evaluation
audit.jsonl         `server/admission/audit.py`
releases/           `server/releases.py`
.lock               held by the one process that works in it
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.config import RunConfig, identity
from federation.errors import RunError
from federation.files import write_file
from server import checkpoint
from server.admission.audit import AuditLog
from server.history import History
from server.round import Rules, ServerState, from_checkpoint, to_parts

CONFIG_NAME, CHECKPOINTS_NAME, AUDIT_NAME = "config.json", "checkpoints", "audit.jsonl"
ROUNDS_NAME, EVALUATIONS_NAME = "rounds.jsonl", "evaluations.jsonl"


@dataclass(frozen=True)
class Record:
    """The state of record. federation: its id. desk: what `Desk.to_meta` gives, None before the first round."""

    state: ServerState
    federation: str
    desk: Mapping[str, Any] | None = None


class StateFolder:
    """Reads and writes one such folder. Get one from `opened`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._path, self._checkpoints = path, path / CHECKPOINTS_NAME
        self._config = config

    def load(self, rules: Rules) -> Record | None:
        """The newest usable record, None in a new folder.

        Raises RunError for a federation of another configuration, CheckpointError when no checkpoint is usable.
        """
        if not checkpoint.rounds(self._checkpoints):
            return None
        found = checkpoint.load_latest(self._checkpoints)
        if "federation" not in found.meta:
            raise RunError(f"{self._path} holds a simulation, no deployed federation; give another folder")
        if found.meta["config"] != identity(self._config):
            raise RunError(
                f"a federation goes on with the configuration it was started with, that in {self._path} was started "
                f"with another (see {CONFIG_NAME} there), or by an older version; give that configuration, another "
                "folder, or go on with the version that began it"
            )
        return Record(from_checkpoint(found, rules), found.meta["federation"], found.meta["desk"])

    def save(self, record: Record) -> None:
        """Makes a record durable. Raises CheckpointError when it cannot."""
        meta = {
            "version": record.state.version,
            "federation": record.federation,
            "config": identity(self._config),
            "desk": record.desk,
        }
        checkpoint.save(self._checkpoints, record.state.round_index, to_parts(record.state), meta)

    def holds(self, round_index: int) -> bool:
        """Whether there is a checkpoint of a round."""
        return round_index in checkpoint.rounds(self._checkpoints)

    @property
    def durable_round(self) -> int:
        """Of the oldest checkpoint: no resume goes back before it."""
        return min(checkpoint.rounds(self._checkpoints))

    def note_config(self) -> None:
        """Writes down the configuration. Raises RunError when it cannot."""
        try:
            write_file(self._path / CONFIG_NAME, self._config.model_dump_json(indent=1).encode())
        except OSError as error:
            raise _unusable(self._path, error) from error

    def audit_log(self) -> AuditLog:
        return AuditLog(self._path / AUDIT_NAME)

    def rounds(self, finished: int) -> History:
        """The history of rounds, up to the last finished one."""
        return History(self._path / ROUNDS_NAME, finished)

    def evaluations(self, finished: int) -> History:
        """The history of evaluations, up to the last finished round. One that measured nobody is still to be done."""
        return History(self._path / EVALUATIONS_NAME, finished, counts=lambda line: line["users"] > 0)


@contextmanager
def opened(path: Path, config: RunConfig) -> Iterator[StateFolder]:
    """The folder, made if it is not there, for this process alone.

    Raises RunError when another process works in it, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise _unusable(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"one process at a time works on a federation, another one is at work in {path} ({error}); end it "
                "first, or give another folder"
            ) from error
        yield StateFolder(path, config)


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(f"the folder of the state, {path}, must be writable ({error}); mend it or give another")
