"""A user's course as bytes, between two tasks.

safetensors, with one entry of metadata, "fedquilt": JSON with the keys

    format     "fedquilt course 2"
    rule       the continual rule's name, and
    version    the version of what it remembers
    pool       version of the pool whose rows the user adapts
    tuner      the tuner's name, as `tuner_name` of `client/continual/device.py` has it
    tasks, at  as in `Standing`

Tensors, of one user, by prefix: "rows/", "start/" (none where rows start as the pool's), "tuner/" and "memory/".

Format 1 did not say whose steps `at` and "tuner/" are of. It is refused: such a user begins anew.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from client.continual.course import ContinualRule, Standing
from federation.errors import StoreError
from federation.pool.spec import Rows

FORMAT = "fedquilt course 2"
ANCHOR = "anchor"
"""What names of remembered tensors begin with that are rows: they move with the pool."""

_METADATA = "fedquilt"
_HEADER_LENGTH = struct.Struct("<Q")
_UNREADABLE = (struct.error, SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class KeptCourse:
    """A user's course between two tasks. start: where its rows started, if not as the pool's. pool: its version.

    tuner: the name of what took the steps that `standing.at` counts and `standing.tuner` remembers.
    """

    standing: Standing
    start: Rows | None
    rule: str
    rule_version: int
    pool: str
    tuner: str

    def to_bytes(self) -> bytes:
        """Equal courses give equal bytes."""
        standing = self.standing
        said = {
            "format": FORMAT,
            "rule": self.rule,
            "version": self.rule_version,
            "pool": self.pool,
            "tuner": self.tuner,
            "tasks": standing.tasks,
            "at": standing.at,
        }
        parts = {"rows": standing.rows, "start": self.start or {}, "tuner": standing.tuner, "memory": standing.memory}
        tensors = {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
        copies = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
        payload: bytes = save(copies, {_METADATA: json.dumps(said)})
        return payload

    def of(self, rule: ContinualRule, pool: str) -> KeptCourse:
        """The same, of this rule and pool.

        Raises StoreError when it is of another.
        """
        if (self.rule, self.rule_version) != (rule.name, rule.version):
            raise StoreError(
                f"what is remembered is of the continual rule {self.rule!r}, version {self.rule_version}; the task's "
                f"is {rule.name!r}, version {rule.version}"
            )
        if self.pool != pool:
            raise StoreError(f"what is remembered refers to the pool {self.pool}, the values to {pool}")
        return self

    def by(self, tuner: str) -> KeptCourse:
        """The same, whose next steps this tuner takes: of another's, none count and nothing is remembered."""
        if self.tuner == tuner:
            return self
        return replace(self, standing=replace(self.standing, at=0, tuner={}), tuner=tuner)

    def moved(self, difference: Rows, pool: str) -> KeptCourse:
        """The same course on another pool, whose rows differ by so much from those that the user adapts.

        Rows move with the pool's, and so do remembered ones: what the user learned is a difference to them. Everything
        else stays; importances then are those of the former pool.
        """
        standing = replace(
            self.standing,
            rows=_shifted(self.standing.rows, difference),
            memory=_shifted(self.standing.memory, difference, ANCHOR),
        )
        return replace(self, standing=standing, start=self.start and _shifted(self.start, difference), pool=pool)


def course_from(payload: bytes, sections: Sequence[str]) -> KeptCourse:
    """What `to_bytes` wrote of a model with these sections, on torch's default device.

    Raises StoreError when it is anything else.
    """
    try:
        return _read(payload, sections)
    except _UNREADABLE as error:
        raise StoreError(f"{len(payload)} bytes are no course of this release of fedquilt ({error!r})") from error


def _read(payload: bytes, sections: Sequence[str]) -> KeptCourse:
    (length,) = _HEADER_LENGTH.unpack_from(payload)
    header = json.loads(payload[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])
    said: dict[str, Any] = json.loads(header["__metadata__"][_METADATA])
    if said["format"] != FORMAT:
        raise ValueError(f"its format is {said['format']!r}, not {FORMAT!r}")
    parts: dict[str, dict[str, Tensor]] = {"rows": {}, "start": {}, "tuner": {}, "memory": {}}
    for name, tensor in load(payload).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor.to(torch.get_default_device())
    rows = {name: parts["rows"][name] for name in sections}
    nobody_u = torch.zeros(1, dtype=torch.bool)
    standing = Standing(said["tasks"], said["at"], rows, parts["tuner"], parts["memory"], nobody_u)
    return KeptCourse(standing, parts["start"] or None, said["rule"], said["version"], said["pool"], said["tuner"])


def _shifted(tensors: Mapping[str, Tensor], difference: Rows, prefix: str = "") -> dict[str, Tensor]:
    """With the section's difference added to all whose names begin with the prefix; names end in the section."""
    return {
        name: tensor + difference[name.rpartition(" ")[2]] if name.startswith(prefix) else tensor
        for name, tensor in tensors.items()
    }
