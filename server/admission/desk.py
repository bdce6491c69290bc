"""The desk where replies arrive: what is refused before anything of it is decoded, who is left out, and what is noted.

In this order: the size of the reply; that it is a contribution; the ledger (nothing is applied twice); the work that it
echoes; that its seat is still open; the number and sizes of its users' updates. What is inside an update is judged
where it is decoded (`server/admission/lifting.py`).

| reason | the node is left out |
|---|---|
| oversized reply, no contribution, other content, foreign work, malformed frames | yes |
| malformed update, no user admitted (found later, `Desk.quarantine`) | yes |
| repeated, stale, late | no: delivery is to blame, or it was slow |
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from federation import frames
from federation.codec import weight_of
from federation.config import RunConfig
from federation.errors import CodecError
from federation.exchange import Contribution, Work
from server.admission.audit import AuditLog, Event
from server.admission.ledger import Ledger, Quarantine, Sentence
from server.nodes import Parcel
from server.plan import Seat

Reason = Literal[
    "oversized reply",
    "no contribution",
    "repeated",
    "other content",
    "stale",
    "foreign work",
    "late",
    "malformed frames",
    "malformed update",
    "no user admitted",
]
_PARDONED: tuple[Reason, ...] = ("repeated", "stale", "late")

_log = logging.getLogger("fedquilt")


@dataclass(frozen=True)
class Admitted:
    """A reply that may be decoded: an update for each user of its seat, in order.

    scale: for the weight of each of them, so that all users of a node together do not weigh more than it may.
    """

    payloads: tuple[bytes, ...]
    scale: float


class Desk:
    """Judges replies. Keeps the ledger and the quarantine, and writes the audit log.

    A round: `begin`, then `judge` and `quarantine`, then `apply` when the round changes the state, and `to_meta` for
    the checkpoint of that state. A round that is refused is begun again instead: its ledger entries are gone, those who
    are left out stay so. A crash forgets both back to the checkpoint, and the same reply is judged the same again.
    """

    def __init__(self, config: RunConfig, audit: AuditLog, meta: Mapping[str, Any] | None = None) -> None:
        """meta: of `to_meta`. Raises RunError where the audit log cannot be written, as all that write to it do."""
        self._limits = config.limits
        self._deployment = config.deployment
        self._audit = audit
        self._ledger = Ledger(meta and meta["ledger"])
        self._quarantine = Quarantine(meta and meta["quarantine"])
        self.repeats = 0

    def begin(self, work: Work) -> None:
        """Work whose replies are awaited from now on."""
        self._work = work
        self._ledger.begin(work)
        self.repeats = 0

    def judge(self, parcel: Parcel, seat: Seat | None) -> Admitted | Reason:
        """What may be decoded of a parcel, or why nothing. seat: of the node, None when it is no longer open."""
        try:
            return self._opened(parcel, seat)
        except _Fault as fault:
            if fault.reason == "repeated":
                self.repeats += 1
                self._write(parcel.node, "repeated", fault.reason)
            elif fault.reason in _PARDONED:
                self._write(parcel.node, "refused", fault.reason)
            else:
                self.quarantine(parcel.node, fault.reason, str(fault))
            return fault.reason

    def quarantine(self, node: int, reason: Reason, words: str) -> None:
        """Leaves a node out of the rounds to come. words: for the operator; not of the node's making."""
        until = self._work.round_index + self._deployment.quarantine_rounds
        self._quarantine.add(node, Sentence(reason, until))
        self._write(node, "quarantined", reason, until)
        _log.warning("node %d is left out until round %d: %s (%s)", node, until, reason, words)

    def quarantined(self, round_index: int) -> frozenset[int]:
        """Who is left out of a round."""
        return self._quarantine.nodes(round_index)

    def apply(self) -> None:
        """The replies that were admitted since `begin` are in the state from now on."""
        self._ledger.apply()

    def refuse_round(self) -> None:
        """The round in hand does not change the state."""
        self._audit.write(self._work, None, "round refused", "below quorum")

    def to_meta(self) -> dict[str, Any]:
        """What a checkpoint of the state keeps, as JSON."""
        return {"ledger": self._ledger.to_meta(), "quarantine": self._quarantine.to_meta(self._work.round_index)}

    def _opened(self, parcel: Parcel, seat: Seat | None) -> Admitted:
        contribution = self._contribution(parcel)
        self._check_new(parcel.node, contribution)
        self._check_work(contribution.work)
        if seat is None:
            raise _Fault("late", "its seat was given up")
        self._ledger.note(parcel.node, _digest(contribution))
        payloads = self._payloads(contribution, len(seat.positions))
        return Admitted(tuple(payloads), self._scale(payloads))

    def _contribution(self, parcel: Parcel) -> Contribution:
        answer, most = parcel.answer, _bytes_of(self._deployment.max_reply_mib)
        size = max(parcel.size_bytes, len(answer.payload) if isinstance(answer, Contribution) else 0)
        if size > most:
            raise _Fault("oversized reply", f"{size} bytes, deployment.max_reply_mib allows {most}")
        if not isinstance(answer, Contribution):
            raise _Fault("no contribution", f"a {type(answer).__name__} where updates were asked for")
        return answer

    def _check_new(self, node: int, contribution: Contribution) -> None:
        known = self._ledger.digest(contribution.work, node)
        if known is not None:
            if known == _digest(contribution):
                raise _Fault("repeated", "the same reply again")
            raise _Fault("other content", "two replies to the same work differ")

    def _check_work(self, claimed: Work) -> None:
        asked = self._work
        if claimed == asked:
            return
        turn = (asked.round_index, asked.attempt)
        if claimed.federation == asked.federation and (claimed.round_index, claimed.attempt) < turn:
            raise _Fault("stale", "of an earlier round or attempt")
        raise _Fault("foreign work", "of a federation, round, attempt or version that nobody asked for")

    def _payloads(self, contribution: Contribution, users: int) -> Sequence[bytes]:
        try:
            payloads = frames.split(contribution.payload, users, _bytes_of(self._deployment.max_update_mib))
        except CodecError as error:
            raise _Fault("malformed frames", str(error)) from error
        if len(payloads) != users:
            raise _Fault("malformed frames", f"{len(payloads)} updates of {users} users")
        return payloads

    def _scale(self, payloads: Sequence[bytes]) -> float:
        """Weights are those that the updates claim, each at most `limits.weight`: refused users count too."""
        claimed = sum(min(weight_of(payload), self._limits.weight) for payload in payloads)
        cap = self._limits.node_weight
        return 1.0 if cap is None or claimed <= cap else cap / claimed

    def _write(self, node: int, event: Event, reason: Reason, until: int | None = None) -> None:
        self._audit.write(self._work, node, event, reason, until)


class _Fault(Exception):
    """Why a parcel is refused."""

    def __init__(self, reason: Reason, words: str) -> None:
        super().__init__(words)
        self.reason = reason


def _digest(contribution: Contribution) -> str:
    return hashlib.sha256(contribution.payload).hexdigest()


def _bytes_of(mib: float) -> int:
    return int(mib * 2**20)
