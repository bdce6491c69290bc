"""Who rests: a node that is silent costs all others a whole deadline, in every round that asks it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable

_TOLERATED = 1

_log = logging.getLogger("fedquilt")


class Patience:
    """After its second silence in a row a node rests for a round, after the third for 2, then 4, and so on until it
    answers. A restart of the server forgets it.

    longest: rounds that nobody rests longer than.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._silences: Counter[int] = Counter()
        self._until: dict[int, int] = {}

    def note(self, round_index: int, asked: Iterable[int], silent: Collection[int]) -> None:
        """What became of a try of a round. A refusal is no silence: it costs nobody time."""
        for node in asked:
            if node not in silent:
                del self._silences[node]
                self._until.pop(node, None)
                continue
            self._silences[node] += 1
            if (beyond := self._silences[node] - _TOLERATED) > 0:
                self._until[node] = round_index + min(2 ** min(beyond - 1, self._longest), self._longest)
                _log.warning(
                    "node %d was silent %d times in a row, it rests until round %d",
                    *(node, self._silences[node], self._until[node]),
                )

    def resting(self, round_index: int) -> frozenset[int]:
        """Who rests in a round."""
        return frozenset(node for node, until in self._until.items() if round_index <= until)
