"""A user's course as bytes, and on its device from one personalisation to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from client import personal_store
from client.continual.course import Standing, adapt_to, begin
from client.continual.device import goes_on, kept_active
from client.continual.kept import KeptCourse, course_from
from client.continual.rules import course_of
from client.node import Node
from client.personal import active_rows, personal_schema, task_known, task_mask, tuning_of
from client.personal_store import Kept
from client.serving import Rebased, Serving
from federation.codec import decode_personal
from federation.data.population import Batch
from federation.errors import ConfigError, NodeError, StoreError
from federation.pool.file import PoolFile
from tests import models
from tests.client.courses import RULES, Stream, alone, course_with, taken
from tests.client.served import TASK, equal, opened, pool_of, released, rows_of, task_config

TASKS = 3
LEARNED = {"signal": "fomaml", "rule": {"name": "rates"}, "start": {"name": "contextual"}, "tasks": 2}
SERVED = [rule for rule in RULES if rule not in ("none", "lwf")]


def course_config(rule: str, **changes: object):
    continual = {"rule": rule, **RULES[rule]}
    return task_config(personal=TASK["personal"] | {"continual": continual}, **changes)


def learned_config(rule: str):
    return course_config(rule, meta=LEARNED, local={"steps": 4, "learning_rate": 0.05})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = opened(tmp_path / "state")
    yield made
    made.close()


def same(a: Standing, b: Standing) -> bool:
    kinds = ((getattr(a, kind), getattr(b, kind)) for kind in ("rows", "tuner", "memory"))
    return (a.tasks, a.at) == (b.tasks, b.at) and all(equal(dict(x), dict(y)) for x, y in kinds)


# -------------------------------------------------------------------------------- bytes


def kept_course(rule: str) -> tuple[KeptCourse, object]:
    make = models.gpt2 if rule == "lwf" else models.mlp
    course = alone(course_with(make, rule), 1)
    standing = taken(course, Stream.of(course.model.base, 2), np.array([1]))[-1]
    start = {name: row + 1.0 for name, row in course.active.rows.items()}
    return KeptCourse(standing, start, course.rule.name, course.rule.version, "r3-00ff", "adam"), course.rule


@pytest.mark.parametrize("rule", RULES)
def test_a_course_is_what_was_written(rule: str) -> None:
    course, its_rule = kept_course(rule)
    payload = course.to_bytes()
    found = course_from(payload, list(course.standing.rows))
    assert same(found.standing, course.standing)
    assert list(found.standing.rows) == list(course.standing.rows)
    assert equal(dict(found.start), dict(course.start))
    assert found.of(its_rule, "r3-00ff") is found
    assert found.to_bytes() == payload
    for name, tensor in course.standing.memory.items():
        assert found.standing.memory[name].dtype == tensor.dtype


def test_the_order_of_rows_is_the_models_whatever_the_bytes_say() -> None:
    course, _ = kept_course("ewc")
    names = list(course.standing.rows)
    turned = {name: course.standing.rows[name] for name in reversed(names)}
    payload = replace(course, standing=replace(course.standing, rows=turned)).to_bytes()
    assert list(course_from(payload, names).standing.rows) == names


def test_the_bytes_are_those_of_the_table(tmp_path: Path) -> None:
    course, _ = kept_course("online_ewc")
    (tmp_path / "course").write_bytes(course.to_bytes())
    with safe_open(tmp_path / "course", "pt") as file:
        assert json.loads(file.metadata()["fedquilt"]) == {
            "format": "fedquilt course 2", "rule": "online_ewc", "version": 1, "pool": "r3-00ff", "tuner": "adam",
            "tasks": 2, "at": 0,
        }  # fmt: skip
        sections = ("pool/0", "pool/2")
        names = {f"{part}/{m}" for part in ("rows", "start", "memory/fisher", "memory/anchor") for m in sections}
        assert set(file.keys()) == {n.replace("fisher/", "fisher ").replace("anchor/", "anchor ") for n in names}


def test_another_rule_version_or_pool_is_refused() -> None:
    course, rule = kept_course("ewc")
    with pytest.raises(StoreError, match=r"rule 'ewc', version 1; the task's is 'replay', version 1"):
        course.of(course_with(models.mlp, "replay").rule, "r3-00ff")
    with pytest.raises(StoreError, match=r"rule 'ewc', version 0; the task's is 'ewc', version 1"):
        replace(course, rule_version=0).of(rule, "r3-00ff")
    with pytest.raises(StoreError, match=r"refers to the pool r3-00ff, the values to r4-00ff"):
        course.of(rule, "r4-00ff")


@pytest.mark.parametrize("damage", ["empty", "cut", "format", "sections", "length"])
def test_bytes_that_are_no_course_are_refused(damage: str) -> None:
    course, _ = kept_course("ewc")
    payload, names = course.to_bytes(), list(course.standing.rows)
    if damage == "sections":
        names = ["pool/other"]
    changed = {
        "empty": b"",
        "cut": payload[: len(payload) // 2],
        "format": payload.replace(b"fedquilt course 2", b"fedquilt course 3"),
        "length": b"\xff" * 8 + payload[8:],
    }.get(damage, payload)
    with pytest.raises(StoreError, match=r"bytes are no course of this release of fedquilt"):
        course_from(changed, names)


# -------------------------------------------------------------------------------- on a device


def uninterrupted(node: Node, version: str, user_id: int, tasks: int) -> list[Standing]:
    """One user's course, held in memory, by the mask and the start that its first task proposes."""
    task, values = node.loaded(version)
    ids = np.array([user_id])
    known = task_known(task, values, node, ids)
    active = active_rows(values, task.model.spec, task_mask(task, known, ids))
    course = course_of(task.model, active, tuning_of(task, values, known, active), task.config.personal.continual)
    standings = [begin(course)]
    for index in range(tasks):
        streams = task.streams.at("serve", "task", index)
        standings.append(adapt_to(course, standings[-1], node, ids, streams))
    return standings[1:]


