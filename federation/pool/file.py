"""A version of the pool and the gate as one file: what travels to nodes, and what a release is.

safetensors, with the metadata

    format     "fedquilt pool 1"
    version    the name of these values, which is checked against them
    round      the round whose end this is
    task       the `TaskConfig` that the values belong to, as JSON
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save

from federation.config import TaskConfig, parse
from federation.errors import ConfigError, PoolError
from federation.state import version_of
from federation.update import Values

FORMAT = "fedquilt pool 1"
_HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class PoolFile:
    """The trained values at the end of a round, and what they were trained for."""

    round_index: int
    values: Values
    task: TaskConfig

    @property
    def version(self) -> str:
        """The name of these values."""
        return version_of(self.values, self.round_index)

    def to_bytes(self) -> bytes:
        """The file. Equal values give equal bytes."""
        metadata = {
            "format": FORMAT,
            "version": self.version,
            "round": str(self.round_index),
            "task": self.task.model_dump_json(),
        }
        payload: bytes = save({name: self.values[name].contiguous() for name in sorted(self.values)}, metadata)
        return payload


def pool_file(payload: bytes) -> PoolFile:
    """What `to_bytes` wrote. Raises PoolError when it is anything else, or its values are not those of its version."""
    try:
        (length,) = _HEADER_LENGTH.unpack_from(payload)
        metadata = json.loads(payload[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise PoolError(f"a pool file is of the format {FORMAT!r}, got {metadata['format']!r}; use its release")
        found = PoolFile(int(metadata["round"]), load(payload), parse(TaskConfig, json.loads(metadata["task"])))
        version = metadata["version"]
    except (struct.error, ValueError, KeyError, TypeError, ConfigError, SafetensorError) as error:
        raise PoolError(f"{len(payload)} bytes are no pool file ({error!r}); fetch it again") from error
    if found.version != version:
        raise PoolError(
            f"the values are those of {found.version}, the file says {version}; it is damaged: fetch it again"
        )
    return found
