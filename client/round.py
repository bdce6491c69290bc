"""A user's whole work in one round, for U users at once: the same function on a device and in a simulation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from client.adapt import sgd, unit_gains
from client.state import UserBlock
from federation import masks
from federation.config import GateConfig, LocalConfig
from federation.data.population import Batch, Examples
from federation.gate import GateState
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution
from federation.policy_gradient import entropy_bonus, explored, price, reinforce
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec, gather, rows_of_mask
from federation.state import GATE_SECTION, gate_spec
from federation.streams import Streams, UserIds
from federation.update import Section, UpdateBlock, Values


@dataclass(frozen=True)
class RoundState:
    """What the server sends: the trained values, the round (counted from 1) and the version of the values."""

    values: Values
    round_index: int
    pool_version: str


@dataclass(frozen=True)
class LocalRule:
    """How masks are chosen and how a user trains."""

    gate: GateConfig
    local: LocalConfig


@dataclass(frozen=True)
class RoundData:
    """What a round needs of U users' data: support examples to adapt on, query examples for rewards."""

    support: Batch
    query: Batch


def round_data(examples: Examples, user_ids: UserIds, rule: LocalRule, streams: Streams) -> RoundData:
    """Draws a round's examples. `streams` is the round's."""
    local = rule.local
    size = max(local.gain_examples, local.different_batches * local.examples)
    return RoundData(
        examples.batch(user_ids, "support", size, streams.at("support")),
        examples.batch(user_ids, "query", local.query_examples, streams.at("query")),
    )


def local_round(
    model: PooledModel, state: RoundState, users: UserBlock, data: RoundData, rule: LocalRule, streams: Streams
) -> tuple[UpdateBlock, UserBlock]:
    """Masks, S inner steps on the active rows, rewards and gate gradients of U users; their updates and new state.

    `streams` is the round's. The update's pool sections hold trained minus given rows of the active units, and its
    gate section the ascent gradient of the expected reward (reward: minus the query loss before any step).
    """
    choice = _choose(model, state, users, data, rule, streams)
    spec, local = model.spec, rule.local
    modules = len(spec.modules)
    ids_ujk, valid_ujk = rows_of_mask(choice.trained_ug, modules, rule.gate.max_rows(spec.rank))
    start = gather(state.values, spec, ids_ujk, valid_ujk)
    batches = [
        data.support.window(i * local.examples, (i + 1) * local.examples) for i in range(local.different_batches)
    ]
    trained, loss_u = sgd(model, start, batches, local.steps, local.learning_rate, local.factors(state.round_index))
    sections = {
        m.section: Section(ids_ujk[:, j].int(), valid_ujk[:, j], trained[m.section] - start[m.section])
        for j, m in enumerate(spec.modules)
    }
    metrics = {"support_loss": loss_u, "active_share": choice.trained_ug.float().mean(1)}
    if rule.gate.policy == "gate":
        sections[GATE_SECTION], embedding_ue, signals = _gate_update(
            model, state.values, users, data.query, choice.sampled, rule.gate
        )
        users, metrics = replace(users, embedding_ue=embedding_ue), metrics | signals
    users = replace(users, mask_ub=masks.pack(choice.trained_ug), visits_u=users.visits_u + 1)
    weight_u = torch.ones(len(users))
    return UpdateBlock(sections, weight_u, metrics, state.round_index, state.pool_version), users


@dataclass(frozen=True)
class _Sampled:
    """What the gate's gradient needs: K masks, their importance weights, and where they come from."""

    distribution: MaskDistribution
    state: GateState
    masks_ukg: Tensor
    log_weight_uk: Tensor


@dataclass(frozen=True)
class _Choice:
    """The mask that each user trains, and the gate's samples (None when no gate chose)."""

    trained_ug: Tensor
    sampled: _Sampled | None = None


