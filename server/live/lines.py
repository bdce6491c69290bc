"""What a deployed federation writes of its rounds and evaluations: nothing of a small group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

FEWEST_USERS = 3
"""Of fewer users no mean is written: it would tell of one of them."""


@dataclass(frozen=True)
class RoundLine:
    """What is known of one finished round.

    attempt: which try it was, counted from 1. nodes_asked, nodes: how many were asked, and answered in time.
    users, admitted: how many were asked, and had a part in the result. rejected: users by reason.
    repeats: replies that had been taken before, and were not taken again.
    metrics: means over the admitted users, and the gate's health; None when they are suppressed (why).
    seconds: from its letters to the new state.
    bytes_down, bytes_up: of the pools sent, and of the contributions received.
    """

    round_index: int
    attempt: int
    nodes_asked: int
    nodes: int
    users: int
    admitted: int
    rejected: Mapping[str, int]
    repeats: int
    metrics: Mapping[str, float] | None
    suppressed: str
    seconds: float
    bytes_down: int
    bytes_up: int

    def with_health(self, health: Mapping[str, float]) -> RoundLine:
        """With the gate's health among the metrics that are shown."""
        return self if self.metrics is None else replace(self, metrics={**self.metrics, **health})


@dataclass(frozen=True)
class EvaluationLine:
    """What is known of one evaluation. users, nodes: how many were measured, and by how many nodes.

    rejected: nodes by reason. metrics, suppressed: as in `RoundLine`, over the measured users.
    """

    round_index: int
    version: str
    split: str
    users_asked: int
    users: int
    nodes: int
    rejected: Mapping[str, int]
    metrics: Mapping[str, float] | None
    suppressed: str


def means(sums: Mapping[str, float], users: int) -> tuple[dict[str, float] | None, str]:
    """The means over `users`, or None and why they are not shown."""
    if users < FEWEST_USERS:
        return None, f"fewer than {FEWEST_USERS} users"
    return {name: total / users for name, total in sums.items()}, ""
