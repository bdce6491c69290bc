"""What a server remembers of replies: which it has taken, so that none is applied twice, and who is left out.

Both are saved as the meta of a checkpoint, so they and the state that the replies went into become durable together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from federation.exchange import Work

Digest = str
"""SHA-256 of a payload, in hexadecimal."""


class Ledger:
    """Digests of replies by work and node: those of the round in hand, and those of the last one that was applied.

    Older ones need no entry: rounds only grow, so their replies are stale whatever they hold.
    """

    def __init__(self, meta: Mapping[str, Any] | None = None) -> None:
        self._in_hand: tuple[Work, dict[int, Digest]] | None = None
        self._applied: tuple[Work, dict[int, Digest]] | None = None
        if meta:
            digests = {int(node): digest for node, digest in meta["digests"].items()}
            self._applied = Work(**meta["work"]), digests

    def begin(self, work: Work) -> None:
        """Work whose replies are awaited now. What was in hand is forgotten unless it was applied."""
        self._in_hand = work, {}

    def apply(self) -> None:
        """The replies in hand are in the state from now on."""
        self._applied = self._in_hand

    def digest(self, work: Work, node: int) -> Digest | None:
        """Of the reply that was taken under this key."""
        for page in (self._in_hand, self._applied):
            if page is not None and page[0] == work and node in page[1]:
                return page[1][node]
        return None

    def note(self, node: int, digest: Digest) -> None:
        """A reply to the work in hand."""
        assert self._in_hand is not None
        self._in_hand[1][node] = digest

    def to_meta(self) -> dict[str, Any]:
        """The applied entries as JSON."""
        if self._applied is None:
            return {}
        work, digests = self._applied
        return {"work": asdict(work), "digests": {str(node): digests[node] for node in sorted(digests)}}


@dataclass(frozen=True)
class Sentence:
    """Why a node is left out, and the last round that it is left out of."""

    reason: str
    until: int


class Quarantine:
    """The nodes that are left out."""

    def __init__(self, meta: Mapping[str, Any] | None = None) -> None:
        self._sentences = {int(node): Sentence(**sentence) for node, sentence in (meta or {}).items()}

    def add(self, node: int, sentence: Sentence) -> None:
        self._sentences[node] = sentence

    def nodes(self, round_index: int) -> frozenset[int]:
        """Who is left out of a round."""
        return frozenset(node for node, sentence in self._sentences.items() if round_index <= sentence.until)

    def to_meta(self, round_index: int) -> dict[str, Any]:
        """What still holds after a round, as JSON."""
        lasting = sorted(self.nodes(round_index + 1))
        return {str(node): asdict(self._sentences[node]) for node in lasting}
