"""The reduction tree: partials merged pairwise, neighbours first, in chunk order.

The shape depends on the number of chunks alone, so in process and on Ray the same bits come out, whoever was first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

P = TypeVar("P")


def fold(partials: Sequence[P], merge: Callable[[P, P], P]) -> P:
    """All partials as one. Needs at least one.

    On a cluster the partials are references, and `merge` sends two of them to a worker and gives a reference back:
    then the partials never visit the caller.
    """
    level = list(partials)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]
