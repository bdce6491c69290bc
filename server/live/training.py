"""One try of a round: nodes are asked, and their contributions taken in until all are there or time is over."""

from __future__ import annotations

from dataclasses import dataclass

from federation.exchange import Refusal
from server.admission.intake import Intake, Outcome
from server.live.errand import Errand
from server.live.lines import RoundLine, means
from server.live.session import Head, Session
from server.plan import Plan, plan_round


@dataclass(frozen=True)
class Try:
    """What came of asking nodes once. started: when. nodes: how many answered in time."""

    started: float
    plan: Plan
    outcome: Outcome
    nodes: int
    bytes_down: int
    bytes_up: int

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
            metrics=metrics,
            suppressed=suppressed,
            seconds=now - self.started,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
        )


def try_round(session: Session, head: Head, attempt: int) -> Try:
    """Asks the nodes that are present for the round after `head`. Changes no state but the desk's."""
    started, plan = session.clock.now(), _plan(session, head, attempt)
    intake = Intake(plan, session.rules, head.state.strategy, session.lifter, session.desk, session.config)
    asked = {
        seat.node: session.instructions(plan.work, "train", seat.positions, head.durable_round) for seat in plan.seats
    }
    errand, answered = Errand(session, "train", asked, head.pool), 0
    for parcel in errand.answers(lambda: intake.wanted):
        if isinstance(parcel.answer, Refusal):
            intake.skip(parcel.node, parcel.answer.fault)
        else:
            answered += 1
            intake.take(parcel)
    return Try(started, plan, intake.close(), answered, errand.bytes_down, errand.bytes_up)


def _plan(session: Session, head: Head, attempt: int) -> Plan:
    round_index = head.state.round_index + 1
    return plan_round(
        session.work(head, round_index, attempt),
        session.roster.holdings("train"),
        session.desk.quarantined(round_index),
        session.config.federation,
        session.streams,
    )
