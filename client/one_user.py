"""One of a node's users: its values made on a release, moved to another, read and measured. Nothing is stored here."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from federation import wire
from federation.codec import decode_personal, encode_personal
from federation.config import TaskConfig
from federation.devices import making_tensors_on
from federation.errors import CodecError, DamagedValuesError, NodeError, StoreError
from federation.learner import rate_of
from federation.pool.model import PooledModel
from federation.pool.spec import Rows
from federation.streams import UserIds
from federation.update import Section, Values

HAVE_IT_BEGIN_ANEW = "have it begin anew with `fedquilt ask begin-anew`"


@dataclass(frozen=True)
class PersonalModel:
    """A model and one user's rows, {section: (1, k, d_in + d_out)}; None for the base alone."""

    model: PooledModel
    rows: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Tuned:
    """Values that were just made, by so many steps. Losses: on the user's query part, nats per target."""

    kept: Kept
    steps: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class OneUser:
    """One of a node's users. name: as its caller calls it, for errors."""

    node: Node
    user_id: int
    name: str

    @property
    def ids(self) -> UserIds:
        """The user as a block of one, (1,)."""
        return np.array([self.user_id], dtype=np.int64)

    def tuned(self, version: str) -> Tuned:
        """Values by the user's support part, on the rows of a release, and what it is to remember.

        Raises as `Serving.personalize`.
        """
        task, values = self.node.loaded(version)
        with making_tensors_on(self.node.device):
            earlier, memory = self._earlier(version)
            known = task_known(task, values, self.node, self.ids)
            if goes_on(task.config):
                active, personal, memory = self._next_task(version, known, earlier, memory)
            else:
                active = active_rows(values, task.model.spec, task_mask(task, known, self.ids))
                personal = personal_values(task, active, tuning_of(task, values, known, active), self.node, self.ids)
        kept = Kept(version, _encoded(task, personal_sections(active, personal), version), memory)
        before = self._query_loss(task, active.rows)
        after = self._query_loss(task, self._rows(task, values, kept))
        if not math.isfinite(after):
            raise _diverged(self.name, task.config, after)
        return Tuned(kept, task.config.personal.steps, before, after)

    def moved(self, kept: Kept, version: str, margin: float) -> Kept | None:
        """The user's values on another release; None where that has another shape or serves it worse, by the margin.

        Raises as `Serving.rebase`.
        """
        task, values = self._referred(kept.version)
        newer, newer_values = self.node.loaded(version)
        if kept.version == version or task.model.spec != newer.model.spec:
            return None
        sections = self._sections(task, kept)
        rebased = Kept(version, _encoded(newer, sections, version))
        before = self._query_loss(task, self._rows(task, values, kept))
        after = self._query_loss(newer, self._rows(newer, newer_values, rebased))
        if not after <= before + margin:
            return None
        try:
            with making_tensors_on(self.node.device):
                memory = course_on(kept.memory, task.model.spec, sections, values, newer_values, version)
        except StoreError as error:
            raise StoreError(f"the course of user {self.name!r} cannot move: {error}; {HAVE_IT_BEGIN_ANEW}") from error
        return replace(rebased, memory=memory)

    def model_with(self, kept: Kept) -> PersonalModel:
        """The user's model by its values. Raises as `Serving.model_of`."""
        task, values = self._referred(kept.version)
        return PersonalModel(task.model, self._rows(task, values, kept))

    def proposed(self, version: str) -> Tensor:
        """The mask that the policy of a release proposes for the user, (1, G)."""
        task, values = self.node.loaded(version)
        with making_tensors_on(self.node.device):
            return task_mask(task, task_known(task, values, self.node, self.ids), self.ids)

    def _next_task(
        self, version: str, known: Known, earlier: Mapping[str, Section], memory: bytes
    ) -> tuple[ActiveRows, Rows, bytes]:
        """The user's rows in the pool, what it keeps of them after the next task of its course, and the course then."""
        task, values = self.node.loaded(version)
        try:
            active, course = next_task(task, values, known, earlier, memory, self.node, self.ids, version)
        except StoreError as error:
            raise StoreError(f"the course of user {self.name!r} cannot go on: {error}; {HAVE_IT_BEGIN_ANEW}") from error
        if course.standing.diverged_u.any():
            raise _diverged(self.name, task.config, math.nan)
        return active, {name: row - active.rows[name] for name, row in course.standing.rows.items()}, course.to_bytes()

    def _earlier(self, version: str) -> tuple[Mapping[str, Section], bytes]:
        """What the user keeps, and its course; nothing for one that begins, since there was none or it is damaged.

        Raises StoreError for a course where the release has none, and for values that another fedquilt can read.
        """
        task, _ = self.node.loaded(version)
        try:
            kept = self.node.personal.get(self.user_id)
            if kept is None or not kept.memory:
                return {}, b""
            if not goes_on(task.config):
                raise StoreError(
                    f"the course of user {self.name!r} cannot go on: the release {version} has no continual rule "
                    f"(personal.continual.rule is 'none'); {HAVE_IT_BEGIN_ANEW}"
                )
            if kept.version == version:
                return self._sections(task, kept), kept.memory
        except DamagedValuesError:
            return {}, b""
        raise NodeError(
            "failed",
            f"user {self.name!r} is in a course on the release {kept.version}, this node serves {version} now; rebase "
            f"the user with `fedquilt ask rebase`, so that the course goes on there, or {HAVE_IT_BEGIN_ANEW}",
        )

    def _referred(self, version: str) -> tuple[Task, Values]:
        """What the user's values refer to."""
        try:
            return self.node.loaded(version)
        except NodeError as error:
            raise NodeError(
                "failed",
                f"user {self.name!r} has values that refer to the pool {version}: {error}; or personalise it again",
            ) from error

    def _sections(self, task: Task, kept: Kept) -> dict[str, Section]:
        """What the user's bytes keep.

        Raises DamagedValuesError when they are no values of its model, StoreError when a newer fedquilt wrote them.
        """
        try:
            return decode_personal(kept.payload, personal_schema(task.model.spec, "rows"), kept.version)
        except CodecError as error:
            unread = f"personal values of user {self.name!r} cannot be read ({error})"
            if _of_newer_format(kept.payload):
                raise StoreError(f"{unread}; upgrade this fedquilt, or {HAVE_IT_BEGIN_ANEW}") from error
            raise DamagedValuesError(f"{unread}; personalise it again") from error

    def _rows(self, task: Task, values: Values, kept: Kept) -> dict[str, Tensor]:
        """The rows that the user's bytes stand for. Raises as `_sections`."""
        return served_rows(values, task.model.spec, self._sections(task, kept), "rows")

    def _query_loss(self, task: Task, rows: Mapping[str, Tensor]) -> float:
        """The user's mean loss on the whole query part."""
        batch = self.node.batch(self.ids, "query", None, task.streams)
        with making_tensors_on(self.node.device), torch.no_grad(), task.model.bound(rows):
            return float(task.model.loss(batch))


def _of_newer_format(payload: bytes) -> bool:
    if len(payload) < wire.HEAD.size:
        return False
    magic, version, _ = wire.HEAD.unpack_from(payload)
    return bool(magic == wire.PERSONAL and version > wire.VERSION)


def _encoded(task: Task, sections: Mapping[str, Section], version: str) -> bytes:
    formats = {"pool": row_format(task.config.personal.rows)}
    return encode_personal(sections, 0, personal_schema(task.model.spec, "rows"), formats, version)


def _diverged(user: str, config: TaskConfig, loss: float) -> NodeError:
    return NodeError(
        "failed",
        f"tuned rows give a finite loss, user {user!r} got {loss}; the federation's {_rate(config)} is too high: "
        "lower it. What the user had is as it was",
    )


def _rate(config: TaskConfig) -> str:
    """What sets how far a tuning step goes, with its value; see `tuning_of`."""
    if not config.meta.adapts:
        return f"personal.learning_rate ({config.personal.learning_rate})"
    name, value = rate_of(config.meta, config.local)
    rule, rate = config.meta.rule, f"{name} ({value})"
    return rate if rule.name == "sgd" else f"{rate} or meta.rule.bound ({rule.bound})"
