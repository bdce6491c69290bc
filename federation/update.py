"""What users send: sections of rows, admitted by the server's schema before anything else sees them.

`admit` is pure and stacked: it looks at U users at once, rejects users one by one, and clips the others.
Order (security): schema, then finite, then absurd norms, then clip, then weight cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from federation.errors import PoolError

T = TypeVar("T")

Values = Mapping[str, Tensor]
"""The trained state, by section name: each (rows, width) float32."""


@dataclass(frozen=True)
class SectionSpec:
    """One part of the trained state and what a user may send for it.

    rows: rows of the part: R for a module of the pool, 1 for a dense part such as the gate.
    factors: columns by name, in order, for example {"down": 128, "up": 384}.
    max_rows: most rows that one user may send.
    """

    rows: int
    factors: Mapping[str, int]
    max_rows: int

    @property
    def width(self) -> int:
        return sum(self.factors.values())

    def columns(self, factor: str) -> slice:
        """Where a factor's columns lie."""
        start = 0
        for name, width in self.factors.items():
            if name == factor:
                return slice(start, start + width)
            start += width
        raise PoolError(f"a section has the factors {list(self.factors)}, got {factor!r}; name one of them")


@dataclass(frozen=True)
class Schema:
    """All sections of the trained state, in a fixed order. The server owns it."""

    sections: Mapping[str, SectionSpec]

    def zeros(self) -> dict[str, Tensor]:
        """Values of this schema, all zero: (rows, width) per section."""
        return {name: torch.zeros(spec.rows, spec.width) for name, spec in self.sections.items()}


@dataclass(frozen=True)
class Section:
    """U users' contribution to one part of the state.

    ids_uk: (U, k) int32, which rows. valid_uk: (U, k) bool, False is padding (Bernoulli masks differ in size).
    rows_ukw: (U, k, width) float32, the *direction of improvement*: trained minus given values, or an ascent gradient.
    """

    ids_uk: Tensor
    valid_uk: Tensor
    rows_ukw: Tensor

    def take(self, keep: Tensor) -> Section:
        """The users at positions (or the mask) `keep`."""
        return Section(self.ids_uk[keep], self.valid_uk[keep], self.rows_ukw[keep])

    def without_padding(self) -> Section:
        """Padding rows become zero. Copies only where there are any."""
        if self.valid_uk.all():
            return self
        padding = (~self.valid_uk).flatten().nonzero().squeeze(1)
        # By row, not by entry: half the time of `masked_fill`.
        filled = self.rows_ukw.flatten(0, 1).index_fill(0, padding, 0.0)
        return replace(self, rows_ukw=filled.view(self.rows_ukw.shape))


@dataclass(frozen=True)
class UpdateBlock:
    """U users' updates. weight_u: (U,) float32; metrics: (U,) float32 by name."""

    sections: Mapping[str, Section]
    weight_u: Tensor
    metrics: Mapping[str, Tensor]
    round_index: int
    pool_version: str

    def take(self, keep: Tensor) -> UpdateBlock:
        """The users at positions (or the mask) `keep`."""
        return replace(
            self,
            sections={name: section.take(keep) for name, section in self.sections.items()},
            weight_u=self.weight_u[keep],
            metrics={name: values[keep] for name, values in self.metrics.items()},
        )


@dataclass(frozen=True)
class Limits:
    """What the server tolerates of one user.

    max_norm: largest L2 norm, by prefix of the section's name ("pool", "gate"): the sections that share a prefix
    are clipped together. A prefix that is not listed is not clipped.
    max_weight: cap on a user's weight.
    absurd: a norm above so many times the largest is refused, not clipped: no honest training makes one.
    """

    max_norm: Mapping[str, float] = field(default_factory=dict)
    max_weight: float = 1.0
    absurd: float = 1e3


@dataclass(frozen=True)
class Rejections:
    """Who was refused and why: {position in the block: reason}. No reason holds a number of the user's."""

    reasons: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.reasons)


