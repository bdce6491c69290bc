"""The pools that a node keeps, one file for each version, and which of them it serves.

    pools/<version>.safetensors   as `federation/pool/file.py` writes it
    release.json                  {"release": the version served, "" for none, "pinned": the versions users refer to}

The newest few are kept, by the time they came, and besides them the release and what is pinned: a user's personal
values are a difference to the rows of one version, and worth nothing without it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from client.private import PRIVATE_FILE, PRIVATE_FOLDER
from federation.errors import NodeError, PoolError, PoolFormatError
from federation.files import remove_leftovers, set_damaged_aside, write_file
from federation.pool.file import PoolFile, pool_file
from federation.warn import warn

NEWEST = 3
"""How many versions are kept whatever refers to them: the head moves on, and a resumed server goes back a round."""
_VERSION = re.compile(r"r([0-9]{1,10})-[0-9a-f]{16}")
_SUFFIX = ".safetensors"
_DECODED = 2
"""How many are held in memory: one that is trained, one that is served."""


class Pools:
    """The pools in `folder`. May be used from several threads of one process.

    Raises PoolError when its files cannot be read or written, from every method too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._notes = folder / "pools", folder / "release.json"
        self._lock = threading.RLock()
        self._decoded: dict[str, PoolFile] = {}
        with _using(self._folder):
            self._folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            remove_leftovers(self._folder)
        self._release, self._pinned = _read_notes(self._notes)

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that are kept, in the order in which they came. They are checked when they are read."""
        with self._lock, _using(self._folder):
            paths = [path for path in self._folder.glob(f"*{_SUFFIX}") if _VERSION.fullmatch(path.stem)]
            return tuple(path.stem for path in sorted(paths, key=_age))

    @property
    def release(self) -> str:
        """The version that is served, "" for none."""
        return self._release

    def keep(self, payload: bytes) -> str:
        """Keeps a pool, and drops those that nothing needs any longer. Returns its version.

        Raises PoolError for bytes that are no whole pool file.
        """
        found = pool_file(payload)
        version = found.version
        with self._lock, _using(self._folder):
            write_file(self._path(version), payload, PRIVATE_FILE)
            self._prune({version})
            self._remember(version, found)
        return version

    def read(self, version: str) -> PoolFile:
        """A pool that is kept.

        Raises NodeError ("lacks version") for others. A damaged file is set aside, with a warning, and lacking then;
        for one of another release of fedquilt, PoolFormatError is raised, and it stays.
        """
        with self._lock:
            if version not in self._decoded:
                self._remember(version, self._read(version))
            return self._decoded[version]

    def adopt(self, version: str) -> None:
        """Serve this version from now on. Raises as `read` does."""
        with self._lock:
            self.read(version)
            self._note(version, self._pinned)

    def pin(self, versions: Collection[str]) -> None:
        """Keep these as long as they are not replaced by others here: the versions that users' values refer to."""
        with self._lock:
            self._note(self._release, frozenset(versions))

    def _path(self, version: str) -> Path:
        """Where a version lies. What a server calls a version becomes a path only when it is one."""
        if not _VERSION.fullmatch(version):
            raise PoolError(
                f"a pool's version matches {_VERSION.pattern!r}, got {version!r}; is the server of this release?"
            )
        return self._folder / f"{version}{_SUFFIX}"

    def _read(self, version: str) -> PoolFile:
        path = self._path(version)
        with _using(path):
            if not path.exists():
                raise _lacking(version)
            payload = path.read_bytes()
        try:
            found = pool_file(payload)
            if found.version != version:
                raise PoolError(f"it holds {found.version}")
        except PoolFormatError as error:
            raise PoolFormatError(f"{path} stays as it is: {error}") from error
        except PoolError as error:
            with _using(path):
                aside = set_damaged_aside(path)
            warn(f"{path} is damaged ({error}); it is set aside as {aside.name}", stacklevel=3)
            raise _lacking(version) from error
        return found

    def _remember(self, version: str, found: PoolFile) -> None:
        self._decoded[version] = found
        for oldest in list(self._decoded)[:-_DECODED]:
            del self._decoded[oldest]

    def _prune(self, needed: Collection[str]) -> None:
        versions = self.versions
        for version in set(versions[:-NEWEST]) - {*needed, *self._pinned, self._release}:
            self._path(version).unlink()
            self._decoded.pop(version, None)

    def _note(self, release: str, pinned: frozenset[str]) -> None:
        with _using(self._notes):
            write_file(self._notes, json.dumps({"release": release, "pinned": sorted(pinned)}).encode(), PRIVATE_FILE)
        self._release, self._pinned = release, pinned


def _age(path: Path) -> tuple[int, int]:
    """When a pool came; the clock's ticks are wide enough for two rounds to fall into one."""
    return path.stat().st_mtime_ns, int(path.stem[1:].partition("-")[0])


def _read_notes(path: Path) -> tuple[str, frozenset[str]]:
    """The release and the pinned versions, of a folder without notes none.

    Raises PoolError for damaged ones: a node that took them for none would drop what users' values refer to.
    """
    with _using(path):
        payload = path.read_bytes() if path.exists() else b'{"release": "", "pinned": []}'
    try:
        found = json.loads(payload)
        return str(found["release"]), frozenset(map(str, found["pinned"]))
    except (ValueError, KeyError, TypeError) as error:
        raise PoolError(
            f"{path} says which pools a node needs, but cannot be read ({error!r}); restore it, or remove it: the "
            "server names a release again, and users are personalised anew"
        ) from error


def _lacking(version: str) -> NodeError:
    return NodeError("lacks version", f"this node does not keep the pool {version}; send it with the instructions")


@contextmanager
def _using(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoolError(
            f"a node keeps its pools in files, {path} cannot be read or written ({error}); free space if the disk is "
            "full, and see that the folder is the node's own"
        ) from error
