"""Answers are collected a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.nodes import Nodes, Parcel


def collected(nodes: Nodes, tickets: Sequence[str], at_once: int) -> Iterator[Parcel]:
    """What has come under these tickets, each given once. Not more than `at_once` answers are held at a time, however
    many there are and however large nodes make them."""
    for first in range(0, len(tickets), at_once):
        yield from nodes.collect(tickets[first : first + at_once])
