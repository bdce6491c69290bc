"""f_init, the initialisation network: from a user's context to where its rows start.

The start of a module is its active units with the core C between them, delta W = s * down^T C up (as in LoRA-XS,
Balazy et al., 2024):

    C_u = M_u (diag(a_u) + sum_q c_uq l_q r_q^T) M_u,    M_u = diag(mask)

a_u: a scale for each unit, 2 sigmoid(bias_g + e_g . W h(u)), within [0, 2], with the factors e_g = a_j * b_r, so that
the number of parameters hardly grows with the pool. c_u: how much of each of Q learned combinations of units. h(u)
sees the mean features of the user's examples; without context there is one start for all users. A mask alone is
the special case C_u = M_u, and takes the same path (`starting_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.pool.spec import ModuleSpec, Rows


def cores_of_mask(valid_ujk: Tensor) -> Tensor:
    """The cores of a mask alone, 0 or 1 on the diagonal: (U, J, k) bool -> (U, J, k, k)."""
    return torch.diag_embed(valid_ujk.to(torch.get_default_dtype()))


def starting_rows(rows: Rows, cores_ujkk: Tensor, modules: Sequence[ModuleSpec]) -> dict[str, Tensor]:
    """The rows with `up` mixed by the cores: {section: (U, k, d_in + d_out)}."""
    started = {}
    for j, module in enumerate(modules):
        down, up = torch.split(rows[module.section], [module.d_in, module.d_out], 2)
        started[module.section] = torch.cat((down, torch.bmm(cores_ujkk[:, j], up)), 2)
    return started


@dataclass(frozen=True)
class InitNetwork:
    """The shape of f_init; its parameters are one flat row.

    contextual: whether h(u) is there. hidden: H. factors: D. combinations: Q.
    """

    modules: int
    rank: int
    feature_width: int
    hidden: int
    factors: int
    combinations: int
    contextual: bool

    @cached_property
    def _parts(self) -> dict[str, tuple[int, ...]]:
        units, j, r = self.modules * self.rank, self.modules, self.rank
        d, h, q = self.factors, self.hidden, self.combinations
        parts: dict[str, tuple[int, ...]] = {"bias": (units,), "share": (q,), "left": (units, q), "right": (units, q)}
        if self.contextual:
            parts |= {"inner": (self.feature_width, h), "inner_bias": (h,), "module": (j, d), "unit": (r, d)}
            parts |= {"scale": (h, d), "shares": (h, q)}
        return parts

    @cached_property
    def size(self) -> int:
        """|f_init|: its parameters."""
        return sum(math.prod(shape) for shape in self._parts.values())

    def init(self, generator: torch.Generator) -> Tensor:
        """Parameters (1, size) with which every start is the pool's own, and has a gradient."""

        def normal(part: str, deviation: float) -> Tensor:
            return deviation * torch.randn(self._parts[part], generator=generator)

        first = {name: torch.zeros(shape) for name, shape in self._parts.items()}
        first |= {"share": torch.ones(self.combinations), "left": normal("left", 1 / math.sqrt(self.rank))}
        if self.contextual:
            first["inner"] = normal("inner", 1 / math.sqrt(self.feature_width))
            first |= {"module": normal("module", 1.0), "unit": normal("unit", 1 / math.sqrt(self.factors))}
        return torch.cat([first[name].flatten() for name in self._parts])[None]

    def cores(self, parameters_up: Tensor, features_uf: Tensor, ids_ujk: Tensor, valid_ujk: Tensor) -> Tensor:
        """(U, J, k, k) of U users with parameters of their own (U, size), so that gradients are too.

        features_uf: (U, F). ids_ujk: (U, J, k), which units of their module; valid_ujk: (U, J, k) bool, not padding.
        """
        users = len(parameters_up)
        sizes = [math.prod(shape) for shape in self._parts.values()]
        named = {
            name: part.view(users, *shape)
            for (name, shape), part in zip(self._parts.items(), torch.split(parameters_up, sizes, 1), strict=True)
        }
        logit_ug, share_uq = named["bias"], named["share"]
        if self.contextual:
            seen = F.layer_norm(features_uf, features_uf.shape[1:])[:, None]
            hidden_u1h = torch.baddbmm(named["inner_bias"][:, None], seen, named["inner"]).tanh()
            factors_ujrd = named["module"][:, :, None] * named["unit"][:, None]
            weight_ud1 = torch.bmm(hidden_u1h, named["scale"]).transpose(1, 2)
            logit_ug = logit_ug + torch.bmm(factors_ujrd.flatten(1, 2), weight_ud1).squeeze(2)
            share_uq = share_uq + torch.bmm(hidden_u1h, named["shares"]).squeeze(1)
        active = ids_ujk + self.rank * torch.arange(self.modules)[:, None]
        at = torch.arange(users)[:, None, None], active
        left, right = named["left"][at], named["right"][at]
        mixed = (left * share_uq[:, None, None]) @ right.transpose(2, 3)
        cores: Tensor = torch.diag_embed(2.0 * logit_ug[at].sigmoid()) + mixed
        return cores * (valid_ujk[..., None] & valid_ujk[..., None, :])
