"""Releases: immutable versions of the pool and the gate, each with its evaluation, and which of them is current.

    releases/
        r20/
            pool.safetensors     federation/pool/file.py
            release.json         a `Release`
        current.json             `Promotions`: the last one is current
        .lock                    held by the one process that writes here; readers need not wait for it

A release is written whole or not at all and never changes; promoting one, or rolling back, only adds a line to
`current.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from federation.errors import ConfigError, PoolError, RunError
from federation.files import new_folder, remove_leftovers, write_file
from federation.plugins import suggest
from federation.pool.file import PoolFile, pool_file
from federation.settings import Settings, parse
from server.promotion import Evaluation, Promotion, Promotions, previous, standing

FOLDER_NAME = "releases"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_POOL, _RELEASE, _CURRENT, _LOCK = "pool.safetensors", "release.json", "current.json", ".lock"
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Candidate:
    """What a run offers for release. config: what decided the bits, as `federation.config.identity` gives it."""

    pool: PoolFile
    evaluation: Evaluation
    config: Mapping[str, Any]


class Release(Settings):
    """What is said of a release. sha256: of its pool's file. software: fedquilt's version, "" if not installed."""

    format: Literal["fedquilt release 1"] = "fedquilt release 1"
    name: str
    version: str
    round: int = Field(ge=0)
    evaluation: Evaluation
    config: dict[str, Any]
    sha256: str
    created: datetime
    software: str


class Releases:
    """The releases of a run's folder; none where there is no such folder.

    All that write raise RunError when another process is writing, or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER_NAME

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and NAME.fullmatch(entry.name)))

    def read(self, name: str) -> Release:
        """What is said of a release. Raises RunError for an unknown name, and for a file that `add` did not write."""
        self._check_known(name)
        found = _read(self.folder / name / _RELEASE, Release)
        if found.name != name:
            raise RunError(f"{self.folder / name} holds the release {found.name!r}; give the folder its name back")
        return found

    def pool(self, name: str) -> PoolFile:
        """The values of a release. Raises RunError for an unknown name, and for values that are not those released."""
        release, path = self.read(name), self.folder / name / _POOL
        try:
            payload = path.read_bytes()
            if _sha256(payload) != release.sha256:
                raise PoolError("its bytes do not match the sha256 of the release")
            found = pool_file(payload)
        except (OSError, PoolError) as error:
            raise RunError(f"{path} is damaged: {error}; restore it from a copy, or roll back to another") from error
        if (found.version, found.round_index) != (release.version, release.round):
            raise RunError(f"{path} is of {found.version}, its release of {release.version}; restore it from a copy")
        return found

    def add(self, candidate: Candidate, name: str) -> Release:
        """Writes a release. Raises RunError for a name that is taken, ConfigError for one that cannot be a name."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"a release's name matches {NAME.pattern!r}, got {name!r}; choose another --name")
        payload = candidate.pool.to_bytes()
        release = _described(candidate, name, _sha256(payload))
        with self._writing():
            self._check_free(name)
            remove_leftovers(self.folder)
            with new_folder(self.folder / name) as folder:
                (folder / _POOL).write_bytes(payload)
                (folder / _RELEASE).write_bytes(_text(release))
        return release

    def history(self) -> tuple[Promotion, ...]:
        """All promotions, in order. Raises RunError for a file that this class did not write."""
        path = self.folder / _CURRENT
        return _read(path, Promotions).history if path.exists() else ()

    def current(self) -> Release | None:
        """What is said of the release that nodes are to serve."""
        history = self.history()
        return self.read(history[-1].name) if history else None

    def promote(self, name: str, how: Literal["rule", "hand"], why: str = "") -> None:
        """Makes a release current. Raises RunError for one that is not there, or damaged."""
        self.pool(name)
        with self._writing():
            self._record(Promotion(name=name, when=_now(), how=how, why=why))

    def roll_back(self, name: str | None = None) -> str:
        """Makes current again what was before: `name`, or the one before the current one. Returns its name.

        Raises RunError when `name` is not one of those that were current before, or damaged.
        """
        if not self.folder.is_dir():
            previous((), name)  # refuses, and no folder is made for it
        with self._writing():
            history = self.history()
            target = previous(standing(history)[:-1], name)
            self.pool(target)
            self._record(Promotion(name=target, when=_now(), how="rollback", why=f"back from {history[-1].name}"))
        return target

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The folder, made if it is not there, for this process alone."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
        except BlockingIOError as error:
            raise RunError(
                f"one process at a time changes releases, another one is at work in {self.folder}; "
                "see what it did with `fedquilt releases`, then try again"
            ) from error
        except OSError as error:
            raise RunError(
                f"releases are written to {self.folder}, which must be writable ({error}); free space or mend the "
                "folder, then try again"
            ) from error

    def _record(self, promotion: Promotion) -> None:
        write_file(self.folder / _CURRENT, _text(Promotions(history=(*self.history(), promotion))))

    def _check_free(self, name: str) -> None:
        if name in self.names():
            raise RunError(
                f"a release never changes, {name!r} is there already ({self.read(name).version}); promote it with "
                "`fedquilt promote`, or choose another --name"
            )

    def _check_known(self, name: str) -> None:
        if name not in (known := self.names()):
            raise RunError(f"{self.folder} has no release {name!r}; {suggest(name, known)}")


def released(run: Path) -> PoolFile | None:
    """The current release of a run's folder, None when nothing is promoted. Raises RunError for a damaged one."""
    current = Releases(run).current()
    return _loaded(run, current.name) if current else None


@lru_cache(maxsize=1)
def _loaded(run: Path, name: str) -> PoolFile:
    """A release never changes: a server that asks for it in every round reads it once."""
    return Releases(run).pool(name)


def _described(candidate: Candidate, name: str, sha256: str) -> Release:
    return Release(
        name=name,
        version=candidate.pool.version,
        round=candidate.pool.round_index,
        evaluation=candidate.evaluation,
        config=dict(candidate.config),
        sha256=sha256,
        created=_now(),
        software=_software(),
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _software() -> str:
    with suppress(PackageNotFoundError):
        return version("fedquilt")
    return ""


def _text(settings: Settings) -> bytes:
    return (settings.model_dump_json(indent=1) + "\n").encode()


def _read(path: Path, kind: type[S]) -> S:
    try:
        return parse(kind, json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not what was written ({error}); restore it from a copy") from error


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
