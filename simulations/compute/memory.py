"""How much memory a simulation takes for itself, process by process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

Memory = Mapping[str, float]
"""Private memory in MiB by process ("node:pid"). Empty where the system does not tell it."""

_STATM = Path("/proc/self/statm")


def private_memory() -> Memory:
    """What this process holds now and no other: heap and stacks.

    Left out are pages of files, which the system takes back when it needs them (the user store's maps), and shared
    memory, which would count once per process (Ray's object store). Linux tells them apart at 10 us a call.
    """
    if not _STATM.exists():
        return {}
    _, resident_pages, shared_pages, *_ = map(int, _STATM.read_text().split())
    private_bytes = (resident_pages - shared_pages) * os.sysconf("SC_PAGE_SIZE")
    return {f"{platform.node()}:{os.getpid()}": private_bytes / 2**20}


def largest(parts: Iterable[Memory]) -> Memory:
    """The most that each process held."""
    most: dict[str, float] = {}
    for part in parts:
        for process, mib in part.items():
            most[process] = max(mib, most.get(process, 0.0))
    return most


def total(memory: Memory) -> float | None:
    """All processes together, in MiB; None where the system does not tell."""
    return round(sum(memory.values()), 1) if memory else None
