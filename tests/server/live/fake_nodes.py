"""Nodes in memory, with a time of their own: whoever sleeps moves it, so no test waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from federation.exchange import (
    Answer,
    Contribution,
    Description,
    Instructions,
    Letter,
    Measures,
    Refusal,
    Work,
)
from federation.frames import join
from federation.pool.file import PoolFile, pool_file
from federation.update import UpdateBlock, Values
from server.live.clock import Clock
from server.nodes import Parcel
from tests.server.admission.replies import payload_of, update_of


class Time:
    """Seconds since the test began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = Clock(lambda: self.now, self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def trained(user: int, work: Work, values: Values) -> UpdateBlock:
    """What a user sends: something of its own, and a step back from the values that it was given."""
    update = update_of(user, work)
    sections = {
        name: replace(section, rows_ukw=section.rows_ukw - 0.5 * values[name][section.ids_uk.long()])
        for name, section in update.sections.items()
    }
    return replace(update, sections=sections)


@dataclass
class FakeNode:
    """A node whose users are `first`, `first + 1`, ... of each split.

    seconds: that an answer takes. hears: whether a letter comes to it; of one that is lost it does nothing.
    changed: what becomes of an answer, None when it never comes.
    """

    first: int
    users: dict[str, int]
    order: int = 0
    seconds: float = 0.5
    hears: Callable[[Letter], bool] = lambda letter: True
    changed: Callable[[Letter, Answer], Answer | str | None] = lambda letter, answer: answer
    pools: dict[str, PoolFile] = field(default_factory=dict)
    release: str = ""
    versions_said: Collection[str] | None = None

    def answer(self, letter: Letter) -> Answer | str | None:
        return self.changed(letter, self._honest(letter)) if self.hears(letter) else None

    def _honest(self, letter: Letter) -> Answer:
        if letter.pool is not None:
            file = pool_file(letter.pool)
            self.pools[file.version] = file
        wish = letter.instructions
        if wish is None:
            said = self.pools if self.versions_said is None else self.versions_said
            return Description(dict(self.users), self.order, tuple(said), self.release, "test")
        if wish.version not in self.pools:
            return Refusal("lacks version", f"no {wish.version}")
        if wish.positions and wish.positions[-1] >= self.users.get(wish.split, 0):
            return Refusal("unknown users", f"{self.users}")
        return {"train": self._train, "evaluate": self._evaluate, "release": self._adopt}[letter.kind](wish)

    def _train(self, wish: Instructions) -> Answer:
        values = self.pools[wish.version].values
        updates = [trained(self.first + position, wish.work, values) for position in wish.positions]
        return Contribution(wish.work, dict(self.users), join([payload_of(update) for update in updates]))

    def _evaluate(self, wish: Instructions) -> Answer:
        users = [self.first + position for position in wish.positions]
        return Measures(wish.work, dict(self.users), len(users), sums_of(users))

    def _adopt(self, wish: Instructions) -> Answer:
        self.release = wish.version
        return self._honest(Letter("describe"))


def sums_of(users: Collection[int]) -> dict[str, float]:
    """What the users measure."""
    losses = {"base_loss": lambda u: 3.0 + u, "mask_loss": lambda u: 2.0 + u, "tuned_loss": lambda u: 1.0 + u * u / 8}
    return {name: float(sum(map(loss, users))) for name, loss in losses.items()}


class FakeNodes:
    """Some fake nodes as a server reaches them (`server/nodes.py`). posted: (time, node, letter) of each letter.

    most_at_once: tickets of one look. waiting: the tickets that were neither answered nor dropped.
    online_at: whether a node is online at a time. unreachable: those that take no letter, though they seem online.
    """

    def __init__(self, nodes: Mapping[int, FakeNode], time: Time | None = None) -> None:
        self.nodes, self.time = dict(nodes), time or Time()
        self.posted: list[tuple[float, int, Letter]] = []
        self.online_at: Callable[[int, float], bool] = lambda node, now: True
        self.unreachable: set[int] = set()
        self.most_at_once = 0
        self.waiting: set[str] = set()
        self._under_way: dict[str, tuple[float, int, Any]] = {}
        self._numbers = count()

    def online(self) -> Sequence[int]:
        return sorted(node for node in self.nodes if self.online_at(node, self.time.now))

    def post(self, letters: Mapping[int, Letter], seconds: float) -> Mapping[int, str]:
        assert letters
        assert seconds > 0
        tickets = {}
        for node, letter in letters.items():
            if node in self.unreachable:
                continue
            self.posted.append((self.time.now, node, letter))
            ticket, taken = f"ticket-{next(self._numbers)}", self.nodes[node].seconds
            answer = self.nodes[node].answer(letter)
            if answer is not None and taken <= seconds:
                self._under_way[ticket] = self.time.now + taken, node, answer
            tickets[node] = ticket
            self.waiting.add(ticket)
        return tickets

    def collect(self, tickets: Sequence[str]) -> Sequence[Parcel]:
        assert len(set(tickets)) == len(tickets)
        self.most_at_once = max(self.most_at_once, len(tickets))
        there = [t for t in tickets if t in self._under_way and self._under_way[t][0] <= self.time.now]
        parcels = []
        for ticket in sorted(there, key=lambda t: self._under_way[t][0]):
            _, node, answer = self._under_way.pop(ticket)
            parcels.append(Parcel(ticket, node, answer, len(getattr(answer, "payload", b""))))
            self.waiting.discard(ticket)
        return parcels

    def drop(self, tickets: Collection[str]) -> None:
        self.waiting.difference_update(tickets)
        for ticket in tickets:
            self._under_way.pop(ticket, None)

    def letters(self, kind: str, node: int | None = None) -> list[Letter]:
        """The letters of a kind that went out, in order."""
        return [letter for _, to, letter in self.posted if letter.kind == kind and node in (None, to)]

    def asked_of(self, kind: str) -> Counter[int]:
        """How many letters of a kind each node got."""
        return Counter(node for _, node, letter in self.posted if letter.kind == kind)
