"""Whether the gate is well: which units it leaves unused, which it has taken up again, and whether it has collapsed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from federation.state import LOAD_SECTION
from federation.update import Values
from federation.warn import warn

LEAST_LOAD = 0.1
"""A unit is unused that is chosen less often than this share of the mean."""
LEAST_ENTROPY = 0.05
"""Of the largest entropy that masks can have: below it, hardly anything else is tried."""
MOST_UNUSED = 0.5
"""Of all units: where more are unused, users share the same few."""


def gate_health(before: Values, after: Values) -> dict[str, float]:
    """The health of a round's gate, from the load of the units before and after it; nothing without a trained gate.

    unused_share: of the units after the round. revived: how many were unused before it and no longer are.
    """
    if LOAD_SECTION not in after:
        return {}
    unused_before_g, unused_g = _unused(before[LOAD_SECTION][0]), _unused(after[LOAD_SECTION][0])
    return {
        "unused_share": float(unused_g.double().mean()),
        "revived": float((unused_before_g & ~unused_g).sum()),
    }


def collapsed(metrics: Mapping[str, float]) -> bool:
    """Whether a round's metrics are those of a gate that gives nearly everyone the same few units, and has stopped
    trying others. Never so in a round in which no gate chose."""
    return metrics.get("gate_entropy", 1.0) < LEAST_ENTROPY and metrics.get("unused_share", 0.0) > MOST_UNUSED


class CollapseWatch:
    """Looks at the rounds of a run, and warns of the first collapse."""

    def __init__(self) -> None:
        self._warned = False

    def note(self, round_index: int, metrics: Mapping[str, float]) -> None:
        """A round has ended with these metrics. A FedquiltWarning if it is the first of a collapse."""
        if self._warned or not collapsed(metrics):
            return
        self._warned = True
        warn(
            f"the gate collapses: in round {round_index} the entropy of its masks is {metrics['gate_entropy']:.1%} of "
            f"the largest possible, and {metrics['unused_share']:.0%} of the units are hardly chosen (less than "
            f"{LEAST_LOAD:g} times the mean), so nearly everyone gets the same few; raise gate.exploration, "
            "gate.entropy or gate.balance, or lower gate_optimizer.learning_rate"
        )


def _unused(load_g: Tensor) -> Tensor:
    """(G,) bool; nothing is unused before anything was chosen."""
    return load_g < LEAST_LOAD * load_g.mean()
