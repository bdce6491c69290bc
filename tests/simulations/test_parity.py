"""The same population and seed give the same pool and gate, simulated and through nodes that hold parts of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from client.node import Node, NodeConfig
from federation.config import RunConfig
from federation.data.registry import make_population
from federation.exchange import Contribution, Letter
from server.begin import first_state
from server.live.loop import RoundLine, federate
from server.nodes import Parcel
from server.round import ServerState
from simulations.federate import load_state
from tests.simulations.tiny import simulate, tiny_config, tiny_setup

NODES, USERS_PER_NODE = 3, 5
PARTIAL = 11
"""A cohort that takes some of each node's users."""


class InThisProcess:
    """Real nodes as a server reaches them (`server/nodes.py`), by a plain call."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes, self._parcels, self._numbers = nodes, {}, count()

    def online(self) -> Sequence[int]:
        return range(len(self._nodes))

    def post(self, letters: Mapping[int, Letter], seconds: float) -> Mapping[int, str]:
        tickets = {node: f"ticket-{next(self._numbers)}" for node in letters}
        for node, letter in letters.items():
            answer = self._nodes[node].answer(letter)
            size_bytes = len(answer.payload) if isinstance(answer, Contribution) else 0
            self._parcels[tickets[node]] = Parcel(tickets[node], node, answer, size_bytes)
        return tickets

    def collect(self, tickets: Sequence[str]) -> Sequence[Parcel]:
        return [self._parcels.pop(ticket) for ticket in tickets if ticket in self._parcels]

    def drop(self, tickets: Collection[str]) -> None:
        for ticket in tickets:
            self._parcels.pop(ticket, None)


def parity_config(*overrides: str) -> RunConfig:
    """Clipping at work, rows of int8, and a gate that chooses from the second round on."""
    population = {"train_users": NODES * USERS_PER_NODE, "new_users": 4, "widths": [8, 12, 4], "rank": 8, "budget": 2}
    options = ", ".join(f"{key}={value}" for key, value in {**population, "types": 3, "examples": 16}.items())
    return tiny_config(
        f"population.options={{{options}}}",
        "federation={rounds=3, shards=1, cohort=15}",
        "gate.every=1",
        "codec.rows=int8",
        "limits={pool_norm=0.05, gate_norm=0.0005}",
        f"deployment={{nodes={NODES}, quorum=1.0}}",
        "personal={steps=2, gain_examples=4, examples=4}",
        *overrides,
    )


@contextmanager
def nodes_of(config: RunConfig, folder: Path, block: int) -> Iterator[InThisProcess]:
    """The population cut into nodes. Their ids do not stand in their order."""
    settings = {"population": config.population, "partitions": NODES, "block": block}
    nodes = [Node(NodeConfig(state=folder / str(part), partition=part, **settings)) for part in (1, 2, 0)]
    yield InThisProcess(nodes)
    for node in nodes:
        node.close()


def deploy(config: RunConfig, folder: Path, block: int) -> tuple[ServerState, list[RoundLine]]:
    lines: list[RoundLine] = []
    rules, first = first_state(config, make_population(config.population).base_model())
    with nodes_of(config, folder / "nodes", block) as nodes:
        return federate(config, rules, first, nodes, folder / "server", on_round=lines.append), lines


def simulated(config: RunConfig, folder: Path) -> ServerState:
    simulate(config, folder)
    return load_state(tiny_setup(config), folder)


def test_nodes_give_the_bits_of_a_simulation_with_their_blocks(tmp_path: Path) -> None:
    config = parity_config(f"compute.block={USERS_PER_NODE}")
    state, lines = deploy(config, tmp_path, USERS_PER_NODE)
    expected = simulated(config, tmp_path / "simulation")
    assert all(torch.equal(state.values[name], expected.values[name]) for name in expected.values)
    assert state.version == expected.version
    assert [line.admitted for line in lines] == [15, 15, 15]
    warming_up = {"support_loss", "active_share", "unused_share", "revived"}
    learning = warming_up | {"gate_entropy", "reward", "reward_spread"}
    assert [set(line.metrics or ()) for line in lines] == [warming_up, learning, learning]


@pytest.mark.parametrize(("cohort", "block", "node_block"), [(15, 4, 5), (PARTIAL, 5, 5), (PARTIAL, 4, 2), (15, 15, 1)])
def test_with_other_blocks_they_differ_by_rounding_alone(
    tmp_path: Path, cohort: int, block: int, node_block: int
) -> None:
    config = parity_config(f"compute.block={block}", f"federation.cohort={cohort}")
    state, lines = deploy(config, tmp_path, node_block)
    expected = simulated(config, tmp_path / "simulation")
    for name, values in expected.values.items():
        assert (state.values[name] - values).norm() <= 1e-5 * values.norm(), name
    assert [line.admitted for line in lines] == [cohort] * 3


@pytest.mark.parametrize("other", ["codec.rows=fp32", "limits.pool_norm=1000.0", "limits.gate_norm=1000.0"])
def test_clipping_and_int8_are_at_work_in_what_is_compared(tmp_path: Path, other: str) -> None:
    """Else the tests above would say nothing about them."""
    usual = simulated(parity_config(), tmp_path / "usual")
    changed = simulated(parity_config(other), tmp_path / "changed")
    assert any(not torch.equal(usual.values[name], values) for name, values in changed.values.items())
