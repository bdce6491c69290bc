"""Users who own few examples: what a few-shot curve is measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from federation.data.population import Batch, Examples, Part
from federation.streams import Streams, UserIds


@dataclass(frozen=True)
class FewExamples:
    """The users of `examples` with a support part of `shots` examples, the same ones in every draw.

    streams: by which these are chosen. A user that owns fewer has some of them more than once.
    """

    examples: Examples
    shots: int
    streams: Streams

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """As of `Examples`; no more support examples than there are."""
        if part != "support":
            return self.examples.batch(user_ids, part, size, streams)
        owned = self.examples.batch(user_ids, part, self.shots, self.streams)
        if size is None or size >= self.shots:
            return owned
        return owned.pick(torch.as_tensor(streams.distinct("shots", user_ids, self.shots, size)))


def with_shots(examples: Examples, shots: int, streams: Streams) -> Examples:
    """Users with so many support examples; with 0, with all that they have."""
    return FewExamples(examples, shots, streams.at("shots", shots)) if shots else examples