def admit(block: UpdateBlock, schema: Schema, limits: Limits) -> tuple[UpdateBlock, Rejections]:
    """The users whose updates are well formed, clipped and weight-capped, and the reasons for the others.

    A fault of shape or dtype cannot be told apart by user: then every user of the block is rejected.
    The others are judged one by one: ids in range and unique, no more rows than allowed, all numbers finite, no
    absurd norm. What becomes of a user depends neither on the others nor on padding.
    """
    fault = _structure_fault(block, schema)
    if fault is not None:
        users = block.weight_u.shape[0] if block.weight_u.dim() else 0
        return _nobody(block, schema), Rejections(dict.fromkeys(range(users), fault))
    slots = _slots_of(block, schema)
    norms = {prefix: slots.norm_under(prefix) for prefix in limits.max_norm}
    reasons = _user_faults(block, schema, slots)
    for prefix, norm_u in norms.items():
        reason = f"prefix {prefix!r}: a norm above {limits.absurd:g} times the largest"
        _refuse(reasons, norm_u > limits.absurd * limits.max_norm[prefix], reason)
    if reasons:
        keep = torch.ones(len(block.weight_u), dtype=torch.bool)
        keep[list(reasons)] = False
        block, norms = block.take(keep), {prefix: norm_u[keep] for prefix, norm_u in norms.items()}
    sections = dict(block.sections)
    if not slots.valid_un.all():
        sections = {name: section.without_padding() for name, section in sections.items()}
    for prefix, norm_u in norms.items():
        sections |= _clip(_under(prefix, sections), norm_u, limits.max_norm[prefix])
    return replace(block, sections=sections, weight_u=block.weight_u.clamp(max=limits.max_weight)), Rejections(reasons)


def _nobody(block: UpdateBlock, schema: Schema) -> UpdateBlock:
    """A block of no users."""
    sections = {
        name: Section(
            torch.zeros(0, spec.max_rows, dtype=torch.int32),
            torch.zeros(0, spec.max_rows, dtype=torch.bool),
            torch.zeros(0, spec.max_rows, spec.width),
        )
        for name, spec in schema.sections.items()
    }
    return replace(block, sections=sections, weight_u=torch.zeros(0), metrics={})


def _structure_fault(block: UpdateBlock, schema: Schema) -> str | None:
    users = block.weight_u.shape[0] if block.weight_u.dim() == 1 else -1
    if users < 0 or block.weight_u.dtype != torch.float32:
        return f"weight must be (U,) float32, got {tuple(block.weight_u.shape)} {block.weight_u.dtype}"
    if set(block.sections) != set(schema.sections):
        odd = sorted(set(block.sections) ^ set(schema.sections))
        return f"sections must be those of the schema; missing or unknown: {odd}"
    for name, spec in schema.sections.items():
        section = block.sections[name]
        k = section.ids_uk.shape[1] if section.ids_uk.dim() == 2 else -1
        wanted = ((users, k), (users, k), (users, k, spec.width))
        shapes = tuple(tuple(t.shape) for t in (section.ids_uk, section.valid_uk, section.rows_ukw))
        if k < 0 or shapes != wanted:
            return f"section {name!r} must have shapes {wanted}, got {shapes}"
        dtypes = (section.ids_uk.dtype, section.valid_uk.dtype, section.rows_ukw.dtype)
        if dtypes != (torch.int32, torch.bool, torch.float32):
            return f"section {name!r} must be int32, bool, float32, got {dtypes}"
    for name, values in block.metrics.items():
        if tuple(values.shape) != (users,):
            return f"metric {name!r} must have shape {(users,)}, got {tuple(values.shape)}"
    return None


@dataclass(frozen=True)
class _Slots:
    """The slots of all sections side by side, N per user, so that one pass judges them all.

    places: where each section's slots lie, in schema order. ids_un, valid_un: (U, N), as in the sections.
    norm_un: (U, N) float64, the L2 norm of each row: 0 for padding, not finite where an entry is not.
    """

    places: Mapping[str, slice]
    ids_un: Tensor
    valid_un: Tensor
    norm_un: Tensor

    def norm_under(self, prefix: str) -> Tensor:
        """The L2 norm of each user's rows in the sections of a prefix: (U,) float64."""
        nothing = self.norm_un.new_zeros(len(self.norm_un), 1)
        own = [self.norm_un[:, place] for place in _under(prefix, self.places).values()]
        # Added one after the other, where `sum` would build a tree: padding in between must not change a bit.
        return torch.cat([nothing, *own], 1).square_().cumsum(1)[:, -1].sqrt()


