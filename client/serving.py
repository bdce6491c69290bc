"""A personal model for each of a node's users, from the release in service: `one_user.py` makes it, `writing.py` has it
write. Here is what is kept, and that nothing is lost while several ask.

Rows that a user tuned are kept as a difference to the release that they were tuned on, which the node keeps for as
long. Personalising a user again begins anew, or, where the task has a continual rule, is the next task of its course,
on the release that the course began on. A user without any values is served by the mask that the release's policy
proposes; before the first release, everyone is served by the base. All calls may be made from several threads, and
beside a training. What changes one user's values waits for its turn; forgetting does not.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from torch import Tensor

from client.node import Node
from client.one_user import OneUser, PersonalModel
from client.personal import active_rows
from client.personal_store import Kept
from federation.errors import NodeError
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec

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
class BegunAnew:
    """Whether there was a course, which ended."""

    had_course: bool


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


class Serving:
    """A node's users, served. Raises NodeError for users that are not the node's, from every method that takes one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._keeping = threading.Lock()
        self._masks: dict[tuple[int, str], Tensor] = {}
        self._awaited: Counter[str] = Counter()
        self._changing: set[int] = set()
        self._changed = threading.Condition()

    def personalize(self, user: str) -> Personalised:
        """Tunes the user's rows on its support part, and keeps them, and what it is to remember.

        Raises NodeError before the first release, when the tuning diverged, and for a course on another release;
        StoreError for a course by another rule, or where the release has none, and for values that cannot be read
        but are not damaged; ConfigError for a continual rule that cannot be. Then the user has what it had. Only what
        is damaged begins anew.
        """
        one = self._one(user)
        with self._turn(one.user_id):
            version = self._release()
            with self._pinned(version):
                tuned = one.tuned(version)
                self._keep(one.user_id, tuned.kept)
        return Personalised(version, tuned.steps, len(tuned.kept.payload), tuned.loss_before, tuned.loss_after)

    def model_of(self, user: str) -> PersonalModel:
        """The user's personal model.

        Raises StoreError when its values are damaged, NodeError when the pool that they refer to is.
        """
        one, version = self._one(user), self._node.release
        kept = self._node.personal.get(one.user_id)
        if kept is not None:
            return one.model_with(kept)
        if not version:
            return PersonalModel(PooledModel(self._node.base_model(), PoolSpec((), 1, 1.0)), None)
        task, values = self._node.loaded(version)
        return PersonalModel(task.model, active_rows(values, task.model.spec, self._proposed(one, version)).rows)

    def begin_anew(self, user: str) -> BegunAnew:
        """Has the user's next personalisation begin a course. Its values stay; what it remembers of its tasks is gone.

        Raises StoreError when its values are damaged; personalising it begins anew then.
        """
        user_id = self._node.user_id(user)
        with self._turn(user_id), self._keeping:
            kept = self._node.personal.get(user_id)
            if kept is None or not kept.memory:
                return BegunAnew(False)
            self._node.personal.put(user_id, replace(kept, memory=b""))
        return BegunAnew(True)

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
        wanted = [self._one(user)] if user is not None else self._with_values()
        found = [one for one in wanted if self._node.personal.get(one.user_id) is not None]
        if user is not None and not found:
            raise NodeError("failed", f"user {user!r} has no personal values to rebase; personalise it first")
        with self._pinned(version):
            self._node.loaded(version)
            moved = sum(self._moved(one, version, margin) for one in found)
        return Rebased(moved, len(found) - moved)

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

    def _one(self, user: str) -> OneUser:
        return OneUser(self._node, self._node.user_id(user), user)

    def _release(self) -> str:
        if not self._node.release:
            raise NodeError(
                "failed",
                "a user is personalised on a release, this node serves none yet; make one on the server with "
                "`fedquilt release`, and let this node take part once more: it is told then",
            )
        return self._node.release

    def _proposed(self, one: OneUser, version: str) -> Tensor:
        """The mask that the release's policy proposes for one user, (1, G)."""
        key = one.user_id, version
        mask_ug = self._masks.get(key)
        if mask_ug is None:
            mask_ug = one.proposed(version)
            with self._keeping:
                if self._node.holds(one.user_id):  # else it was forgotten meanwhile
                    newest = list(self._masks.items())[-(_REMEMBERED - 1) :]
                    self._masks = {**dict(newest), key: mask_ug}
        return mask_ug

    @contextmanager
    def _turn(self, user_id: int) -> Iterator[None]:
        """Waits until nothing else changes this user's values, so that what is read of them is what is replaced."""
        with self._changed:
            self._changed.wait_for(lambda: user_id not in self._changing)
            self._changing.add(user_id)
        try:
            yield
        finally:
            with self._changed:
                self._changing.remove(user_id)
                self._changed.notify_all()

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

    def _with_values(self) -> list[OneUser]:
        ids = self._node.personal.users().tolist()
        return [OneUser(self._node, user_id, str(user_id)) for user_id in ids if self._node.holds(user_id)]

    def _moved(self, one: OneUser, version: str, margin: float) -> bool:
        """Whether the user's values refer to this version now, having been moved."""
        with self._turn(one.user_id):
            kept = self._node.personal.get(one.user_id)
            moved = None if kept is None else one.moved(kept, version, margin)
            if moved is None:
                return False
            self._keep(one.user_id, moved)
            return True
