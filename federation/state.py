"""The trained state that clients and server share: its schema, its first values and its version."""

from __future__ import annotations

import hashlib

import torch

from federation.config import GateConfig
from federation.gate import GateSpec
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec
from federation.streams import Streams
from federation.update import Schema, SectionSpec, Values

GATE_SECTION = "gate"


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
    )


def schema_of(pool: PoolSpec, gate: GateSpec, config: GateConfig) -> Schema:
    """What a user may send: at most its budget of units per module, and one row for the gate if a gate is trained."""
    sections = pool.sections(max_rows=config.max_rows(pool.rank))
    if config.policy == "gate":
        sections[GATE_SECTION] = SectionSpec(rows=1, factors={"phi": gate.size}, max_rows=1)
    return Schema(sections)


def metric_names(gate: GateConfig, round_index: int) -> tuple[str, ...]:
    """What every user reports of a round (counted from 1): those of the gate only where it chose the masks."""
    chosen_by_gate = gate.policy == "gate" and round_index > gate.warmup
    return ("support_loss", "active_share", *(("reward", "reward_spread") if chosen_by_gate else ()))


def initial_values(pool: PoolSpec, gate: GateSpec, schema: Schema, streams: Streams) -> dict[str, torch.Tensor]:
    """Fresh values for every section of the schema."""
    values = pool.init(streams.generator("pool"))
    if GATE_SECTION in schema.sections:
        values[GATE_SECTION] = gate.init(streams.generator("gate"))
    return values


def version_of(values: Values, round_index: int) -> str:
    """A name for these values: the round and a digest of their names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(values):
        rows = values[name].contiguous().numpy()
        digest.update(repr((name, rows.dtype.str, rows.shape)).encode())
        digest.update(rows.tobytes())
    return f"r{round_index}-{digest.hexdigest()}"
