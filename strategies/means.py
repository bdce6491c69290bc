"""Means of sparse updates: user i sends D_i = m_i * (theta_i - theta) with weight w_i; each row is averaged.

| rule      | mean of row j         | factor          | strategy               |
|-----------|-----------------------|-----------------|------------------------|
| A1 dilute | sum w D_j / sum w     | 1               | `FedAvg`               |
| A2 count  | sum w D_j / n_j       | 1               | `MaskedMean(kappa=0)`  |
| A3 shrunk | sum w D_j / n_j       | n_j / (n_j + c) | `MaskedMean()`         |

n_j = sum w m_j is the weight behind a row, c = kappa * mean weight of the round. A1 moves a row at a rate
proportional to how often it is selected (FedAvg; McMahan et al., AISTATS 2017). A2 has the same fixed points
and is faster on rare rows, with variance 1 / n_j. A3 tames the rare rows of A2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.errors import ConfigError
from federation.update import Schema, Section, UpdateBlock
from strategies.protocol import State, Step, StepSection


@dataclass(frozen=True)
class Sums:
    """The partial of a mean; its size depends on the schema, not on the users.

    rows: sum w D, (rows, width) float32 per section. weights: n_j = sum w m_j, (rows,) float64 per section.
    weight: sum w, () float64. users: how many users have a positive weight, () int64.
    """

    rows: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    weight: Tensor
    users: Tensor


def weighted_sums(section: Section, weight_u: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """sum w D and sum w m of every row; what padding holds is never read.

    Shapes: section of U users, k rows each; weight_u (U,); results (rows, width) float32, (rows,) float64.

    Sorted by row, the sum is one `embedding_bag`: each sent row is read once, without the weighted copy of the block
    that `index_add_` would need. It runs at the rate of a memory copy (`fedquilt bench aggregation`).
    """
    sent = section.valid_uk.flatten().nonzero().squeeze(1)
    ids, order = section.ids_uk.flatten()[sent].long().sort(stable=True)
    sent = sent[order]
    weight = weight_u[sent // max(section.ids_uk.shape[1], 1)]
    starts = torch.searchsorted(ids, torch.arange(rows, device=ids.device))
    flat = section.rows_ukw.flatten(0, 1)
    total = F.embedding_bag(sent, flat, starts, mode="sum", per_sample_weights=weight)
    return total, torch.bincount(ids, weights=weight.double(), minlength=rows)


class _Mean:
    """The additive half that all means share."""

    linear_memory = False

    def init(self, schema: Schema) -> State:
        return State(schema)

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        rows, weights = {}, {}
        for name, spec in state.schema.sections.items():
            rows[name], weights[name] = weighted_sums(block.sections[name], block.weight_u, spec.rows)
        return Sums(rows, weights, block.weight_u.double().sum(), (block.weight_u > 0).sum())

    def merge(self, a: Sums, b: Sums) -> Sums:
        # Neither is written to, as both may lie in read-only shared memory. In place it would take 2/3 of the time.
        return Sums(
            rows={name: a.rows[name] + b.rows[name] for name in a.rows},
            weights={name: a.weights[name] + b.weights[name] for name in a.weights},
            weight=a.weight + b.weight,
            users=a.users + b.users,
        )


@dataclass(frozen=True)
class FedAvg(_Mean):
    """Rule A1: the dense mean over all users, those who did not send a row counting as zero."""

    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        sections = {}
        for name, rows in partial.rows.items():
            weight = partial.weights[name].float()
            sections[name] = StepSection(_divide(rows, partial.weight.float()), weight, torch.ones_like(weight))
        return Step(sections), state


@dataclass(frozen=True)
class MaskedMean(_Mean):
    """Rules A2 and A3: the mean over a row's contributors, trusted by n_j / (n_j + kappa * mean weight).

    kappa: how many users' worth of doubt a row must overcome; 0 is rule A2.
    """

    kappa: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.kappa) and self.kappa >= 0):
            raise ConfigError(f"kappa must be finite and at least 0, got {self.kappa}; 2 to 4 suits sparse masks")

    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        doubt = self.kappa * _divide(partial.weight, partial.users.double())
        sections = {}
        for name, rows in partial.rows.items():
            weight = partial.weights[name]
            factor = _divide(weight, weight + doubt)
            mean = _divide(rows, weight.float()[:, None])
            sections[name] = StepSection(mean, weight.float(), factor.float())
        return Step(sections), state


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
