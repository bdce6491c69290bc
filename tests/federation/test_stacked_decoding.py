"""Many payloads at once against one after the other, and what each kind of bad payload costs: its sender alone."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from federation.codec import decode_all, encode, encode_personal, quantise, weight_of
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock, admit
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

every_format = pytest.mark.parametrize("kind", FORMATS)


def decoded(payloads: list[bytes], schema: Schema = SCHEMA) -> UpdateBlock:
    """The block of payloads of which none is bad."""
    block, faults = decode_all(payloads, schema, VERSION, METRICS, ROUND)
    assert not faults
    return block


@every_format
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0], ids=lambda share: f"share {share}")
@pytest.mark.parametrize("users", [0, 1, 5])
def test_all_at_once_is_one_after_the_other(kind: str, share: float, users: int) -> None:
    payloads = payloads_of(block_of(users, seed=users, share=share), [FORMATS[kind]])
    assert_same(decoded(payloads), decoded_one_by_one(payloads))


@pytest.mark.parametrize("share", [0.4, 0.9, 1.0])
def test_users_may_differ_in_their_formats(share: float) -> None:
    payloads = payloads_of(block_of(13, seed=1, share=share), list(FORMATS.values()))
    assert_same(decoded(payloads), decoded_one_by_one(payloads))


@every_format
def test_rows_are_those_that_quantise_gives(kind: str) -> None:
    original = block_of(4, seed=9)
    wanted = quantise(original.sections, FORMATS[kind])
    for name, section in decoded(payloads_of(original, [FORMATS[kind]])).sections.items():
        for u in range(4):
            sent, got = original.sections[name].valid_uk[u], section.valid_uk[u]
            ids_k, order_k = wanted[name].ids_uk[u][sent].sort()
            assert torch.equal(section.ids_uk[u][got], ids_k)
            assert torch.equal(section.rows_ukw[u][got], wanted[name].rows_ukw[u][sent][order_k])


@every_format
def test_users_with_as_many_rows_as_each_other_need_no_padding(kind: str) -> None:
    sections = decoded(payloads_of(block_of(3, share=1.0), [FORMATS[kind]])).sections
    assert all(section.valid_uk.all() for section in sections.values())
    assert [section.ids_uk.shape for section in sections.values()] == [(3, 4), (3, 1), (3, 7), (3, 3)]


def test_a_block_may_be_written_to_and_the_payloads_stay_as_they_are() -> None:
    payloads = payloads_of(block_of(2, share=1.0), [EXACT])
    for section in decoded(payloads).sections.values():
        section.rows_ukw.fill_(7.0)
    assert payloads == payloads_of(block_of(2, share=1.0), [EXACT])


def test_no_metrics_are_asked_of_users_who_tell_none() -> None:
    silent = replace(block_of(2), metrics={})
    block, faults = decode_all(payloads_of(silent, [EXACT]), SCHEMA, VERSION, (), ROUND)
    assert (block.metrics, faults) == ({}, {})


# -------------------------------------------------------------------------------- one bad payload


def changed(place: int, value: int) -> Callable[[bytes], bytes]:
    """Another byte at a place, counted from the end if negative, under a fresh checksum."""

    def change(payload: bytes) -> bytes:
        body = bytearray(payload[:-4])
        body[place] = value
        return sealed(bytes(body))

    return change


def written(**parts: object) -> Callable[[bytes], bytes]:
    """An honest payload of an update that differs in some parts."""
    return lambda payload: encode(replace(block_of(3), **parts), 1, SCHEMA, EXACT)  # type: ignore[arg-type]


def with_metrics(*names: str) -> Callable[[bytes], bytes]:
    return written(metrics={name: torch.ones(3) for name in names})


METRIC_BYTES = sum(1 + len(name.encode()) + 4 for name in METRICS)
KINDS_AT = 7 + 9 + METRIC_BYTES
MASK_AT = KINDS_AT + 3
WIDER = Schema({**SCHEMA.sections, "gate": SectionSpec(1, {"phi": 10}, 1)})
LOOSER = Schema({**SCHEMA.sections, "pool/a": replace(SCHEMA.sections["pool/a"], max_rows=5)})


def too_many_rows(payload: bytes) -> bytes:
    return encode(block_of(2, share=1.0, schema=LOOSER), 0, LOOSER, EXACT)


FIRST_LEVEL = MASK_AT + 3 + 2 * (4 + 7)
LAST_LEVEL = FIRST_LEVEL + 4 * 33 + 7 * 11 - 1


def minus_128(place: int) -> Callable[[bytes], bytes]:
    """One of the levels of a pool in which every row is sent, each with its scale."""
    formats = {**EXACT, "pool": FORMATS["int8"]["pool"]}
    return lambda payload: changed(place, 0x80)(encode(block_of(1, share=1.0), 0, SCHEMA, formats))


def ternary_bomb(payload: bytes) -> bytes:
    """Says that it keeps four billion values."""
    payload = encode(block_of(1, share=1.0), 0, SCHEMA, FORMATS["ternary-rice"])
    count_at = MASK_AT + 3 + 2 * (4 + 7) + 1
    return sealed(payload[:count_at] + b"\xff\xff\xff\xff" + payload[count_at + 4 : -4])


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda p: b"", "less than 20 bytes"),
    "nineteen bytes": (lambda p: p[:19], "less than 20 bytes"),
    "cut": (lambda p: p[: len(p) // 2], "a checksum that does not match"),
    "flipped": (lambda p: p[:-30] + bytes([p[-30] ^ 1]) + p[-29:], "a checksum that does not match"),
    "personal values": (
        lambda p: encode_personal(block_of(1).sections, 0, SCHEMA, EXACT, VERSION),
        "bytes that are no update",
    ),
    "another version": (changed(2, 2), "another version of the codec than 1"),
    "another pool": (written(pool_version="release-3"), "another pool version or schema"),
    "another schema": (lambda p: encode(block_of(1, schema=WIDER), 0, WIDER, EXACT), "another pool version or schema"),
    "the round before": (written(round_index=ROUND - 1), f"another round than {ROUND}"),
    "no metrics": (with_metrics(), "other metrics than"),
    "a metric less": (with_metrics("größe", "loss"), "other metrics than"),
    "a metric more": (with_metrics("größe", "loss", "reward", "secret"), "other metrics than"),
    "a metric of another name": (with_metrics("größe", "lost", "reward"), "other metrics than"),
    "a metric of a longer name": (with_metrics("größe", "loss", "rewards"), "other metrics than"),
    "unknown kind": (changed(KINDS_AT + 1, 4), "an unknown kind of rows"),
    "padding of the mask": (changed(MASK_AT + 2, 0xFF), "padding bits that are set"),
    "more rows than allowed": (too_many_rows, "section 'pool/a': more than 4 rows"),
    "cut and sealed": (lambda p: sealed(p[:-5]), "an end that is not that of the last row"),
    "cut in the head and sealed": (lambda p: sealed(p[: MASK_AT + 1]), "an end before the first row"),
    "longer and sealed": (lambda p: sealed(p[:-4] + b"\0"), "an end that is not that of the last row"),
    "first level -128": (minus_128(FIRST_LEVEL), "int8 levels are -127 to 127"),
    "last level -128": (minus_128(LAST_LEVEL), "int8 levels are -127 to 127"),
    "ternary bomb": (ternary_bomb, "ternary rows that cannot be read"),
}


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_bad_payload_is_named_and_disturbs_nobody(
    damage: Callable[[bytes], bytes], reason: str, position: int
) -> None:
    honest = payloads_of(block_of(5, seed=3), [FORMATS["int8"], FORMATS["ternary-rice"]])
    payloads = honest.copy()
    payloads[position] = damage(encode(block_of(5, seed=3, share=0.9), position, SCHEMA, EXACT))
    block, faults = decode_all(payloads, SCHEMA, VERSION, METRICS, ROUND)
    assert list(faults) == [position]
    assert reason in faults[position]
    assert_same(block, decoded([payload for u, payload in enumerate(honest) if u != position]))


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_all_payloads_may_be_bad(damage: Callable[[bytes], bytes], reason: str) -> None:
    payloads = [damage(payload) for payload in payloads_of(block_of(3), [EXACT])]
    block, faults = decode_all(payloads, SCHEMA, VERSION, METRICS, ROUND)
    assert_same(block, decoded([]))
    assert list(faults) == [0, 1, 2]
    assert len(set(faults.values())) == 1  # the same for all: nothing in it is theirs


def test_faults_of_every_kind_come_in_the_order_of_the_payloads() -> None:
    honest = encode(block_of(1), 0, SCHEMA, EXACT)
    _, faults = decode_all([ternary_bomb(honest), sealed(honest[:-5]), honest, b""], SCHEMA, VERSION, METRICS, ROUND)
    assert list(faults) == [0, 1, 3]


def test_the_level_that_is_refused_is_looked_for_among_levels_alone() -> None:
    """A scale or a number of another prefix may have the byte 0x80."""
    rows = torch.tensor([[[1.0] + 8 * [2.0**-126]]])  # bytes 0x80 in float32
    one = torch.ones(1, 1)
    gate = Section(one.int() - 1, one.bool(), rows)
    pool = Section(one.int(), one.bool(), torch.full((1, 1, 33), 127.0))
    honest = block_of(1, share=0.0)
    honest = replace(honest, sections={**honest.sections, "gate": gate, "pool/a": pool})
    payloads = payloads_of(honest, [{**EXACT, "pool": FORMATS["int8"]["pool"]}])
    assert b"\x80\x3f" in payloads[0]  # the scale 1.0
    assert_same(decoded(payloads), decoded_one_by_one(payloads))


@every_format
def test_what_is_not_finite_is_decoded_and_refused_by_admission(kind: str) -> None:
    updates = block_of(3, share=1.0)
    updates.sections["pool/b"].rows_ukw[1, 2, 3] = math.inf
    updates.weight_u[0] = math.nan
    updates.metrics["loss"][2] = math.nan
    block = decoded(payloads_of(updates, [FORMATS[kind]]))
    _, rejections = admit(block, SCHEMA, Limits())
    assert list(rejections.reasons) == [1, 0, 2]


def test_a_full_mask_allocates_no_rows() -> None:
    """What a schema with two rows of a thousand values allows, and not what 4,096 such rows would take."""
    wide = SectionSpec(rows=4_096, factors={"value": 1_000}, max_rows=2)
    schema, generous = Schema({"pool/a": wide}), Schema({"pool/a": replace(wide, max_rows=4_096)})
    ids = torch.arange(4_096, dtype=torch.int32)[None]
    everything = Section(ids, torch.ones(1, 4_096, dtype=torch.bool), torch.ones(1, 4_096, 1_000))
    update = UpdateBlock({"pool/a": everything}, torch.ones(1), {}, ROUND, VERSION)
    payloads = [encode(update, 0, generous, EXACT), encode(update, 0, generous, FORMATS["ternary-rice"])]
    tracemalloc.start()
    try:
        _, faults = decode_all(payloads, schema, VERSION, (), ROUND)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert faults == dict.fromkeys(range(2), "section 'pool/a': more than 2 rows")


# -------------------------------------------------------------------------------- the weight alone


def test_the_weight_is_read_from_the_head() -> None:
    updates = block_of(3)
    payloads = payloads_of(updates, [FORMATS["ternary-rice"]])
    assert [weight_of(payload) for payload in payloads] == updates.weight_u.tolist()
    assert weight_of(payloads[0][:16]) == updates.weight_u[0].item()


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -1e-9])
def test_a_weight_that_admission_refuses_is_none(weight: float) -> None:
    payload = payloads_of(block_of(1), [EXACT])[0]
    assert weight_of(payload[:11] + struct.pack("<f", weight) + payload[15:]) == 0.0


def test_bytes_that_are_no_update_have_no_weight() -> None:
    payload = payloads_of(block_of(1), [EXACT])[0]
    personal = encode_personal(block_of(1, share=1.0).sections, 0, SCHEMA, EXACT, VERSION)
    for other in (b"", payload[:15], personal, payload[:2] + b"\x02" + payload[3:]):
        assert weight_of(other) == 0.0
