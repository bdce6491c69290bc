"""Users with texts of their own, read in windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch

from federation.base import BaseModel
from federation.data.corpus import TextCorpus, UserText
from federation.data.population import Batch, Part, as_array
from federation.data.tokenizer import Tokenizer, Tokens
from federation.errors import PopulationError
from federation.streams import Streams, UserIds

PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class TokenTable:
    """All users' tokens in one array, so that windows of many users are one gather.

    tokens (L,) of the tokenizer's type; offset_up, length_up (users, parts) int64, parts in the order of `PARTS`.
    """

    tokens: Tokens
    offset_up: npt.NDArray[np.int64]
    length_up: npt.NDArray[np.int64]

    @staticmethod
    def of(tokens_up: Sequence[Sequence[Tokens]]) -> TokenTable:
        """Shapes: tokens_up holds one array of tokens for each user and part."""
        flat = [np.zeros(0, np.uint16), *(part for parts in tokens_up for part in parts)]
        lengths = np.array([len(part) for part in flat[1:]], dtype=np.int64)
        shape = (len(tokens_up), len(PARTS))
        offsets = np.cumsum(lengths) - lengths
        return TokenTable(np.concatenate(flat), offsets.reshape(shape), lengths.reshape(shape))

    def part(self, row: int, place: int) -> Tokens:
        """One user's part, (L,)."""
        start = self.offset_up[row, place]
        return self.tokens[start : start + self.length_up[row, place]]

    def windows(self, start_un: npt.NDArray[np.int64], width: int) -> torch.Tensor:
        """Tokens from absolute positions on. Shapes: start_un (U, N), result (U, N, width) int64."""
        return torch.from_numpy(self.tokens[start_un[..., None] + np.arange(width)].astype(np.int64))


def in_order(users: Sequence[UserText]) -> range:
    """The numbers 0..n-1 as ids."""
    return range(len(users))


