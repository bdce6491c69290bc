"""The gate in a federation: when the pool rests, what its load and price become, and what a run says of its health."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import simulations.federate as federate_module
from client.state import RecordLayout
from client.store import UserStore
from federation import masks
from federation.cohorts import draw_cohort
from federation.config import RunConfig
from federation.data.registry import make_population
from federation.errors import CheckpointError, FedquiltWarning
from federation.state import GATE_SECTION, LOAD_SECTION, PRICE_SECTION
from server.checkpoint import save
from simulations.federate import last_checkpoint, load_state, read_history
from simulations.setup import first_pool
from tests.simulations.tiny import Interrupt, interrupt_at, simulate, tiny_config, tiny_setup


@pytest.mark.parametrize("train", ["both", "alternate"])
def test_where_the_gate_learns_in_turn_the_pool_rests_and_moves_in_the_rounds_between(
    tmp_path: Path, train: str
) -> None:
    config = tiny_config("gate.schedule=alternate", "gate.every=2", "federation.rounds=4", f"local.train={train}")
    setup = tiny_setup(config)
    states = [setup.begin()]
    for stop in (1, 2, 3, 4):
        with pytest.raises(Interrupt):
            simulate(config, tmp_path, resume=stop > 1, on_round=interrupt_at(stop))
        states.append(load_state(setup, tmp_path))
    moved = [
        {name.split("/")[0] for name in before.values if not torch.equal(before.values[name], after.values[name])}
        for before, after in pairwise(states)
    ]
    assert moved == [{"pool"}, {GATE_SECTION, LOAD_SECTION}, {"pool", LOAD_SECTION}, {GATE_SECTION, LOAD_SECTION}]


def masks_of_round_2(config: RunConfig, folder: Path) -> torch.Tensor:
    """What each user of the cohort trained, (U, G) bool, in a federation of two rounds, of which one was a warm-up."""
    setup = tiny_setup(config)
    cohort = draw_cohort(range(60), config.federation, setup.streams, 2)
    layout = RecordLayout(config.gate.embedding, 2)
    with UserStore(folder / "users", config.federation.shards, layout) as store:
        return masks.unpack(store.read(cohort, before_round=3).mask_ub, setup.model.spec.units)


SURE = ("gate.distribution=bernoulli", "gate.initial_alpha=1e4", "gate.exploration=0.0")
"""Of a gate that is so sure that the masks it draws are those that it finds likely."""


def test_the_load_is_the_running_mean_of_the_masks_that_the_gate_finds_likely(tmp_path: Path) -> None:
    config = tiny_config("strategy.name=fedavg", "federation.rounds=2", *SURE)
    simulate(config, tmp_path)
    mask_ug = masks_of_round_2(config, tmp_path)
    load = load_state(tiny_setup(config), tmp_path).values[LOAD_SECTION]
    torch.testing.assert_close(load, 0.1 * mask_ug.float().mean(0, keepdim=True))
    unused = (load < 0.1 * load.mean()).double().mean()
    assert read_history(tmp_path)[-1]["metrics"]["unused_share"] == float(unused)


@pytest.mark.parametrize("target", [0.1, 0.6])
def test_a_price_follows_how_far_the_mean_share_of_active_units_is_off_its_target(
    tmp_path: Path, target: float
) -> None:
    reward = f"gate.reward={{price = 0.01, target = {target}, price_rate = 0.3}}"
    config = tiny_config("strategy.name=fedavg", "federation.rounds=2", reward, *SURE)
    simulate(config, tmp_path)
    share = float(masks_of_round_2(config, tmp_path).double().mean())
    off = (share - target) / max(share, target)
    assert abs(off) > 0.01
    steered = float(load_state(tiny_setup(config), tmp_path).values[PRICE_SECTION])
    assert steered == pytest.approx(math.log(0.01) + 0.3 * off, rel=1e-5)


def test_without_a_trained_gate_a_history_says_nothing_of_its_health(tmp_path: Path) -> None:
    simulate(tiny_config("gate.policy=saliency", "federation.rounds=1"), tmp_path)
    assert set(read_history(tmp_path)[0]["metrics"]) == {"support_loss", "active_share"}


def test_a_collapse_is_warned_of_when_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federate_module, "gate_health", lambda before, after: {"unused_share": 0.9, "revived": 0.0})
    sure = ("gate.initial_alpha=1000", "gate.inputs=['gains']", "gate.budget=1", "federation.rounds=3")
    with pytest.warns(FedquiltWarning, match=r"the gate collapses: in round 2 .* 90% of the units") as caught:
        simulate(tiny_config(*sure), tmp_path)
    assert len([warning for warning in caught if issubclass(warning.category, FedquiltWarning)]) == 1


def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = tiny_config("federation.rounds=1")
    simulate(config, tmp_path)
    found = last_checkpoint(tmp_path)
    values = {name: rows for name, rows in found.tensors["values"].items() if name != LOAD_SECTION}
    older = {part: tensors for part, tensors in found.tensors.items() if part != "optimizer-load"} | {"values": values}
    save(tmp_path / "checkpoints", 1, older, found.meta)
    wanted = r"lacks values/load, optimizer-load, .* older version .*: begin a new run"
    for again in (lambda: simulate(config, tmp_path, resume=True), lambda: load_state(tiny_setup(config), tmp_path)):
        with pytest.raises(CheckpointError, match=wanted):
            again()


def test_units_that_a_gate_has_given_up_are_tried_and_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate begins sure that nobody wants the first unit of each module, and some users do."""
    config = tiny_config(
        "population.options={kind='additive', widths=[8, 8, 8], rank=8, budget=2, types=4}",
        "population.options.train_users=200",
        "population.options.new_users=8",
        "pool={rank=8, scale=1.0, start='teacher'}",
        "gate={budget=2, warmup=0, every=1, samples=4, factors=4, exploration=0.3}",
        "local={train='nothing', steps=1, examples=4, gain_examples=8, query_examples=16}",
        "gate_optimizer.learning_rate=0.05",
        "federation={rounds=60, cohort=32, shards=1}",
        "compute={workers=0, block=32}",
    )
    setup = tiny_setup(config)
    begin = {**setup.begin().values, **first_pool(config, make_population(config.population))}

    def prejudiced(*_: object) -> dict[str, torch.Tensor]:
        values = {name: rows.clone() for name, rows in begin.items()}
        parts = setup.gate.parts(values[GATE_SECTION])
        parts["module_factor"].fill_(1.0)
        parts["rank_factor"].zero_()[0] = -3.0
        parts["output_bias"].fill_(1.0)
        return values

    monkeypatch.setattr("simulations.setup.initial_values", prejudiced)
    simulate(config, tmp_path)
    metrics = [line["metrics"] for line in read_history(tmp_path)]
    assert metrics[4]["unused_share"] == 2 / 16
    assert metrics[-1]["unused_share"] == 0
    assert sum(line["revived"] for line in metrics) >= 2
