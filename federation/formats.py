"""How rows of numbers are rounded before they leave or persist.

Every kind of format is a pair of stacked functions, rows -> levels -> rows. `quantise` runs both, the codec
puts bytes in between: so a simulation that only quantises gets, bit for bit, what a server decodes.

| kind | a value becomes | per row |
|---|---|---|
| fp32 | itself | |
| fp16 | the nearest float16; beyond 65504 infinity, so admission refuses it; below 6e-8 zero | |
| int8 | round(127 * value / peak) | scale = peak / 127 |
| ternary | its sign if among the user's largest, else 0 (ComPEFT; Yadav et al., 2023) | scale = their mean |

A scale is a bfloat16: two bytes, and the range of float32, so that gradients of 1e-9 survive. A row with a
number that is not finite comes back with one, so that admission sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.update import Section

Kind = Literal["fp32", "fp16", "int8", "ternary"]

_MEAN_STEPS = 2.0**23
_LEAST = 2.0**-149  # the smallest float32 above zero


@dataclass(frozen=True)
class RowFormat:
    """How the sections of one prefix ("pool", "gate") are rounded.

    top: share of a user's values that a ternary format keeps, 0 < top <= 1: the largest of *all* rows that
    the user has under the prefix, so that a quiet module spends fewer of them.

    >>> RowFormat("ternary", top=0.5)
    RowFormat(kind='ternary', top=0.5)
    """

    kind: Kind
    top: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"a row format is one of {list(get_args(Kind))}, got {self.kind!r}; name one of them")
        if not 0.0 < self.top <= 1.0:
            raise ConfigError(f"a ternary format keeps a share in (0, 1] of the values, got top={self.top}")
        if self.top != 1.0 and self.kind != "ternary":
            raise ConfigError(f"only ternary rows keep a share, got top={self.top} with {self.kind}; leave it out")


@dataclass(frozen=True)
class Levels:
    """Rows as they travel: numbers of the format, and a scale per row where the format has one.

    levels_ukw: (U, k, width) float32, float16 or int8; scale_uk: (U, k) bfloat16, or None.
    """

    levels_ukw: Tensor
    scale_uk: Tensor | None

    def rows(self) -> Tensor:
        """(U, k, width) float32."""
        values = self.levels_ukw.float()
        return values if self.scale_uk is None else values.mul_(self.scale_uk.float()[..., None])


def quantise(sections: Mapping[str, Section], formats: Mapping[str, RowFormat]) -> dict[str, Section]:
    """U users' sections with every row rounded by the format of its prefix; padding rows become zero.

    Equal, bit for bit and row by row, to decoding each user's encoded bytes. A user's result does not depend
    on the others in the block or on the order of rows.

    Raises ConfigError if a prefix has no format.
    """
    rounded: dict[str, Section] = {}
    for prefix, names in by_prefix(sections).items():
        group = [sections[name] for name in names]
        for name, section, levels in zip(names, group, to_levels(group, format_of(prefix, formats))):
            rounded[name] = replace(section, rows_ukw=levels.rows())
    return {name: rounded[name] for name in sections}


def by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Section names by what stands before their first "/", in the order given."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("/")[0], []).append(name)
    return groups


def format_of(prefix: str, formats: Mapping[str, RowFormat]) -> RowFormat:
    """The format of a prefix. Raises ConfigError if there is none."""
    if prefix not in formats:
        raise ConfigError(
            f"every prefix needs a row format, {prefix!r} has none; formats are given for {sorted(formats)}"
        )
    return formats[prefix]


def to_levels(sections: Sequence[Section], row_format: RowFormat) -> list[Levels]:
    """The levels of U users' sections, all of one prefix."""
    rows = [section.without_padding().rows_ukw.float() for section in sections]
    match row_format.kind:
        case "fp32":
            return [Levels(rows_ukw, None) for rows_ukw in rows]
        case "fp16":
            return [Levels(rows_ukw.half(), None) for rows_ukw in rows]
        case "int8":
            return [_int8(rows_ukw) for rows_ukw in rows]
        case "ternary":
            values_u = torch.stack([s.valid_uk.sum(1) * s.rows_ukw.shape[2] for s in sections]).sum(0)
            floor_u = _smallest_kept([rows_ukw.abs() for rows_ukw in rows], values_u, row_format.top)
            return [_ternary(rows_ukw, floor_u) for rows_ukw in rows]


