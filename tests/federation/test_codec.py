"""Payloads: exact round trips, golden bytes, and bytes that were cut, flipped or written by an enemy."""

import random
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from federation import masks
from federation.codec import (
    RowFormat,
    decode,
    decode_personal,
    encode,
    encode_personal,
    personal_bytes,
    quantise,
)
from federation.errors import CodecError, ConfigError
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock, admit
from tests.golden.codec import make

GOLDEN = make.FOLDER
SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=12, factors={"down": 20, "up": 13}, max_rows=4),
        "pool/b": SectionSpec(rows=7, factors={"down": 5, "up": 6}, max_rows=7),
        "gate": SectionSpec(rows=1, factors={"phi": 9}, max_rows=1),
    }
)
EXACT = {"pool": RowFormat("fp32"), "gate": RowFormat("fp32")}
EVERY = {
    "fp32": EXACT,
    "fp16": {"pool": RowFormat("fp16"), "gate": RowFormat("fp32")},
    "int8": {"pool": RowFormat("int8"), "gate": RowFormat("fp16")},
    "ternary-all": {"pool": RowFormat("ternary"), "gate": RowFormat("int8")},
    "ternary-half": {"pool": RowFormat("ternary", 0.5), "gate": RowFormat("ternary", 0.5)},
    "ternary-few": {"pool": RowFormat("ternary", 0.04), "gate": RowFormat("fp32")},
}
every_format = pytest.mark.parametrize("formats", EVERY.values(), ids=EVERY.keys())


