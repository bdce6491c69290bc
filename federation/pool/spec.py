"""The shape of a pool: which modules are adapted, how many units each has, and where a unit lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from federation.update import SectionSpec

SECTION_PREFIX = "pool/"

Rows = Mapping[str, Tensor]
"""U users' rows: {section: (U, k, d_in + d_out)}."""


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted linear layer: its dotted name in the model and its widths."""

    name: str
    d_in: int
    d_out: int

    @property
    def section(self) -> str:
        return SECTION_PREFIX + self.name

    @property
    def width(self) -> int:
        return self.d_in + self.d_out


@dataclass(frozen=True)
class PoolSpec:
    """J modules with R units each; unit g = (j, r) has the number j * R + r.

    scale: the factor s in y = base(x) + s * (x @ down^T) @ up.
    """

    modules: tuple[ModuleSpec, ...]
    rank: int
    scale: float

    @cached_property
    def units(self) -> int:
        """G = J * R."""
        return len(self.modules) * self.rank

    def sections(self, max_rows: int) -> dict[str, SectionSpec]:
        """The pool's part of the schema, where a user sends at most `max_rows` units per module."""
        return {m.section: SectionSpec(self.rank, {"down": m.d_in, "up": m.d_out}, max_rows) for m in self.modules}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh rows (R, d_in + d_out) per section: `down` uniform as in LoRA (Hu et al., 2021), `up` zero."""
        values = {}
        for m in self.modules:
            bound = 1.0 / math.sqrt(m.d_in)
            down = torch.empty(self.rank, m.d_in).uniform_(-bound, bound, generator=generator)
            values[m.section] = torch.cat((down, torch.zeros(self.rank, m.d_out)), 1)
        return values


def rows_of_mask(mask_ug: Tensor, modules: int, max_rows: int) -> tuple[Tensor, Tensor]:
    """The active unit ids of each user and module, ascending, padded.

    Shapes: mask_ug (U, J * R) bool; results ids (U, J, max_rows) int64 (padding 0) and valid (U, J, max_rows) bool.
    Raises no error when a module has more active units than `max_rows`: callers size it by the mask.
    """
    mask = mask_ug.view(mask_ug.shape[0], modules, -1)
    order = torch.sort(mask.to(torch.int8), dim=2, descending=True, stable=True).indices[..., :max_rows]
    valid = mask.gather(2, order)
    return order.masked_fill(~valid, 0), valid


def gather(values: Mapping[str, Tensor], spec: PoolSpec, ids_ujk: Tensor, valid_ujk: Tensor) -> dict[str, Tensor]:
    """The chosen rows of each module: {section: (U, k, d_in + d_out)}; padding rows are zero, so they do nothing."""
    rows, full = {}, bool(valid_ujk.all())
    for j, m in enumerate(spec.modules):
        chosen = values[m.section][ids_ujk[:, j]]
        rows[m.section] = chosen if full else chosen.masked_fill_(~valid_ujk[:, j, :, None], 0.0)
    return rows