class TextPopulation:
    """Users of a corpus, as the Population protocol asks for them.

    An example is a window of T tokens with the T that follow each of them, so it needs T + 1. A user one of whose parts
    does not fill a window is left out and counted. base makes the frozen model that users share; it is called once,
    when first needed. ids: the ids of training users and then new ones, ascending; numbers by default.
    """

    def __init__(
        self,
        corpus: TextCorpus,
        tokenizer: Tokenizer,
        base: Callable[[], BaseModel],
        window: int = 64,
        ids: Callable[[Sequence[UserText]], range | UserIds] = in_order,
    ) -> None:
        users = (*corpus.train, *corpus.new)
        flat = tokenizer.encode_all([getattr(user, part) for user in users for part in PARTS])
        tokens_up = [flat[first : first + len(PARTS)] for first in range(0, len(flat), len(PARTS))]
        kept = [u for u, parts in enumerate(tokens_up) if min(map(len, parts)) > window]
        trained = sum(u < len(corpus.train) for u in kept)
        self.name = corpus.name
        self.window = window
        self.tokenizer = tokenizer
        self.texts = tuple(users[u] for u in kept)
        self.base_model = cache(base)
        self._corpus = corpus
        self._ids = ids(self.texts)
        self._row = {user_id: row for row, user_id in enumerate(as_array(self._ids).tolist())}
        self._splits = {"train": slice(0, trained), "new": slice(trained, len(kept))}
        self._table = TokenTable.of([tokens_up[u] for u in kept])
        _, group_r = np.unique([user.project for user in self.texts], return_inverse=True)
        self._group_r = group_r.astype(np.int64)

    def users(self, split: str) -> range | UserIds:
        """The ids of "train" or "new" users."""
        try:
            return self._ids[self._splits[split]]
        except KeyError:
            raise PopulationError(f"the splits of population {self.name!r} are train and new, not {split!r}") from None

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """Windows of each user: `size` of them from random places, or, with None, all that do not overlap.

        Shapes: inputs and targets (U, N, T) int64, weight (U, N). With None, windows lie end to end from the
        start of the part; the last T or fewer tokens, which fill none, are left out; padding repeats the
        first window.
        """
        row_u = self._rows(user_ids)
        offset_u, count_u = self._layout(row_u, part)
        if size is None:
            number_n = np.arange(count_u.max(initial=0))
            counted_un = number_n < count_u[:, None]
            start_un = np.where(counted_un, number_n * self.window, 0)
        else:
            length_u = self._table.length_up[row_u, PARTS.index(part)]
            start_un = streams.integers(f"windows/{part}", user_ids, length_u - self.window, size)
            counted_un = np.ones(start_un.shape, dtype=bool)
        tokens = self._table.windows(offset_u[:, None] + start_un, self.window + 1)
        weight = torch.from_numpy(counted_un.astype(np.float32))
        return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), weight)

    def tokens(self, user_id: int, part: Part) -> Tokens:
        """All tokens of one user's part, (L,)."""
        (row,) = self._rows(np.array([user_id]))
        return self._table.part(row, PARTS.index(part))

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """Characters per target over the windows of the whole part, (U,).

        A user's bits per character are its mean nats per target / log 2 / this.
        """
        offset_u, count_u = self._layout(self._rows(user_ids), part)
        targets_u = count_u * self.window
        chars_u = self._chars_before[offset_u + 1 + targets_u] - self._chars_before[offset_u + 1]
        return np.asarray(chars_u / targets_u)

    @cached_property
    def _chars_before(self) -> npt.NDArray[np.int64]:
        """How many characters stand before each token of the table, (L + 1,)."""
        chars = [
            self.tokenizer.characters(getattr(user, part), self._table.part(row, place))
            for row, user in enumerate(self.texts)
            for place, part in enumerate(PARTS)
        ]
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *chars]))

    def _layout(self, row_u: UserIds, part: Part) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each user's part starts, and how many windows lie in it end to end: (U,) and (U,)."""
        place = PARTS.index(part)
        return self._table.offset_up[row_u, place], (self._table.length_up[row_u, place] - 1) // self.window

    def groups(self, user_ids: UserIds) -> UserIds:
        """The number of each user's project (or play): (U,)."""
        return self._group_r[self._rows(user_ids)]

    @property
    def left_out(self) -> dict[str, int]:
        """What was left out, by reason: files and users by the corpus, users with less than a window here."""
        short = len(self._corpus.train) + len(self._corpus.new) - len(self.texts)
        return {**self._corpus.left_out, f"users with a part of less than {self.window + 1} tokens": short}

    def describe(self) -> dict[str, object]:
        """For the record. The fingerprint covers every text, those for pre-training too."""
        pretraining = self._corpus.pretraining
        groups = {name: len(np.unique(self._group_r[rows])) for name, rows in self._splits.items()}
        chars: dict[str, int] = {p: sum(len(getattr(user, p)) for user in self.texts) for p in PARTS}
        return {
            "name": self.name,
            "window_tokens": self.window,
            "vocabulary": self.tokenizer.size,
            "users": {split: len(self.users(split)) for split in self._splits},
            "groups": {**groups, "pretraining": len({document.project for document in pretraining})},
            "characters": {**chars, "pretraining": sum(len(document.text) for document in pretraining)},
            "left_out": self.left_out,
            "fingerprint": self._corpus.fingerprint,
            "versions": dict(self._corpus.versions),
        }

    def _rows(self, user_ids: UserIds) -> npt.NDArray[np.int64]:
        """Where the users stand in the tables, (U,)."""
        try:
            return np.array([self._row[user_id] for user_id in np.asarray(user_ids).tolist()], dtype=np.int64)
        except KeyError as error:
            raise PopulationError(
                f"population {self.name!r} has {len(self._row)} users, none has the id {error}; users() gives their ids"
            ) from None
