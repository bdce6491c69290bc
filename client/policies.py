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

import torch
from torch import Tensor

from client.adapt import unit_gains
from federation.config import GateConfig, Policy
from federation.data.population import Batch
from federation.gate import GateState, standardise
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec
from federation.state import GATE_SECTION, gate_spec
from federation.update import Values


@dataclass(frozen=True)
class Known:
    """What a policy is told of U users.

    examples: of their own, that gains and context are taken from. embedding_ue: (U, E), zero for a user that is not
    known. uniform_ug: (U, G) in (0, 1), of their own. budget: active units asked for, per module.
    """

    examples: Batch
    embedding_ue: Tensor
    uniform_ug: Tensor
    budget: int


def gate_state(model: PooledModel, values: Values, known: Known, gate: GateConfig) -> GateState:
    """What the gate is told: zeros in place of what it is configured not to see. Gains cost a backward pass."""
    count, share = known.examples.users, known.budget / model.spec.rank
    zeros = known.embedding_ue.new_zeros
    return GateState(
        features_uf=(
            model.features(known.examples) if "context" in gate.inputs else zeros(count, model.base.feature_width)
        ),
        embedding_ue=known.embedding_ue if "embedding" in gate.inputs else torch.zeros_like(known.embedding_ue),
        gain_ug=_gains(model, values, known) if "gains" in gate.inputs else zeros(count, model.spec.units),
        budget_share=share,
        examples_u=known.examples.weight.sum(1),
    )


def gate_logits(model: PooledModel, values: Values, state: GateState, gate: GateConfig) -> Tensor:
    """(U, G). Zero for a user whose data overflow: admission refuses what that user sends."""
    logits_ug = gate_spec(model, gate).logits(values[GATE_SECTION], state)
    return logits_ug.nan_to_num(0.0, 0.0, 0.0)


def policy_masks(policy: Policy, model: PooledModel, values: Values, known: Known, gate: GateConfig) -> Tensor:
    """The mask that a policy proposes to each user, its likeliest one: (U, G) bool."""
    spec = model.spec
    if policy == "all":
        return torch.ones(known.examples.users, spec.units, dtype=torch.bool)
    if policy == "random":
        return random_masks(spec, known.uniform_ug, gate, known.budget)
    if policy == "gate":
        logits_ug = gate_logits(model, values, gate_state(model, values, known, gate), gate)
    else:
        logits_ug = _LOGITS[policy](model, values, known)
    return distribution_of(logits_ug, len(spec.modules), gate, known.budget).mode()


def distribution_of(logits_ug: Tensor, modules: int, gate: GateConfig, budget: int) -> MaskDistribution:
    """The configured distribution over masks with these logits; budget: active units per module."""
    if gate.distribution == "bernoulli":
        return Bernoulli(logits_ug)
    if gate.scope == "global":
        return FixedBudget(logits_ug, 1, budget * modules)
    return FixedBudget(logits_ug, modules, budget)


def random_masks(spec: PoolSpec, uniform_ug: Tensor, gate: GateConfig, budget: int) -> Tensor:
    """A mask for each user in which all units are equally likely, (U, G) bool. A Bernoulli one has that share too."""
    if gate.distribution == "bernoulli":
        return uniform_ug < budget / spec.rank
    return distribution_of(uniform_ug, len(spec.modules), gate, budget).mode()


def _gains(model: PooledModel, values: Values, known: Known) -> Tensor:
    return unit_gains(model, values, known.examples, known.budget / model.spec.rank)


def _magnitudes(model: PooledModel, values: Values, known: Known) -> Tensor:
    """Standardised, so that about half of the units have a positive logit."""
    norms = []
    for m in model.spec.modules:
        down, up = torch.split(values[m.section], [m.d_in, m.d_out], 1)
        norms.append(down.norm(dim=1) * up.norm(dim=1))
    return standardise(torch.cat(norms)[None], len(model.spec.modules)).repeat(known.examples.users, 1)


_LOGITS: Mapping[Policy, Callable[[PooledModel, Values, Known], Tensor]] = {
    "saliency": _gains,
    "magnitude": _magnitudes,
}
