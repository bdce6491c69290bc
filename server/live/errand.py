"""One piece of work for several nodes: letters go out, answers come in until a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from federation.exchange import Description, Fault, Instructions, Letter, LetterKind, Refusal
from server.live.roster import in_words
from server.live.session import Session
from server.live.windows import collected
from server.nodes import Parcel

_LEAST_SECONDS = 1.0

_log = logging.getLogger("fedquilt")


class Errand:
    """Letters of one kind, posted when it is made. The pool goes along to nodes that are not known to keep it, and
    once more to a node that says it lacks it.

    asked: the instructions of each node, all with one version. pool: that version as bytes.
    bytes_down, bytes_up: of the pools sent, and of the contributions received.
    """

    def __init__(self, session: Session, kind: LetterKind, asked: Mapping[int, Instructions], pool: bytes) -> None:
        self._nodes, self._roster, self._clock = session.nodes, session.roster, session.clock
        self._kind, self._asked, self._pool = kind, asked, pool
        deployment = session.config.deployment
        self._poll_seconds, self._at_once = deployment.poll_seconds, deployment.replies
        self._deadline = self._clock.now() + deployment.round_seconds
        self.bytes_down = self.bytes_up = 0
        self._tickets: dict[int, str] = {}
        self._without_pool = {node for node, wish in asked.items() if self._roster.keeps(node, wish.version)}
        self._post(self._without_pool, None)
        self._post(asked.keys() - self._without_pool, pool)

    def answers(self, wanted: Callable[[], Sequence[int]]) -> Iterator[Parcel]:
        """One parcel for each node that `wanted` names, until it names none; it is asked anew after every look.

        What has come is given at once. Once the deadline is over, a node that has not answered gets a Refusal in its
        name, and so does one that cannot be reached. The errand ends with the last answer that is taken.
        """
        while nodes := wanted():
            left, answered = self._deadline - self._clock.now(), set()
            for parcel in self.came(nodes):
                answered.add(parcel.node)
                yield parcel
            if left <= 0:
                yield from (_refusal(node, "late", "time is over") for node in nodes if node not in answered)
            elif not answered:
                self._clock.sleep(min(self._poll_seconds, left))
        self.end()

    def came(self, nodes: Sequence[int]) -> Iterator[Parcel]:
        """The answers of these nodes that have come, each given once, `deployment.replies` of them held at a time."""
        yield from (_refusal(node, "failed", "it cannot be reached") for node in nodes if not self._tickets[node])
        tickets = [self._tickets[node] for node in nodes if self._tickets[node]]
        for parcel in collected(self._nodes, tickets, self._at_once):
            if self._lacks_the_pool(parcel):
                self._post([parcel.node], self._pool)
            else:
                self._note(parcel)
                yield parcel

    @property
    def is_over(self) -> bool:
        """Whether its deadline has passed."""
        return self._clock.now() >= self._deadline

    def end(self) -> None:
        """No answer is awaited any longer."""
        self._nodes.drop([ticket for ticket in self._tickets.values() if ticket])

    def _post(self, nodes: Collection[int], pool: bytes | None) -> None:
        letters = {node: Letter(self._kind, self._asked[node], pool) for node in sorted(nodes)}
        left = max(self._deadline - self._clock.now(), _LEAST_SECONDS)
        tickets = self._nodes.post(letters, left) if letters else {}
        self._tickets |= {node: tickets.get(node, "") for node in letters}
        self.bytes_down += len(pool or b"") * len(tickets)

    def _lacks_the_pool(self, parcel: Parcel) -> bool:
        """Whether a node is to be sent the pool after all. Once: who lacks what it was sent has failed."""
        match parcel.answer:
            case Refusal(fault="lacks version") if parcel.node in self._without_pool:
                self._without_pool.discard(parcel.node)
                return not self.is_over
        return False

    def _note(self, parcel: Parcel) -> None:
        """What contributions and measures tell of a node is believed by those who judge them."""
        self.bytes_up += parcel.size_bytes
        match parcel.answer:
            case Refusal() as refusal:
                _log.warning("node %d gives no answer: %s", parcel.node, in_words(refusal))
                self._roster.learn(parcel.node, refusal)
            case Description() as said if self._kind == "release":
                self._roster.learn(parcel.node, said)


def _refusal(node: int, fault: Fault, message: str) -> Parcel:
    return Parcel("", node, Refusal(fault, message))
