"""Payloads of users become a partial: decoded, admitted, weighed and lifted, block by block, here or on a Ray cluster.

A lifter takes blocks in order and gives results in the same order, so what they are merged to depends neither on where
nor on when they were lifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from federation.codec import decode_all
from federation.config import ComputeConfig
from federation.errors import RunError
from federation.update import UpdateBlock, admit
from server.round import Rules
from strategies.protocol import State


@dataclass(frozen=True)
class Terms:
    """What all blocks of a round have in common. metrics: the names that every update carries."""

    rules: Rules
    strategy: State
    round_index: int
    version: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Lifted:
    """A block's users as a partial, None when nobody was admitted; and who was refused, why, by position in the block.

    malformed: bytes that are no update of this round. refused: updates that `admit` refused.
    metric_sums: over the admitted users.
    """

    partial: Any | None
    admitted: int
    malformed: Mapping[int, str]
    refused: Mapping[int, str]
    metric_sums: Mapping[str, float]


class Lifter(Protocol):
    """Where blocks are lifted."""

    def begin(self, terms: Terms) -> None:
        """A round's first word. What is left of the one before is dropped."""
        ...

    def submit(self, payloads: Sequence[bytes], scales: Sequence[float]) -> list[Lifted]:
        """Takes the next block, and gives the results that are ready, in the order of their blocks.

        scales: for each user's weight. May wait when much is under way.
        """
        ...

    def drain(self) -> list[Lifted]:
        """Waits for the results that are left."""
        ...

    def close(self) -> None:
        """Gives back what it took."""
        ...


class InProcessLifter:
    """Lifts at once, in this process."""

    def begin(self, terms: Terms) -> None:
        self._terms = terms

    def submit(self, payloads: Sequence[bytes], scales: Sequence[float]) -> list[Lifted]:
        return [lift_payloads(self._terms, payloads, scales)]

    def drain(self) -> list[Lifted]:
        return []

    def close(self) -> None:
        """Has nothing to give back."""


def make_lifter(compute: ComputeConfig) -> Lifter:
    """The lifter that a configuration asks for.

    Raises RunError when there is no Ray cluster at `compute.ray_address`, or Ray is not installed.
    """
    if compute.ray_address is None:
        return InProcessLifter()
    try:
        from server.admission.ray_lifting import RayLifter
    except ModuleNotFoundError as error:
        raise RunError(
            f"compute.ray_address = {compute.ray_address!r} needs Ray ({error}); install fedquilt[simulation], or "
            "leave the address out to lift in this process"
        ) from error
    return RayLifter(compute.ray_address)


def lift_payloads(terms: Terms, payloads: Sequence[bytes], scales: Sequence[float]) -> Lifted:
    """A block's payloads as a partial. Pure, and raises nothing for bad payloads: each bad user is left out alone."""
    rules = terms.rules
    block, malformed = decode_all(payloads, rules.schema, terms.version, terms.metrics, round_index=terms.round_index)
    admitted, rejections = admit(block, rules.schema, rules.limits)
    decoded = [position for position in range(len(payloads)) if position not in malformed]
    refused = {decoded[position]: reason for position, reason in rejections.reasons.items()}
    kept = [position for position in decoded if position not in refused]
    if not kept:
        return Lifted(None, 0, malformed, refused, {})
    weighed = _scaled(admitted, [scales[position] for position in kept])
    sums = {name: float(values.double().sum()) for name, values in admitted.metrics.items()}
    return Lifted(rules.strategy.lift(weighed, terms.strategy), len(kept), malformed, refused, sums)


def _scaled(block: UpdateBlock, scales: Sequence[float]) -> UpdateBlock:
    return replace(block, weight_u=block.weight_u * torch.tensor(scales, dtype=torch.float32))
