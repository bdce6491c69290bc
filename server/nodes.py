"""How a server reaches its nodes: letters are posted, answers are collected under the ticket of the letter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from federation.exchange import Answer, Letter


@dataclass(frozen=True)
class Parcel:
    """An answer as it arrived. node: who was asked, whatever the answer says.

    answer: an ExchangeError's text where it is not of the form that nodes send. size_bytes: of the payload, known
    before anything is decoded.
    """

    ticket: str
    node: int
    answer: Answer | str
    size_bytes: int = 0


class Nodes(Protocol):
    """The nodes of a federation: real ones over Flower, or others in tests."""

    def online(self) -> Sequence[int]:
        """The ids of the nodes that can be reached now, ascending."""
        ...

    def post(self, letters: Mapping[int, Letter], seconds: float) -> Mapping[int, str]:
        """Sends one letter to each node; the ticket of each. An answer later than `seconds` is of no use."""
        ...

    def collect(self, tickets: Sequence[str]) -> Sequence[Parcel]:
        """The answers that have come under these tickets, each given once; does not wait for the others.

        A node that is gone, or whose work failed, answers with a Refusal.
        """
        ...

    def drop(self, tickets: Collection[str]) -> None:
        """Forgets these tickets, known or not: their answers are awaited no more."""
        ...