def remembered(node: Node, user_id: int) -> KeptCourse:
    kept = node.personal.get(user_id)
    assert kept is not None
    version, names = kept.version, [m.section for m in node.loaded(kept.version)[0].model.spec.modules]
    course = course_from(kept.memory, names)
    assert course.pool == version
    return course


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rule", SERVED)
def test_a_course_outlives_restarts(tmp_path: Path, rule: str, learned: bool) -> None:
    """Bit for bit; also with a learned rule, which remembers its steps, from a learned start."""
    state = tmp_path / "state"
    with_course = opened(state)
    version = released(with_course, config=learned_config(rule) if learned else course_config(rule))
    expected = uninterrupted(with_course, version, 2, TASKS)
    with_course.close()
    for standing in expected:
        again = opened(state)
        Serving(again).personalize("2")
        found = remembered(again, 2)
        assert same(found.standing, standing)
        assert (found.start is not None) == bool(found.standing.tuner) == learned
        for name, row in rows_of(Serving(again), "2").items():
            torch.testing.assert_close(row, standing.rows[name], rtol=0.02, atol=0.02)
        again.close()
    assert not same(expected[0], expected[1])


def test_a_course_stays_with_its_mask_and_its_start_whatever_comes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """User 2 finds the data of user 5 in its second task."""
    serving, batch = Serving(node), node.batch
    version = released(node, config=learned_config("ewc"))
    task, values = node.loaded(version)

    def proposed_mask() -> Tensor:
        ids = np.array([2])
        return task_mask(task, task_known(task, values, node, ids), ids)

    serving.personalize("2")
    before, mask_ug = remembered(node, 2), proposed_mask()
    monkeypatch.setattr(node, "batch", lambda ids, *rest: batch(np.array([5]), *rest))
    assert not torch.equal(proposed_mask(), mask_ug)
    serving.personalize("2")
    after, kept = remembered(node, 2), node.personal.get(2)
    assert kept is not None
    units = active_rows(values, task.model.spec, mask_ug).units
    sections = decode_personal(kept.payload, personal_schema(task.model.spec, "rows"), version)
    for j, section in enumerate(sections.values()):
        assert torch.equal(section.ids_uk.long(), units.ids_ujk[:, j])
    assert equal(dict(after.start), dict(before.start))
    assert not equal(dict(after.standing.rows), dict(before.standing.rows))


