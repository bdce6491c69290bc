"""A version of the pool and the gate as one file: what travels to nodes, and what a release is.

safetensors, with one entry of metadata, "fedquilt": JSON with the keys

    format     "fedquilt pool 1"
    version    the name of these values, which is checked against them
    round      the round whose end this is
    task       the `TaskConfig` that the values belong to
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from federation.config import TaskConfig
from federation.errors import ConfigError, PoolError, PoolFormatError
from federation.settings import parse
from federation.state import version_of
from federation.update import Values

FORMAT = "fedquilt pool 1"
_METADATA = "fedquilt"
_HEADER_LENGTH = struct.Struct("<Q")
_UNREADABLE = (
    *(struct.error, SafetensorError, ValueError, KeyError, TypeError),
    *(OverflowError, RecursionError),  # of numbers and nesting that JSON allows and Python does not
)


@dataclass(frozen=True)
class PoolFile:
    """The trained values at the end of a round, and what they were trained for."""

    round_index: int
    values: Values
    task: TaskConfig

    @cached_property
    def version(self) -> str:
        """The name of these values."""
        return version_of(self.values, self.round_index)

    def to_bytes(self) -> bytes:
        """The file. Equal values give equal bytes."""
        said = {
            "format": FORMAT,
            "version": self.version,
            "round": self.round_index,
            "task": self.task.model_dump(mode="json"),
        }
        tensors = {name: self.values[name].contiguous() for name in sorted(self.values)}
        payload: bytes = save(tensors, {_METADATA: json.dumps(said)})  # of several entries the order would be random
        return payload


def pool_file(payload: bytes) -> PoolFile:
    """What `to_bytes` wrote.

    Raises PoolError when it is anything else, or its values are not those of its version; PoolFormatError when another
    release of fedquilt wrote it.
    """
    try:
        found, version = _read(payload)
        own = found.version
    except ConfigError as error:
        raise PoolFormatError(
            f"{len(payload)} bytes are no pool file of this release: its task is another's ({error}); "
            "use the release that wrote it, or fetch it again"
        ) from error
    except _UNREADABLE as error:
        raise PoolError(f"{len(payload)} bytes are no pool file ({error!r}); fetch it again") from error
    if own != version:
        raise PoolError(f"the values are those of {own}, the file says {version}; it is damaged: fetch it again")
    return found


def _read(payload: bytes) -> tuple[PoolFile, Any]:
    """The file, and the version that it says it is."""
    (length,) = _HEADER_LENGTH.unpack_from(payload)
    metadata = json.loads(payload[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])["__metadata__"]
    said = json.loads(metadata[_METADATA])
    if said["format"] != FORMAT:
        raise PoolFormatError(f"a pool file is of the format {FORMAT!r}, got {said['format']!r}; use its release")
    return PoolFile(int(said["round"]), load(payload), parse(TaskConfig, said["task"])), said["version"]
