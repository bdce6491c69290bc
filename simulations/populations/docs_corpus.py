"""Documentation strings of the environment's functions and classes, by topic, split by project.

Sources are parsed, never imported. A topic is a module with enough documentation strings, or what is left of its unit
(`federation.data.sources`) together. A project trains or is new by a hash of its name alone: installing another package
moves no project from one split to the other.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from federation.data import clean, sources
from federation.data.cache import cache_dir, whole_folder
from federation.data.corpus import name_order, normalise
from federation.data.sources import SourceFile, Unit, environment_units
from federation.errors import PopulationError

log = logging.getLogger("fedquilt")

DocsSplit = Literal["train", "new"]
_FILE = "docs.json"
_TELLING_WORDS = 10
"""Two documentation strings that begin with the same words, so many of them, are copies."""


@dataclass(frozen=True)
class DocsLimits:
    """documents: of each topic, exactly. words: kept of each; with fewer than least_words it is left out."""

    documents: int = 32
    topics_per_project: int = 24
    words: int = 64
    least_words: int = 8


@dataclass(frozen=True)
class Topic:
    """What a folder may hold: documentation strings of one part of a project."""

    project: str
    name: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class DocsCorpus:
    """Topics of each split, those of a project side by side; every topic has as many documents as any other.

    left_out: how many files, documents or topics were left out, by reason. versions: what they were taken from.
    """

    train: tuple[Topic, ...]
    new: tuple[Topic, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Those of all topics, training topics first."""
        return tuple(text for topic in (*self.train, *self.new) for text in topic.documents)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every name and text, in order."""
        content = [[asdict(topic) for topic in topics] for topics in (self.train, self.new)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def docs_corpus(limits: DocsLimits | None = None) -> DocsCorpus:
    """The environment's documentation, cached by the files' paths, sizes and times, the limits and this code.

    A damaged cache is said and built anew, in about two minutes on one core.
    """
    limits = limits or DocsLimits()
    left_out: Counter[str] = Counter()
    units = environment_units(left_out)
    folder = cache_dir() / "corpora" / f"docs-{_cache_key(units, limits)}"
    if folder.exists():
        try:
            return load_docs(folder)
        except PopulationError as error:
            log.warning("%s; building it anew", error)
    built = build_docs(units, limits, left_out)
    save_docs(built, folder)
    return built


def split_of(project: str) -> DocsSplit:
    """The split of a project, by its name alone: on average, of five, 3 train and 2 are new."""
    return "train" if int(name_order(f"docs split {project}")[:8], 16) % 5 < 3 else "new"


def build_docs(units: Iterable[Unit], limits: DocsLimits, left_out: Mapping[str, int]) -> DocsCorpus:
    """The topics of the units, training projects first: what a new project repeats of them is a copy."""
    by_split: dict[DocsSplit, list[Unit]] = defaultdict(list)
    for unit in sorted(units, key=lambda unit: (unit.project, unit.name)):
        by_split[split_of(unit.project)].append(unit)
    counts = Counter(left_out)
    seen: set[str] = set()
    train, new = (_topics(by_split[split], limits, seen, counts) for split in get_args(DocsSplit))
    projects = {topic.project for topic in (*train, *new)}
    versions = {d.name: d.version for d in metadata.distributions() if d.name.lower() in projects}
    return DocsCorpus(
        train=train,
        new=new,
        left_out=dict(sorted(counts.items())),
        versions={"python": platform.python_version(), **dict(sorted(versions.items()))},
    )


def documents_of(source: bytes, limits: DocsLimits, left_out: Counter[str]) -> Iterator[str]:
    """The first words of the documentation of every function and class of a file, in one line each, in ASCII.

    Rulers and prompts are no words. What cannot be parsed has none, and is counted.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in foreign sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        left_out["unreadable"] += 1
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            words = [word for word in normalise(text).split() if re.search(r"\w", word)]
            if len(words) < limits.least_words:
                left_out["documentation with too few words"] += 1
            else:
                yield " ".join(words[: limits.words])


def _topics(units: Sequence[Unit], limits: DocsLimits, seen: set[str], left_out: Counter[str]) -> tuple[Topic, ...]:
    """The topics of one split's units; those of a project are shuffled by the hash of their names, and cut off."""
    by_project: dict[str, list[Topic]] = defaultdict(list)
    for unit in units:
        for name, texts in _grouped(unit, limits, seen, left_out).items():
            if len(texts) < limits.documents:
                left_out["topics with too little documentation"] += 1
            else:
                chosen = sorted(texts, key=name_order)[: limits.documents]
                by_project[unit.project].append(Topic(unit.project, name, tuple(chosen)))
    most = limits.topics_per_project
    left_out["topics beyond the limit per project"] += sum(max(0, len(t) - most) for t in by_project.values())
    return tuple(
        topic
        for project in sorted(by_project)
        for topic in sorted(by_project[project], key=lambda topic: name_order(topic.name))[:most]
    )


def _grouped(unit: Unit, limits: DocsLimits, seen: set[str], left_out: Counter[str]) -> dict[str, list[str]]:
    """A unit's documents that are no copies: by file where there are enough of them, the rest under the unit's name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for file in unit.files:
        texts = [text for text in _read(file, limits, left_out) if _is_first(text, seen, left_out)]
        groups[file.relative.as_posix() if len(texts) >= limits.documents else unit.name] += texts
    return {name: texts for name, texts in groups.items() if texts}


def _read(file: SourceFile, limits: DocsLimits, left_out: Counter[str]) -> list[str]:
    try:
        source = file.path.read_bytes()
    except OSError:
        left_out["unreadable"] += 1
        return []
    quoted = b'"""' in source or b"'''" in source  # else there is hardly any documentation, and parsing is slow
    return list(documents_of(source, limits, left_out)) if quoted else []


def _is_first(text: str, seen: set[str], left_out: Counter[str]) -> bool:
    telling = " ".join(re.findall(r"\w+", text.lower())[:_TELLING_WORDS])
    if telling in seen:
        left_out["copies"] += 1
        return False
    seen.add(telling)
    return True


def save_docs(corpus: DocsCorpus, folder: Path) -> None:
    """Write one JSON file; whole or not at all."""
    with whole_folder(folder) as work:
        (work / _FILE).write_text(json.dumps({**asdict(corpus), "fingerprint": corpus.fingerprint}))


def load_docs(folder: Path) -> DocsCorpus:
    """Read what `save_docs` wrote. Raises PopulationError when it is not that."""
    try:
        content = json.loads((folder / _FILE).read_text())
        train, new = (
            tuple(Topic(topic["project"], topic["name"], tuple(topic["documents"])) for topic in content[split])
            for split in get_args(DocsSplit)
        )
        corpus = DocsCorpus(train, new, content["left_out"], content["versions"])
        fingerprint = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PopulationError(f"{folder} does not hold documentation ({error}); delete it to build it anew") from error
    if corpus.fingerprint != fingerprint:
        raise PopulationError(f"the documentation in {folder} is damaged (its checksum differs); delete it")
    return corpus


def _cache_key(units: Iterable[Unit], limits: DocsLimits) -> str:
    """Changes with any file that may be read, with the limits, and with the code that makes topics of them."""
    files = sorted(
        (unit.project, unit.name, str(file.path), file.size_bytes, file.modified_ns)
        for unit in units
        for file in unit.files
    )
    code = [Path(str(module.__file__)).read_text() for module in (clean, sources)] + [Path(__file__).read_text()]
    return hashlib.sha256(json.dumps([files, asdict(limits), code]).encode()).hexdigest()[:20]
