"""The gate's part of a user's round: which mask U users train, and what they send for the gate.

What leaves a user is a gradient of the gate's parameters, from which who reads it can work out what the gate was told
of the user; the mask that it would be served; and how far its share of active units is off a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.policies import Known, distribution_of, gate_logits, gate_state
from client.rewards import Adaptation, MaskReward
from federation.config import GateConfig
from federation.estimators.protocol import Draws, Estimate
from federation.estimators.registry import checked
from federation.estimators.terms import balance, entropy_bonus, price
from federation.exploration import Exploration, rarely_used
from federation.gate import GateState
from federation.learning import Learning
from federation.mask_distribution import LARGEST_LOGIT, MaskDistribution
from federation.state import GATE_SECTION, LOAD_SECTION, PRICE_SECTION, gate_spec
from federation.streams import Streams, UserIds
from federation.update import Section, Values


@dataclass(frozen=True)
class UserDraws:
    """The randomness of users in a round. `streams` is the round's."""

    streams: Streams
    user_ids: UserIds

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return self.streams.uniform(purpose, self.user_ids, shape)


@dataclass(frozen=True)
class Proposed:
    """What the gate knew of U users, and the masks that it finds likely.

    overflows_u: (U,) bool, whose data gave logits that are no numbers, or larger than a distribution can take. Such a
    user's masks are as likely as each other.
    """

    state: GateState
    distribution: MaskDistribution
    exploration: Exploration
    overflows_u: Tensor


def propose(known: Known, gate: GateConfig) -> Proposed:
    """The gate's distribution over each user's masks."""
    signals, state = known.signals, gate_state(known, gate)
    modules, budget = len(signals.model.spec.modules), signals.budget
    logits_ug = gate_logits(signals, state, gate)
    overflows_u = ~(logits_ug.abs() < LARGEST_LOGIT).all(1)
    distribution = distribution_of(logits_ug.masked_fill(overflows_u[:, None], 0.0), modules, gate, budget)
    toward = rarely_used(signals.values[LOAD_SECTION][0], signals.share)
    exploring = distribution_of(toward, modules, gate, budget)
    return Proposed(state, distribution, Exploration(gate.exploration, exploring), overflows_u)


def draw(proposed: Proposed, draws: Draws) -> Tensor:
    """One mask for each user from the exploration mixture, (U, G) bool: that of a round without an estimate."""
    units = proposed.distribution.logits_ug.shape[1]
    uniform_u1g, coin_u1 = draws.uniform("mask", (1, units)), draws.uniform("explore", (1,))
    return proposed.exploration.sample(proposed.distribution, uniform_u1g, coin_u1)[0][:, 0]


def estimate(
    reward: MaskReward, proposed: Proposed, learning: Learning, gate: GateConfig, draws: Draws
) -> tuple[Estimate, Tensor, Tensor]:
    """The estimate of the reward's gradient; and with the price, the entropy and the load balance, each user's
    gradients with respect to phi (U, |phi|) and to its embedding (U, E)."""
    model, values = reward.model, reward.values
    found = checked(
        learning.estimator.estimate(proposed.distribution, reward, proposed.exploration, gate.samples, draws),
        proposed.distribution,
        gate.samples,
        gate.estimator.name,
    )
    gamma_ug = found.gamma_ug
    if gate.reward.price:
        gamma_ug = gamma_ug + price(proposed.distribution, learning.cost_g, _current_price(values, gate))
    if gate.entropy:
        gamma_ug = gamma_ug + entropy_bonus(proposed.distribution, gate.entropy)
    if gate.balance:
        gamma_ug = gamma_ug + balance(proposed.distribution, values[LOAD_SECTION][0], gate.balance)
    return found, *gate_spec(model, gate).vjp(values[GATE_SECTION], proposed.state, gamma_ug)


def moved(embedding_ue: Tensor, gradient_ue: Tensor, gate: GateConfig) -> Tensor:
    """The embeddings one step on; as they are where a number is not finite."""
    moved_ue = embedding_ue + gate.embedding_rate * gradient_ue
    return torch.where(moved_ue.isfinite().all(1, keepdim=True), moved_ue, embedding_ue)


def rebuilt(known: Known, learning: Learning, gate: GateConfig, draws: UserDraws) -> Known:
    """What is known of users whose embedding is not: it takes `gate.rebuild` steps along its policy gradient.

    Rewards are those on the examples that the policy sees, since a device that is served has no others.
    """
    signals = known.signals
    reward = MaskReward(signals.model, signals.values, signals.examples, learning.quality, Adaptation((), 0, 0.0))
    for step in range(gate.rebuild):
        fresh = replace(draws, streams=draws.streams.at("rebuild", step))
        _, _, gradient_ue = estimate(reward, propose(known, gate), learning, gate, fresh)
        known = replace(known, embedding_ue=moved(known.embedding_ue, gradient_ue, gate))
    return known


def off_target(mask_ug: Tensor, target: float) -> Tensor:
    """How far a user's share of active units is above the target: (U, G) bool -> (U, 1)."""
    return mask_ug.float().mean(1, keepdim=True) - target


def dense_sections(values: Values, rows: Mapping[str, Tensor], users: int) -> dict[str, Section]:
    """The sections of one row that users send, (U, width) each by name; padding for those that the round leaves out."""
    sections = {}
    for name in (GATE_SECTION, LOAD_SECTION, PRICE_SECTION):
        if name in values:
            sent_uw = rows.get(name, torch.zeros(users, values[name].shape[1]))
            valid_u1 = torch.full((users, 1), name in rows)
            sections[name] = Section(torch.zeros(users, 1, dtype=torch.int32), valid_u1, sent_uw[:, None])
    return sections


def _current_price(values: Values, gate: GateConfig) -> float:
    """lambda: the configured price, or where it has been steered to."""
    return float(values[PRICE_SECTION].exp()) if gate.reward.target is not None else gate.reward.price
