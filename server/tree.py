"""The reduction tree: partials merged pairwise, neighbours first, in chunk order.

The shape depends on the number of chunks alone, so in process and on Ray the same bits come out, whoever was first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

P = TypeVar("P")


def fold(partials: Sequence[P], merge: Callable[[P, P], P]) -> P:
    """All partials as one. Needs at least one."""
    level = list(partials)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def fold_on_ray(partials: Sequence[Any], merge: Callable[[P, P], P]) -> Any:
    """The same tree over Ray object references: each merge is a task, and partials never visit the driver."""
    import ray

    merge_task = ray.remote(num_cpus=0)(_apply)
    return fold(partials, lambda a, b: merge_task.remote(merge, a, b))


def _apply(merge: Callable[[P, P], P], a: P, b: P) -> P:
    return merge(a, b)
