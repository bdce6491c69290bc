"""Many updates decoded at once: the hot path of a server, without a call per user and module; each row is copied once.

The metrics of an update are known, so what comes before its rows has a fixed size: the heads of U updates are one
structured array. A mask tells the size of what follows: the body is a chain of *pieces*, the scales and the values of
each section, and it is known where each of them lies before any is read.

A payload that is not well formed costs its sender alone. The reason holds no number of the user's, so that it can be
counted and logged; `decode` says more.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation import wire
from federation.cursor import Bits
from federation.decoding import decode
from federation.errors import CodecError
from federation.formats import Levels, by_prefix
from federation.update import Schema, Section, UpdateBlock

Array = npt.NDArray[Any]

_LEAST = wire.HEAD.size + wire.ROUND.size + wire.CRC.size
_INT8, _TERNARY = wire.KINDS.index("int8"), wire.KINDS.index("ternary")
_VALUE_BYTES = np.array([np.dtype(wire.LEVELS[kind]).itemsize if kind in wire.LEVELS else 0 for kind in wire.KINDS])
_SCALE_BYTES = np.array([np.dtype(wire.SCALE).itemsize if kind in wire.SCALED else 0 for kind in wire.KINDS])


def decode_all(
    payloads: Sequence[bytes], schema: Schema, pool_version: str, metrics: Collection[str], round_index: int
) -> tuple[UpdateBlock, dict[int, str]]:
    """The well-formed updates, in order, as one block, and why the others are none: {position in payloads: reason}.

    Every update must be of this round and carry exactly these metrics. Rows ascend by id, as `decode` gives them; where
    users differ in their number, padding of zeros comes last. No payload makes it raise, or allocate more than the
    schema allows its user to send.
    """
    layout = _Layout(schema, tuple(sorted(set(metrics))))
    heads = layout.heads(payloads)
    bodies = _bodies_of(heads, layout)
    faults = _body_faults(payloads, bodies, layout)
    faults |= _head_faults(payloads, heads, layout, wire.digest_of(schema, pool_version), round_index)
    alone = _decode_alone(payloads, bodies, faults, schema, pool_version)
    good = [position for position in range(len(payloads)) if position not in faults]
    heads = heads[good]
    read_alone = {place: alone[position] for place, position in enumerate(good) if position in alone}
    reader = _Reader(layout, [memoryview(payloads[position]) for position in good], bodies.take(good), read_alone)
    told = {name: _floats(heads[field]) for name, field in layout.metric_fields.items()}
    block = UpdateBlock(reader.sections(), _floats(heads["weight"]), told, round_index, pool_version)
    return block, dict(sorted(faults.items()))


@dataclass(frozen=True)
class _Layout:
    """What the schema and the names of the metrics, ascending, say about the bytes of an update.

    R rows and S sections in schema order; a chain has Q = 2S pieces: piece s holds the scales of section s, piece S + s
    its values.
    """

    schema: Schema
    metrics: tuple[str, ...]

    @cached_property
    def metric_fields(self) -> dict[str, str]:
        """The field of the head that holds each metric."""
        return {name: f"metric {place}" for place, name in enumerate(self.metrics)}

    @cached_property
    def head(self) -> np.dtype[Any]:
        """All that comes before the rows."""
        fields: list[Any] = [("magic", "S2"), ("version", "u1"), ("digest", "<u4")]
        fields += [("round", "<u4"), ("weight", "<f4"), ("metrics", "u1")]
        for field, name in self.name_bytes.items():
            fields += [(f"name of {field}", "u1", name.shape), (field, "<f4")]
        fields += [("kinds", "u1", (len(self.prefixes),)), ("mask", "u1", (-(-self.first_row_s[-1] // 8),))]
        return np.dtype(fields)

    @cached_property
    def name_bytes(self) -> dict[str, Array]:
        """What must stand in the field before each metric."""
        raw = {field: name.encode() for name, field in self.metric_fields.items()}
        return {field: np.frombuffer(bytes([len(name)]) + name, np.uint8) for field, name in raw.items()}

    @cached_property
    def prefixes(self) -> list[list[int]]:
        """The sections of each prefix."""
        names = list(self.schema.sections)
        return [[names.index(name) for name in group] for group in by_prefix(names).values()]

    @cached_property
    def first_row_s(self) -> list[int]:
        """The first row of each section among all rows, and behind the last one their number: S + 1."""
        return list(accumulate((spec.rows for spec in self.schema.sections.values()), initial=0))

    @cached_property
    def prefix_s(self) -> Array:
        """Which prefix each section has."""
        of_section = {section: place for place, group in enumerate(self.prefixes) for section in group}
        return np.array([of_section[section] for section in range(len(of_section))])

    @cached_property
    def chain_q(self) -> list[int]:
        """The pieces as they follow one another: of each prefix the scales, then the values."""
        count = len(self.schema.sections)
        return [start + section for group in self.prefixes for start in (0, count) for section in group]

    @cached_property
    def id_r(self) -> Array:
        """The id of each row in its section."""
        return np.concatenate([np.arange(spec.rows, dtype=np.int32) for spec in self.schema.sections.values()])

    @cached_property
    def width_s(self) -> Array:
        """Values per row of each section."""
        return np.array([spec.width for spec in self.schema.sections.values()])

    def values_piece(self, section: int) -> int:
        """The piece with the values of a section; that with its scales has the section's own number."""
        return len(self.width_s) + section

    def heads(self, payloads: Sequence[bytes]) -> Array:
        """The head of each payload: (U,); zeros stand for what a short one lacks."""
        size = self.head.itemsize
        return np.frombuffer(b"".join([payload[:size].ljust(size, b"\0") for payload in payloads]), self.head)


