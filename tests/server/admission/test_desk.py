"""The desk: what it refuses and why, who is left out until when, and what it remembers through checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from federation.errors import RunError
from federation.exchange import Description, Measures, Refusal
from server.admission.audit import AuditLog
from server.admission.desk import Admitted, Desk
from server.nodes import Parcel
from server.plan import Seat
from tests.server.admission.replies import WORK, config_of, parcel, payload_of, payloads_of, reply, update_of

SEAT = Seat(node=7, positions=(3, 5), first=0)
PAYLOADS = payloads_of(SEAT)
REPLY = reply(PAYLOADS)
OTHER = reply(PAYLOADS[::-1])
NEXT = replace(WORK, round_index=6, attempt=1, version="r5-def")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def desk_in(folder: Path, *overrides: str, meta: Any = None) -> Desk:
    desk = Desk(config_of(*overrides), AuditLog(folder / "audit.jsonl"), meta)
    desk.begin(WORK)
    return desk


# -------------------------------------------------------------------------------- verdicts


def test_a_reply_as_asked_for_is_admitted_and_nothing_is_written_of_it(tmp_path: Path) -> None:
    assert desk_in(tmp_path).judge(parcel(7, REPLY), SEAT) == Admitted(tuple(PAYLOADS), 1.0)
    assert lines(tmp_path) == []


LARGE = {"max_reply_mib": 11_000, "max_update_mib": 1_100}
VERDICTS: dict[str, tuple[Any, str, bool]] = {
    "a reply that is too large": (replace(REPLY, payload=bytes(LARGE["max_reply_mib"])), "oversized reply", True),
    "an update that is too large": (reply([PAYLOADS[0], bytes(LARGE["max_update_mib"])]), "malformed frames", True),
    "text": ("an answer is one of ...", "no contribution", True),
    "sums of an evaluation": (Measures(WORK, {}, 2, {"loss": 1.0}), "no contribution", True),
    "a description": (Description({"train": 2}), "no contribution", True),
    "an earlier attempt": (replace(REPLY, work=replace(WORK, attempt=1)), "stale", False),
    "an earlier round": (replace(REPLY, work=replace(WORK, round_index=4, attempt=9, version="v")), "stale", False),
    "a later attempt": (replace(REPLY, work=replace(WORK, attempt=3)), "foreign work", True),
    "a later round": (replace(REPLY, work=replace(WORK, round_index=6, attempt=1)), "foreign work", True),
    "another version": (replace(REPLY, work=replace(WORK, version="r4-abd")), "foreign work", True),
    "another federation": (replace(REPLY, work=replace(WORK, federation="o", round_index=1)), "foreign work", True),
    "a user too many": (reply([*PAYLOADS, PAYLOADS[0]]), "malformed frames", True),
    "a user too few": (reply(PAYLOADS[:1]), "malformed frames", True),
    "nobody": (reply([]), "malformed frames", True),
    "nothing": (replace(REPLY, payload=b""), "malformed frames", True),
    "a reply cut short": (replace(REPLY, payload=REPLY.payload[:-1]), "malformed frames", True),
    "a byte more": (replace(REPLY, payload=REPLY.payload + b"\0"), "malformed frames", True),
}


@pytest.mark.parametrize(("answer", "reason", "left_out"), VERDICTS.values(), ids=VERDICTS)
def test_what_is_refused_and_who_is_left_out(tmp_path: Path, answer: Any, reason: str, left_out: bool) -> None:
    desk = desk_in(tmp_path)
    assert desk.judge(parcel(7, answer), SEAT) == reason
    assert desk.quarantined(6) == ({7} if left_out else set())
    (line,) = lines(tmp_path)
    assert datetime.fromisoformat(line.pop("time")).tzinfo == UTC
    event, until = ("quarantined", 11) if left_out else ("refused", None)
    assert line == {"round": 5, "attempt": 2, "node": 7, "event": event, "reason": reason, "until": until}


def test_the_size_is_judged_before_anything_else_is_looked_at(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    assert desk.judge(Parcel("t", 7, "any text", LARGE["max_reply_mib"]), SEAT) == "oversized reply"
    assert desk.judge(Parcel("t", 8, Refusal("busy", "x"), LARGE["max_reply_mib"]), SEAT) == "oversized reply"
    large = replace(REPLY, payload=bytes(LARGE["max_reply_mib"]), work=replace(WORK, federation="other"))
    assert desk.judge(Parcel("t", 9, large, size_bytes=0), SEAT) == "oversized reply"


def test_limits_themselves_are_allowed(tmp_path: Path) -> None:
    fits = f"deployment.max_reply_mib={len(REPLY.payload) / 2**20!r}"
    assert isinstance(desk_in(tmp_path, fits).judge(parcel(7, REPLY), SEAT), Admitted)
    below = f"deployment.max_reply_mib={(len(REPLY.payload) - 1) / 2**20!r}"
    assert desk_in(tmp_path, below).judge(parcel(7, REPLY), SEAT) == "oversized reply"


def test_a_seat_that_was_given_up_takes_nothing_and_nothing_is_noted(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    assert desk.judge(parcel(7, REPLY), None) == "late"
    assert desk.judge(parcel(7, OTHER), None) == "late"
    assert desk.quarantined(6) == set()
    desk.apply()
    assert desk.to_meta()["ledger"]["digests"] == {}


def test_what_a_node_says_is_neither_logged_nor_audited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    desk = desk_in(tmp_path)
    desk.judge(parcel(7, "my secret"), SEAT)
    desk.judge(parcel(8, replace(REPLY, work=replace(WORK, version="my secret"))), SEAT)
    assert len(lines(tmp_path)) == 2
    assert "secret" not in (tmp_path / "audit.jsonl").read_text() + caplog.text
    assert "node 7 is left out until round 11: no contribution" in caplog.text


# -------------------------------------------------------------------------------- weights


def weighing(weight: float) -> bytes:
    update = update_of(0)
    return payload_of(replace(update, weight_u=update.weight_u.new_tensor([weight])))


@pytest.mark.parametrize(
    ("weights", "scale"),
    [
        ([0.5, 0.25], 1.0),
        ([0.5, 0.5], 1.0),
        ([0.75, 0.75], 1 / 1.5),
        ([1e30, 0.75], 1 / 1.75),  # a user weighs at most 1
        ([float("nan"), 0.75], 1.0),
        ([-1e30, 1.0], 1.0),
        ([0.0, 0.0], 1.0),
    ],
)
def test_all_users_of_a_node_weigh_no_more_than_a_node_may(tmp_path: Path, weights: list[float], scale: float) -> None:
    answer = reply([weighing(weight) for weight in weights])
    admitted = desk_in(tmp_path, "limits.node_weight=1.0").judge(parcel(7, answer), SEAT)
    assert isinstance(admitted, Admitted)
    assert admitted.scale == pytest.approx(scale, rel=1e-12)


# -------------------------------------------------------------------------------- nothing twice


def test_the_same_reply_again_is_counted_and_other_content_is_not_taken(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    assert isinstance(desk.judge(parcel(7, REPLY), SEAT), Admitted)
    for seat in (SEAT, None):
        assert desk.judge(parcel(7, REPLY), seat) == "repeated"
    assert (desk.repeats, desk.quarantined(6)) == (2, set())
    assert desk.judge(parcel(7, OTHER), None) == "other content"
    assert desk.quarantined(6) == {7}
    assert [line["event"] for line in lines(tmp_path)] == ["repeated", "repeated", "quarantined"]
    assert isinstance(desk.judge(parcel(8, OTHER), replace(SEAT, node=8)), Admitted)
    desk.begin(NEXT)
    assert desk.repeats == 0


def test_a_reply_that_was_applied_is_known_after_a_restart(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    desk.judge(parcel(7, REPLY), SEAT)
    desk.apply()
    meta = json.loads(json.dumps(desk.to_meta()))
    digest = hashlib.sha256(REPLY.payload).hexdigest()
    assert meta["ledger"] == {"work": vars(WORK), "digests": {"7": digest}}
    for again in (desk, desk_in(tmp_path, meta=meta)):
        again.begin(NEXT)
        assert again.judge(parcel(7, REPLY), SEAT) == "repeated"
        assert again.judge(parcel(8, REPLY), SEAT) == "stale"
        assert again.quarantined(6) == set()
        assert again.judge(parcel(7, OTHER), SEAT) == "other content"
        assert again.quarantined(6) == {7}


def test_a_refused_round_leaves_no_entries_but_those_who_are_left_out_stay_so(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    desk.judge(parcel(7, REPLY), SEAT)
    desk.judge(parcel(8, "text"), SEAT)
    desk.begin(replace(WORK, attempt=3))
    assert desk.judge(parcel(7, REPLY), SEAT) == "stale"
    meta = desk.to_meta()
    assert meta["ledger"] == {}
    assert meta["quarantine"] == {"8": {"reason": "no contribution", "until": 11}}
    assert desk.judge(parcel(7, replace(OTHER, work=replace(WORK, attempt=3))), SEAT) == Admitted(
        tuple(PAYLOADS[::-1]), 1.0
    )


def test_entries_in_hand_are_not_saved_before_they_are_applied(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    desk.judge(parcel(7, REPLY), SEAT)
    desk.apply()
    saved = desk.to_meta()
    desk.begin(NEXT)
    desk.judge(parcel(7, replace(OTHER, work=NEXT)), SEAT)
    assert desk.to_meta() == saved
    desk.apply()
    assert list(desk.to_meta()["ledger"]["digests"]) == ["7"]
    assert desk.to_meta()["ledger"]["work"] == vars(NEXT)


def test_what_is_saved_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    desk, sizes = desk_in(tmp_path), []
    for round_index in range(10, 40):
        work = replace(WORK, round_index=round_index)
        desk.begin(work)
        for node in (7, 8):
            desk.judge(parcel(node, replace(REPLY, work=work)), SEAT)
        desk.judge(parcel(100 + round_index, "text"), SEAT)
        desk.apply()
        sizes.append(len(json.dumps(desk.to_meta())))
    assert len(set(sizes[10:])) == 1


def test_who_is_left_out_returns_after_its_rounds(tmp_path: Path) -> None:
    desk = desk_in(tmp_path, "deployment.quarantine_rounds=2")
    desk.judge(parcel(7, "text"), SEAT)
    assert [desk.quarantined(round_index) for round_index in (5, 6, 7, 8)] == [{7}, {7}, {7}, set()]
    later = desk_in(tmp_path, meta=json.loads(json.dumps(desk.to_meta())))
    assert [later.quarantined(round_index) for round_index in (7, 8)] == [{7}, set()]


# -------------------------------------------------------------------------------- the audit log


def test_an_audit_log_is_continued_after_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "audit.jsonl"
    AuditLog(path).write(WORK, 1, "refused", "stale")
    AuditLog(path).write(WORK, 2, "refused", "stale")
    with path.open("a") as file:
        file.write('{"time": "2030')
    AuditLog(path).write(WORK, 3, "refused", "stale")
    whole = path.read_text().splitlines()
    assert [json.loads(line)["node"] for line in (*whole[:2], *whole[3:])] == [1, 2, 3]
    assert whole[2] == '{"time": "2030'


def test_a_federation_does_not_run_unaudited(tmp_path: Path) -> None:
    said = r"the audit log .*audit\.jsonl must be writable .*; free space or mend the folder, then run again"
    (tmp_path / "taken" / "audit.jsonl").mkdir(parents=True)
    with pytest.raises(RunError, match=said):
        AuditLog(tmp_path / "taken" / "audit.jsonl")
    log = AuditLog(tmp_path / "audit.jsonl")
    (tmp_path / "audit.jsonl").unlink()
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(RunError, match=said):
        log.write(WORK, 7, "refused", "stale")
