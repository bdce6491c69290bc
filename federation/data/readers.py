"""Users' own documents: a folder of files for each user, JSON lines, or a Hugging Face dataset on disk.

    notes/ada/today.md, notes/ben/code/x.py      each sub-folder is a user; a folder of files alone is one user
    {"user": "ada", "text": "A document."}       one line of a .jsonl file, other keys are ignored
    dataset.save_to_disk("mails")                with the columns user and text

A user's documents are put in an order that depends on each one's name alone (its path, or its place among the user's
lines), so that documents that are added later hardly move the others: what is cut from the order stays nearly the same.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.data.corpus import name_order
from federation.data.sources import SOURCE
from federation.errors import PopulationError

Rows = Iterable[tuple[str, Any, Any]]
"""Where a document stands (for messages), its user and its text."""


@dataclass(frozen=True)
class Documents:
    """Texts of each user, by name, in their order. left_out: files and users that give none, counted by reason."""

    of_user: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, int]


def read_documents(path: Path) -> Documents:
    """The documents of every user below a path; users without any are left out.

    Raises PopulationError when the path is none of what this module reads, or a line or row of it is wrong.
    """
    if (path / "dataset_dict.json").is_file():
        raise PopulationError(
            f"users' texts are one dataset, {str(path)!r} holds several splits; give the folder of one of them"
        )
    if (path / "dataset_info.json").is_file():
        return _in_order(*_grouped(_dataset_rows(path)))
    if path.is_dir():
        return _in_order(*_folder(path))
    if path.suffix == ".jsonl" and path.is_file():
        return _in_order(*_grouped(_lines(path)))
    raise PopulationError(
        f"users' texts are a folder, a .jsonl file or a dataset on disk, {str(path)!r} is none of these; "
        "correct the path or the suffix"
    )


Named = Mapping[str, list[tuple[str, str]]]
"""Of each user, names and texts of its documents."""


def _in_order(documents: Named, left_out: Counter[str]) -> Documents:
    of_user: dict[str, tuple[str, ...]] = {}
    for user, named in documents.items():
        of_user[user] = tuple(text for _, text in sorted(named, key=lambda item: name_order(item[0])) if text.strip())
    left_out["users without text"] = sum(not texts for texts in of_user.values())
    return Documents({user: texts for user, texts in of_user.items() if texts}, dict(+left_out))


def _folder(root: Path) -> tuple[Named, Counter[str]]:
    left_out: Counter[str] = Counter()
    entries = _entries(root, left_out)
    users = [entry for entry in entries if entry.is_dir()]
    if not users:
        return {root.resolve().name: list(_files(root, left_out))}, left_out
    left_out["files beside the users' folders"] = len(entries) - len(users)
    return {user.name: list(_files(user, left_out)) for user in users}, left_out


def _files(user: Path, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Name and text of every file of text or code below a user's folder."""
    folders = [user]
    for folder in folders:
        for entry in _entries(folder, left_out):
            if entry.is_dir():
                folders.append(entry)
            elif entry.suffix.lower() not in SOURCE or not entry.is_file():
                left_out["files of other kinds"] += 1
            elif (text := _text(entry, left_out)) is not None:
                yield entry.relative_to(user).as_posix(), text


def _entries(folder: Path, left_out: Counter[str]) -> list[Path]:
    """What a folder holds, but for what is hidden, and links; also a name that is no text is left out."""
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    except OSError:
        left_out["unreadable folders"] += 1
        return []
    left_out["links"] += sum(entry.is_symlink() for entry in entries)
    left_out["names that are not UTF-8"] += sum(not _is_unicode(entry.name) for entry in entries)
    return [entry for entry in entries if not entry.is_symlink() and _is_unicode(entry.name)]


def _text(path: Path, left_out: Counter[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        left_out["files that are not UTF-8"] += 1
    except OSError:
        left_out["unreadable files"] += 1
    return None


def _is_unicode(text: str) -> bool:
    """Not so where half a surrogate pair stands for what could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _grouped(rows: Rows) -> tuple[Named, Counter[str]]:
    """The rows' texts by user; a document's name is its place among the user's."""
    documents: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for place, user, text in rows:
        named = documents[_user(place, user)]
        if not (isinstance(text, str) and _is_unicode(text)):
            raise PopulationError(f"'text' is a string of Unicode, {place} has {_kind(text)}; correct or remove it")
        named.append((str(len(named)), text))
    return documents, Counter()


def _user(place: str, user: object) -> str:
    """The user's name; a whole number is taken as its digits."""
    if isinstance(user, int) and not isinstance(user, bool):
        return str(user)
    if isinstance(user, str) and user and _is_unicode(user):
        return user
    raise PopulationError(f"'user' is a name or a whole number, {place} has {_kind(user)}; correct or remove it")


def _kind(value: object) -> str:
    """What a wrong value is, but not its content: a message may end up in a log."""
    if isinstance(value, str):
        return "one that is not Unicode" if value else "an empty one"
    return "none" if value is None else f"one of type {type(value).__name__}"


def _lines(path: Path) -> Iterator[tuple[str, Any, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PopulationError(f"a line is a JSON object, {place} is not ({error}); mend the line") from error
            if not isinstance(row, dict):
                raise PopulationError(f"a line is a JSON object, {place} is a {type(row).__name__}; mend the line")
            yield place, row.get("user"), row.get("text")


def _dataset_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise PopulationError(
            f"{str(path)!r} is a Hugging Face dataset, which needs another package: pip install 'fedquilt[data]'"
        ) from error
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # whatever is damaged, a dozen kinds of exception tell
        raise PopulationError(f"the dataset in {str(path)!r} cannot be read ({error}); save it again") from error
    missing = {"user", "text"} - set(dataset.column_names)
    if missing:
        raise PopulationError(
            f"a dataset has the columns user and text, {str(path)!r} has {', '.join(dataset.column_names)}; "
            f"rename the columns that are to be {' and '.join(sorted(missing))}"
        )
    for number, row in enumerate(dataset.select_columns(["user", "text"])):
        yield f"{path}, row {number}", row["user"], row["text"]
