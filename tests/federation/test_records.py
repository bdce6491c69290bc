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
        ({"round_index": "7"}, "round_index are made of int"),
        ({"task": None}, "not as agreed"),
        ({"extra": 1}, "not as agreed"),
        ({"durable_round": 9}, "rounds count from 0"),
        ({"attempt": 0}, "rounds count from 0"),
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
        (ANSWERS[0], {"round_index": float("inf")}, "not as agreed"),
        (ANSWERS[0], {"users_values": [float("inf"), 0.0]}, "not as agreed"),
        (ANSWERS[2], {"measured": float("-inf")}, "not as agreed"),
        (ANSWERS[4], {"order": float("nan")}, "not as agreed"),
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


def test_one_record_of_bytes_serves_all_nodes_that_are_sent_the_same_pool() -> None:
    pool = bytes(1000)
    first, second = (letter_record(Letter("train", ASKED, pool))["payload"] for _ in range(2))
    other = letter_record(Letter("train", ASKED, bytes(999)))["payload"]
    assert first is second
    assert (other["payload"].shape, other["payload"].data) == ((999,), bytes(999))


def test_of_a_nodes_splits_only_those_are_kept_that_servers_ask_for() -> None:
    answer = Description({f"s{n}": n for n in range(10_000)} | {"new": 3, "spare": -1, "train": 4})
    assert answer_of(answer_record(answer)).users == {"train": 4, "new": 3}


def test_of_a_nodes_words_a_server_keeps_no_more_than_it_needs() -> None:
    versions = tuple(f"r{n}-0123456789abcdef" for n in range(10_000))
    found = answer_of(answer_record(Description({}, 0, (*versions, "v" * 10_000), "w" * 10_000, "x" * 10_000)))
    assert found == Description({}, 0, (*versions[-63:], "v" * 64), "w" * 64, "x" * 64)
    assert answer_of(answer_record(Refusal("failed", "y" * 10_000))) == Refusal("failed", "y" * 300)


@pytest.mark.parametrize(
    "fields", [{"answer": "z" * 10_000}, {"z" * 10_000: 1, "order": "none"}, {"order": "z" * 10_000}]
)
def test_an_error_repeats_no_more_than_a_few_of_a_nodes_words(fields: dict[str, object]) -> None:
    with pytest.raises(ExchangeError) as error:
        answer_of(changed(answer_record(ANSWERS[4]), **fields))
    assert len(str(error.value)) < 200