def _choose(
    model: PooledModel, state: RoundState, users: UserBlock, data: RoundData, rule: LocalRule, streams: Streams
) -> _Choice:
    gate, spec = rule.gate, model.spec
    modules, share = len(spec.modules), gate.budget / spec.rank
    if gate.policy == "all":
        return _Choice(torch.ones(len(users), spec.units, dtype=torch.bool))
    if gate.policy == "random" or state.round_index <= gate.warmup:
        return _Choice(random_masks(spec, users.ids, gate, streams))
    gain_ug = unit_gains(model, state.values, data.support.window(0, rule.local.gain_examples), share)
    if gate.policy == "saliency":
        return _Choice(distribution_of(gain_ug, modules, gate).mode())
    gate_state = GateState(model.features(data.support), users.embedding_ue, gain_ug, share)
    logits_ug = gate_spec(model, gate).logits(state.values[GATE_SECTION], gate_state)
    logits_ug = logits_ug.nan_to_num(0.0, 0.0, 0.0)  # of a user whose data overflow: admission refuses what they send
    distribution = distribution_of(logits_ug, modules, gate)
    masks_ukg, log_weight_uk = explored(
        distribution,
        gate.exploration,
        streams.uniform("mask", users.ids, (gate.samples, spec.units)),
        streams.uniform("explore", users.ids, (gate.samples,)),
    )
    return _Choice(masks_ukg[:, 0], _Sampled(distribution, gate_state, masks_ukg, log_weight_uk))


def _gate_update(
    model: PooledModel, values: Values, users: UserBlock, query: Batch, sampled: _Sampled | None, gate: GateConfig
) -> tuple[Section, Tensor, dict[str, Tensor]]:
    """The gate's section, the moved private embedding, and metrics. Without samples, padding and nothing moved."""
    spec, count = gate_spec(model, gate), len(users)
    ids = torch.zeros(count, 1, dtype=torch.int32)
    if sampled is None:
        padding = Section(ids, torch.zeros(count, 1, dtype=torch.bool), torch.zeros(count, 1, spec.size))
        return padding, users.embedding_ue, {}
    reward_uk = mask_rewards(model, values, sampled.masks_ukg, query)
    gamma_ug = reinforce(sampled.distribution, sampled.masks_ukg, reward_uk, sampled.log_weight_uk)
    if gate.entropy:
        gamma_ug = gamma_ug + entropy_bonus(sampled.distribution, gate.entropy)
    if isinstance(sampled.distribution, Bernoulli):
        gamma_ug = gamma_ug + price(sampled.distribution, torch.ones(model.spec.units), gate.price)
    gradient, embedding_gradient = spec.vjp(values[GATE_SECTION], sampled.state, gamma_ug)
    section = Section(ids, torch.ones(count, 1, dtype=torch.bool), gradient[:, None])
    metrics = {"reward": reward_uk.mean(1), "reward_spread": reward_uk.std(1)}
    moved_ue = users.embedding_ue + gate.embedding_rate * embedding_gradient
    kept_ue = torch.where(moved_ue.isfinite().all(1, keepdim=True), moved_ue, users.embedding_ue)
    return section, kept_ue, metrics


@torch.no_grad()
def mask_rewards(model: PooledModel, values: Values, masks_ukg: Tensor, query: Batch) -> Tensor:
    """Minus the query loss of each user under each of its K masks, with the pool's rows as they are: (U, K)."""
    users, samples, _ = masks_ukg.shape
    flat = masks_ukg.flatten(0, 1)
    modules = len(model.spec.modules)
    most = int(flat.view(users * samples, modules, -1).sum(2).max())
    ids_ujk, valid_ujk = rows_of_mask(flat, modules, max(most, 1))
    repeated = query.take(torch.arange(users).repeat_interleave(samples))
    with model.bound(gather(values, model.spec, ids_ujk, valid_ujk)):
        return -model.loss(repeated).view(users, samples)


def random_masks(spec: PoolSpec, user_ids: UserIds, gate: GateConfig, streams: Streams) -> Tensor:
    """A mask for each user in which all units are equally likely, (U, G) bool. `streams` is the round's."""
    uniform_ug = streams.uniform("mask", user_ids, (spec.units,))
    return distribution_of(uniform_ug - 0.5, len(spec.modules), gate).mode()  # the largest, or those above 1/2


def distribution_of(logits_ug: Tensor, modules: int, gate: GateConfig) -> MaskDistribution:
    """The configured distribution over masks with these logits."""
    if gate.distribution == "budget":
        return FixedBudget(logits_ug, modules, gate.budget)
    return Bernoulli(logits_ug)
