"""A personal model for each of a node's users, from the release in service; `writing.py` has them write.

Rows that a user tuned are kept as a difference to the release that they were tuned on, which the node keeps for as
long. Personalising a user again begins anew, or, where the task has a continual rule, is the next task of its course,
on the release that the course began on. A user without any values is served by the mask that the release's policy
proposes; before the first release, everyone is served by the base. All calls may be made from several threads, and
beside a training.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from client.continual.device import course_on, goes_on, next_task
from client.node import Node
from client.personal import (
    ActiveRows,
    active_rows,
    personal_schema,
    personal_sections,
    personal_values,
    served_rows,
    task_known,
    task_mask,
    tuning_of,
)
from client.personal_store import Kept
from client.policies import Known
from client.task import Task, row_format
from federation.codec import decode_personal, encode_personal
from federation.devices import making_tensors_on
from federation.errors import CodecError, NodeError, StoreError
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec, Rows
from federation.streams import UserIds
from federation.update import Section, Values

CANNOT_UNDO = (
    "what the user contributed to pools, which servers hold",
    "the user's own data, in the folder that the node reads, and copies of the node's folder",
    "files that were damaged and set aside, and freed pages of the node's stores until they are used again",
)
_REMEMBERED = 256
"""Users whose proposed masks are held in memory: proposing one takes a backward pass."""


@dataclass(frozen=True)
class Personalised:
    """What came of it. version: of the release. losses: on the user's query part, nats per target, by the proposed
    mask alone and with the kept values."""

    version: str
    steps: int
    personal_bytes: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Forgotten:
    """What was removed: personal values, and the training state that so many federations had. And what remains."""

    had_values: bool
    federations: int
    cannot_undo: tuple[str, ...] = CANNOT_UNDO


@dataclass(frozen=True)
class Rebased:
    """How many users' values were moved to the newer release, and how many stayed with their own."""

    moved: int
    stayed: int


@dataclass(frozen=True)
class ServingStatus:
    """A node in numbers. users: by split. versions: of the pools that are kept. release: "" for none."""

    users: Mapping[str, int]
    personalised: int
    forgotten: int
    release: str
    versions: tuple[str, ...]
    disk_bytes: int


@dataclass(frozen=True)
class PersonalModel:
    """A model and one user's rows, {section: (1, k, d_in + d_out)}; None for the base alone."""

    model: PooledModel
    rows: Mapping[str, Tensor] | None