@dataclass(frozen=True)
class _Bodies:
    """What the masks say of U payloads.

    mask_ur, padding_ur: (U, R) and the bits behind them. count_us: rows of each section. kind_us: the format of these
    rows, as its place in `wire.KINDS`; fp32 where there are no values. start_uq, stop_uq: bytes of each piece.
    end_u: byte behind the last one. alone_u: who has ternary rows; only the rows' own bytes tell their size, so these
    users are decoded one by one: all their kinds are ternary, and of their pieces nothing is known.
    """

    mask_ur: Bits
    padding_ur: Bits
    count_us: Array
    kind_us: Array
    start_uq: Array
    stop_uq: Array
    end_u: Array
    alone_u: Bits

    def take(self, users: list[int]) -> _Bodies:
        """These users."""
        return _Bodies(**{field.name: getattr(self, field.name)[users] for field in fields(self)})


def _bodies_of(heads: Array, layout: _Layout) -> _Bodies:
    bits = np.unpackbits(heads["mask"], axis=1, bitorder="little")
    mask_ur, padding_ur = np.split(bits.view(np.bool_), [layout.first_row_s[-1]], axis=1)
    count_us = np.add.reduceat(mask_ur, layout.first_row_s[:-1], axis=1, dtype=np.int64)
    value_us = count_us * layout.width_s
    kind_us = np.where(value_us > 0, np.minimum(heads["kinds"], _TERNARY)[:, layout.prefix_s], 0)
    alone_u = (kind_us == _TERNARY).any(1)
    kind_us[alone_u] = _TERNARY
    size_uq = np.concatenate((count_us * _SCALE_BYTES[kind_us], value_us * _VALUE_BYTES[kind_us]), 1)
    stop_uq = np.empty_like(size_uq)
    stop_uq[:, layout.chain_q] = layout.head.itemsize + size_uq[:, layout.chain_q].cumsum(1)
    end_u = layout.head.itemsize + size_uq.sum(1)
    return _Bodies(mask_ur, padding_ur, count_us, kind_us, stop_uq - size_uq, stop_uq, end_u, alone_u)


