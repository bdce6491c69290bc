"""Payloads read one at a time; every fault is named with its numbers, for who made the payload.

`stacked_decoding` reads many updates at once; whoever is unsure asks the readers here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from federation import rice, wire
from federation.cursor import Cursor
from federation.errors import CodecError
from federation.formats import Kind, Levels, by_prefix
from federation.update import Schema, Section, UpdateBlock


def decode(data: bytes, schema: Schema, pool_version: str) -> UpdateBlock:
    """The update of one user (U = 1), with rows ascending by id and without padding.

    Allocates no more than the schema allows one user to send.

    Raises CodecError on bytes that `encode` did not make for this schema and pool version.
    """
    cursor = _open(data, wire.UPDATE, schema, pool_version)
    round_index, weight, metric_count = cursor.fields(wire.ROUND, "round, weight and number of metrics")
    metrics = _read_metrics(cursor, metric_count)
    sections = _read_sections(cursor, schema)
    cursor.end()
    return UpdateBlock(sections, torch.tensor([weight]), metrics, round_index, pool_version)


def decode_personal(data: bytes, schema: Schema, pool_version: str) -> dict[str, Section]:
    """What one user keeps (U = 1), with rows ascending by id and without padding. Raises as `decode` does."""
    cursor = _open(data, wire.PERSONAL, schema, pool_version)
    sections = _read_sections(cursor, schema)
    cursor.end()
    return sections


def weight_of(payload: bytes) -> float:
    """The weight that an update claims, from its head alone; 0 where `admit` would refuse it or nothing can be read."""
    if len(payload) < wire.HEAD.size + wire.ROUND.size:
        return 0.0
    magic, version, _ = wire.HEAD.unpack_from(payload)
    weight: float = wire.ROUND.unpack_from(payload, wire.HEAD.size)[1]
    return weight if (magic, version) == (wire.UPDATE, wire.VERSION) and 0 <= weight < math.inf else 0.0


def _open(data: bytes, magic: bytes, schema: Schema, pool_version: str) -> Cursor:
    """The payload behind the head, after its checks."""
    if len(data) < wire.HEAD.size + wire.CRC.size:
        raise CodecError(f"a payload has at least {wire.HEAD.size + wire.CRC.size} bytes, got {len(data)}; it is cut")
    payload = memoryview(data)[: -wire.CRC.size]
    found_magic, version, digest = wire.HEAD.unpack_from(payload)
    if found_magic != magic:
        raise CodecError(
            f"the payload must start with {magic!r}, got {found_magic!r}; is it an update or personal values?"
        )
    if version != wire.VERSION:
        raise CodecError(f"this codec reads version {wire.VERSION}, got {version}; use the release that wrote it")
    if wire.CRC.unpack(data[-wire.CRC.size :])[0] != zlib.crc32(payload):
        raise CodecError(
            f"the checksum of {len(data)} bytes does not match; the payload is cut or damaged, send it again"
        )
    if digest != wire.digest_of(schema, pool_version):
        raise CodecError(
            f"the payload is not for pool version {pool_version!r} with this schema (digest {digest.hex()}); "
            "name the version it was made for"
        )
    return Cursor(payload[wire.HEAD.size :])


def _read_metrics(cursor: Cursor, count: int) -> dict[str, Tensor]:
    metrics: dict[str, Tensor] = {}
    previous = ""
    for place in range(count):
        raw = bytes(cursor.take(cursor.byte(f"metric {place}"), f"name of metric {place}"))
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise CodecError(f"names of metrics are UTF-8, got {raw!r}; the sender's encoder is broken") from error
        if place and name <= previous:
            raise CodecError(f"metrics ascend by name, got {name!r} after {previous!r}; the sender's encoder is broken")
        metrics[name] = torch.tensor(cursor.fields(wire.FLOAT, f"metric {name!r}"))
        previous = name
    return metrics


def _read_sections(cursor: Cursor, schema: Schema) -> dict[str, Section]:
    groups = by_prefix(schema.sections)
    kinds = {prefix: _read_kind(cursor, prefix) for prefix in groups}
    mask = cursor.bits(sum(spec.rows for spec in schema.sections.values()), "mask")
    ids: dict[str, Tensor] = {}
    for name, spec in schema.sections.items():
        ids_k, mask = np.flatnonzero(mask[: spec.rows]), mask[spec.rows :]
        if len(ids_k) > spec.max_rows:
            raise CodecError(f"section {name!r} holds at most {spec.max_rows} rows, got {len(ids_k)}; send fewer")
        ids[name] = torch.from_numpy(ids_k.astype(np.int32))
    rows = {name: torch.zeros(1, len(ids_k), schema.sections[name].width) for name, ids_k in ids.items()}
    for prefix, names in groups.items():
        group = [name for name in names if rows[name].numel()]
        if group:
            shapes = [rows[name].shape for name in group]
            rows.update(zip(group, _read_rows(cursor, shapes, kinds[prefix], prefix)))
    return {
        name: Section(ids_k[None], torch.ones(1, len(ids_k), dtype=torch.bool), rows[name])
        for name, ids_k in ids.items()
    }


def _read_kind(cursor: Cursor, prefix: str) -> Kind:
    code = cursor.byte(f"kind of {prefix!r}")
    if code >= len(wire.KINDS):
        raise CodecError(
            f"kinds of rows are 0 to {len(wire.KINDS) - 1}, got {code} for {prefix!r}; the payload is damaged"
        )
    return wire.KINDS[code]


def _read_rows(cursor: Cursor, shapes: Sequence[torch.Size], kind: Kind, prefix: str) -> list[Tensor]:
    """The rows of one prefix as float32: (1, k, width) per section, none of them empty."""
    counts, sizes = [shape[1] for shape in shapes], [shape.numel() for shape in shapes]
    scales: Sequence[Tensor | None] = [None] * len(shapes)
    if kind in wire.SCALED:
        bits = cursor.numbers(wire.SCALE, sum(counts), f"scales of {prefix!r}")
        scales = [scale_k[None] for scale_k in bits.view(torch.bfloat16).split_with_sizes(counts)]
    if kind == "ternary":
        values = _read_ternary(cursor, sum(sizes), prefix)
    else:
        values = cursor.numbers(wire.LEVELS[kind], sum(sizes), f"values of {prefix!r}")
    if kind == "int8" and (values == -128).any():
        raise CodecError(f"int8 levels of {prefix!r} are -127 to 127, got -128; the sender's encoder is broken")
    levels = [level.view(shape) for level, shape in zip(values.split_with_sizes(sizes), shapes)]
    return [Levels(levels_ukw, scale_uk).rows() for levels_ukw, scale_uk in zip(levels, scales)]


def _read_ternary(cursor: Cursor, size: int, prefix: str) -> Tensor:
    levels = np.zeros(size, dtype=np.int8)
    coding = cursor.byte(f"coding of {prefix!r}")
    if coding == wire.BITMAP:
        positions = np.flatnonzero(cursor.bits(size, f"bitmap of {prefix!r}"))
    else:
        (kept,) = cursor.fields(wire.COUNT, f"kept values of {prefix!r}")
        positions = rice.decode(cursor, kept, size, coding)
    negative = cursor.bits(len(positions), f"signs of {prefix!r}")
    levels[positions] = np.where(negative, -1, 1)
    return torch.from_numpy(levels)
