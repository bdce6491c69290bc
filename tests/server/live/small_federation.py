"""A federation of three fake nodes, and the plain loop over their users that it must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from federation.cohorts import draw_cohort
from federation.config import RunConfig
from federation.exchange import Answer, Contribution, Letter, Work
from federation.streams import Streams
from server.history import read_history
from server.live.loop import federate
from server.round import Rules, ServerState, begin, close, lift, rules_of
from tests.server.admission.replies import SCHEMA, bits, config_of
from tests.server.live.fake_nodes import FakeNode, FakeNodes, trained

SIZES = (7, 4, 9)
NODES = (31, 12, 23)
"""Ids of the nodes in the row; they answer in yet another order."""


def live_config(*overrides: str) -> RunConfig:
    own = (
        "federation.rounds=5",
        "federation.cohort=11",
        "deployment.nodes=3",
        "deployment.join_seconds=40",
        "deployment.round_seconds=20",
        "deployment.replies=2",
        "deployment.attempts=3",
        "evaluate.users=6",
    )
    return config_of(*own, *overrides)


def fake_nodes(sizes: Sequence[int] = SIZES, new: int = 0) -> FakeNodes:
    nodes = {}
    for place, (node, size) in enumerate(zip(NODES, sizes)):
        users = {"train": size, "new": new}
        nodes[node] = FakeNode(sum(sizes[:place]), users, order=place, seconds=(1.3, 0.7, 0.4)[place])
    return FakeNodes(nodes)


def at_once(nodes: FakeNodes) -> FakeNodes:
    """The same nodes, which take equally long: so all take part from the first round on, however few are waited for."""
    for node in nodes.nodes.values():
        node.seconds = 0.4
    return nodes


def begun(config: RunConfig) -> tuple[Rules, ServerState]:
    rules = rules_of(config, SCHEMA)
    generator = torch.Generator().manual_seed(5)
    values = {name: torch.randn(spec.rows, spec.width, generator=generator) for name, spec in SCHEMA.sections.items()}
    return rules, begin(rules, values)


def run(nodes: FakeNodes, folder: Path, config: RunConfig | None = None, **options: Any) -> ServerState:
    config = config or live_config()
    return federate(config, *begun(config), nodes, folder, clock=nodes.time.clock, **options)


def plain(
    config: RunConfig,
    missing: Callable[[int], Collection[int]] = lambda round_index: (),
    row: Callable[[int], Sequence[int]] = lambda round_index: range(sum(SIZES)),
) -> ServerState:
    """The same federation as one loop over users. row: who stands in it in a round. missing: who has no part in it."""
    rules, state = begun(config)
    for round_index in range(1, config.federation.rounds + 1):
        users = np.array(row(round_index))
        federation = config.federation.model_copy(update={"cohort": min(config.federation.cohort, len(users))})
        cohort = draw_cohort(users, federation, Streams(config.seed), round_index).tolist()
        work = Work("any", round_index, 1, state.version)
        partials: dict[int, Any] = {}
        for place, user in enumerate(cohort):
            if user not in missing(round_index):
                partials.setdefault(place // config.compute.block, []).append(trained(user, work, state.values))
        lifted = [lift(stacked(updates), state.strategy, rules)[0] for _, updates in sorted(partials.items())]
        state = close(state, reduce(rules.strategy.merge, lifted), rules)
    return state


def stacked(updates: Sequence[Any]) -> Any:
    """Blocks of one user as a block."""
    first = updates[0]
    sections = {
        name: replace(
            section,
            **{part: torch.cat([getattr(u.sections[name], part) for u in updates]) for part in vars(section)},
        )
        for name, section in first.sections.items()
    }
    return replace(first, sections=sections, weight_u=torch.cat([u.weight_u for u in updates]), metrics={})


def users_of(node: int) -> range:
    place = NODES.index(node)
    return range(sum(SIZES[:place]), sum(SIZES[: place + 1]))


def assert_same(state: ServerState, expected: ServerState) -> None:
    assert state.round_index == expected.round_index
    assert bits(state.values) == bits(expected.values)
    assert bits(state.optimizers) == bits(expected.optimizers)


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(folder / "rounds.jsonl")


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def in_round(letter: Letter) -> int:
    return letter.instructions.round_index if letter.instructions and letter.kind == "train" else 0


def silent_in(*wanted: int) -> Callable[[Letter, Answer], Answer | None]:
    """A node that does not answer in some rounds."""
    return lambda letter, answer: None if in_round(letter) in wanted else answer


def missing_in(node: int, *wanted: int) -> Callable[[int], Collection[int]]:
    """The users of a node, in some rounds."""
    return lambda round_index: users_of(node) if round_index in wanted else ()


def row_without(node: int, *wanted: int) -> Callable[[int], Sequence[int]]:
    """The row of users in which a node does not stand, in some rounds."""
    return lambda round_index: [u for u in range(sum(SIZES)) if round_index not in wanted or u not in users_of(node)]


def cohort_of(config: RunConfig, round_index: int) -> list[int]:
    return draw_cohort(range(sum(SIZES)), config.federation, Streams(config.seed), round_index).tolist()


def rubbish(letter: Letter, answer: Answer) -> Answer:
    """What a node sends that cuts its reply to round 2."""
    if in_round(letter) == 2 and isinstance(answer, Contribution):
        return replace(answer, payload=answer.payload[:-1])
    return answer


def honest(letter: Letter, answer: Answer) -> Answer:
    return answer
