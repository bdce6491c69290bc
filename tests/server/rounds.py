"""Rules, states and updates of a few made-up users, and a round of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from federation.config import load_config
from federation.state import LOAD_SECTION, PRICE_SECTION
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from server.round import Rules, ServerState, begin, close, lift, rules_of

SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 2, "up": 3}, max_rows=3),
        "pool/b": SectionSpec(rows=4, factors={"down": 3, "up": 1}, max_rows=3),
        "gate": SectionSpec(rows=1, factors={"phi": 7}, max_rows=1),
    }
)
TRACKED = Schema(
    {
        **SCHEMA.sections,
        LOAD_SECTION: SectionSpec(rows=1, factors={"units": 10}, max_rows=1),
        PRICE_SECTION: SectionSpec(rows=1, factors={"log": 1}, max_rows=1),
    }
)
"""Of a gate whose price is steered."""
STEERED = (
    "gate.distribution=bernoulli",
    "gate.reward.price=0.01",
    "gate.reward.target=0.2",
    "gate.reward.price_rate=0.5",
)


def rules(*overrides: str, schema: Schema = SCHEMA) -> Rules:
    return rules_of(load_config(overrides=overrides), schema)


def first_state(rules: Rules) -> ServerState:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (spec.rows, spec.width) for name, spec in rules.schema.sections.items()}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return begin(rules, {name: rows.sigmoid() if name == LOAD_SECTION else rows for name, rows in values.items()})


def updates(users: int, seed: int, schema: Schema = SCHEMA) -> UpdateBlock:
    generator = torch.Generator().manual_seed(seed)
    sections = {}
    for name, spec in schema.sections.items():
        ids = torch.stack([torch.randperm(spec.rows, generator=generator)[: spec.max_rows] for _ in range(users)])
        valid = torch.rand(ids.shape, generator=generator) < 0.7
        sections[name] = Section(ids.int(), valid, torch.randn(*ids.shape, spec.width, generator=generator))
    return UpdateBlock(sections, torch.ones(users), {}, 1, "v")


def one_round(
    state: ServerState, rules: Rules, blocks: Sequence[UpdateBlock], frozen: Sequence[str] = ()
) -> ServerState:
    partials = [lift(block, state.strategy, rules)[0] for block in blocks]
    return close(state, reduce(rules.strategy.merge, partials), rules, frozen)
