"""The trained state that clients and server share: its schema, its first values and its version."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import torch

from federation.config import GateConfig, TaskConfig
from federation.gate import GateSpec
from federation.learner import Learner
from federation.pool.model import PooledModel
from federation.streams import Streams
from federation.update import Schema, SectionSpec, Values

GATE_SECTION = "gate"
LOAD_SECTION = "load"
PRICE_SECTION = "price"


def gate_spec(model: PooledModel, config: GateConfig) -> GateSpec:
    """The gate that fits a model's pool and features."""
    return GateSpec(
        modules=len(model.spec.modules),
        rank=model.spec.rank,
        feature_width=model.base.feature_width,
        embedding_width=config.embedding,
        hidden=config.hidden,
        factor_width=config.factors,
        initial_alpha=config.initial_alpha,
        interactions=config.interactions,
        groups=1 if config.scope == "global" else len(model.spec.modules),
    )


def schema_of(learner: Learner, gate: GateSpec, config: GateConfig) -> Schema:
    """What a user may send: at most its budget of units per module, what a learner learns of them besides, and, where a
    gate is trained, one row each for the gate (an ascent gradient), the load (how often the gate gives each unit: the
    likeliest mask minus the mean so far) and the price (log lambda, if it is steered: how far the user's share of
    active units is off the target)."""
    pool, max_rows = learner.spec, config.max_rows(learner.spec.rank)
    sections = {**pool.sections(max_rows), **learner.sections(max_rows)}
    if config.policy == "gate":
        sections[GATE_SECTION] = SectionSpec(rows=1, factors={"phi": gate.size}, max_rows=1)
        sections[LOAD_SECTION] = SectionSpec(rows=1, factors={"units": pool.units}, max_rows=1)
        if config.reward.target is not None:
            sections[PRICE_SECTION] = SectionSpec(rows=1, factors={"log": 1}, max_rows=1)
    return Schema(sections)


def metric_names(config: TaskConfig, round_index: int) -> tuple[str, ...]:
    """What every user reports of a round (counted from 1): the gate's only where it chose the masks, or learned.

    gate_entropy: as a share of the largest that the distribution can have. query_loss: after the last inner step, of
    users whose inner loop taught something; withheld: 1 for the others, who send nothing of the pool and of what is
    learned besides, and whose query_loss is the loss before the steps.
    """
    gate = config.gate
    taught = ("query_loss", "withheld") if config.meta.adapts and not gate.rests(round_index) else ()
    chosen = ("gate_entropy",) if gate.chooses(round_index) else ()
    learned = ("reward", "reward_spread") if gate.learns(round_index) else ()
    return ("support_loss", "active_share", *chosen, *learned, *taught)


def initial_values(learner: Learner, gate: GateSpec, schema: Schema, config: GateConfig, streams: Streams) -> Values:
    """Fresh values for every section of the schema. A Bernoulli gate begins at its target, or at the budget's share."""
    pool = learner.spec
    values = {**pool.init(streams.generator("pool")), **learner.initial(streams)}
    if GATE_SECTION in schema.sections:
        threshold = first_threshold(config.share(config.budget, pool.rank), config)
        values[GATE_SECTION] = gate.init(streams.generator("gate"), threshold)
        values[LOAD_SECTION] = torch.zeros(1, pool.units)
    if PRICE_SECTION in schema.sections:
        values[PRICE_SECTION] = torch.full((1, 1), math.log(config.reward.price))
    return values


def first_threshold(share: float, config: GateConfig) -> float:
    """Where a fresh gate's Bernoulli mask has about this share of the units.

    With gains, the share of a normal distribution that lies above it, at least -3.72 (a share of 0.9999). Without,
    every unit's logit is minus alpha times it.
    """
    kept = min(share, 0.9999)
    if "gains" in config.inputs:
        return -NormalDist().inv_cdf(kept)
    return math.log((1 - kept) / kept) / config.initial_alpha


def version_of(values: Values, round_index: int) -> str:
    """A name for these values: the round and a digest of their names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(values):
        rows = values[name].contiguous().numpy()
        digest.update(repr((name, rows.dtype.str, rows.shape)).encode())
        digest.update(rows.tobytes())
    return f"r{round_index}-{digest.hexdigest()}"
