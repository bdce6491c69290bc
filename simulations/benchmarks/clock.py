"""How benchmarks take times: in turns, so that a busy machine slows all sides alike, and on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

K = TypeVar("K")


def in_turns(sides: Mapping[K, Callable[[], object]], repetitions: int) -> dict[K, tuple[float, ...]]:
    """Seconds of each side in each repetition, after one that is not counted."""
    for work in sides.values():
        work()
    times: dict[K, list[float]] = {side: [] for side in sides}
    for _ in range(repetitions):
        for side, work in sides.items():
            times[side].append(seconds(work))
    return {side: tuple(taken) for side, taken in times.items()}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def one_thread() -> Iterator[None]:
    """torch as it runs in a worker: on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
