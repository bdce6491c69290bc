"""Policies: from what is known of U users to one logit per unit. A mask is a sample or the mode of what they describe.

| policy | logit of a unit |
|---|---|
| gate | the trained network's, from gains, context, embedding and budget (`federation/gate.py`) |
| saliency | the first-order gain of switching it on |
| magnitude | the norm of what it adds, |down| |up|: the same for every user |

Random masks, in which all units are equally likely, need no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from client.adapt import unit_gains
from federation.config import GateConfig, Policy
from federation.data.population import Batch
from federation.gate import GateState
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution
from federation.meta_config import StartConfig
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec
from federation.state import GATE_SECTION, gate_spec
from federation.update import Values


@dataclass(frozen=True, eq=False)
class Signals:
    """What the frozen model and the pool say of U users' examples. Each signal is computed once, when first asked for.

    budget: active units asked for, per module. share: of all units that are asked for.
    """

    model: PooledModel
    values: Values
    examples: Batch
    budget: int
    share: float

    @cached_property
    def features_uf(self) -> Tensor:
        """(U, F): one forward pass of the frozen model."""
        return self.model.features(self.examples)

    def context(self, start: StartConfig) -> Tensor:
        """What f_init is told, (U, F); where it is told nothing, of width 0."""
        return (
            self.features_uf if start.name == "contextual" else self.examples.weight.new_zeros(self.examples.users, 0)
        )

    @cached_property
    def gain_ug(self) -> Tensor:
        """(U, G), with all units on at the share asked for: one forward and one backward pass."""
        return unit_gains(self.model, self.values, self.examples, self.share)

    @cached_property
    def magnitude_ug(self) -> Tensor:
        """(U, G): the norm of what each unit adds, the same for every user."""
        norms = []
        for m in self.model.spec.modules:
            down, up = torch.split(self.values[m.section], [m.d_in, m.d_out], 1)
            norms.append(down.norm(dim=1) * up.norm(dim=1))
        return torch.cat(norms).repeat(self.examples.users, 1)


@dataclass(frozen=True, eq=False)
class Known:
    """What a policy is told of U users.

    embedding_ue: (U, E), zero for a user that is not known. uniform_ug: (U, G) in (0, 1), of their own.
    """

    signals: Signals
    embedding_ue: Tensor
    uniform_ug: Tensor


def gate_state(known: Known, gate: GateConfig) -> GateState:
    """What the gate is told: zeros in place of what it is configured not to see."""
    signals, zeros = known.signals, known.embedding_ue.new_zeros
    users, model = signals.examples.users, signals.model
    return GateState(
        features_uf=signals.features_uf if "context" in gate.inputs else zeros(users, model.base.feature_width),
        embedding_ue=known.embedding_ue if "embedding" in gate.inputs else torch.zeros_like(known.embedding_ue),
        gain_ug=signals.gain_ug if "gains" in gate.inputs else zeros(users, model.spec.units),
        examples_u=signals.examples.weight.sum(1),
        budget_share=signals.share,
    )


def gate_logits(signals: Signals, state: GateState, gate: GateConfig) -> Tensor:
    """(U, G); not finite for a user whose data overflow."""
    return gate_spec(signals.model, gate).logits(signals.values[GATE_SECTION], state)


def policy_masks(policy: Policy, known: Known, gate: GateConfig) -> Tensor:
    """The mask that a policy proposes to each user, its likeliest one: (U, G) bool."""
    signals = known.signals
    spec = signals.model.spec
    if policy == "all":
        return torch.ones(signals.examples.users, spec.units, dtype=torch.bool)
    if policy == "gate":
        logits_ug = gate_logits(signals, gate_state(known, gate), gate)
        return distribution_of(logits_ug.nan_to_num(0.0), len(spec.modules), gate, signals.budget).mode()
    logits: Mapping[Policy, Callable[[], Tensor]] = {
        "saliency": lambda: signals.gain_ug,
        "magnitude": lambda: signals.magnitude_ug,
        "random": lambda: known.uniform_ug,
    }
    return highest(logits[policy](), spec, gate, signals.budget, signals.share)


def distribution_of(logits_ug: Tensor, modules: int, gate: GateConfig, budget: int) -> MaskDistribution:
    """The configured distribution over masks with these logits; budget: active units per module."""
    if gate.distribution == "bernoulli":
        return Bernoulli(logits_ug)
    if gate.scope == "global":
        return FixedBudget(logits_ug, 1, budget * modules)
    return FixedBudget(logits_ug, modules, budget)


def highest(logits_ug: Tensor, spec: PoolSpec, gate: GateConfig, budget: int, share: float) -> Tensor:
    """The masks of the highest logits, (U, G) bool: as many units as the configured distribution has on average.

    That is a share of all units for independent ones, whose logits have no meaningful zero where nothing was learned.
    """
    if gate.distribution == "bernoulli":
        return FixedBudget(logits_ug, 1, max(1, round(share * spec.units))).mode()
    return distribution_of(logits_ug, len(spec.modules), gate, budget).mode()
