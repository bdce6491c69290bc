"""A user's whole work in one round, for U users at once: the same function on a device and in a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from client.gate_round import UserDraws, dense_sections, draw, estimate, moved, off_target, propose, rebuilt
from client.inner import Inner
from client.meta import SIGNALS, Lesson, rested
from client.policies import Known, Signals, policy_masks
from client.rewards import Adaptation, MaskReward
from client.state import UserBlock
from federation import masks
from federation.config import GateConfig, LocalConfig, MetaConfig
from federation.data.population import Batch, Examples, Sequenced, side_by_side
from federation.errors import PopulationError
from federation.formats import RowFormat
from federation.learner import ActiveUnits, Learner
from federation.learning import Learning
from federation.pool.model import PooledModel
from federation.pool.spec import rows_of_mask
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
    """How masks are chosen, how a user trains and what it sends of that, and what the gate learns by."""

    gate: GateConfig
    local: LocalConfig
    meta: MetaConfig
    learning: Learning
    learner: Learner


@dataclass(frozen=True)
class RoundData:
    """What a round needs of U users' data: support examples to adapt on, query examples for rewards."""

    support: Batch
    query: Batch


def round_data(examples: Examples, user_ids: UserIds, rule: LocalRule, streams: Streams) -> RoundData:
    """Draws a round's examples. `streams` is the round's.

    Of several tasks (`meta.tasks`), the steps see one after the other, and the query part is of all. A policy is
    told of the first examples, as of a user who begins.
    Raises PopulationError where users have no such sequence.
    """
    local, tasks = rule.local, rule.meta.tasks
    if tasks == 1:
        size = max(local.gain_examples, *rule.gate.windows, local.different_batches * local.examples)
        return RoundData(
            examples.batch(user_ids, "support", size, streams.at("support")),
            examples.batch(user_ids, "query", local.query_examples, streams.at("query")),
        )
    if not isinstance(examples, Sequenced):
        raise PopulationError(f"meta.tasks = {tasks} needs users with a sequence of tasks; set it to 1")
    each, query = local.steps // tasks * local.examples, local.query_examples
    own = [(examples.of_task(at), at) for at in range(tasks)]
    return RoundData(
        side_by_side([task.batch(user_ids, "support", each, streams.at("support", at)) for task, at in own]),
        side_by_side([task.batch(user_ids, "query", query, streams.at("query", at)) for task, at in own]),
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
    trained, learned = _train(model, state, chosen, data, rule)
    metrics = {"active_share": chosen.mask_ug.float().mean(1), **learned, **chosen.metrics}
    dense = dense_sections(values, chosen.sent, len(users)) if gate.policy == "gate" else {}
    users = replace(
        users,
        embedding_ue=chosen.embedding_ue,
        mask_ub=masks.pack(chosen.mask_ug),
        visits_u=users.visits_u + 1,
    )
    weight_u = torch.ones(len(users))
    return UpdateBlock({**trained, **dense}, weight_u, metrics, state.round_index, state.pool_version), users


@dataclass(frozen=True)
class _Choice:
    """The mask that each user trains, by what signals, its embedding afterwards, and what it sends of the gate."""

    mask_ug: Tensor
    signals: Signals
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
    return _Choice(policy_masks(policy, known, gate), signals, users.embedding_ue)


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
    return _Choice(mask_ug, known.signals, embedding_ue, sent, metrics)


def _train(
    model: PooledModel, state: RoundState, chosen: _Choice, data: RoundData, rule: LocalRule
) -> tuple[dict[str, Section], dict[str, Tensor]]:
    """What users send of the pool and of what is learned besides, and the metrics. Where the pool rests, padding."""
    gate, local, meta, learner = rule.gate, rule.local, rule.meta, rule.learner
    rests = gate.rests(state.round_index)
    active = ActiveUnits(*rows_of_mask(chosen.mask_ug, len(model.spec.modules), gate.max_rows(model.spec.rank)))
    lesson = Lesson(
        Inner(
            model,
            learner,
            active,
            chosen.signals.context(meta.start),
            () if rests else local.factors(state.round_index),
        ),
        learner.copies(state.values, active),
        _batches(data.support, local),
        local.steps,
        data.query,
        meta.query_steps or (local.steps,),
        meta.recompute,
        RowFormat(meta.written.rows, meta.written.top),
    )
    outer = rested(lesson) if rests else SIGNALS[meta.signal](lesson)
    withheld_u = outer.withheld(data.query)
    metrics = {"support_loss": outer.support_loss_u}
    if outer.query_loss_u is not None:
        metrics["query_loss"] = torch.where(withheld_u, outer.support_loss_u, outer.query_loss_u)
        metrics["withheld"] = withheld_u.float()
    nobody_u = torch.ones_like(withheld_u) if rests else withheld_u
    return learner.sent(outer.directions, active, ~nobody_u), metrics


def _batches(support: Batch, local: LocalConfig) -> list[Batch]:
    """What the steps see, in turn."""
    return [support.window(i * local.examples, (i + 1) * local.examples) for i in range(local.different_batches)]


def _drawn(purpose: str, choices: Sequence[int], default: int, streams: Streams) -> int:
    """One of the choices for all users of a round."""
    if not choices:
        return default
    return choices[int(streams.integers(purpose, np.zeros(1, dtype=np.int64), len(choices), 1)[0, 0])]