def _slots_of(block: UpdateBlock, schema: Schema) -> _Slots:
    sections = [block.sections[name] for name in schema.sections]
    ends = accumulate((section.ids_uk.shape[1] for section in sections), initial=0)
    places = {name: slice(start, stop) for name, (start, stop) in zip(schema.sections, pairwise(ends))}
    valid_un = torch.cat([section.valid_uk for section in sections], 1)
    norm_un = torch.cat([torch.linalg.vector_norm(section.rows_ukw, dim=2) for section in sections], 1).double()
    norm_un.masked_fill_(~valid_un, 0.0)
    odd_un = ~norm_un.isfinite()
    if odd_un.any():  # in float64 the squares of finite float32 entries never overflow
        for section, place in zip(sections, places.values()):
            again_uk = odd_un[:, place]
            norm_un[:, place][again_uk] = section.rows_ukw[again_uk].double().square().sum(1).sqrt()
    return _Slots(places, torch.cat([section.ids_uk for section in sections], 1), valid_un, norm_un)


def _user_faults(block: UpdateBlock, schema: Schema, slots: _Slots) -> dict[int, str]:
    """The first fault of every user that has one."""
    reasons: dict[int, str] = {}
    for name, spec in schema.sections.items():
        if block.sections[name].ids_uk.shape[1] > spec.max_rows:
            many_u = block.sections[name].valid_uk.sum(1) > spec.max_rows
            _refuse(reasons, many_u, f"section {name!r}: more than {spec.max_rows} rows")
    inside_un, twice_un = _judge_ids(schema, slots)
    finite_un = slots.norm_un.isfinite()
    if not (inside_un & finite_un & ~twice_un).all():
        for name, place in slots.places.items():
            outside = f"section {name!r}: a row id outside 0..{schema.sections[name].rows - 1}"
            _refuse(reasons, ~inside_un[:, place].all(1), outside)
            _refuse(reasons, twice_un[:, place].any(1), f"section {name!r}: a row id sent twice")
            _refuse(reasons, ~finite_un[:, place].all(1), f"section {name!r}: a number that is not finite")
    weight_u = block.weight_u
    _refuse(reasons, ~weight_u.isfinite() | (weight_u < 0), "the weight must be finite and not negative")
    for name, values_u in block.metrics.items():
        _refuse(reasons, ~values_u.isfinite(), f"metric {name!r} must be finite")
    return reasons


def _judge_ids(schema: Schema, slots: _Slots) -> tuple[Tensor, Tensor]:
    """Of each slot, whether its id is in range, and whether the user sent it before: (U, N) bool. Padding passes."""
    specs = [(spec, place.stop - place.start) for spec, place in zip(schema.sections.values(), slots.places.values())]
    firsts = accumulate((spec.rows for spec, _ in specs), initial=0)
    rows_n = torch.tensor([spec.rows for spec, count in specs for _ in range(count)], dtype=torch.int32)
    first_n = torch.tensor([first for first, (_, count) in zip(firsts, specs) for _ in range(count)], dtype=torch.int32)
    inside_un = (slots.ids_un >= 0) & (slots.ids_un < rows_n)
    unlike_n = torch.arange(-len(rows_n), 0, dtype=torch.int32)
    keys_un, order_un = torch.where(slots.valid_un & inside_un, slots.ids_un + first_n, unlike_n).sort(1)
    twice_un = torch.zeros_like(slots.valid_un)
    twice_un.scatter_(1, order_un[:, 1:], keys_un[:, 1:] == keys_un[:, :-1])
    return inside_un | ~slots.valid_un, twice_un


def _refuse(reasons: dict[int, str], bad_u: Tensor, reason: str) -> None:
    """Notes the reason for each user who has none yet."""
    for position in bad_u.nonzero().flatten().tolist():
        reasons.setdefault(position, reason)


def _clip(sections: Mapping[str, Section], norm_u: Tensor, bound: float) -> dict[str, Section]:
    """The sections, of these norms taken together, scaled to norm <= bound (a zero norm is left).

    Copies only what it changes.
    """
    over_u = norm_u > bound
    if not over_u.any():
        return dict(sections)
    factor_u = torch.where(over_u, bound / norm_u.clamp_min(1e-300), 1.0).float()
    return {
        name: replace(section, rows_ukw=section.rows_ukw * factor_u[:, None, None])
        for name, section in sections.items()
    }


def _under(prefix: str, by_section: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in by_section.items() if name.split("/")[0] == prefix}