def test_a_meta_learned_sequence_goes_on_without_a_rule(node: Node) -> None:
    assert goes_on(learned_config("none"))
    assert not goes_on(course_config("none"))
    assert not goes_on(course_config("none", meta=LEARNED | {"tasks": 1}, local={"steps": 4, "learning_rate": 0.05}))
    version = released(node, config=learned_config("none"))
    for standing in uninterrupted(node, version, 2, TASKS):
        Serving(node).personalize("2")
        assert same(remembered(node, 2).standing, standing)


def test_without_a_rule_nothing_is_remembered(node: Node) -> None:
    released(node)
    first = Serving(node).personalize("2")
    kept = node.personal.get(2)
    assert kept is not None
    assert kept.memory == b""
    assert Serving(node).personalize("2") == first
    assert node.personal.get(2) == kept


def test_values_of_another_rule_are_refused_until_the_course_begins_anew(node: Node) -> None:
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    serving.personalize("2")
    had, rows = node.personal.get(2), rows_of(serving, "2")
    values = node.pool(node.release).values
    node.adopt(node.keep(PoolFile(4, values, course_config("replay")).to_bytes()))
    serving.rebase(node.release, "2", margin=1e-3)
    with pytest.raises(StoreError, match=r"course of user '2' cannot go on: .* rule 'ewc', .*; have it begin anew"):
        serving.personalize("2")
    assert equal(rows_of(serving, "2"), rows)
    assert had is not None
    serving.begin_anew("2")
    assert equal(rows_of(serving, "2"), rows)
    serving.personalize("2")
    found = remembered(node, 2)
    assert (found.rule, found.standing.tasks) == ("replay", 1)
    serving.begin_anew("3")
    assert node.personal.get(3) is None


def test_a_course_is_not_dropped_by_a_release_without_a_rule(node: Node) -> None:
    serving = Serving(node)
    for rule in (course_config("replay"), learned_config("none")):
        released(node, config=rule)
        serving.personalize("2")
        newer = node.keep(pool_of(node, task_config(), 4).to_bytes())
        node.adopt(newer)
        for moved in (0, 1):
            had = node.personal.get(2)
            with pytest.raises(StoreError, match=r"course of user '2' cannot go on: .* no continual rule .*begin-anew"):
                serving.personalize("2")
            assert node.personal.get(2) == had
            if not moved:
                assert serving.rebase(newer, "2", margin=1e9) == Rebased(1, 0)
        serving.begin_anew("2")
        serving.personalize("2")
        kept = node.personal.get(2)
        assert kept is not None
        assert (kept.version, kept.memory) == (newer, b"")


LEARNED_BY_SGD = LEARNED | {"rule": {"name": "sgd"}}


@pytest.mark.parametrize(
    ("first", "then", "at"),
    [
        (LEARNED, {}, 0),
        (LEARNED, LEARNED_BY_SGD, 4),
        (LEARNED_BY_SGD, LEARNED, 4),
        (LEARNED, LEARNED, 8),
    ],
)
def test_another_tuner_counts_anew(node: Node, first: dict[str, object], then: dict[str, object], at: int) -> None:
    """It begins where the course stands, without a velocity that is not its own."""
    serving, local = Serving(node), {"steps": 4, "learning_rate": 0.05}
    released(node, config=course_config("replay", meta=first, local=local))
    serving.personalize("2")
    newer = released(node, 4, course_config("replay", meta=then, local=local))
    assert serving.rebase(newer, "2", margin=1e9) == Rebased(1, 0)
    stands = remembered(node, 2)
    task, values = node.loaded(newer)
    ids = np.array([2])
    kept = node.personal.get(2)
    assert kept is not None
    sections = decode_personal(kept.payload, personal_schema(task.model.spec, "rows"), newer)
    active = kept_active(values, task.model.spec, sections)
    tuning = tuning_of(task, values, task_known(task, values, node, ids), active)
    course = course_of(task.model, active, replace(tuning, start=stands.start), task.config.personal.continual)
    same_tuner = first == then
    begun = stands.standing if same_tuner else replace(stands.standing, at=0, tuner={})
    expected = adapt_to(course, begun, node, ids, task.streams.at("serve", "task", 1))
    serving.personalize("2")
    found = remembered(node, 2)
    assert same(found.standing, expected)
    assert (found.standing.at, bool(found.standing.tuner)) == (at, then is LEARNED)


