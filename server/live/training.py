"""One try of a round: nodes are asked, and their contributions taken in until all are there or time is over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from federation.exchange import Contribution, Fault, Refusal, Work
from server.admission.intake import Intake, Outcome
from server.live.errand import Errand
from server.live.lines import RoundLine, means
from server.live.session import Head, Session
from server.plan import Plan, plan_round


@dataclass(frozen=True)
class Try:
    """What came of asking nodes once.

    started: when. faults: of the nodes that gave no answer in time. repeats: as in `RoundLine`.
    """

    started: float
    plan: Plan
    outcome: Outcome
    faults: Mapping[int, Fault]
    repeats: int
    bytes_down: int
    bytes_up: int

    @property
    def nodes(self) -> int:
        """How many nodes answered in time."""
        return len(self.plan.seats) - len(self.faults)

    def line(self, now: float) -> RoundLine:
        """What the history says of it when the round has ended now."""
        outcome = self.outcome
        metrics, suppressed = means(outcome.metric_sums, outcome.admitted)
        return RoundLine(
            round_index=self.plan.work.round_index,
            attempt=self.plan.work.attempt,
            nodes_asked=len(self.plan.seats),
            nodes=self.nodes,
            users=self.plan.users,
            admitted=outcome.admitted,
            rejected=dict(outcome.rejected),
            repeats=self.repeats,
            metrics=metrics,
            suppressed=suppressed,
            seconds=now - self.started,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
        )


def try_round(session: Session, head: Head, attempt: int) -> Try:
    """Asks the nodes that are present for the round after `head`.

    Changes no state but the desk's, and what is known of the nodes. What a contribution tells of its node is believed
    once all of it was judged, and only of a node that is not in quarantine for it.
    """
    started, plan = session.clock.now(), _plan(session, head, attempt)
    intake = Intake(plan, session.rules, head.state.strategy, session.lifter, session.desk, session.config)
    asked = {
        seat.node: session.instructions(plan.work, "train", seat.positions, head.durable_round) for seat in plan.seats
    }
    errand = Errand(session, "train", asked, head.pool)
    faults: dict[int, Fault] = {}
    said: dict[int, Contribution] = {}
    for parcel in errand.answers(lambda: intake.wanted):
        if isinstance(parcel.answer, Refusal):
            faults[parcel.node] = parcel.answer.fault
            intake.skip(parcel.node, parcel.answer.fault)
        else:
            if isinstance(parcel.answer, Contribution) and parcel.answer.work == plan.work:
                said[parcel.node] = replace(parcel.answer, payload=b"")
            intake.take(parcel)
    outcome = intake.close()
    _learn(session, plan.work, asked, said, faults)
    return Try(started, plan, outcome, faults, session.desk.repeats, errand.bytes_down, errand.bytes_up)


def _learn(
    session: Session,
    work: Work,
    asked: Collection[int],
    said: Mapping[int, Contribution],
    faults: Mapping[int, Fault],
) -> None:
    """said: what contributions tell of their nodes, without their payloads."""
    for node in said.keys() - session.desk.quarantined(work.round_index):
        session.roster.learn(node, said[node])
    session.patience.note(work.round_index, asked, [node for node, fault in faults.items() if fault == "late"])


def _plan(session: Session, head: Head, attempt: int) -> Plan:
    round_index = head.state.round_index + 1
    return plan_round(
        session.work(head, round_index, attempt),
        session.roster.holdings("train"),
        session.left_out(round_index),
        session.config.federation,
        session.streams,
    )
