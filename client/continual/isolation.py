"""Hard isolation: units that a task moved most are its own from then on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from client.continual.course import Memory, NextTask
from client.continual.penalties import Nothing
from federation.continual_config import ContinualName
from federation.pool.spec import Rows


@dataclass(frozen=True)
class Isolation(Nothing):
    """Of the n active units of a module, floor(n t / tasks) are claimed after t tasks; claimed ones move no more.

    When none is left, after `tasks` tasks, nothing moves: the user is served as before, and learns nothing further. A
    module with fewer units than tasks gives some tasks none: what these move, later ones may move again.

    Memory: "claimed" (U, J, k) bool, and "ended" (U,) int64, the user's tasks.
    """

    name: ClassVar[ContinualName] = "isolation"
    tasks: int = 5

    def bytes_after(self, lesson: NextTask) -> int:
        return lesson.course.active.units.valid_ujk[0].numel() + 8

    def held(self, lesson: NextTask) -> Mapping[str, Tensor]:
        if not lesson.before.memory:
            return {}
        claimed_ujk = lesson.before.memory["claimed"]
        return {name: claimed_ujk[:, j, :, None] for j, name in enumerate(lesson.before.rows)}

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        valid_ujk, memory = lesson.course.active.units.valid_ujk, lesson.before.memory
        claimed_ujk = memory["claimed"] if memory else torch.zeros_like(valid_ujk)
        ended_u = (memory["ended"] if memory else torch.zeros(len(valid_ujk), dtype=torch.int64)) + 1
        share_uj = valid_ujk.sum(2) * ended_u.clamp_max(self.tasks)[:, None] // self.tasks
        before = lesson.before.rows
        moved_ujk = torch.stack([(row - before[name]).norm(dim=2) for name, row in rows.items()], 1)
        return {"claimed": first(share_uj, moved_ujk, claimed_ujk, valid_ujk), "ended": ended_u}


def first(count_uj: Tensor, size_ujk: Tensor, before_ujk: Tensor, valid_ujk: Tensor) -> Tensor:
    """The `count` units that come first: those of before, then the others by size; of equals, the first. Never padding.

    Shapes: count (U, J) int64, size (U, J, k), before and valid (U, J, k) bool; result (U, J, k) bool.
    """
    ranked_ujk = size_ujk.masked_fill(before_ujk, torch.inf).masked_fill(~valid_ujk, -1.0)
    place_ujk = torch.sort(ranked_ujk, dim=2, descending=True, stable=True).indices.argsort(2)
    return (place_ujk < count_uj[..., None]) & valid_ujk