def test_a_course_on_another_release_is_refused_until_it_is_rebased(node: Node) -> None:
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    serving.personalize("2")
    serving.personalize("2")
    had = node.personal.get(2)
    newer = released(node, 4, course_config("ewc"))
    with pytest.raises(NodeError, match=r"user '2' is in a course on the release r3-.* serves r4-.*; rebase the user"):
        serving.personalize("2")
    assert node.personal.get(2) == had
    assert serving.rebase(newer, "2", margin=1e9) == Rebased(1, 0)
    serving.personalize("2")
    assert remembered(node, 2).standing.tasks == 3


def test_rows_move_with_the_pool_and_nothing_else_does(node: Node) -> None:
    """A difference to the pool stays what it was, in the rows and in those that are remembered."""
    serving, config = Serving(node), learned_config("ewc")
    first = released(node, config=config)
    serving.personalize("2")
    before = remembered(node, 2)
    newer = node.keep(pool_of(node, config, 5).to_bytes())
    assert serving.rebase(newer, "2", margin=1e9) == Rebased(1, 0)
    after = remembered(node, 2)
    assert (after.pool, after.standing.tasks, after.standing.at) == (newer, 1, 4)
    task, values = node.loaded(first)
    known = task_known(task, values, node, np.array([2]))
    mask_ug = task_mask(task, known, np.array([2]))
    old, new = (active_rows(node.loaded(v)[1], task.model.spec, mask_ug).rows for v in (first, newer))

    def differences(course: KeptCourse, pool: dict[str, Tensor]) -> dict[str, Tensor]:
        anchors = {f"anchor {name}": course.standing.memory[f"anchor 0 {name}"] - row for name, row in pool.items()}
        starts = {f"start {name}": course.start[name] - row for name, row in pool.items()}
        return {name: course.standing.rows[name] - row for name, row in pool.items()} | anchors | starts

    had, has = differences(before, old), differences(after, new)
    for name, row in had.items():
        torch.testing.assert_close(has[name], row, rtol=1e-4, atol=1e-6)
        assert row.any()
    for name, tensor in before.standing.memory.items():
        assert name.startswith("anchor") or torch.equal(tensor, after.standing.memory[name])
    assert equal(dict(before.standing.tuner), dict(after.standing.tuner))


def test_a_rule_without_room_is_refused_and_the_user_has_what_it_had(node: Node) -> None:
    """Of 20 + 16 entries in 4 bytes, 2 of a module's units: 288 bytes a task, twice; the fourth task is too many."""
    serving = Serving(node)
    tight = {"continual": {"rule": "ewc", "max_kib": 2}}
    released(node, config=task_config(personal=TASK["personal"] | tight))
    for _ in range(3):
        serving.personalize("2")
    had = node.personal.get(2)
    with pytest.raises(ConfigError, match=r"max_kib \(2 KiB\), the rule 'ewc' needs 2304 bytes after task 4; raise it"):
        serving.personalize("2")
    assert node.personal.get(2) == had


