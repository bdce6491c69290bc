"""Letters and answers as Flower's records: one ConfigRecord of fields, and one Array for a payload of bytes.

An array travels in chunks, and once for all nodes that are sent the same one; its `stype` keeps Flower's own code from
taking the bytes for numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from reprlib import repr as brief
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from federation.errors import ExchangeError
from federation.exchange import (
    FAULTS,
    Answer,
    Contribution,
    Description,
    Instructions,
    Letter,
    LetterKind,
    Measures,
    Refusal,
    Work,
)

MESSAGE_TYPES: Mapping[LetterKind, str] = {
    "describe": f"{MessageType.QUERY}.describe",
    "release": f"{MessageType.QUERY}.release",
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
}
SPLITS = ("train", "new")
MOST_VERSIONS, LONGEST_NAME, LONGEST_MESSAGE = 64, 64, 300
"""What is kept of a node's words. Of its versions the last ones: nodes name the newest last."""
_FIELDS, _BYTES, _STYPE = "fedquilt", "payload", "fedquilt.bytes"


def letter_record(letter: Letter) -> RecordDict:
    """A letter as the content of a message of the type `MESSAGE_TYPES[letter.kind]`."""
    asked = letter.instructions
    fields: dict[str, Any] = {"kind": letter.kind}
    if asked is not None:
        fields |= {**vars(asked), "positions": list(asked.positions)}
    return _record(fields, None if letter.pool is None else _pool_array(letter.pool))


def letter_of(record: RecordDict) -> Letter:
    """What `letter_record` wrote. Raises ExchangeError for anything else."""
    fields, payload = _read(record)
    kind = fields.pop("kind", None)
    if kind not in MESSAGE_TYPES:
        raise ExchangeError(f"a letter is one of {', '.join(MESSAGE_TYPES)}, got {kind!r}; is the server fedquilt's?")
    if not fields:
        return Letter(kind, None, payload)
    try:
        instructions = Instructions(**{**fields, "positions": tuple(fields["positions"])})
    except (KeyError, TypeError) as error:
        raise ExchangeError(
            f"instructions of {sorted(fields)} are not as agreed ({error}); update the older side"
        ) from error
    return Letter(kind, instructions, payload)


def answer_record(answer: Answer) -> RecordDict:
    """An answer as the content of a reply."""
    match answer:
        case Contribution(work, users, payload):
            return _record({"answer": "contribution", **vars(work), **_counted("users", users)}, _array(payload))
        case Measures(work, users, measured, sums):
            named = {**_counted("users", users), **_counted("sums", sums)}
            return _record({"answer": "measures", **vars(work), "measured": measured, **named})
        case Description(users, order, versions, release, software):
            said = {"order": order, "versions": list(versions), "release": release, "software": software}
            return _record({"answer": "description", **said, **_counted("users", users)})
        case Refusal(fault, message):
            return _record({"answer": "refusal", "fault": fault, "message": message})


def answer_of(record: RecordDict) -> Answer:
    """What `answer_record` wrote. Raises ExchangeError for anything else: a node's reply is never trusted."""
    fields, payload = _read(record)
    read = _ANSWERS.get(str(fields.get("answer")))
    if read is None:
        raise ExchangeError(f"an answer is one of {', '.join(_ANSWERS)}, got {brief(fields.get('answer'))}")
    try:
        return read(fields, payload)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ExchangeError(
            f"an answer of the fields {brief(sorted(fields))} is not as agreed ({brief(error)})"
        ) from error


def _contribution(fields: Mapping[str, Any], payload: bytes | None) -> Contribution:
    if payload is None:
        raise ExchangeError("a contribution carries its updates as bytes, got none")
    return Contribution(_work(fields), _counts(fields), payload)


def _measures(fields: Mapping[str, Any], payload: bytes | None) -> Measures:
    sums = dict(zip(fields["sums"], map(float, fields["sums_values"]), strict=True))
    return Measures(_work(fields), _counts(fields), int(fields["measured"]), sums)


def _description(fields: Mapping[str, Any], payload: bytes | None) -> Description:
    versions = tuple(_name(version) for version in fields["versions"][-MOST_VERSIONS:])
    return Description(
        _counts(fields), int(fields["order"]), versions, _name(fields["release"]), _name(fields["software"])
    )


def _refusal(fields: Mapping[str, Any], payload: bytes | None) -> Refusal:
    if fields["fault"] not in FAULTS:
        raise ExchangeError(f"a fault is one of {', '.join(FAULTS)}, got another")
    return Refusal(fields["fault"], str(fields["message"])[:LONGEST_MESSAGE])


_ANSWERS: Mapping[str, Callable[[Mapping[str, Any], bytes | None], Answer]] = {
    "contribution": _contribution,
    "measures": _measures,
    "description": _description,
    "refusal": _refusal,
}


def _work(fields: Mapping[str, Any]) -> Work:
    rounds = int(fields["round_index"]), int(fields["attempt"])
    return Work(_name(fields["federation"]), *rounds, _name(fields["version"]))


def _counted(name: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    """A mapping as two lists: records hold no mappings."""
    return {name: list(numbers), f"{name}_values": list(numbers.values())}


def _counts(fields: Mapping[str, Any]) -> dict[str, int]:
    """Of the splits that servers ask for; others are passed over."""
    said = dict(zip(fields["users"], fields["users_values"], strict=True))
    counts = {split: int(said[split]) for split in SPLITS if split in said}
    if any(count < 0 for count in counts.values()):
        raise ExchangeError("a node has at least no users, got a negative number")
    return counts


def _name(said: Any) -> str:
    """Cut where no name of ours would be as long."""
    return str(said)[:LONGEST_NAME]


def _record(fields: dict[str, Any], arrays: ArrayRecord | None = None) -> RecordDict:
    content = RecordDict({_FIELDS: ConfigRecord(fields)})
    if arrays is not None:
        content[_BYTES] = arrays
    return content


def _array(payload: bytes) -> ArrayRecord:
    return ArrayRecord({_BYTES: Array("uint8", (len(payload),), _STYPE, payload)})


_pool_array = lru_cache(maxsize=1)(_array)
"""One record for all nodes that are sent the same pool: Flower keeps the pieces that it is cut into."""


def _read(record: RecordDict) -> tuple[dict[str, Any], bytes | None]:
    """The fields, and the bytes if there are any."""
    extra = set(record) - {_FIELDS, _BYTES}
    if extra or not isinstance(record.get(_FIELDS), ConfigRecord):
        raise ExchangeError(f"a message has the records {_FIELDS!r} and {_BYTES!r}, got {brief(sorted(record))}")
    arrays = record.get(_BYTES)
    if arrays is None:
        return dict(record[_FIELDS]), None
    if not isinstance(arrays, ArrayRecord) or list(arrays) != [_BYTES] or arrays[_BYTES].stype != _STYPE:
        raise ExchangeError(f"the record {_BYTES!r} holds one array of {_STYPE}, got another")
    return dict(record[_FIELDS]), arrays[_BYTES].data
