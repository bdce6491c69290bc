"""What users send: sections of rows, admitted by the server's schema before anything else sees them.

`admit` is pure and stacked: it looks at U users at once, rejects users one by one, and clips the others.
Order (security): schema, then finite, then clip, then weight cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from federation.errors import PoolError

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
        return replace(self, rows_ukw=self.rows_ukw.masked_fill(~self.valid_uk[..., None], 0.0))


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
    """

    max_norm: Mapping[str, float] = field(default_factory=dict)
    max_weight: float = 1.0


@dataclass(frozen=True)
class Rejections:
    """Who was refused and why: {position in the block: reason}."""

    reasons: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.reasons)


def admit(block: UpdateBlock, schema: Schema, limits: Limits) -> tuple[UpdateBlock, Rejections]:
    """The users whose updates are well formed, clipped and weight-capped, and the reasons for the others.

    A fault of shape or dtype cannot be told apart by user: then every user of the block is rejected.
    The others are judged one by one: ids in range and unique, no more rows than allowed, all numbers finite.
    """
    users = block.weight_u.shape[0] if block.weight_u.dim() else 0
    fault = _structure_fault(block, schema)
    if fault is not None:
        empty = {
            name: Section(
                torch.zeros(0, spec.max_rows, dtype=torch.int32),
                torch.zeros(0, spec.max_rows, dtype=torch.bool),
                torch.zeros(0, spec.max_rows, spec.width),
            )
            for name, spec in schema.sections.items()
        }
        nobody = replace(block, sections=empty, weight_u=torch.zeros(0), metrics={})
        return nobody, Rejections(dict.fromkeys(range(users), fault))
    norms = {name: _row_norms(section) for name, section in block.sections.items()}
    reasons = _user_faults(block, schema, norms)
    if reasons:
        keep = torch.ones(users, dtype=torch.bool)
        keep[list(reasons)] = False
        block, norms = block.take(keep), {name: norm_uk[keep] for name, norm_uk in norms.items()}
    clipped = _clip(block.sections, norms, limits.max_norm)
    return replace(block, sections=clipped, weight_u=block.weight_u.clamp(max=limits.max_weight)), Rejections(reasons)


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


def _row_norms(section: Section) -> Tensor:
    """The L2 norm of every row, 0 for padding; not finite where an entry is not: (U, k) float64.

    One fast pass in float32. Only rows whose squares overflow there are looked at again, in float64, where finite
    float32 entries never do.
    """
    norm_uk: Tensor = torch.linalg.vector_norm(section.rows_ukw, dim=2).double().masked_fill_(~section.valid_uk, 0.0)
    odd_uk = ~torch.isfinite(norm_uk)
    if odd_uk.any():
        norm_uk[odd_uk] = section.rows_ukw[odd_uk].double().square().sum(1).sqrt()
    return norm_uk


def _user_faults(block: UpdateBlock, schema: Schema, norms: Mapping[str, Tensor]) -> dict[int, str]:
    reasons: dict[int, str] = {}

    def refuse(bad_u: Tensor, reason: str) -> None:
        for position in bad_u.nonzero().flatten().tolist():
            reasons.setdefault(position, reason)

    for name, spec in schema.sections.items():
        section = block.sections[name]
        ids, valid = section.ids_uk, section.valid_uk
        outside = ((ids < 0) | (ids >= spec.rows)) & valid
        refuse(outside.any(1), f"section {name!r}: a row id outside 0..{spec.rows - 1}")
        refuse(valid.sum(1) > spec.max_rows, f"section {name!r}: more than {spec.max_rows} rows")
        padding = spec.rows + torch.arange(ids.shape[1], dtype=torch.int32)
        ordered = torch.where(valid, ids, padding).sort(1).values
        refuse((ordered[:, 1:] == ordered[:, :-1]).any(1), f"section {name!r}: a row id sent twice")
        refuse(~torch.isfinite(norms[name]).all(1), f"section {name!r}: a number that is not finite")
    refuse(~torch.isfinite(block.weight_u) | (block.weight_u < 0), "the weight must be finite and not negative")
    for name, values in block.metrics.items():
        refuse(~torch.isfinite(values), f"metric {name!r} must be finite")
    return reasons


def _clip(
    sections: Mapping[str, Section], norms: Mapping[str, Tensor], max_norm: Mapping[str, float]
) -> dict[str, Section]:
    """Padding becomes zero; each prefix's sections are scaled together to norm <= max_norm (a zero norm is left).

    Copies only what it changes.
    """
    clipped = {name: section.without_padding() for name, section in sections.items()}
    for prefix, bound in max_norm.items():
        group = [name for name in clipped if name.split("/")[0] == prefix]
        if not group:
            continue
        norm_u = torch.stack([norms[name].square().sum(1) for name in group]).sum(0).sqrt()
        over_u = norm_u > bound
        if over_u.any():
            factor_u = torch.where(over_u, bound / norm_u.clamp_min(1e-300), 1.0).float()
            for name in group:
                section = clipped[name]
                clipped[name] = replace(section, rows_ukw=section.rows_ukw * factor_u[:, None, None])
    return clipped
