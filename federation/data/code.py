"""Users made of source code: packages and standard-library modules of the environment, or own projects.

A user is a package, a sub-package of a large package, or a standard-library module. Projects are split into
pre-training, training users and new users by a hash of their name alone: installing another package moves no
project from one split to another. A folder of own projects takes the place of the new users: the base is
pre-trained, and the pool trained, without ever reading them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

from federation.data import clean, corpus, sources
from federation.data.cache import cache_dir
from federation.data.clean import Cleaner
from federation.data.corpus import (
    Document,
    TextCorpus,
    UserText,
    in_parts,
    load_corpus,
    name_order,
    normalise,
    save_corpus,
    thin,
)
from federation.data.sources import Unit, environment_units, folder_units
from federation.errors import PopulationError

log = logging.getLogger("fedquilt")

Split = Literal["pretraining", "train", "new"]
Text = TypeVar("Text", Document, UserText)


@dataclass(frozen=True)
class CodeLimits:
    """How many users a project may give, and how many characters a user or a document has."""

    users_per_project: int = 12
    support: int = 16 * 1024
    query: int = 4 * 1024
    test: int = 4 * 1024
    least_support: int = 8_000
    least_query: int = 1_500
    least_test: int = 1_500
    document: int = 100 * 1024
    read: int = 160 * 1024
    """Files of one unit are read until they have this many characters."""


def code_corpus(root: Path | None = None, limits: CodeLimits | None = None) -> TextCorpus:
    """The environment's source code as users; with `root`, that folder's projects are the new users instead.

    Cached by the files' paths, sizes and times, the limits and this code; a damaged cache is said and built
    anew. Raises PopulationError when `root` is not a folder or holds no source.
    """
    limits = limits or CodeLimits()
    left_out: Counter[str] = Counter()
    by_split: dict[Split, list[Unit]] = defaultdict(list)
    for unit in environment_units(left_out):
        by_split[split_of(unit.project)].append(unit)
    if root is not None:
        by_split["new"] = folder_units(root, left_out)
    folder = cache_dir() / "corpora" / f"code-{_cache_key(by_split, limits)}"
    if folder.exists():
        try:
            return load_corpus(folder)
        except PopulationError as error:
            log.warning("%s; building it anew", error)
    built = build_corpus(by_split, limits, left_out)
    save_corpus(built, folder)
    return built


def split_of(project: str) -> Split:
    """The split of a project, by its name alone: on average, of nine, 3 pre-train, 4 train, 2 are new."""
    place = int(name_order(f"split {project}")[:8], 16) % 9
    return "pretraining" if place < 3 else "train" if place < 7 else "new"


def build_corpus(by_split: dict[Split, list[Unit]], limits: CodeLimits, left_out: Counter[str]) -> TextCorpus:
    """Read and clean the units of each split, pre-training first: what a new user repeats of it is a copy."""
    cleaner = Cleaner(left_out.copy())
    pretraining = _texts(by_split["pretraining"], document, limits, cleaner)
    train = _texts(by_split["train"], user_text, limits, cleaner)
    new = _texts(by_split["new"], user_text, limits, cleaner)
    projects = {text.project for texts in (pretraining, train, new) for text in texts}
    versions = {d.name: d.version for d in metadata.distributions() if d.name.lower() in projects}
    return TextCorpus(
        name="code",
        pretraining=pretraining,
        train=train,
        new=new,
        left_out=dict(sorted(cleaner.left_out.items())),
        versions={"python": platform.python_version(), **dict(sorted(versions.items()))},
    )


def document(unit: Unit, bodies: Sequence[str], limits: CodeLimits) -> Document | None:
    """A text to pre-train on, or None when there is less of it than a user needs."""
    text = thin("\n\n".join(bodies), limits.document)
    least = limits.least_support + limits.least_query + limits.least_test
    return Document(unit.project, unit.name, text) if len(text) >= least else None


def user_text(unit: Unit, bodies: Sequence[str], limits: CodeLimits) -> UserText | None:
    """A user, or None when a part has too little text."""
    support, query, test = in_parts(bodies)
    if len(support) < limits.least_support or len(query) < limits.least_query or len(test) < limits.least_test:
        return None
    parts = thin(support, limits.support), thin(query, limits.query), thin(test, limits.test)
    return UserText(unit.project, unit.name, *parts)


def _texts(
    units: Sequence[Unit],
    make: Callable[[Unit, Sequence[str], CodeLimits], Text | None],
    limits: CodeLimits,
    cleaner: Cleaner,
) -> tuple[Text, ...]:
    """What `make` makes of the units, at most so many per project, shuffled by the hash of their names."""
    texts: list[Text] = []
    per_project: Counter[str] = Counter()
    least_bytes = limits.least_support + limits.least_query + limits.least_test
    for unit in sorted(units, key=lambda unit: (unit.project, name_order(unit.name))):
        if unit.size_bytes < least_bytes:
            cleaner.left_out["users with too little text"] += 1
        elif per_project[unit.project] == limits.users_per_project:
            cleaner.left_out["users beyond the limit per project"] += 1
        elif (text := make(unit, _bodies(unit, limits.read, cleaner), limits)) is None:
            cleaner.left_out["users with too little text"] += 1
        else:
            texts.append(text)
            per_project[unit.project] += 1
    return tuple(sorted(texts, key=lambda text: name_order(text.name)))


def _bodies(unit: Unit, read: int, cleaner: Cleaner) -> list[str]:
    """Cleaned files of a unit, shuffled by the hash of their names, until they have `read` characters."""
    bodies: list[str] = []
    for file in sorted(unit.files, key=lambda file: name_order(file.relative.as_posix())):
        if sum(map(len, bodies)) >= read:
            break
        try:
            body = cleaner.clean(normalise(file.path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            cleaner.left_out["unreadable"] += 1
            continue
        if body is not None:
            bodies.append(body)
    return bodies


def _cache_key(by_split: dict[Split, list[Unit]], limits: CodeLimits) -> str:
    """Changes with any file that may be read, with the limits, and with the code that makes users of them."""
    files = [
        (split, str(file.path), file.size_bytes, file.modified_ns)
        for split, units in by_split.items()
        for unit in units
        for file in unit.files
    ]
    code = [Path(str(module.__file__)).read_text() for module in (clean, corpus, sources)] + [
        Path(__file__).read_text()
    ]
    return hashlib.sha256(json.dumps([sorted(files), asdict(limits), code]).encode()).hexdigest()[:20]
