"""Replay: a uniform sample of all examples that a user has met, drawn while they pass by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from client.continual.course import Memory, NextTask
from client.continual.penalties import Nothing
from federation.continual_config import ContinualName
from federation.data.population import Batch, side_by_side
from federation.pool.spec import Rows
from federation.streams import Streams, UserIds, below


@dataclass(frozen=True)
class Replay(Nothing):
    """Every step sees the kept examples besides the task's, weighted so that its loss is, in expectation, the mean over
    all examples that the user ever met, this task's among them.

    Memory: "inputs" and "targets" (U, m, ...) as the user has them, and "seen" (U,) int64, how many examples passed by:
    so many slots are taken, from the first.
    """

    name: ClassVar[ContinualName] = "replay"
    examples: int = 16

    def bytes_after(self, lesson: NextTask) -> int:
        kinds = (lesson.support.inputs, lesson.support.targets)
        return self.examples * sum(t.shape[2:].numel() * t.element_size() for t in kinds) + 8

    def batch(self, lesson: NextTask, batch: Batch) -> Batch:
        if not lesson.before.memory:
            return batch
        kept, seen_u = kept_examples(lesson.before.memory), lesson.before.memory["seen"]
        met_u = (lesson.support.weight > 0).sum(1)
        now = Batch(batch.inputs, batch.targets, _of_mass(batch.weight, met_u))
        return side_by_side([now, Batch(kept.inputs, kept.targets, _of_mass(kept.weight, seen_u))])

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        return filled(self._memory(lesson), lesson.support, lesson.user_ids, lesson.streams)

    def _memory(self, lesson: NextTask) -> Memory:
        """What there is, or empty slots."""
        support, users = lesson.support, len(lesson.user_ids)
        return lesson.before.memory or {
            "inputs": support.inputs.new_zeros(users, self.examples, *support.inputs.shape[2:]),
            "targets": support.targets.new_zeros(users, self.examples, *support.targets.shape[2:]),
            "seen": torch.zeros(users, dtype=torch.int64),
        }


def kept_examples(memory: Memory) -> Batch:
    """What is kept, as a batch: empty slots are padding."""
    taken_um = torch.arange(memory["inputs"].shape[1]) < memory["seen"][:, None]
    return Batch(memory["inputs"], memory["targets"], taken_um.float())


def filled(memory: Memory, passing: Batch, user_ids: UserIds, streams: Streams) -> Memory:
    """The memory after more examples (U, N) have passed by.

    Algorithm R (Vitter, 1985): of the first n examples each is kept with probability m / n. Padding passes unseen.
    """
    met_un = passing.weight > 0
    chosen_um = _chosen(met_un, memory["seen"], memory["inputs"].shape[1], user_ids, streams)
    return {
        "inputs": _taken(chosen_um, passing.inputs, memory["inputs"]),
        "targets": _taken(chosen_um, passing.targets, memory["targets"]),
        "seen": memory["seen"] + met_un.sum(1),
    }


def _chosen(met_un: Tensor, seen_u: Tensor, slots: int, user_ids: UserIds, streams: Streams) -> Tensor:
    """Which of the passing examples each slot ends with, -1 for the one that it has: (U, m) int64.

    Example n of all, from 0, takes the slot n while n < m, then the slot j = [0, n + 1) if j < m. The draw's place is
    n, so it depends on neither the other users nor the padding.
    """
    met = met_un.numpy(force=True)
    place_un = seen_u.numpy(force=True)[:, None] + met.cumsum(1) - 1
    drawn_un = below(streams.words("reservoir", user_ids, place_un.clip(0))[..., 0], (place_un + 1).astype(np.uint64))
    slot_un = np.where(place_un < slots, place_un, drawn_un)
    user, example = np.nonzero(met & (slot_un < slots))
    chosen_um = np.full((len(met), slots), -1)
    np.maximum.at(chosen_um, (user, slot_un[user, example]), example)  # of several, the one that came last
    return torch.as_tensor(chosen_um, device=met_un.device)


def _taken(chosen_um: Tensor, passing: Tensor, kept: Tensor) -> Tensor:
    """The passing examples (U, N, ...) that were chosen, and the kept ones (U, m, ...) elsewhere."""
    user, slot = (chosen_um >= 0).nonzero(as_tuple=True)
    taken = kept.clone()
    taken[user, slot] = passing[user, chosen_um[user, slot]]
    return taken


def _of_mass(weight_un: Tensor, mass_u: Tensor) -> Tensor:
    """The weights, scaled so that each user's sum up to its mass."""
    return weight_un * (mass_u / weight_un.sum(1).clamp_min(1e-12))[:, None]