class Serving:
    """A node's users, served. Raises NodeError for users that are not the node's, from every method that takes one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._keeping = threading.Lock()
        self._masks: dict[tuple[int, str], Tensor] = {}
        self._awaited: Counter[str] = Counter()

    def personalize(self, user: str) -> Personalised:
        """Tunes the user's rows on its support part, and keeps them, and what it is to remember.

        Raises NodeError before the first release, when the tuning diverged, and for a course on another release;
        StoreError for a course by another rule; ConfigError for a continual rule that cannot be. Then the user has
        what it had. Only a course that is damaged begins anew.
        """
        user_id, version = self._node.user_id(user), self._release()
        with self._pinned(version):
            return self._personalize(user, user_id, version)

    def model_of(self, user: str) -> PersonalModel:
        """The user's personal model.

        Raises StoreError when its values are damaged, NodeError when the pool that they refer to is.
        """
        user_id = self._node.user_id(user)
        kept = self._node.personal.get(user_id)
        if kept is not None:
            task, values = self._referred(user, kept.version)
            return PersonalModel(task.model, _decoded(user, task, values, kept))
        if not self._node.release:
            return PersonalModel(PooledModel(self._node.base_model(), PoolSpec((), 1, 1.0)), None)
        version = self._node.release
        task, values = self._node.loaded(version)
        mask_ug = self._proposed(user_id, version, task, values)
        return PersonalModel(task.model, active_rows(values, task.model.spec, mask_ug).rows)

    def begin_anew(self, user: str) -> None:
        """Has the user's next personalisation begin a course. Its values stay; what it remembers of its tasks is gone.

        Raises StoreError when its values are damaged; personalising it begins anew then.
        """
        user_id = self._node.user_id(user)
        with self._keeping:
            kept = self._node.personal.get(user_id)
            if kept is not None:
                self._node.personal.put(user_id, replace(kept, memory=b""))

    def forget(self, user: str) -> Forgotten:
        """Removes what the node made of the user's data, and leaves the user out of all that it does from now on.

        The data itself may be gone already. Raises NodeError while the node trains, and for a user of whom it has
        neither data nor anything else.
        """
        user_id = self._node.known_id(user)
        with self._keeping:
            had_values, federations = self._node.forget(user_id)
            self._masks = {key: mask for key, mask in self._masks.items() if key[0] != user_id}
            self._pin()
        return Forgotten(had_values, federations)

    def rebase(self, version: str, user: str | None = None, margin: float = 0.0) -> Rebased:
        """Moves the values of one user, or of all, to another release, for those whom it serves as well.

        A user's difference is added to the rows of that release instead. It moves if its loss on the user's query part,
        in nats per target, is then at most `margin` higher; else the user stays as it is. Its course moves with it:
        so do the rows that it remembers, not their importance.

        Raises NodeError for a version that is not kept, or a user without values; StoreError for damaged ones.
        """
        wanted = self._with_values() if user is None else [self._node.user_id(user)]
        found = [(user_id, self._node.personal.get(user_id)) for user_id in wanted]
        values_of = {user_id: kept for user_id, kept in found if kept is not None}
        if user is not None and not values_of:
            raise NodeError("failed", f"user {user!r} has no personal values to rebase; personalise it first")
        with self._pinned(version):
            self._node.loaded(version)
            moved = sum(self._moved(user_id, kept, version, margin) for user_id, kept in values_of.items())
        return Rebased(moved, len(values_of) - moved)

    def status(self) -> ServingStatus:
        """Counts and sizes; nothing of a single user."""
        described, personal = self._node.describe(), self._node.personal
        disk_bytes = 0
        for path in self._node.config.state.rglob("*"):
            with suppress(FileNotFoundError):  # a file that is being replaced
                disk_bytes += path.stat().st_blocks * 512
        return ServingStatus(
            described.users,
            len(personal.users()),
            len(personal.forgotten()),
            described.release,
            described.versions,
            disk_bytes,
        )

    def _personalize(self, user: str, user_id: int, version: str) -> Personalised:
        task, values = self._node.loaded(version)
        ids = _one(user_id)
        with making_tensors_on(self._node.device):
            known = task_known(task, values, self._node, ids)
            if goes_on(task.config):
                active, personal, memory = self._next_task(user, user_id, version, known)
            else:
                active = active_rows(values, task.model.spec, task_mask(task, known, ids))
                personal = personal_values(task, active, tuning_of(task, values, known, active), self._node, ids)
                memory = b""
        kept = Kept(version, _encoded(task, personal_sections(active, personal), version), memory)
        before = self._query_loss(task, active.rows, ids)
        after = self._query_loss(task, _decoded(user, task, values, kept), ids)
        if not math.isfinite(after):
            raise _diverged(user, task, after)
        self._keep(user_id, kept)
        return Personalised(version, task.config.personal.steps, len(kept.payload), before, after)

    def _next_task(self, user: str, user_id: int, version: str, known: Known) -> tuple[ActiveRows, Rows, bytes]:
        """A user's rows in the pool, what it keeps of them after the next task of its course, and the course then."""
        task, values = self._node.loaded(version)
        earlier, memory = self._earlier(user, user_id, version)
        try:
            active, course = next_task(task, values, known, earlier, memory, self._node, _one(user_id), version)
        except StoreError as error:
            raise StoreError(f"the course of user {user!r} cannot go on: {error}; have it begin anew") from error
        if course.standing.diverged_u.any():
            raise _diverged(user, task, math.nan)
        return active, {name: row - active.rows[name] for name, row in course.standing.rows.items()}, course.to_bytes()

    def _earlier(self, user: str, user_id: int, version: str) -> tuple[Mapping[str, Section], bytes]:
        """What a user keeps, and its course; nothing for one that begins, since there was none or it is damaged."""
        try:
            kept = self._node.personal.get(user_id)
            if kept is None or not kept.memory:
                return {}, b""
            if kept.version == version:
                return _sections(user, self._node.loaded(version)[0], kept), kept.memory
        except StoreError:
            return {}, b""
        raise NodeError(
            "failed",
            f"user {user!r} is in a course on the release {kept.version}, this node serves {version} now; rebase the "
            "user, so that the course goes on there, or have it begin anew",
        )

    def _release(self) -> str:
        if not self._node.release:
            raise NodeError(
                "failed",
                "a user is personalised on a release, this node serves none yet; make one on the server with "
                "`fedquilt release`, and let this node take part once more: it is told then",
            )
        return self._node.release

    def _referred(self, user: str, version: str) -> tuple[Task, Values]:
        """What a user's values refer to."""
        try:
            return self._node.loaded(version)
        except NodeError as error:
            raise NodeError(
                "failed", f"user {user!r} has values that refer to the pool {version}: {error}; or personalise it again"
            ) from error

    def _proposed(self, user_id: int, version: str, task: Task, values: Values) -> Tensor:
        """The mask that the release's policy proposes for one user, (1, G)."""
        key = user_id, version
        mask_ug = self._masks.get(key)
        if mask_ug is None:
            with making_tensors_on(self._node.device):
                ids = _one(user_id)
                mask_ug = task_mask(task, task_known(task, values, self._node, ids), ids)
            with self._keeping:
                if self._node.holds(user_id):  # else it was forgotten meanwhile
                    newest = list(self._masks.items())[-(_REMEMBERED - 1) :]
                    self._masks = {**dict(newest), key: mask_ug}
        return mask_ug

    @contextmanager
    def _pinned(self, version: str) -> Iterator[None]:
        """Keeps a pool while values are made that will refer to it."""
        with self._keeping:
            self._awaited[version] += 1
            self._pin()
        try:
            yield
        finally:
            with self._keeping:
                self._awaited[version] -= 1
                self._pin()

    def _pin(self) -> None:
        """Has the node keep the pools that values refer to, or are about to."""
        self._node.pin(self._node.personal.versions() | (+self._awaited).keys())

    def _keep(self, user_id: int, kept: Kept) -> None:
        """Stores values whose pool is pinned, so that no kill leaves them alone.

        Raises NodeError when that pool was lost meanwhile: then the user has what it had.
        """
        with self._keeping:
            if kept.version not in self._node.describe().versions:
                raise NodeError(
                    "lacks version",
                    f"personal values refer to a pool that the node keeps, {kept.version} is not kept any longer; "
                    "nothing was changed, ask again for the release that is served now",
                )
            self._node.personal.put(user_id, kept)

    def _with_values(self) -> list[int]:
        return [user_id for user_id in self._node.personal.users().tolist() if self._node.holds(user_id)]

    def _moved(self, user_id: int, kept: Kept, version: str, margin: float) -> bool:
        """Whether the user's values refer to this version now, having been moved."""
        user = str(user_id)
        task, values = self._referred(user, kept.version)
        newer, newer_values = self._node.loaded(version)
        if kept.version == version or task.model.spec != newer.model.spec:
            return False
        ids = _one(user_id)
        sections = _sections(user, task, kept)
        rebased = Kept(version, _encoded(newer, sections, version))
        before = self._query_loss(task, _decoded(user, task, values, kept), ids)
        after = self._query_loss(newer, _decoded(user, newer, newer_values, rebased), ids)
        if not after <= before + margin:
            return False
        try:
            with making_tensors_on(self._node.device):
                memory = course_on(kept.memory, task.model.spec, sections, values, newer_values, version)
        except StoreError as error:
            raise StoreError(f"the course of user {user!r} cannot move: {error}; have it begin anew") from error
        self._keep(user_id, replace(rebased, memory=memory))
        return True

    def _query_loss(self, task: Task, rows: Mapping[str, Tensor], ids: UserIds) -> float:
        """One user's mean loss on the whole query part."""
        batch = self._node.batch(ids, "query", None, task.streams)
        with making_tensors_on(self._node.device), torch.no_grad(), task.model.bound(rows):
            return float(task.model.loss(batch))


def _one(user_id: int) -> UserIds:
    return np.array([user_id], dtype=np.int64)


def _diverged(user: str, task: Task, loss: float) -> NodeError:
    return NodeError(
        "failed",
        f"tuned rows give a finite loss, user {user!r} got {loss}; the federation's personal.learning_rate "
        f"({task.config.personal.learning_rate}) is too high: lower it. What the user had is as it was",
    )


def _encoded(task: Task, sections: Mapping[str, Section], version: str) -> bytes:
    formats = {"pool": row_format(task.config.personal.rows)}
    return encode_personal(sections, 0, personal_schema(task.model.spec, "rows"), formats, version)


def _sections(user: str, task: Task, kept: Kept) -> dict[str, Section]:
    """What a user's bytes keep. Raises StoreError when they are of another model."""
    try:
        return decode_personal(kept.payload, personal_schema(task.model.spec, "rows"), kept.version)
    except CodecError as error:
        raise StoreError(f"personal values of user {user!r} cannot be read ({error}); personalise it again") from error


def _decoded(user: str, task: Task, values: Values, kept: Kept) -> dict[str, Tensor]:
    """The rows that a user's bytes stand for. Raises as `_sections`."""
    return served_rows(values, task.model.spec, _sections(user, task, kept), "rows")
