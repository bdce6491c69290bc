"""Bytes of enemies who know the tables and the checksums, between honest users: nothing raises, nobody is disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import frames
from federation.codec import decode, decode_all, weight_of
from federation.errors import CodecError
from federation.update import Limits, UpdateBlock, admit
from tests.federation.payloads import (
    EXACT,
    FORMATS,
    METRICS,
    ROUND,
    SCHEMA,
    VERSION,
    assert_same,
    block_of,
    decoded_one_by_one,
    payloads_of,
    sealed,
)

HONEST = payloads_of(block_of(6, seed=5), list(FORMATS.values()))
VICTIMS = [*HONEST, *payloads_of(block_of(2, seed=6, share=1.0), [EXACT, FORMATS["int8"]])]
TALLEST = max(len(payload) for payload in VICTIMS)


def overwrite(payload: bytearray, chance: random.Random) -> None:
    payload[chance.randrange(len(payload))] = chance.choice((0x00, 0x01, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def flip(payload: bytearray, chance: random.Random) -> None:
    payload[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)


def cut(payload: bytearray, chance: random.Random) -> None:
    del payload[chance.randint(1, len(payload)) :]


def drop(payload: bytearray, chance: random.Random) -> None:
    start = chance.randint(1, len(payload))
    del payload[start : start + chance.randint(1, 8)]


def append(payload: bytearray, chance: random.Random) -> None:
    payload += chance.randbytes(chance.randint(1, 300))


def insert(payload: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(payload))
    payload[place:place] = chance.randbytes(chance.randint(1, 8))


def splice(payload: bytearray, chance: random.Random) -> None:
    """The tail of another payload."""
    place = chance.randint(1, len(payload))
    payload[place:] = chance.choice(VICTIMS)[place:-4] or b"\0"


ATTACKS: list[Callable[[bytearray, random.Random], None]] = [overwrite, flip, cut, drop, append, insert, splice]


def forged(chance: random.Random) -> bytes:
    """A payload after one to four attacks, nearly always under a checksum that fits."""
    payload = bytearray(chance.choice(VICTIMS)[:-4])
    for _ in range(chance.randint(1, 4)):
        chance.choice(ATTACKS)(payload, chance)
    return sealed(bytes(payload)) if chance.random() < 0.95 else bytes(payload)


def decoded(payloads: list[bytes]) -> tuple[UpdateBlock, dict[int, str]]:
    return decode_all(payloads, SCHEMA, VERSION, METRICS, ROUND)


def passes_alone(payload: bytes) -> bool:
    """Whether the reader of single payloads takes it, and it is what this round wants."""
    try:
        found = decode(payload, SCHEMA, VERSION)
    except CodecError:
        return False
    return (found.round_index, tuple(found.metrics)) == (ROUND, METRICS)


@settings(max_examples=400)
@given(st.integers(0, 2**64))
def test_forged_payloads_are_judged_as_each_alone_and_disturb_nobody(seed: int) -> None:
    chance = random.Random(seed)
    payloads = HONEST.copy()
    for _ in range(chance.randint(1, 3)):
        payloads.insert(chance.randint(0, len(payloads)), forged(chance))
    block, faults = decoded(payloads)
    good = [payload for payload in payloads if passes_alone(payload)]
    assert [payload for u, payload in enumerate(payloads) if u not in faults] == good
    assert_same(block, decoded_one_by_one(good))


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=TALLEST), min_size=1, max_size=4))
def test_arbitrary_bytes_are_refused(payloads: list[bytes]) -> None:
    block, faults = decoded([HONEST[0], *payloads, HONEST[1]])
    assert list(faults) == list(range(1, 1 + len(payloads)))
    assert_same(block, decoded_one_by_one(HONEST[:2]))


@settings(max_examples=100)
@given(st.integers(0, 2**64))
def test_what_decodes_can_be_judged_by_admission(seed: int) -> None:
    """Rows fit the schema whatever was forged: numbers alone are left to refuse."""
    chance = random.Random(seed)
    block, _ = decoded([forged(chance) for _ in range(8)])
    _, rejections = admit(block, SCHEMA, Limits({"pool": 20.0, "gate": 5.0}))
    allowed = ("finite", "a norm above 1000 times the largest")
    assert all(any(word in reason for word in allowed) for reason in rejections.reasons.values())


@settings(max_examples=200)
@given(st.integers(0, 2**64))
def test_reasons_are_the_same_for_everybody(seed: int) -> None:
    """A reason that held anything of its user would hardly be on this list, made without a look at any payload."""
    _, faults = decoded([forged(random.Random(seed + place)) for place in range(5)])
    surplus = [f"section {name!r}: more than {spec.max_rows} rows" for name, spec in SCHEMA.sections.items()]
    assert set(faults.values()) <= {*REASONS, *surplus}


REASONS = {
    "a payload of less than 20 bytes",
    "bytes that are no update",
    "an update of another version of the codec than 1",
    "a checksum that does not match",
    "an update for another pool version or schema",
    f"an update of another round than {ROUND}",
    f"other metrics than {list(METRICS)}",
    "an unknown kind of rows",
    "an end before the first row",
    "padding bits that are set",
    "an end that is not that of the last row",
    "int8 levels are -127 to 127",
    "ternary rows that cannot be read",
}


@given(st.binary(max_size=60))
def test_any_bytes_have_a_weight_that_can_be_added(data: bytes) -> None:
    assert 0.0 <= weight_of(data) < 3.5e38


@pytest.mark.parametrize("seed", range(40))
def test_a_forged_frame_comes_apart_within_its_limits_or_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    frame = bytearray(frames.join(HONEST))
    for _ in range(chance.randint(1, 3)):
        chance.choice([overwrite, flip, cut, drop, append, insert])(frame, chance)
        if chance.random() < 0.5:  # among the numbers
            frame[chance.randrange(min(28, len(frame)))] = chance.randrange(256)
    try:
        parts = frames.split(bytes(frame), most=6, max_bytes=TALLEST)
    except CodecError:
        return
    assert len(parts) <= 6
    assert max(map(len, parts), default=0) <= TALLEST
    assert frames.join(parts) == bytes(frame)
