"""A round's intake: replies come in any order, their users are lifted in blocks and merged in the cohort's order.

A block is `compute.block` places of the cohort, whoever is missing in it, so the cut never moves: the result depends
neither on who answered first, nor on where blocks are lifted, nor on those who are left out. It is that of a simulation
with one shard and the same block.

What is held at a time depends on `deployment.replies` and the block, not on how many nodes or users there are.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from federation.config import RunConfig
from federation.state import metric_names
from server.admission.desk import Admitted, Desk
from server.admission.lifting import Lifted, Lifter, Terms
from server.nodes import Parcel
from server.plan import Plan, Seat
from server.round import Rules
from strategies.protocol import State


@dataclass(frozen=True)
class Outcome:
    """What a round has come to. partial: of all admitted users, None when there are none.

    rejected: how many users were left out, by reason. metric_sums: over the admitted users.
    """

    partial: Any | None
    admitted: int
    rejected: Mapping[str, int]
    metric_sums: Mapping[str, float]


class Intake:
    """Takes the replies to a plan. Collect those of the nodes in `wanted`; whoever does not answer is skipped.

    Raises what the desk and the lifter raise: a RunError when the audit log or the cluster fails. No reply does.
    """

    def __init__(
        self, plan: Plan, rules: Rules, strategy_state: State, lifter: Lifter, desk: Desk, config: RunConfig
    ) -> None:
        self._seats = plan.seats
        self._merge = rules.strategy.merge
        self._lifter = lifter
        self._desk = desk
        self._window = config.deployment.replies
        self._block_size = config.compute.block
        self._open = {seat.node: seat for seat in plan.seats}
        self._admitted: dict[int, Admitted] = {}
        self._settled = 0
        self._block = _Block(0)
        self._under_way: deque[list[int]] = deque()
        self._tallies: dict[int, _Tally] = {}
        self._total = _Total()
        work = plan.work
        metrics = metric_names(config, work.round_index)
        lifter.begin(Terms(rules, strategy_state, work.round_index, work.version, metrics))
        desk.begin(work)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The nodes to collect from next: of the seats from the first open one, as many as replies may be held."""
        window = self._seats[self._settled : self._settled + self._window]
        return tuple(seat.node for seat in window if seat.node in self._open)

    def take(self, parcel: Parcel) -> None:
        """A parcel that has come. One with a Refusal is for `skip`."""
        verdict = self._desk.judge(parcel, self._open.get(parcel.node))
        if isinstance(verdict, Admitted):
            del self._open[parcel.node]
            self._admitted[parcel.node] = verdict
            self._settle()
        else:
            self.skip(parcel.node, verdict)

    def skip(self, node: int, reason: str) -> None:
        """A node without an answer, or with one that is refused: its users are left out and counted, once."""
        if (seat := self._open.pop(node, None)) is not None:
            self._total.rejected[reason] += len(seat.positions)
            self._settle()

    def close(self) -> Outcome:
        """The round's end. Those who have not answered by now are too late."""
        for node in tuple(self._open):
            self.skip(node, "late")
        self._send()
        self._gather(self._lifter.drain())
        total = self._total
        return Outcome(total.partial, total.admitted, dict(total.rejected), total.metric_sums)

    def _settle(self) -> None:
        """Seats users, in the cohort's order, until a seat that is still open."""
        while self._settled < len(self._seats) and (seat := self._seats[self._settled]).node not in self._open:
            self._settled += 1
            if (admitted := self._admitted.pop(seat.node, None)) is not None:
                self._seat(seat, admitted)

    def _seat(self, seat: Seat, admitted: Admitted) -> None:
        self._tallies[seat.node] = _Tally(len(seat.positions))
        for place, payload in enumerate(admitted.payloads, seat.first):
            number = place // self._block_size
            if number != self._block.number:
                self._send()
                self._block = _Block(number)
            self._block.add(seat.node, payload, admitted.scale)

    def _send(self) -> None:
        """The accumulated block to the lifter. One without users is not worth a partial."""
        block = self._block
        if block.nodes:
            self._under_way.append(block.nodes)
            self._gather(self._lifter.submit(block.payloads, block.scales))

    def _gather(self, results: list[Lifted]) -> None:
        for lifted in results:
            self._total.add(lifted, self._merge)
            for position, node in enumerate(self._under_way.popleft()):
                self._count(node, lifted.malformed.get(position), lifted.refused.get(position))

    def _count(self, node: int, malformed: str | None, refused: str | None) -> None:
        """One user of a node is judged. A node is judged after its last one."""
        tally = self._tallies[node]
        tally.left -= 1
        tally.admitted += malformed is None and refused is None
        tally.malformed = tally.malformed or malformed
        tally.refused = tally.refused or refused
        if tally.left:
            return
        del self._tallies[node]
        if tally.malformed is not None:
            self._desk.quarantine(node, "malformed update", tally.malformed)
        elif not tally.admitted:
            self._desk.quarantine(node, "no user admitted", str(tally.refused))


@dataclass
class _Block:
    """Users of one block of the cohort, as far as they have come."""

    number: int
    nodes: list[int] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    def add(self, node: int, payload: bytes, scale: float) -> None:
        self.nodes.append(node)
        self.payloads.append(payload)
        self.scales.append(scale)


@dataclass
class _Tally:
    """What has become of a node's users. left: how many are not judged yet. The words are of the first of its kind."""

    left: int
    admitted: int = 0
    malformed: str | None = None
    refused: str | None = None


@dataclass
class _Total:
    """The sums of a round."""

    partial: Any | None = None
    admitted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    metric_sums: dict[str, float] = field(default_factory=dict)

    def add(self, lifted: Lifted, merge: Callable[[Any, Any], Any]) -> None:
        self.admitted += lifted.admitted
        self.rejected.update([*lifted.malformed.values(), *lifted.refused.values()])
        for name, value in lifted.metric_sums.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0.0) + value
        if lifted.partial is not None:
            self.partial = lifted.partial if self.partial is None else merge(self.partial, lifted.partial)