def _head_faults(
    payloads: Sequence[bytes], heads: Array, layout: _Layout, digest: bytes, round_index: int
) -> dict[int, str]:
    others_u = heads["metrics"] != len(layout.metrics)
    for field, name in layout.name_bytes.items():
        others_u |= (heads[f"name of {field}"] != name).any(1)
    return _first_faults(
        ([len(payload) < _LEAST for payload in payloads], f"a payload of less than {_LEAST} bytes"),
        (heads["magic"] != wire.UPDATE, "bytes that are no update"),
        (heads["version"] != wire.VERSION, f"an update of another version of the codec than {wire.VERSION}"),
        ([_damaged(payload) for payload in payloads], "a checksum that does not match"),
        (heads["digest"] != int.from_bytes(digest, "little"), "an update for another pool version or schema"),
        (heads["round"] != round_index, f"an update of another round than {round_index}"),
        (others_u, f"other metrics than {list(layout.metrics)}"),
        ((heads["kinds"] >= len(wire.KINDS)).any(1), "an unknown kind of rows"),
    )


def _body_faults(payloads: Sequence[bytes], bodies: _Bodies, layout: _Layout) -> dict[int, str]:
    length_u = np.array([len(payload) for payload in payloads], np.int64)
    surplus = [
        (count_u > spec.max_rows, f"section {name!r}: more than {spec.max_rows} rows")
        for (name, spec), count_u in zip(layout.schema.sections.items(), bodies.count_us.T)
    ]
    return _first_faults(
        (length_u < layout.head.itemsize + wire.CRC.size, "an end before the first row"),
        (bodies.padding_ur.any(1), "padding bits that are set"),
        *surplus,
        ((length_u != bodies.end_u + wire.CRC.size) & ~bodies.alone_u, "an end that is not that of the last row"),
        (_odd_levels(payloads, bodies, layout), "int8 levels are -127 to 127"),
    )


def _first_faults(*checks: tuple[npt.ArrayLike, str]) -> dict[int, str]:
    """The first fault of every user that has one."""
    faults: dict[int, str] = {}
    for bad_u, reason in checks:
        for position in np.flatnonzero(bad_u).tolist():
            faults.setdefault(position, reason)
    return faults


def _damaged(payload: bytes) -> bool:
    return zlib.crc32(memoryview(payload)[: -wire.CRC.size]) != int.from_bytes(payload[-wire.CRC.size :], "little")


def _odd_levels(payloads: Sequence[bytes], bodies: _Bodies, layout: _Layout) -> Bits:
    """Who sent an int8 level of -128: (U,). The values of a prefix are one stretch of bytes."""
    odd_u = np.zeros(len(payloads), dtype=bool)
    for group in layout.prefixes:
        start_u = bodies.start_uq[:, layout.values_piece(group[0])].tolist()
        stop_u = bodies.stop_uq[:, layout.values_piece(group[-1])].tolist()
        for u in np.flatnonzero((bodies.kind_us[:, group] == _INT8).any(1)).tolist():
            odd_u[u] |= payloads[u].find(b"\x80", start_u[u], stop_u[u]) >= 0
    return odd_u


def _decode_alone(
    payloads: Sequence[bytes], bodies: _Bodies, faults: dict[int, str], schema: Schema, pool_version: str
) -> dict[int, Mapping[str, Section]]:
    """The sections of those whose rows are ternary and have no other fault; notes the faults found here."""
    decoded: dict[int, Mapping[str, Section]] = {}
    for position in np.flatnonzero(bodies.alone_u).tolist():
        if position not in faults:
            try:
                decoded[position] = decode(payloads[position], schema, pool_version).sections
            except CodecError:
                faults[position] = "ternary rows that cannot be read"
    return decoded


