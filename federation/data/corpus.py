"""A corpus of users' texts: what text populations are made of, how it is thinned out and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from federation.data.cache import whole_folder
from federation.errors import PopulationError

BLOCK_CHARS = 1024
"""Texts that are too long are thinned out by blocks of whole lines of about this many characters."""


@dataclass(frozen=True)
class Document:
    """A text for pre-training. All documents of a project are pre-trained on, or all are held out."""

    project: str
    name: str
    text: str


@dataclass(frozen=True)
class UserText:
    """One user's texts. Users of one project (or play) are not independent of each other."""

    project: str
    name: str
    support: str
    query: str
    test: str


@dataclass(frozen=True)
class TextCorpus:
    """Texts split by project: documents to pre-train on, training users, new users. What is saved is ASCII.

    left_out: how many files, users or roles were left out, by reason. versions: what the texts were taken
    from.
    """

    name: str
    pretraining: tuple[Document, ...]
    train: tuple[UserText, ...]
    new: tuple[UserText, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every name and text, in order."""
        return _fingerprint((self.pretraining, self.train, self.new))


def _fingerprint(parts: Iterable[tuple[Document, ...] | tuple[UserText, ...]]) -> str:
    digest = hashlib.sha256()
    for records in parts:
        digest.update(f"{len(records)}\n".encode())
        for record in records:
            for value in _values(record):
                digest.update(f"{len(value)}:".encode() + value.encode())
    return digest.hexdigest()


def _values(record: Document | UserText) -> list[str]:
    return [getattr(record, f.name) for f in fields(record)]


def normalise(text: str) -> str:
    """ASCII text: other characters become '?', tabs four spaces, carriage returns vanish."""
    return text.encode("ascii", "replace").decode("ascii").replace("\r", "").replace("\t", "    ")


def name_order(name: str) -> str:
    """A sort key that shuffles names in the same way everywhere, whatever other names there are."""
    return hashlib.sha256(name.encode()).hexdigest()


def in_parts(documents: Sequence[str]) -> tuple[str, str, str]:
    """A user's support, query and test.

    With at least five documents, each part has documents of its own (3/5, 1/5, 1/5: test from the start of the order,
    then query); with fewer, its own stretch of text (70, 15, 15%).
    """
    if len(documents) >= 5:
        fifth = len(documents) // 5
        support, query, test = documents[2 * fifth :], documents[fifth : 2 * fifth], documents[:fifth]
        return "\n\n".join(support), "\n\n".join(query), "\n\n".join(test)
    text = "\n\n".join(documents)
    first, second = int(0.7 * len(text)), int(0.85 * len(text))
    return text[:first], text[first:second], text[second:]


def thin(text: str, limit: int) -> str:
    """At most `limit` characters: evenly spread blocks of whole lines; a short text is kept whole."""
    if len(text) <= limit:
        return text
    blocks = _line_blocks(text)
    wanted = min(len(blocks), max(1, limit // BLOCK_CHARS))
    chosen = np.linspace(0, len(blocks) - 1, wanted).round().astype(int)
    return "".join(blocks[i] for i in np.unique(chosen))[:limit]


def _line_blocks(text: str) -> list[str]:
    blocks: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + BLOCK_CHARS - 1) + 1
        stop = end if end > 0 else len(text)
        blocks.append(text[start:stop])
        start = stop
    return blocks


def save_corpus(corpus: TextCorpus, folder: Path) -> None:
    """Write `corpus.json` (names and lengths) and `text.npy` (all characters); whole or not at all."""
    groups: dict[str, tuple[Document, ...] | tuple[UserText, ...]] = {
        "pretraining": corpus.pretraining,
        "train": corpus.train,
        "new": corpus.new,
    }
    index: dict[str, object] = {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "left_out": dict(corpus.left_out),
        "versions": dict(corpus.versions),
    }
    texts: list[str] = []
    for group, records in groups.items():
        values = [_values(record) for record in records]
        index[group] = [[project, name, *map(len, parts)] for project, name, *parts in values]
        texts += [part for _, _, *parts in values for part in parts]
    with whole_folder(folder) as work:
        np.save(work / "text.npy", np.frombuffer("".join(texts).encode("ascii"), np.uint8), allow_pickle=False)
        (work / "corpus.json").write_text(json.dumps(index))


def load_corpus(folder: Path) -> TextCorpus:
    """Read what `save_corpus` wrote.

    Raises PopulationError when the folder is not a corpus, or its texts are not those it was written with.
    """
    try:
        index = json.loads((folder / "corpus.json").read_text())
        text = np.load(folder / "text.npy", allow_pickle=False).tobytes().decode("ascii")
        position = 0

        def records(group: str, kind: type[Document] | type[UserText]) -> Iterable[Document | UserText]:
            nonlocal position
            for project, name, *lengths in index[group]:
                ends = np.cumsum([position, *lengths]).tolist()
                yield kind(project, name, *(text[a:b] for a, b in pairwise(ends)))
                position = ends[-1]

        corpus = TextCorpus(
            name=index["name"],
            pretraining=tuple(records("pretraining", Document)),  # type: ignore[arg-type]
            train=tuple(records("train", UserText)),  # type: ignore[arg-type]
            new=tuple(records("new", UserText)),  # type: ignore[arg-type]
            left_out=index["left_out"],
            versions=index["versions"],
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise PopulationError(f"{folder} does not hold a corpus ({error}); delete it, and it is built anew") from error
    if corpus.fingerprint != index["fingerprint"]:
        raise PopulationError(f"the corpus in {folder} is damaged (its checksum differs); delete it to build it anew")
    return corpus
