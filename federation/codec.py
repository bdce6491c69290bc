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

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation import rice, wire
from federation.cursor import Bits, pack_bits
from federation.decoding import decode, decode_personal, weight_of
from federation.errors import CodecError
from federation.formats import Kind, Levels, RowFormat, by_prefix, format_of, quantise, to_levels
from federation.stacked_decoding import decode_all
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from federation.wire import VERSION

__all__ = [
    "VERSION",
    "RowFormat",
    "decode",
    "decode_all",
    "decode_personal",
    "encode",
    "encode_personal",
    "personal_bytes",
    "quantise",
    "weight_of",
]


def encode(block: UpdateBlock, position: int, schema: Schema, formats: Mapping[str, RowFormat]) -> bytes:
    """The update of the user at `position` of the block, its rows rounded by the format of their prefix.

    Raises CodecError if the block does not fit the schema, ConfigError if a prefix has no format.
    """
    weight = float(block.weight_u[position])
    metrics = {name: float(values_u[position]) for name, values_u in block.metrics.items()}
    return _seal(
        wire.HEAD.pack(wire.UPDATE, VERSION, wire.digest_of(schema, block.pool_version)),
        _round_bytes(block.round_index, weight, metrics),
        _sections_bytes(block.sections, position, schema, formats),
    )


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
    head = wire.HEAD.pack(wire.PERSONAL, VERSION, wire.digest_of(schema, pool_version))
    return _seal(head, _sections_bytes(sections, position, schema, formats))


def personal_bytes(sections: Mapping[str, Section], schema: Schema, formats: Mapping[str, RowFormat]) -> Tensor:
    """Length of each user's encoded personal values: (U,) int64."""
    users = next(iter(sections.values())).ids_uk.shape[0]
    return torch.tensor(
        [len(encode_personal(sections, u, schema, formats, "")) for u in range(users)], dtype=torch.int64
    )


def _seal(*parts: bytes) -> bytes:
    payload = b"".join(parts)
    return payload + wire.CRC.pack(zlib.crc32(payload))


def _round_bytes(round_index: int, weight: float, metrics: Mapping[str, float]) -> bytes:
    names = {name: name.encode() for name in sorted(metrics)}
    if not 0 <= round_index < 2**32 or len(names) > 255 or any(len(name) > 255 for name in names.values()):
        raise CodecError(
            "a round index is below 2**32, metrics are at most 255 with names of at most 255 bytes, "
            f"got round {round_index} and the metrics {list(names)}"
        )
    parts = [bytes([len(raw)]) + raw + wire.FLOAT.pack(metrics[name]) for name, raw in names.items()]
    return wire.ROUND.pack(round_index, weight, len(parts)) + b"".join(parts)


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
        kinds.append(wire.KINDS.index(row_format.kind))
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
        levels.scale_uk.view(torch.int16).numpy().astype(wire.SCALE) for levels in group if levels.scale_uk is not None
    ]
    values = np.concatenate([levels.levels_ukw.numpy().ravel() for levels in group])
    body = _ternary_bytes(values) if kind == "ternary" else values.astype(wire.LEVELS[kind]).tobytes()
    return b"".join(scale.tobytes() for scale in scales) + body


def _ternary_bytes(levels: npt.NDArray[np.int8]) -> bytes:
    """Which levels are not zero, in the smaller of the two codings, and the signs of those."""
    positions = np.flatnonzero(levels)
    parameter, coded = rice.encode(positions)
    where = bytes([parameter]) + wire.COUNT.pack(len(positions)) + coded
    bitmap = bytes([wire.BITMAP]) + pack_bits(levels != 0)
    return min(bitmap, where, key=len) + pack_bits(levels[positions] < 0)
