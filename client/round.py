"""A user's whole work in one round, for U users at once: the same function on a device and in a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from client.adapt import sgd
from client.gate_round import UserDraws, dense_sections, draw, estimate, moved, off_target, propose, rebuilt
from client.policies import Known, Signals, policy_masks
from client.rewards import Adaptation, MaskReward
from client.state import UserBlock
from federation import masks
from federation.config import GateConfig, LocalConfig
from federation.data.population import Batch, Examples
from federation.learning import Learning
from federation.pool.model import PooledModel
from federation.pool.spec import gather, rows_of_mask
from federation.state import GATE_SECTION, LOAD_SECTION, PRICE_SECTION
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
    """How masks are chosen, how a user trains, and what the gate learns by."""

    gate: GateConfig
    local: LocalConfig
    learning: Learning


@dataclass(frozen=True)
class RoundData:
    """What a round needs of U users' data: support examples to adapt on, query examples for rewards."""

    support: Batch
    query: Batch


def round_data(examples: Examples, user_ids: UserIds, rule: LocalRule, streams: Streams) -> RoundData:
    """Draws a round's examples. `streams` is the round's."""
    local = rule.local
    size = max(local.gain_examples, *rule.gate.windows, local.different_batches * local.examples)
    return RoundData(
        examples.batch(user_ids, "support", size, streams.at("support")),
        examples.batch(user_ids, "query", local.query_examples, streams.at("query")),
    )


def local_round(
    model: PooledModel, state: RoundState, users: UserBlock, data: RoundData, rule: LocalRule, streams: Streams
) -> tuple[UpdateBlock, UserBlock]:
    """Masks, S inner steps on the active rows, rewards and gate gradients of U users; their updates and new state.

    `streams` is the round's. The update's pool sections hold trained minus given rows of the active units, its gate
    section the ascent gradient of the expected reward (with the pool as it was given), its load section the mask that
    the gate finds likeliest.
    """
    gate, values = rule.gate, state.values
    chosen = _choose(model, state, users, data, rule, streams)
    pool, loss_u = _train(model, state, chosen.mask_ug, _batches(data.support, rule.local), rule)
    metrics = {"support_loss": loss_u, "active_share": chosen.mask_ug.float().mean(1), **chosen.metrics}
    dense = dense_sections(values, chosen.sent, len(users)) if gate.policy == "gate" else {}
    users = replace(
        users,
        embedding_ue=chosen.embedding_ue,
        mask_ub=masks.pack(chosen.mask_ug),
        visits_u=users.visits_u + 1,
    )
    weight_u = torch.ones(len(users))
    return UpdateBlock({**pool, **dense}, weight_u, metrics, state.round_index, state.pool_version), users


@dataclass(frozen=True)
class _Choice:
    """The mask that each user trains, its embedding afterwards, and what it sends of the gate."""

    mask_ug: Tensor
    embedding_ue: Tensor
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def _choose(
    model: PooledModel, state: RoundState, users: UserBlock, data: RoundData, rule: LocalRule, streams: Streams
) -> _Choice:
    gate, values = rule.gate, state.values
    budget = _drawn("budget", gate.budgets, gate.budget, streams)
    window = _drawn("window", gate.windows, rule.local.gain_examples, streams)
    draws = UserDraws(streams, users.ids)
    signals = Signals(model, values, data.support.window(0, window), budget, gate.share(budget, model.spec.rank))
    known = Known(signals, users.embedding_ue, draws.uniform("mask", (model.spec.units,)))
    if gate.chooses(state.round_index):
        return _gate_choice(model, state, users, data, known, rule, draws)
    policy = "random" if gate.policy == "gate" else gate.policy  # a gate that warms up
    return _Choice(policy_masks(policy, known, gate), users.embedding_ue)


def _gate_choice(
    model: PooledModel,
    state: RoundState,
    users: UserBlock,
    data: RoundData,
    known: Known,
    rule: LocalRule,
    draws: UserDraws,
) -> _Choice:
    gate, local, values = rule.gate, rule.local, state.values
    adaptation = Adaptation(_batches(data.support, local), gate.reward.steps, local.learning_rate)
    reward = MaskReward(model, values, data.query, rule.learning.quality, adaptation)
    if gate.rebuild and (unknown_u := ~users.embedding_ue.any(1)).any():
        anew_ue = rebuilt(known, rule.learning, gate, draws).embedding_ue
        known = replace(known, embedding_ue=torch.where(unknown_u[:, None], anew_ue, known.embedding_ue))
    proposed = propose(known, gate)
    likely_ug = proposed.distribution.mode()
    entropy_u = proposed.distribution.entropy_share()  # not a number of a user whom admission shall refuse
    metrics = {"gate_entropy": entropy_u.masked_fill(proposed.overflows_u, math.nan)}
    sent, embedding_ue = {}, known.embedding_ue
    if gate.learns(state.round_index):
        found, sent[GATE_SECTION], embedding_gradient_ue = estimate(reward, proposed, rule.learning, gate, draws)
        embedding_ue = moved(embedding_ue, embedding_gradient_ue, gate)
        metrics["reward"] = found.reward_uk.mean(1)
        metrics["reward_spread"] = found.reward_uk.std(1, correction=0)
        mask_ug = found.mask_ug
    else:
        mask_ug = draw(proposed, draws)
    sent[LOAD_SECTION] = likely_ug.float() - values[LOAD_SECTION]
    if gate.reward.target is not None:
        sent[PRICE_SECTION] = off_target(likely_ug, gate.reward.target)
    return _Choice(mask_ug, embedding_ue, sent, metrics)


def _train(
    model: PooledModel, state: RoundState, mask_ug: Tensor, batches: Sequence[Batch], rule: LocalRule
) -> tuple[dict[str, Section], Tensor]:
    """The pool's sections, and each user's loss before the first step. Where the pool rests, padding."""
    gate, local, spec = rule.gate, rule.local, model.spec
    rests = gate.rests(state.round_index)
    ids_ujk, valid_ujk = rows_of_mask(mask_ug, len(spec.modules), gate.max_rows(spec.rank))
    start = gather(state.values, spec, ids_ujk, valid_ujk)
    factors = () if rests else local.factors(state.round_index)
    trained, loss_u = sgd(model, start, batches, local.steps, local.learning_rate, factors)
    sent_ujk = torch.zeros_like(valid_ujk) if rests else valid_ujk
    sections = {
        m.section: Section(ids_ujk[:, j].int(), sent_ujk[:, j], trained[m.section] - start[m.section])
        for j, m in enumerate(spec.modules)
    }
    return sections, loss_u


def _batches(support: Batch, local: LocalConfig) -> list[Batch]:
    """What the steps see, in turn."""
    return [support.window(i * local.examples, (i + 1) * local.examples) for i in range(local.different_batches)]


def _drawn(purpose: str, choices: Sequence[int], default: int, streams: Streams) -> int:
    """One of the choices for all users of a round."""
    if not choices:
        return default
    return choices[int(streams.integers(purpose, np.zeros(1, dtype=np.int64), len(choices), 1)[0, 0])]
