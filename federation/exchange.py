"""What a server and its nodes say to each other, whatever carries it: Flower messages, gRPC, or a plain call.

Numbers, text and bytes only, and no torch: a process that merely passes them on starts at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from federation.errors import ExchangeError

FEDERATION_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
MOST_ROUNDS = 2**32 - 1
"""The last round that there can be: stores keep a round in 32 bits."""

Fault = Literal["lacks version", "unknown users", "busy", "no agent", "late", "failed"]
"""Why a node has no answer. "lacks version": send the pool with the instructions."""
FAULTS: tuple[str, ...] = get_args(Fault)

LetterKind = Literal["describe", "train", "evaluate", "release"]


@dataclass(frozen=True)
class Instructions:
    """What one node is asked to do in one round.

    federation: its id, the same after any restart. round_index: counted from 1. attempt: counted from 1; a round that
    was refused is tried again. version: of the pool and gate to work with. split, positions: which of the node's users
    of that split, ascending, counted from 0 in the order of their ids. durable_round: no resume goes back before it.
    task: a `TaskConfig` as JSON.

    Raises ExchangeError for values that no server sends.
    """

    federation: str
    round_index: int
    attempt: int
    version: str
    split: str
    positions: tuple[int, ...]
    durable_round: int
    task: str

    def __post_init__(self) -> None:
        self._check_types()
        if not FEDERATION_NAME.fullmatch(self.federation):
            raise ExchangeError(
                f"a federation's id matches {FEDERATION_NAME.pattern!r}, got {self.federation[:80]!r}; give it another"
            )
        if not 0 <= self.durable_round <= self.round_index <= MOST_ROUNDS or self.attempt < 1:
            raise ExchangeError(
                f"rounds count from 0 to {MOST_ROUNDS}, attempts from 1, and a durable round is past, "
                f"got round {self.round_index}, attempt {self.attempt}, durable round {self.durable_round}; "
                "is the server of this version of fedquilt?"
            )
        if any(b <= a for a, b in zip((-1, *self.positions), self.positions)):
            raise ExchangeError("positions ascend from 0, got others; is the server of this version of fedquilt?")

    def _check_types(self) -> None:
        """They come from a message, where a field may hold anything."""
        for name, kind in {"round_index": int, "attempt": int, "durable_round": int, "positions": tuple}.items():
            _check_type(name, getattr(self, name), kind)
        for name in ("federation", "version", "split", "task"):
            _check_type(name, getattr(self, name), str)
        for position in self.positions:
            _check_type("positions", position, int)

    @property
    def work(self) -> Work:
        """Which work this is."""
        return Work(self.federation, self.round_index, self.attempt, self.version)


@dataclass(frozen=True)
class Work:
    """Names a piece of work: an answer echoes it, and the server compares it with what it asked for."""

    federation: str
    round_index: int
    attempt: int
    version: str


@dataclass(frozen=True)
class Contribution:
    """A node's answer to training: its users' updates, encoded and framed (`federation/frames.py`), by position.

    users: how many the node has by now, by split.
    """

    work: Work
    users: Mapping[str, int]
    payload: bytes


@dataclass(frozen=True)
class Measures:
    """A node's answer to an evaluation: sums over the users that were asked for; of one user, if only one is asked.

    sums: of each metric, over `measured` users.
    """

    work: Work
    users: Mapping[str, int]
    measured: int
    sums: Mapping[str, float]


@dataclass(frozen=True)
class Description:
    """What a node says of itself. users: how many, by split. order: its place among the nodes (its partition).

    versions: of the pools that it keeps. release: the version that it serves, "" for none.
    software: fedquilt's version.
    """

    users: Mapping[str, int]
    order: int = 0
    versions: tuple[str, ...] = ()
    release: str = ""
    software: str = ""


@dataclass(frozen=True)
class Refusal:
    """A node's answer when it has none: why, and in words."""

    fault: Fault
    message: str


@dataclass(frozen=True)
class Letter:
    """What a server sends to a node. pool: a `PoolFile` as bytes, for nodes that lack it.

    "describe" needs neither. "train" and "evaluate" need instructions. "release" needs instructions whose version is
    the release's: the node serves it from then on.
    """

    kind: LetterKind
    instructions: Instructions | None = None
    pool: bytes | None = field(default=None, repr=False)


MEASURES: tuple[str, ...] = ("base_loss", "mask_loss", "tuned_loss")
"""What a node measures: losses of the frozen model, under the user's mask, and with rows tuned for the user."""

Answer = Contribution | Measures | Description | Refusal


def _check_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ExchangeError(
            f"instructions' {name} are made of {kind.__name__}, got {type(value).__name__} {str(value)[:80]!r}; "
            "is the server of this version of fedquilt?"
        )