@dataclass(frozen=True)
class _Reader:
    """Reads U payloads without fault. alone: the sections of those users who were decoded alone."""

    layout: _Layout
    payloads: Sequence[memoryview]
    bodies: _Bodies
    alone: Mapping[int, Mapping[str, Section]]

    @cached_property
    def alike_s(self) -> list[bool]:
        """Of which sections all users sent equally many rows of one kind: their rows need no padding."""
        count_us, kind_us = self.bodies.count_us, self.bodies.kind_us
        alike: list[bool] = ((count_us == count_us[:1]) & (kind_us == kind_us[:1])).all(0).tolist()
        return alike

    @cached_property
    def spans_uq(self) -> list[list[slice]]:
        """Where each piece lies."""
        both = zip(self.bodies.start_uq.tolist(), self.bodies.stop_uq.tolist())
        return [[slice(*ends) for ends in zip(starts, stops)] for starts, stops in both]

    def sections(self) -> dict[str, Section]:
        """All users' sections, in the order of the schema."""
        most_s = self.bodies.count_us.max(0, initial=0)
        valid_un = self._slots(most_s)
        ids_un = np.zeros(valid_un.shape, np.int32)
        ids_un[valid_un] = self.layout.id_r[np.nonzero(self.bodies.mask_ur)[1]]  # both by user, then ascending by row
        ends = pairwise(accumulate(most_s.tolist(), initial=0))
        read = {}
        for place, (name, (start, stop)) in enumerate(zip(self.layout.schema.sections, ends)):
            ids_uk, valid_uk = torch.from_numpy(ids_un[:, start:stop]), torch.from_numpy(valid_un[:, start:stop])
            read[name] = Section(ids_uk, valid_uk, self._rows(name, place, valid_uk))
        return read

    def _slots(self, most_s: Array) -> Bits:
        """Which of the N slots of all sections, `most_s` of each, hold rows: (U, N)."""
        section_n = np.repeat(np.arange(len(most_s)), most_s)
        slot_n = np.arange(len(section_n)) - np.repeat(most_s.cumsum() - most_s, most_s)
        valid_un: Bits = slot_n < self.bodies.count_us[:, section_n]
        return valid_un

    def _rows(self, name: str, place: int, valid_uk: Tensor) -> Tensor:
        """The rows of one section, padding zero: (U, k, width) float32."""
        kind_u = self.bodies.kind_us[:, place]
        shape = (*valid_uk.shape, int(self.layout.width_s[place]))
        if 0 in shape:
            return torch.zeros(shape)
        if self.alike_s[place]:
            return self._sent(name, place, int(kind_u[0]), range(len(kind_u))).view(shape)
        rows_ukw = torch.zeros(shape)
        for kind in set(kind_u.tolist()):
            of_kind_u = kind_u == kind
            sent = valid_uk & torch.from_numpy(of_kind_u)[:, None]
            rows_ukw[sent] = self._sent(name, place, kind, np.flatnonzero(of_kind_u).tolist())
        return rows_ukw

    def _sent(self, name: str, place: int, kind: int, users: Sequence[int]) -> Tensor:
        """What users, all of this kind, sent for a section, one after the other: (n, width) float32."""
        if kind == _TERNARY:
            return torch.cat([self.alone[u][name].rows_ukw[0] for u in users])
        values = self._numbers(wire.LEVELS[wire.KINDS[kind]], self.layout.values_piece(place), users)
        scale_n = self._numbers(wire.SCALE, place, users).view(torch.bfloat16) if kind == _INT8 else None
        return Levels(values.view(-1, int(self.layout.width_s[place])), scale_n).rows()

    def _numbers(self, dtype: str, piece: int, users: Sequence[int]) -> Tensor:
        """The numbers of one piece of the users' bodies, in the machine's byte order: (n,)."""
        found = np.frombuffer(bytearray().join([self.payloads[u][self.spans_uq[u][piece]] for u in users]), dtype)
        return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))


def _floats(values_u: Array) -> Tensor:
    """A copy in the machine's byte order."""
    return torch.from_numpy(values_u.astype(np.float32))
