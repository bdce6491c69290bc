"""A federation over real nodes: rounds, one checkpoint after the other, resumable at any moment."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from uuid import uuid4

from federation.config import RunConfig
from federation.errors import FedquiltError, RunError
from federation.pool.file import PoolFile
from server.admission.desk import Desk
from server.admission.intake import Outcome
from server.admission.lifting import make_lifter
from server.health import CollapseWatch, gate_health
from server.live.announcing import Announcer
from server.live.clock import REAL_TIME, Clock
from server.live.evaluation import evaluate
from server.live.folder import AUDIT_NAME, Record, StateFolder, opened
from server.live.lines import RoundLine
from server.live.patience import Patience
from server.live.roster import Roster
from server.live.session import Session
from server.live.training import Try, try_round
from server.nodes import Nodes
from server.round import Rules, ServerState, close, frozen_factors

__all__ = ["RoundLine", "federate"]

_PAUSE = 5.0
"""Seconds after a round's first refused try; after the second it is 5 times as long, and so on up to join_seconds."""

_log = logging.getLogger("fedquilt")


def federate(
    config: RunConfig,
    rules: Rules,
    first: ServerState,
    nodes: Nodes,
    folder: Path,
    on_round: Callable[[RoundLine], None] = lambda line: None,
    released: Callable[[], PoolFile | None] = lambda: None,
    clock: Clock = REAL_TIME,
) -> ServerState:
    """All rounds of a federation in `folder`, or those that are left after the newest checkpoint there.

    Killed at any moment and started again, it ends with the same bits if the same nodes answer: a round's effects, its
    ledger entries and the quarantine are one checkpoint, and what is drawn depends on the seed and the round alone.
    Whatever else ends it (an error, Ctrl-C, SIGTERM) leaves a checkpoint of the last finished round.

    first: the state before the first round. released: the release that nodes are to serve, asked in every round.

    Raises RunError when the folder is in use or holds another federation, when too few nodes join, and when a round
    stays below its quorum; CheckpointError when the state cannot be read or written.
    """
    with _sigterm_exits(), opened(folder, config) as kept, closing(make_lifter(config.compute)) as lifter:
        record = kept.load(rules)
        if record is None:
            record = Record(first, uuid4().hex)
            kept.save(record)
        kept.note_config()
        desk = Desk(config, kept.audit_log(), record.desk)
        roster = Roster(nodes, clock, config.deployment)
        patience = Patience(config.deployment.quarantine_rounds)
        session = Session(record.federation, config, rules, nodes, roster, desk, lifter, clock, patience)
        return _Run(session, kept, record, on_round, released).finish()


class _Run:
    """The rounds that are left. `_record` is the state after the last finished one, `_head` is what nodes see of it."""

    def __init__(
        self,
        session: Session,
        folder: StateFolder,
        record: Record,
        on_round: Callable[[RoundLine], None],
        released: Callable[[], PoolFile | None],
    ) -> None:
        self._session, self._folder, self._record = session, folder, record
        self._head = session.head(record.state, folder.durable_round)
        self._on_round, self._released = on_round, released
        self._announcer = Announcer(session)
        self._watch = CollapseWatch()
        self._rounds = folder.rounds(self._round_index)
        self._evaluations = folder.evaluations(self._round_index)

    def finish(self) -> ServerState:
        """Does the rounds, and the evaluations that are due."""
        try:
            self._evaluate_if_due()
            while self._round_index < self._session.config.federation.rounds:
                self._round()
                self._evaluate_if_due()
        except BaseException:  # finished rounds outlive whatever ends the run
            if not self._folder.holds(self._round_index):
                self._folder.save(self._record)
            raise
        return self._record.state

    @property
    def _round_index(self) -> int:
        return self._record.state.round_index

    def _round(self) -> None:
        done = self._tried()
        state = _applied(self._session, self._record.state, done.outcome)
        line = done.line(self._session.clock.now()).with_health(gate_health(self._record.state.values, state.values))
        self._rounds.add(line)  # before its checkpoint: a resume drops the rounds that it does again
        self._record = replace(self._record, state=state, desk=self._session.desk.to_meta())
        federation = self._session.config.federation
        if self._round_index % federation.checkpoint_every == 0 or self._round_index == federation.rounds:
            self._folder.save(self._record)
        self._head = self._session.head(state, self._folder.durable_round)
        self._on_round(line)
        self._watch.note(line.round_index, line.metrics or {})

    def _tried(self) -> Try:
        """The first try of the next round that reaches the quorum. Raises RunError without one, or without nodes.

        Before the next try the nodes that gave no answer describe themselves anew: those that do not are not asked
        again, and are waited for only where fewer than `deployment.nodes` others are there.
        """
        attempts = self._session.config.deployment.attempts
        for attempt in range(1, attempts + 1):
            self._gather()
            done = try_round(self._session, self._head, attempt)
            if self._reaches_quorum(done):
                return done
            self._session.desk.refuse_round()
            _log.error("try %d of %d is refused: %s", attempt, attempts, self._counts(done))
            if attempt < attempts:
                self._session.roster.forget(done.faults)
                self._session.roster.watch(min(_PAUSE**attempt, self._session.config.deployment.join_seconds))
        raise RunError(
            f"{self._counts(done)}; {attempts} tries (deployment.attempts) were no better. The state is that of round "
            f"{self._round_index}: see {AUDIT_NAME} and the nodes' logs, then start again; or lower the quorum"
        )

    def _gather(self) -> None:
        roster = self._session.roster
        if not roster.gather():
            raise RunError(
                f"{roster.shortage}; start more nodes or look at their logs, then start again: the state is that of "
                f"round {self._round_index}"
            )
        self._announce()

    def _announce(self) -> None:
        """A release that cannot be read is the operator's to mend: training goes on without it."""
        try:
            release = self._released()
        except (FedquiltError, OSError) as error:
            _log.error("no release is announced: %s", error)
            return
        if release is not None:
            self._announcer.announce(release, self._head)

    def _reaches_quorum(self, done: Try) -> bool:
        least = self._session.config.deployment.quorum * done.plan.users
        return done.outcome.partial is not None and done.outcome.admitted >= least

    def _counts(self, done: Try) -> str:
        outcome, quorum = done.outcome, self._session.config.deployment.quorum
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.rejected.items()))
        return (
            f"round {done.plan.work.round_index} needs {quorum:.0%} of the users it asks (deployment.quorum), admitted "
            f"are {outcome.admitted} of {done.plan.users}, from {done.nodes} of {len(done.plan.seats)} nodes"
            f"{f' (not: {reasons})' if reasons else ''}"
        )

    def _evaluate_if_due(self) -> None:
        every, last = self._session.config.deployment.evaluate_every, self._session.config.federation.rounds
        due = self._round_index == last or (every and self._round_index and self._round_index % every == 0)
        if not due or self._round_index in self._evaluations:
            return
        if not self._session.roster.gather():
            _log.warning("%s; those that are there are evaluated", self._session.roster.shortage)
        self._evaluations.add(evaluate(self._session, self._head))


def _applied(session: Session, state: ServerState, outcome: Outcome) -> ServerState:
    """The state after a round."""
    frozen = frozen_factors(session.config, state.round_index + 1)
    after = close(state, outcome.partial, session.rules, frozen)
    session.desk.apply()
    return after


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit, once; afterwards it goes on to the handler that was there before, if there is
    one: Flower's tells the SuperLink how the run has ended. Only the main thread may handle signals: elsewhere nothing
    changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came and callable(before):
            signal.raise_signal(signal.SIGTERM)