def sections(schema: Schema, users: int, seed: int) -> dict[str, Section]:
    """Random rows, masks of any size, padding in the middle that holds garbage."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in schema.sections.items():
        ids = torch.rand(users, spec.rows, generator=generator).argsort(1)[:, : spec.max_rows].int()
        valid = torch.rand(users, spec.max_rows, generator=generator) < 0.6
        rows = torch.randn(users, spec.max_rows, spec.width, generator=generator)
        rows = (rows * 8).round() / 8 if seed % 2 else rows  # odd seeds: many ties and zeros
        made[name] = Section(ids, valid, rows.masked_fill(~valid[..., None], float("nan")))
    return made


def block(users: int = 3, seed: int = 0) -> UpdateBlock:
    generator = torch.Generator().manual_seed(seed)
    metrics = {name: torch.randn(users, generator=generator) for name in ("reward", "loss", "größe")}
    weight_u = torch.rand(users, generator=generator)
    return UpdateBlock(sections(SCHEMA, users, seed), weight_u, metrics, 41, "release-2")


def rows_by_id(section: Section, user: int, spec: SectionSpec) -> dict[int, list[int]]:
    """The rows of one user as a dictionary of integer bit patterns."""
    valid_k = section.valid_uk[user]
    ids, rows = section.ids_uk[user][valid_k].tolist(), section.rows_ukw[user][valid_k].contiguous()
    return dict(zip(ids, rows.view(torch.int32).tolist() if spec.width else [[] for _ in ids]))


def assert_same_rows(found: dict[str, Section], wanted: dict[str, Section], user: int, schema: Schema = SCHEMA) -> None:
    assert list(found) == list(schema.sections)
    for name, spec in schema.sections.items():
        assert rows_by_id(found[name], 0, spec) == rows_by_id(wanted[name], user, spec), name


def sealed(payload: bytes) -> bytes:
    """The checksum that an enemy can compute as well as we."""
    return payload + struct.pack("<I", zlib.crc32(payload))


@every_format
@pytest.mark.parametrize("seed", range(6))
def test_decoding_gives_what_quantise_gives_bit_for_bit(formats: dict[str, RowFormat], seed: int) -> None:
    updates = block(seed=seed)
    wanted = quantise(updates.sections, formats)
    for user in range(3):
        found = decode(encode(updates, user, SCHEMA, formats), SCHEMA, "release-2")
        assert_same_rows(dict(found.sections), wanted, user)
        assert found.round_index == 41
        assert found.pool_version == "release-2"
        assert torch.equal(found.weight_u, updates.weight_u[user : user + 1])
        assert {n: v.tolist() for n, v in found.metrics.items()} == {
            n: [v[user].item()] for n, v in updates.metrics.items()
        }


@every_format
def test_encoding_is_canonical(formats: dict[str, RowFormat]) -> None:
    updates = block()
    payload = encode(updates, 1, SCHEMA, formats)
    again = decode(payload, SCHEMA, "release-2")
    assert all(section.valid_uk.all() for section in again.sections.values())
    if formats["pool"].kind != "int8":
        assert encode(again, 0, SCHEMA, formats) == payload
    turned = {n: Section(s.ids_uk.flip(1), s.valid_uk.flip(1), s.rows_ukw.flip(1)) for n, s in updates.sections.items()}
    assert encode(replace(updates, sections=turned), 1, SCHEMA, formats) == payload


def test_what_is_decoded_is_admitted() -> None:
    found = decode(encode(block(), 0, SCHEMA, EXACT), SCHEMA, "release-2")
    admitted, rejections = admit(found, SCHEMA, Limits())
    assert len(rejections) == 0
    assert admitted.weight_u.shape == (1,)


@every_format
def test_numbers_that_are_not_finite_reach_admission(formats: dict[str, RowFormat]) -> None:
    updates = block()
    updates.sections["pool/b"].valid_uk[0, 3] = True
    updates.sections["pool/b"].rows_ukw[0, 3] = 1.0
    updates.sections["pool/b"].rows_ukw[0, 3, 2] = float("inf")
    _, rejections = admit(decode(encode(updates, 0, SCHEMA, formats), SCHEMA, "release-2"), SCHEMA, Limits())
    assert "not finite" in rejections.reasons[0]


def tier(width: int) -> Schema:
    """256 units in 8 modules, each with `width` values."""
    factors = {"value": width} if width else {}
    return Schema({f"pool/{j}": SectionSpec(32, factors, 8) for j in range(8)})


@pytest.mark.parametrize("width", [0, 1, 24])
@every_format
def test_personal_values_of_every_tier(width: int, formats: dict[str, RowFormat]) -> None:
    schema = tier(width)
    kept = sections(schema, 3, seed=4)
    wanted = quantise(kept, formats)
    for user in range(3):
        payload = encode_personal(kept, user, schema, formats, "release-2")
        assert_same_rows(decode_personal(payload, schema, "release-2"), wanted, user, schema)
        assert personal_bytes(kept, schema, formats)[user] == len(payload)


@every_format
def test_a_mask_alone_costs_a_bit_per_unit_and_twelve_bytes(formats: dict[str, RowFormat]) -> None:
    schema = tier(0)
    kept = sections(schema, 2, seed=3)
    assert personal_bytes(kept, schema, formats).tolist() == [12 + 256 // 8] * 2
    mask_ug = torch.zeros(2, 256, dtype=torch.bool)
    for j, section in enumerate(kept.values()):
        mask_ug[:, 32 * j : 32 * j + 32].scatter_(1, section.ids_uk.long(), section.valid_uk)
    assert bytes(masks.pack(mask_ug)[1].tolist()) in encode_personal(kept, 1, schema, formats, "release-2")


@pytest.mark.parametrize(("kind", "row_bytes"), [("fp32", 4 * 33), ("fp16", 2 * 33), ("int8", 2 + 33)])
def test_bytes_follow_the_table(kind: str, row_bytes: int) -> None:
    schema = Schema({"pool/a": SCHEMA.sections["pool/a"]})
    kept = sections(schema, 4, seed=8)
    formats = {"pool": RowFormat(kind)}  # type: ignore[arg-type]
    rows_u = kept["pool/a"].valid_uk.sum(1)
    assert torch.equal(personal_bytes(kept, schema, formats), 12 + 2 + rows_u * row_bytes)


def test_sparse_ternary_rows_cost_what_positions_and_signs_cost() -> None:
    schema = Schema({"pool/a": SectionSpec(8, {"value": 1_000}, 8)})
    rows = torch.randn(1, 8, 1_000, generator=torch.Generator().manual_seed(2))
    kept = {"pool/a": Section(torch.arange(8)[None].int(), torch.ones(1, 8, dtype=torch.bool), rows)}
    few, half = (personal_bytes(kept, schema, {"pool": RowFormat("ternary", top)}).item() for top in (0.05, 0.5))
    assert half == 12 + 1 + 16 + 1 + 1_000 + 500  # bitmap
    entropy_bytes = 8_000 * 0.2864 / 8
    assert 12 + 1 + 16 + 5 + 50 + entropy_bytes < few < 12 + 1 + 16 + 5 + 50 + 1.06 * entropy_bytes


def test_golden_files_are_what_the_encoder_makes() -> None:
    payloads = make.payloads()
    assert sorted(payloads) == sorted(path.name for path in GOLDEN.glob("*.bin"))
    for name, payload in payloads.items():
        assert (GOLDEN / name).read_bytes() == payload, name


@pytest.mark.parametrize("kind", make.FORMATS)
def test_golden_files_decode_to_the_rounded_rows(kind: str) -> None:
    schema, original = make.SCHEMA, make.block()
    formats = {"pool": make.FORMATS[kind], "gate": RowFormat("fp32")}
    wanted = quantise(original.sections, formats)
    update = decode((GOLDEN / f"update-{kind}.bin").read_bytes(), schema, "release-3")
    personal = decode_personal((GOLDEN / f"personal-{kind}.bin").read_bytes(), schema, "release-3")
    for found in (dict(update.sections), personal):
        assert_same_rows(found, wanted, 0, schema)
    assert update.round_index == 7
    assert update.weight_u.tolist() == [2.0]
    assert {name: value.tolist() for name, value in update.metrics.items()} == {
        "loss": [1.5],
        "reward": [0.75],
    }


def test_a_golden_payload_read_by_hand() -> None:
    payload = (GOLDEN / "personal-fp32.bin").read_bytes()
    assert payload[:3] == b"fp\x01"
    assert payload[7:9] == bytes([0, 0])  # fp32 pool, fp32 gate
    assert payload[9:11] == bytes([0b01110010, 0b00001000])  # pool/a: rows 1, 4, 5; pool/b: row 0; gate: row 0
    first_row = struct.unpack("<64f", payload[11 : 11 + 256])
    assert first_row[0] == ((2 * 64 * 40_503) % 2_048 - 1_024) / 512  # row 1 stands at place 2


@every_format
def test_every_cut_is_refused(formats: dict[str, RowFormat]) -> None:
    payload = encode(block(), 0, SCHEMA, formats)
    for size in range(len(payload)):
        with pytest.raises(CodecError):
            decode(payload[:size], SCHEMA, "release-2")
    for size in range(len(payload) - 4):  # the enemy cuts and seals again
        with pytest.raises(CodecError):
            decode(sealed(payload[:size]), SCHEMA, "release-2")


@every_format
def test_every_flipped_bit_is_refused(formats: dict[str, RowFormat]) -> None:
    payload = encode_personal(block().sections, 0, SCHEMA, formats, "release-2")
    for place in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(CodecError):
            decode_personal(bytes(flipped), SCHEMA, "release-2")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_codec_error(data: bytes) -> None:
    for read in (decode, decode_personal):
        with pytest.raises(CodecError):
            read(data, SCHEMA, "release-2")


@settings(max_examples=300)
@given(st.sampled_from(sorted(EVERY)), st.integers(0, 2**32 - 1))
def test_sealed_damage_decodes_within_the_schema_or_raises_codec_error(kind: str, seed: int) -> None:
    """An enemy knows the checksum: what decodes must fit the schema, all else raises CodecError."""
    chance = random.Random(seed)
    payload = bytearray(encode(block(), 0, SCHEMA, EVERY[kind])[:-4])
    for _ in range(chance.randint(1, 4)):
        payload[chance.randrange(7, len(payload))] = chance.randrange(256)
    if chance.random() < 0.3:
        del payload[chance.randrange(7, len(payload)) :]
    try:
        found = decode(sealed(bytes(payload)), SCHEMA, "release-2")
    except CodecError:
        return
    _, rejections = admit(found, SCHEMA, Limits())
    assert all("finite" in reason for reason in rejections.reasons.values())


def test_more_bytes_than_the_schema_has_room_for_are_refused() -> None:
    payload = encode(block(), 0, SCHEMA, EXACT)
    with pytest.raises(CodecError, match="1 bytes are left"):
        decode(sealed(payload[:-4] + b"\0"), SCHEMA, "release-2")


def test_sealed_bytes_that_no_encoder_writes_are_refused() -> None:
    one = Schema({"pool/a": SectionSpec(1, {"value": 2}, 1)})
    head = encode_personal(sections(one, 1, seed=0), 0, one, EXACT, "release-2")[:7]
    scale = b"\x80\x3f"
    assert decode_personal(sealed(head + b"\x02\x01" + scale + b"\x81\x7f"), one, "release-2")[
        "pool/a"
    ].rows_ukw.tolist() == [[[-127.0, 127.0]]]
    for body, message in (
        (b"\x04\x00", "0 to 3, got 4"),
        (b"\x02\x03" + scale + b"\x81\x7f", "7 padding bits"),
        (b"\x02\x01" + scale + b"\x80\x7f", "got -128"),
        (b"\x03\x01" + scale + b"\xff\x07\x00", "6 padding bits"),
    ):
        with pytest.raises(CodecError, match=message):
            decode_personal(sealed(head + body), one, "release-2")


@pytest.mark.parametrize(
    ("names", "message"), [((b"b", b"a"), "ascend"), ((b"a", b"a"), "ascend"), ((b"\xff",), "UTF-8")]
)
def test_metrics_out_of_order_twice_or_not_text_are_refused(names: tuple[bytes, ...], message: str) -> None:
    payload = encode(replace(block(), metrics={}), 0, SCHEMA, EXACT)
    metrics = b"".join(bytes([len(name)]) + name + bytes(4) for name in names)
    spoilt = payload[:15] + bytes([len(names)]) + metrics + payload[16:-4]
    with pytest.raises(CodecError, match=message):
        decode(sealed(spoilt), SCHEMA, "release-2")


def test_another_pool_or_schema_is_named() -> None:
    payload = encode(block(), 0, SCHEMA, EXACT)
    with pytest.raises(CodecError, match="not for pool version 'release-3'"):
        decode(payload, SCHEMA, "release-3")
    wider = replace(SCHEMA.sections["gate"], factors={"phi": 10})
    with pytest.raises(CodecError, match="with this schema"):
        decode(payload, Schema({**SCHEMA.sections, "gate": wider}), "release-2")
    with pytest.raises(CodecError, match="update or personal"):
        decode_personal(payload, SCHEMA, "release-2")
    with pytest.raises(CodecError, match="reads version 1, got 2"):
        decode(sealed(payload[:2] + b"\x02" + payload[3:-4]), SCHEMA, "release-2")


def test_a_limit_may_change_but_is_enforced() -> None:
    kept = {"pool/a": Section(torch.arange(4)[None].int(), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4, 33))}
    limits = {rows: Schema({"pool/a": replace(SCHEMA.sections["pool/a"], max_rows=rows)}) for rows in (3, 4, 9)}
    payload = encode_personal(kept, 0, limits[4], EXACT, "release-2")
    assert_same_rows(decode_personal(payload, limits[9], "release-2"), kept, 0, limits[9])
    with pytest.raises(CodecError, match="at most 3 rows, got 4"):
        decode_personal(payload, limits[3], "release-2")


def test_a_promise_of_four_billion_values_allocates_nothing() -> None:
    schema = Schema({"pool/a": SectionSpec(8, {"value": 1_000}, 8)})
    rows = torch.randn(1, 8, 1_000, generator=torch.Generator().manual_seed(2))
    kept = {"pool/a": Section(torch.arange(8)[None].int(), torch.ones(1, 8, dtype=torch.bool), rows)}
    payload = encode_personal(kept, 0, schema, {"pool": RowFormat("ternary", 0.05)}, "release-2")
    count_at = 7 + 1 + 1 + 16 + 1
    assert payload[count_at : count_at + 4] == struct.pack("<I", 400)
    bomb = sealed(payload[:count_at] + b"\xff\xff\xff\xff" + payload[count_at + 4 : -4])
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="at most 8000 positions"):
            decode_personal(bomb, schema, "release-2")
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def spoiled(ids: list[int], rows: Tensor) -> dict[str, Section]:
    section = Section(torch.tensor([ids], dtype=torch.int32), torch.ones(1, len(ids), dtype=torch.bool), rows)
    return {**sections(SCHEMA, 1, seed=0), "pool/a": section}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (spoiled([1, 1], torch.ones(1, 2, 33)), "must differ"),
        (spoiled([3, 12], torch.ones(1, 2, 33)), "lie in 0..11"),
        (spoiled([-1], torch.ones(1, 1, 33)), "lie in 0..11"),
        (spoiled([0], torch.ones(1, 1, 32)), "33 values, got 1 of 32"),
        (spoiled([0, 1, 2, 3, 4], torch.ones(1, 5, 33)), "at most 4 rows"),
        ({"gate": sections(SCHEMA, 1, seed=0)["gate"]}, "missing or unknown: .'pool/a', 'pool/b'"),
    ],
)
def test_only_what_fits_the_schema_is_encoded(given: dict[str, Section], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode_personal(given, 0, SCHEMA, EXACT, "release-2")


def test_a_head_that_has_no_room_is_refused() -> None:
    with pytest.raises(CodecError, match=r"below 2\*\*32"):
        encode(replace(block(), round_index=2**32), 0, SCHEMA, EXACT)
    with pytest.raises(CodecError, match="at most 255 bytes"):
        encode(replace(block(), metrics={"m" * 256: torch.zeros(3)}), 0, SCHEMA, EXACT)
    with pytest.raises(ConfigError, match="'gate' has none"):
        encode(block(), 0, SCHEMA, {"pool": RowFormat("fp32")})
