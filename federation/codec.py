"""Bytes that leave or persist a user: one user's update, or the personal values that a user keeps.

Little endian, no pickle; both sides hold the schema, so the bytes name nothing that the schema knows.

| bytes | field | update | personal |
|---|---|---|---|
| 2 | magic | "fu" | "fp" |
| 1 | version of this table | 1 | 1 |
| 4 | BLAKE2b of the schema's layout and the pool version | yes | yes |
| 4 | round index, uint32 | yes | |
| 4 | weight, float32 | yes | |
| 1 | number of metrics | yes | |
| 1 + n + 4 each | metric: length of its name, name (UTF-8), value float32; ascending by name | yes | |
| 1 each | kind of the rows of each prefix, in schema order: 0 fp32, 1 fp16, 2 int8, 3 ternary | yes | yes |
| ceil(rows / 8) | mask: one bit per row of the whole schema, in schema order, low bit first | yes | yes |
| see below | rows of each prefix, in schema order, ascending by row | yes | yes |
| 4 | CRC-32 of all bytes before | yes | yes |

So a mask alone (tier T0: sections of width 0) costs 12 bytes and a bit per unit. The rows of one prefix, if
they have any values (n rows with v values in all):

| kind | bytes |
|---|---|
| fp32, fp16 | 4 v, 2 v |
| int8 | 2 n scales (bfloat16), v levels (int8, -127 to 127) |
| ternary | 2 n scales; 1 coding; positions of the c kept values; ceil(c / 8) signs, 1 is negative |

Positions are a bitmap (coding 255, ceil(v / 8) bytes) or Rice coded (coding is the parameter, then c as
uint32, then the bytes of `rice.py`), whichever is smaller. The checksum finds accidents; a sender who means
harm is the business of `admit`: numbers that are not finite decode as such and are refused there.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation import rice
from federation.cursor import Bits, Cursor, pack_bits
from federation.errors import CodecError
from federation.formats import Kind, Levels, RowFormat, by_prefix, format_of, quantise, to_levels
from federation.update import Schema, Section, SectionSpec, UpdateBlock

__all__ = [
    "RowFormat",
    "decode",
    "decode_personal",
    "encode",
    "encode_personal",
    "personal_bytes",
    "quantise",
]

VERSION = 1
_UPDATE, _PERSONAL = b"fu", b"fp"
_HEAD = struct.Struct("<2sB4s")
_ROUND = struct.Struct("<IfB")
_FLOAT = struct.Struct("<f")
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_BITMAP = 255
_KINDS: tuple[Kind, ...] = get_args(Kind)
_SCALED = ("int8", "ternary")
_LEVELS = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}


def encode(block: UpdateBlock, position: int, schema: Schema, formats: Mapping[str, RowFormat]) -> bytes:
    """The update of the user at `position` of the block, its rows rounded by the format of their prefix.

    Raises CodecError if the block does not fit the schema, ConfigError if a prefix has no format.
    """
    weight = float(block.weight_u[position])
    metrics = {name: float(values_u[position]) for name, values_u in block.metrics.items()}
    return _seal(
        _HEAD.pack(_UPDATE, VERSION, _digest(schema, block.pool_version)),
        _round_bytes(block.round_index, weight, metrics),
        _sections_bytes(block.sections, position, schema, formats),
    )


def decode(data: bytes, schema: Schema, pool_version: str) -> UpdateBlock:
    """The update of one user (U = 1), with rows ascending by id and without padding.

    Allocates no more than the schema allows one user to send.

    Raises CodecError on bytes that `encode` did not make for this schema and pool version.
    """
    cursor = _open(data, _UPDATE, schema, pool_version)
    round_index, weight, metric_count = cursor.fields(_ROUND, "round, weight and number of metrics")
    metrics = _read_metrics(cursor, metric_count)
    sections = _read_sections(cursor, schema)
    cursor.end()
    return UpdateBlock(sections, torch.tensor([weight]), metrics, round_index, pool_version)


def encode_personal(
    sections: Mapping[str, Section],
    position: int,
    schema: Schema,
    formats: Mapping[str, RowFormat],
    pool_version: str,
) -> bytes:
    """What one user keeps, referring to a pool version: a mask (sections of width 0), a scale per unit (width
    1) or rows (full width, as a difference to that version's).

    Raises as `encode` does.
    """
    head = _HEAD.pack(_PERSONAL, VERSION, _digest(schema, pool_version))
    return _seal(head, _sections_bytes(sections, position, schema, formats))


def decode_personal(data: bytes, schema: Schema, pool_version: str) -> dict[str, Section]:
    """What one user keeps (U = 1), with rows ascending by id and without padding. Raises as `decode` does."""
    cursor = _open(data, _PERSONAL, schema, pool_version)
    sections = _read_sections(cursor, schema)
    cursor.end()
    return sections


def personal_bytes(sections: Mapping[str, Section], schema: Schema, formats: Mapping[str, RowFormat]) -> Tensor:
    """Length of each user's encoded personal values: (U,) int64."""
    users = next(iter(sections.values())).ids_uk.shape[0]
    return torch.tensor(
        [len(encode_personal(sections, u, schema, formats, "")) for u in range(users)], dtype=torch.int64
    )


def _digest(schema: Schema, pool_version: str) -> bytes:
    """Four bytes that tell pools and layouts apart; `max_rows` is a limit, not layout, so it may change."""
    layout = [(name, spec.rows, list(spec.factors.items())) for name, spec in schema.sections.items()]
    return hashlib.blake2b(json.dumps([pool_version, layout]).encode(), digest_size=4).digest()


def _seal(*parts: bytes) -> bytes:
    payload = b"".join(parts)
    return payload + _CRC.pack(zlib.crc32(payload))


def _round_bytes(round_index: int, weight: float, metrics: Mapping[str, float]) -> bytes:
    names = {name: name.encode() for name in sorted(metrics)}
    if not 0 <= round_index < 2**32 or len(names) > 255 or any(len(name) > 255 for name in names.values()):
        raise CodecError(
            "a round index is below 2**32, metrics are at most 255 with names of at most 255 bytes, "
            f"got round {round_index} and the metrics {list(names)}"
        )
    parts = [bytes([len(raw)]) + raw + _FLOAT.pack(metrics[name]) for name, raw in names.items()]
    return _ROUND.pack(round_index, weight, len(parts)) + b"".join(parts)


def _sections_bytes(
    sections: Mapping[str, Section], position: int, schema: Schema, formats: Mapping[str, RowFormat]
) -> bytes:
    if set(sections) != set(schema.sections):
        odd = sorted(set(sections) ^ set(schema.sections))
        raise CodecError(
            f"sections must be those of the schema; missing or unknown: {odd}; was it built for this pool?"
        )
    chosen = {name: _one_user(name, sections[name], position, spec) for name, spec in schema.sections.items()}
    mask = np.concatenate([_row_mask(chosen[name], spec) for name, spec in schema.sections.items()])
    kinds, bodies = bytearray(), []
    for prefix, names in by_prefix(schema.sections).items():
        row_format = format_of(prefix, formats)
        kinds.append(_KINDS.index(row_format.kind))
        group = [chosen[name] for name in names if chosen[name].rows_ukw.numel()]
        if group:
            bodies.append(_rows_bytes(to_levels(group, row_format), row_format.kind))
    return bytes(kinds) + pack_bits(mask) + b"".join(bodies)


def _one_user(name: str, section: Section, position: int, spec: SectionSpec) -> Section:
    """The valid rows of one user, ascending by id (U = 1)."""
    valid_k = section.valid_uk[position]
    ids_k, order_k = section.ids_uk[position][valid_k].cpu().sort()
    rows_kw = section.rows_ukw[position][valid_k].cpu()[order_k]
    count, width = rows_kw.shape
    if width != spec.width or count > spec.max_rows:
        raise CodecError(
            f"section {name!r} holds at most {spec.max_rows} rows of {spec.width} values, "
            f"got {count} of {width}; was it built for another pool?"
        )
    if count and (ids_k[0] < 0 or ids_k[-1] >= spec.rows or (ids_k[1:] == ids_k[:-1]).any()):
        raise CodecError(
            f"row ids of section {name!r} must differ and lie in 0..{spec.rows - 1}, "
            f"got {count} from {ids_k[0]} to {ids_k[-1]}; was it built for another pool?"
        )
    return Section(ids_k[None], torch.ones(1, count, dtype=torch.bool), rows_kw[None])


def _row_mask(section: Section, spec: SectionSpec) -> Bits:
    mask = np.zeros(spec.rows, dtype=bool)
    mask[section.ids_uk[0].numpy()] = True
    return mask


def _rows_bytes(group: Sequence[Levels], kind: Kind) -> bytes:
    scales = [
        levels.scale_uk.view(torch.int16).numpy().astype("<i2") for levels in group if levels.scale_uk is not None
    ]
    values = np.concatenate([levels.levels_ukw.numpy().ravel() for levels in group])
    body = _ternary_bytes(values) if kind == "ternary" else values.astype(_LEVELS[kind]).tobytes()
    return b"".join(scale.tobytes() for scale in scales) + body


def _ternary_bytes(levels: npt.NDArray[np.int8]) -> bytes:
    """Which levels are not zero, in the smaller of the two codings, and the signs of those."""
    positions = np.flatnonzero(levels)
    parameter, coded = rice.encode(positions)
    where = bytes([parameter]) + _COUNT.pack(len(positions)) + coded
    bitmap = bytes([_BITMAP]) + pack_bits(levels != 0)
    return min(bitmap, where, key=len) + pack_bits(levels[positions] < 0)


def _open(data: bytes, magic: bytes, schema: Schema, pool_version: str) -> Cursor:
    """The payload behind the head, after its checks."""
    if len(data) < _HEAD.size + _CRC.size:
        raise CodecError(f"a payload has at least {_HEAD.size + _CRC.size} bytes, got {len(data)}; it is cut")
    payload = memoryview(data)[: -_CRC.size]
    found_magic, version, digest = _HEAD.unpack_from(payload)
    if found_magic != magic:
        raise CodecError(
            f"the payload must start with {magic!r}, got {found_magic!r}; is it an update or personal values?"
        )
    if version != VERSION:
        raise CodecError(f"this codec reads version {VERSION}, got {version}; use the release that wrote it")
    if _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(payload):
        raise CodecError(
            f"the checksum of {len(data)} bytes does not match; the payload is cut or damaged, send it again"
        )
    if digest != _digest(schema, pool_version):
        raise CodecError(
            f"the payload is not for pool version {pool_version!r} with this schema (digest {digest.hex()}); "
            "name the version it was made for"
        )
    return Cursor(payload[_HEAD.size :])


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
        metrics[name] = torch.tensor(cursor.fields(_FLOAT, f"metric {name!r}"))
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
    if code >= len(_KINDS):
        raise CodecError(f"kinds of rows are 0 to {len(_KINDS) - 1}, got {code} for {prefix!r}; the payload is damaged")
    return _KINDS[code]


def _read_rows(cursor: Cursor, shapes: Sequence[torch.Size], kind: Kind, prefix: str) -> list[Tensor]:
    """The rows of one prefix as float32: (1, k, width) per section, none of them empty."""
    counts, sizes = [shape[1] for shape in shapes], [shape.numel() for shape in shapes]
    scales: Sequence[Tensor | None] = [None] * len(shapes)
    if kind in _SCALED:
        bits = cursor.numbers("<i2", sum(counts), f"scales of {prefix!r}")
        scales = [scale_k[None] for scale_k in bits.view(torch.bfloat16).split_with_sizes(counts)]
    if kind == "ternary":
        values = _read_ternary(cursor, sum(sizes), prefix)
    else:
        values = cursor.numbers(_LEVELS[kind], sum(sizes), f"values of {prefix!r}")
    if kind == "int8" and (values == -128).any():
        raise CodecError(f"int8 levels of {prefix!r} are -127 to 127, got -128; the sender's encoder is broken")
    levels = [level.view(shape) for level, shape in zip(values.split_with_sizes(sizes), shapes)]
    return [Levels(levels_ukw, scale_uk).rows() for levels_ukw, scale_uk in zip(levels, scales)]


def _read_ternary(cursor: Cursor, size: int, prefix: str) -> Tensor:
    levels = np.zeros(size, dtype=np.int8)
    coding = cursor.byte(f"coding of {prefix!r}")
    if coding == _BITMAP:
        positions = np.flatnonzero(cursor.bits(size, f"bitmap of {prefix!r}"))
    else:
        (kept,) = cursor.fields(_COUNT, f"kept values of {prefix!r}")
        positions = rice.decode(cursor, kept, size, coding)
    negative = cursor.bits(len(positions), f"signs of {prefix!r}")
    levels[positions] = np.where(negative, -1, 1)
    return torch.from_numpy(levels)
