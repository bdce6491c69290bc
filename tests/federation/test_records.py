"""Letters and answers as Flower's records, through the bytes that Flower sends."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from federation.errors import ExchangeError
from federation.exchange import (
    Answer,
    Contribution,
    Description,
    Instructions,
    Letter,
    Measures,
    Refusal,
    Work,
)
from federation.records import MESSAGE_TYPES, answer_of, answer_record, letter_of, letter_record

WORK = Work("f1", 3, 1, "r2-0123456789abcdef")
ASKED = Instructions("f1", 3, 1, WORK.version, "train", (0, 4, 5), 2, '{"seed": 1}')
LETTERS = [
    Letter("describe"),
    Letter("train", ASKED, bytes(range(256)) * 3),
    Letter("train", ASKED),
    Letter("evaluate", Instructions("f1", 0, 1, "v", "new", (), 0, "{}")),
    Letter("release", ASKED, b""),
]
ANSWERS: list[Answer] = [
    Contribution(WORK, {"train": 7, "new": 0}, b"\x00\xff" * 1000),
    Contribution(WORK, {}, b""),
    Measures(WORK, {"train": 7}, 5, {"base_loss": 1.5, "mask_loss": float("nan")}),
    Measures(WORK, {}, 0, {}),
    Description({"train": 2}, 3, ("r1-a", "r2-b"), "r1-a", "0.1.0"),
    Description({}),
    Refusal("lacks version", "no pool r2 here; send it"),
]


def over_the_wire(record: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(record))


@pytest.mark.parametrize("letter", LETTERS, ids=lambda letter: letter.kind)
def test_a_letter_arrives_as_it_was_sent(letter: Letter) -> None:
    assert letter_of(over_the_wire(letter_record(letter))) == letter


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_arrives_as_it_was_sent(answer: Answer) -> None:
    assert repr(answer_of(over_the_wire(answer_record(answer)))) == repr(answer)  # repr: NaN equals NaN there


def test_a_letter_has_a_message_type_for_each_kind() -> None:
    assert len(set(MESSAGE_TYPES.values())) == len(MESSAGE_TYPES) == 4


def changed(record: RecordDict, **fields: object) -> RecordDict:
    """The record with other fields; None takes one away."""
    kept = {**record["fedquilt"], **fields}
    record["fedquilt"] = ConfigRecord({key: value for key, value in kept.items() if value is not None})
    return record


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "obey"}, "a letter is one of describe"),
        ({"federation": "../../etc"}, "a federation's id matches"),
        ({"positions": [3, 2]}, "positions ascend"),
        ({"positions": [-1]}, "positions ascend"),
        ({"round_index": "7"}, "not as agreed"),
        ({"task": None}, "not as agreed"),
        ({"extra": 1}, "not as agreed"),
        ({"durable_round": 9}, "rounds and attempts count upwards"),
        ({"attempt": 0}, "rounds and attempts count upwards"),
    ],
)
def test_a_letter_that_no_server_sends_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ExchangeError, match=said):
        letter_of(changed(letter_record(LETTERS[1]), **fields))


@pytest.mark.parametrize(
    ("answer", "fields", "said"),
    [
        (ANSWERS[0], {"answer": "gift"}, "an answer is one of"),
        (ANSWERS[0], {"answer": None}, "an answer is one of"),
        (ANSWERS[0], {"round_index": "three"}, "not as agreed"),
        (ANSWERS[0], {"round_index": None}, "not as agreed"),
        (ANSWERS[0], {"users": ["train"]}, "not as agreed"),
        (ANSWERS[0], {"users_values": [-1, 0]}, "at least no users"),
        (ANSWERS[2], {"sums_values": ["much", "more"]}, "not as agreed"),
        (ANSWERS[4], {"versions": 3}, "not as agreed"),
        (ANSWERS[6], {"fault": "boredom"}, "a fault is one of"),
    ],
)
def test_an_answer_that_no_node_gives_is_refused(answer: Answer, fields: dict[str, object], said: str) -> None:
    with pytest.raises(ExchangeError, match=said):
        answer_of(changed(answer_record(answer), **fields))


def test_a_contribution_needs_its_bytes() -> None:
    record = answer_record(ANSWERS[0])
    del record["payload"]
    with pytest.raises(ExchangeError, match="carries its updates"):
        answer_of(record)


@pytest.mark.parametrize(
    "odd",
    [
        RecordDict(),
        RecordDict({"fedquilt": MetricRecord({"answer": 1})}),
        RecordDict({"fedquilt": ConfigRecord({"answer": "refusal"}), "more": ConfigRecord({})}),
    ],
)
def test_other_records_are_refused(odd: RecordDict) -> None:
    with pytest.raises(ExchangeError, match="a message has the records"):
        answer_of(odd)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"payload": Array("uint8", (1,), "numpy.ndarray", b"1")},
        {name: Array("uint8", (1,), "fedquilt.bytes", b"1") for name in ("payload", "second")},
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Array]) -> None:
    record = answer_record(ANSWERS[0])
    record["payload"] = ArrayRecord(arrays)
    with pytest.raises(ExchangeError, match="holds one array"):
        answer_of(record)
