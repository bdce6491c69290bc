"""Payloads of random updates, and the slow twin of `decode_all`: one payload after the other, padded by hand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from federation.codec import RowFormat, decode, encode
from federation.update import Schema, Section, SectionSpec, UpdateBlock

SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=12, factors={"down": 20, "up": 13}, max_rows=4),
        "gate": SectionSpec(rows=1, factors={"phi": 9}, max_rows=1),
        "pool/b": SectionSpec(rows=7, factors={"down": 5, "up": 6}, max_rows=7),
        "masks": SectionSpec(rows=3, factors={}, max_rows=3),
    }
)
"""Sections of one prefix that are not neighbours, and one without values."""

VERSION, ROUND, METRICS = "release-2", 41, ("größe", "loss", "reward")
EXACT = {prefix: RowFormat("fp32") for prefix in ("pool", "gate", "masks")}
FORMATS: Mapping[str, Mapping[str, RowFormat]] = {
    "fp32": EXACT,
    "fp16": {**EXACT, "pool": RowFormat("fp16")},
    "int8": {**EXACT, "pool": RowFormat("int8"), "gate": RowFormat("fp16"), "masks": RowFormat("int8")},
    "int8-gate": {**EXACT, "gate": RowFormat("int8")},
    "ternary-bitmap": {**EXACT, "pool": RowFormat("ternary", 0.5), "masks": RowFormat("ternary")},
    "ternary-rice": {**EXACT, "pool": RowFormat("ternary", 0.04), "gate": RowFormat("int8")},
}


def block_of(users: int, seed: int = 0, share: float = 0.6, schema: Schema = SCHEMA) -> UpdateBlock:
    """Updates with rows in any order; each slot is used with probability `share`, the others hold garbage."""
    generator = torch.Generator().manual_seed(seed)
    sections = {}
    for name, spec in schema.sections.items():
        ids = torch.rand(users, spec.rows, generator=generator).argsort(1)[:, : spec.max_rows].int()
        valid = torch.rand(users, spec.max_rows, generator=generator) < share
        rows = torch.randn(users, spec.max_rows, spec.width, generator=generator)
        sections[name] = Section(ids, valid, rows.masked_fill(~valid[..., None], float("nan")))
    metrics = {name: torch.randn(users, generator=generator) for name in METRICS}
    return UpdateBlock(sections, torch.rand(users, generator=generator), metrics, ROUND, VERSION)


def payloads_of(block: UpdateBlock, formats: Sequence[Mapping[str, RowFormat]], schema: Schema = SCHEMA) -> list[bytes]:
    """Each user's payload; users take the formats in turn."""
    return [encode(block, u, schema, formats[u % len(formats)]) for u in range(len(block.weight_u))]


def sealed(payload: bytes) -> bytes:
    """The payload with the checksum that an enemy can compute as well as we."""
    return payload + struct.pack("<I", zlib.crc32(payload))


def decoded_one_by_one(payloads: Sequence[bytes], schema: Schema = SCHEMA) -> UpdateBlock:
    """What `decode` makes of every payload, in one block with padding behind the rows."""
    blocks = [decode(payload, schema, VERSION) for payload in payloads]
    sections = {}
    for name, spec in schema.sections.items():
        most = max((block.sections[name].ids_uk.shape[1] for block in blocks), default=0)
        padded = Section(
            torch.zeros(len(blocks), most, dtype=torch.int32),
            torch.zeros(len(blocks), most, dtype=torch.bool),
            torch.zeros(len(blocks), most, spec.width),
        )
        for u, block in enumerate(blocks):
            count = block.sections[name].ids_uk.shape[1]
            padded.ids_uk[u, :count] = block.sections[name].ids_uk[0]
            padded.valid_uk[u, :count] = True
            padded.rows_ukw[u, :count] = block.sections[name].rows_ukw[0]
        sections[name] = padded
    weight_u = torch.tensor([block.weight_u.item() for block in blocks])
    metrics = {name: torch.tensor([block.metrics[name].item() for block in blocks]) for name in METRICS}
    return UpdateBlock(sections, weight_u, metrics, ROUND, VERSION)


def assert_same(found: UpdateBlock, wanted: UpdateBlock) -> None:
    """Equal in names, order, types, shapes and bits; one NaN is as good as another."""
    assert (list(found.sections), list(found.metrics)) == (list(wanted.sections), list(wanted.metrics))
    assert (found.round_index, found.pool_version) == (wanted.round_index, wanted.pool_version)
    pairs = [(found.weight_u, wanted.weight_u), *((found.metrics[n], wanted.metrics[n]) for n in wanted.metrics)]
    for name, section in wanted.sections.items():
        other = found.sections[name]
        assert torch.equal(other.ids_uk, section.ids_uk), name
        assert torch.equal(other.valid_uk, section.valid_uk), name
        assert (other.ids_uk.dtype, other.valid_uk.dtype) == (torch.int32, torch.bool)
        pairs.append((other.rows_ukw, section.rows_ukw))
    for a, b in pairs:
        assert (a.dtype, a.shape) == (torch.float32, b.shape)
        assert torch.equal(bits_of(a), bits_of(b))


def bits_of(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.nan, values).view(torch.int32)