def _int8(rows_ukw: Tensor) -> Levels:
    # The levels are made with the scale *as it travels*, so its rounding costs nothing: 127 * 2**-9 < 1/2.
    scale_uk = (_peak(rows_ukw) / 127.0).bfloat16()
    divisor_uk = torch.where(scale_uk == 0, 1.0, scale_uk.float())
    levels_ukw = (rows_ukw / divisor_uk[..., None]).round().clamp(-127, 127)
    return Levels(levels_ukw.nan_to_num(nan=0.0).to(torch.int8), scale_uk)


def _ternary(rows_ukw: Tensor, floor_u: Tensor) -> Levels:
    """Signs of the values at or above the user's floor, times their mean magnitude in the row.

    The mean is the scale with the least squared error for the kept values. They are added as integers, steps
    of peak / 2**23, exact in float64 in any order: sums of floats could differ between a block and one user.
    """
    magnitude_ukw, peak_uk = rows_ukw.abs(), _peak(rows_ukw)
    kept_ukw = magnitude_ukw >= floor_u[:, None, None]
    unit_uk = torch.where(peak_uk == 0, 1.0, peak_uk)
    # Products, not masked_fill: on a random mask its branches are four times slower; and NaN * 0 stays NaN.
    steps_ukw = (magnitude_ukw / unit_uk[..., None] * _MEAN_STEPS).round() * kept_ukw
    mean_steps_uk = steps_ukw.sum(2, dtype=torch.float64) / kept_ukw.sum(2, dtype=torch.int32).clamp_min(1)
    scale_uk = (unit_uk.double() * (mean_steps_uk / _MEAN_STEPS)).bfloat16()
    return Levels(rows_ukw.sign().to(torch.int8) * kept_ukw, scale_uk)


def _smallest_kept(magnitudes: Sequence[Tensor], values_u: Tensor, top: float) -> Tensor:
    """The magnitude of each user's last kept value: the round(top * n)-th largest of n, at least the first.

    All values that tie with it are kept (zeros never are), so the choice does not depend on the rows' order.
    Shapes: magnitudes (U, k, width) each, padding zero; values_u (U,), how many are no padding; result (U,).
    """
    floor_u = torch.full(values_u.shape, _LEAST, device=values_u.device)
    if top == 1.0 or not any(magnitude_ukw.numel() for magnitude_ukw in magnitudes):
        return floor_u
    # numpy's selection is ten times faster than torch's; order statistics are exact, so any device agrees.
    flat = torch.cat([magnitude_ukw.flatten(1) for magnitude_ukw in magnitudes], 1).cpu().numpy()
    keep_u = (values_u.double() * top).round().clamp_min(1).long()
    for keep in set(keep_u.tolist()):  # one pass if all users have the same budget
        chosen_u, place = keep_u == keep, flat.shape[1] - keep
        last_kept = np.partition(flat[chosen_u.cpu().numpy()], place, axis=1)[:, place]
        floor_u[chosen_u] = torch.from_numpy(last_kept).to(floor_u)
    return floor_u.clamp_min(_LEAST)


def _peak(rows_ukw: Tensor) -> Tensor:
    """Largest magnitude of each row, NaN if it has one: (U, k). A row of width zero has the peak 0."""
    return rows_ukw.abs().amax(2) if rows_ukw.shape[2] else rows_ukw.new_zeros(rows_ukw.shape[:2])