def test_a_task_that_diverges_leaves_the_course_as_it_was(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, batch = Serving(node), node.batch
    released(node, config=course_config("replay"))
    serving.personalize("2")
    had = node.personal.get(2)

    def wild(ids, part, size, streams) -> Batch:
        found = batch(ids, part, size, streams)
        return replace(found, inputs=found.inputs * torch.nan) if part == "support" and size == 4 else found

    monkeypatch.setattr(node, "batch", wild)
    with pytest.raises(NodeError, match=r"user '2' got nan; .*lower it\. What the user had is as it was"):
        serving.personalize("2")
    assert node.personal.get(2) == had


def test_damaged_values_begin_a_course_anew(node: Node) -> None:
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    for _ in range(2):
        serving.personalize("2")
    kept = node.personal.get(2)
    assert kept is not None
    node.personal.put(2, replace(kept, payload=kept.payload[:-1] + bytes([kept.payload[-1] ^ 1])))
    serving.personalize("2")
    assert remembered(node, 2).standing.tasks == 1


@pytest.mark.parametrize("rule", ["none", "ewc"])
def test_values_that_another_fedquilt_can_read_are_not_replaced(
    node: Node, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    serving = Serving(node)
    released(node, config=course_config(rule))
    serving.personalize("2")
    had = node.personal.get(2)
    assert had is not None
    with monkeypatch.context() as newer:
        newer.setattr(personal_store, "FORMAT_VERSION", 3)
        node.personal.put(2, had)
    with pytest.raises(StoreError, match=r"values of user 2 are of format 3, this fedquilt reads up to 2; upgrade it"):
        serving.personalize("2")
    monkeypatch.setattr(personal_store, "FORMAT_VERSION", 3)
    assert node.personal.get(2) == had


def test_a_payload_that_a_newer_fedquilt_wrote_is_not_replaced(node: Node) -> None:
    """Byte 2 is the version of the payload's table, 1; its checksum is right."""
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    serving.personalize("2")
    kept = node.personal.get(2)
    assert kept is not None
    body = kept.payload[:2] + b"\2" + kept.payload[3:-4]
    newer = replace(kept, payload=body + crc32(body).to_bytes(4, "little"))
    node.personal.put(2, newer)
    with pytest.raises(StoreError, match=r"values of user '2' cannot be read .*version.*; upgrade .*begin-anew"):
        serving.personalize("2")
    assert node.personal.get(2) == newer
    serving.begin_anew("2")
    serving.personalize("2")
    assert remembered(node, 2).standing.tasks == 1


def test_a_store_that_cannot_be_used_for_a_moment_begins_nothing_anew(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    serving.personalize("2")
    had = node.personal.get(2)

    def busy(user_id: int) -> Kept | None:
        raise StoreError("the store cannot be used")

    with monkeypatch.context() as moment:
        moment.setattr(node.personal, "get", busy)
        with pytest.raises(StoreError, match="cannot be used"):
            serving.personalize("2")
    assert node.personal.get(2) == had
    serving.personalize("2")
    assert remembered(node, 2).standing.tasks == 2


def test_a_course_by_an_older_format_is_refused_with_the_remedy(node: Node) -> None:
    serving = Serving(node)
    released(node, config=course_config("ewc"))
    serving.personalize("2")
    kept = node.personal.get(2)
    assert kept is not None
    node.personal.put(2, replace(kept, memory=kept.memory.replace(b"course 2", b"course 1")))
    with pytest.raises(StoreError, match=r"user '2' cannot go on: .*'fedquilt course 1', not .*; have it begin anew"):
        serving.personalize("2")
    newer = node.keep(pool_of(node, course_config("ewc"), 5).to_bytes())
    with pytest.raises(StoreError, match=r"user '2' cannot move: .*'fedquilt course 1', not .*; have it begin anew"):
        serving.rebase(newer, "2", margin=1e9)
    serving.begin_anew("2")
    serving.personalize("2")
    assert remembered(node, 2).standing.tasks == 1


def test_values_without_a_memory_begin_a_course(node: Node) -> None:
    """As those that were kept before courses were, on this release or another."""
    serving = Serving(node)
    version = released(node, config=course_config("ewc"))
    serving.personalize("2")
    kept = node.personal.get(2)
    assert kept is not None
    node.personal.put(2, Kept(version, kept.payload))
    newer = released(node, 4, course_config("ewc"))
    assert serving.personalize("2").version == newer
    assert remembered(node, 2).standing.tasks == 1


def test_forgetting_takes_the_course_too(node: Node) -> None:
    serving = Serving(node)
    released(node, config=course_config("replay"))
    serving.personalize("2")
    assert serving.forget("2").had_values
    assert node.personal.users().tolist() == []
