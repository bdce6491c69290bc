"""Which nodes are there, and what each has said of itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from federation.config import DeploymentConfig
from federation.exchange import Answer, Contribution, Description, Letter, Measures, Refusal
from server.live.clock import Clock
from server.live.windows import collected
from server.nodes import Nodes
from server.plan import Holding

_REFUSED_SECONDS = 5.0

_log = logging.getLogger("fedquilt")


class Roster:
    """The nodes of a federation.

    A node takes part once it has described itself: it is asked when it is first seen, again when it refuses, and again
    when it is silent for a quarter of `join_seconds`. Nobody waits for it but `gather`.

    A node that counts more than `deployment.users_per_node` users does not take part: a count is a share of every
    cohort, so no node's word for it is taken without a bound, and a cut one would be a guess.
    """

    def __init__(self, nodes: Nodes, clock: Clock, deployment: DeploymentConfig) -> None:
        self._nodes, self._clock, self._deployment = nodes, clock, deployment
        self._online: frozenset[int] = frozenset()
        self._known: dict[int, Description] = {}
        self._awaited: dict[str, float] = {}
        self._ask_at: dict[int, float] = {}

    def present(self) -> dict[int, Description]:
        """The nodes that are online and known, ascending."""
        return {node: self._known[node] for node in sorted(self._known) if node in self._online}

    def holdings(self, split: str) -> list[Holding]:
        """What the present nodes hold of a split."""
        return [Holding(node, said.order, said.users.get(split, 0)) for node, said in self.present().items()]

    def keeps(self, node: int, version: str) -> bool:
        """Whether a node is known to keep a version of the pool."""
        return node in self._known and version in self._known[node].versions

    def gather(self) -> bool:
        """Waits until `deployment.nodes` nodes are present, at most `join_seconds`; whether they are."""
        deadline = self._clock.now() + self._deployment.join_seconds
        self.look()
        while len(self.present()) < self._deployment.nodes:
            if self._clock.now() >= deadline:
                return False
            self._clock.sleep(self._deployment.poll_seconds)
            self.look()
        return True

    def watch(self, seconds: float) -> None:
        """Looks for so long."""
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > 0:
            self.look()
            self._clock.sleep(min(self._deployment.poll_seconds, left))

    def forget(self, nodes: Iterable[int]) -> None:
        """These describe themselves anew before they take part again: they are asked at the next look."""
        for node in nodes:
            self._known.pop(node, None)
            self._ask_at.pop(node, None)

    @property
    def shortage(self) -> str:
        """In words: how many nodes are there, and how many should be."""
        return (
            f"a round needs {self._deployment.nodes} nodes (deployment.nodes), {len(self._online)} are online and "
            f"{len(self.present())} of these have described themselves, after {self._deployment.join_seconds:g} s "
            "(deployment.join_seconds)"
        )

    def look(self) -> None:
        """Sees who is online, takes in the descriptions that have come, and asks for those that lack."""
        for parcel in collected(self._nodes, tuple(self._awaited), self._deployment.replies):
            self._awaited.pop(parcel.ticket)
            if isinstance(parcel.answer, Description):
                self.learn(parcel.node, parcel.answer)
            else:
                _log.warning("node %d does not describe itself: %s", parcel.node, in_words(parcel.answer))
                self._ask_at[parcel.node] = self._clock.now() + _REFUSED_SECONDS
        self._online = frozenset(self._nodes.online())
        now = self._clock.now()
        self._nodes.drop([ticket for ticket, until in self._awaited.items() if now >= until])
        self._awaited = {ticket: until for ticket, until in self._awaited.items() if now < until}
        if unasked := sorted(n for n in self._online - self._known.keys() if self._ask_at.get(n, now) <= now):
            self._ask(unasked, now)

    def learn(self, node: int, answer: Answer) -> None:
        """Takes in what an answer says of the node. An answer that counts too many users is passed over.

        Of the versions a node keeps, the one it worked with last is remembered: every round makes another.
        """
        match answer:
            case Description():
                self._note(node, answer)
            case Contribution() | Measures() if node in self._known:
                self._note(node, replace(self._known[node], users=answer.users, versions=(answer.work.version,)))
            case Refusal(fault="unknown users"):
                self.forget([node])

    def _note(self, node: int, said: Description) -> None:
        most = self._deployment.users_per_node
        if not all(0 <= count <= most for count in said.users.values()):
            _log.warning(
                "node %d is not believed: it counts its users outside 0..%d (deployment.users_per_node); raise the "
                "setting if it may hold more, or split it into several nodes",
                *(node, most),
            )
            return
        if node not in self._known:
            _log.info("node %d takes part from now on", node)
        self._known[node] = said

    def _ask(self, nodes: Sequence[int], now: float) -> None:
        patience = self._deployment.join_seconds
        tickets = self._nodes.post(dict.fromkeys(nodes, Letter("describe")), patience)
        self._awaited |= dict.fromkeys(tickets.values(), now + patience)
        self._ask_at |= dict.fromkeys(nodes, now + patience / 4)


def in_words(answer: Answer | str) -> str:
    """What a log may say of an answer that is not as hoped for: nothing in the node's own words."""
    match answer:
        case Refusal(fault):
            return fault
        case str():
            return "its answer cannot be read"
    return f"it answers with a {type(answer).__name__.lower()}"
