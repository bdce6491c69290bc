"""Users' data on a device: what a node and a worker draw examples from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from federation.data.population import Batch, Examples, Part, Sequenced
from federation.devices import CPU, making_tensors_on, moved
from federation.errors import PopulationError
from federation.streams import Streams, UserIds


@dataclass(frozen=True)
class OnDevice:
    """Examples on a device, a `Sequenced`. Populations make their data on the CPU."""

    examples: Examples
    device: torch.device

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        with making_tensors_on(CPU):
            return moved(self.examples.batch(user_ids, part, size, streams), self.device)

    @property
    def tasks(self) -> int:
        """As of `Sequenced`; 1 where users have no sequence."""
        return self.examples.tasks if isinstance(self.examples, Sequenced) else 1

    def of_task(self, index: int) -> OnDevice:
        """As of `Sequenced`. Raises PopulationError where users have no sequence."""
        if not isinstance(self.examples, Sequenced):
            raise PopulationError(
                "tasks are met one after the other where users have a sequence of them, this population has none; set "
                "meta.tasks = 1, or take a population that has, such as digits"
            )
        return OnDevice(self.examples.of_task(index), self.device)
