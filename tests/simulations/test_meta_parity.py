"""What is meta-learned: through nodes as in a simulation, over a restart of all of them, and on a device afterwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from client.node import Node, NodeConfig
from client.personal import personal_schema, personal_sections
from client.serving import Serving
from federation.codec import encode_personal
from federation.config import RunConfig
from federation.continual_config import ContinualConfig
from federation.data.population import Population
from federation.data.registry import POPULATIONS, make_population
from federation.errors import CheckpointError, RunError
from federation.exchange import Instructions, Letter, Refusal
from federation.meta_config import MetaConfig
from federation.pool.file import PoolFile, pool_file
from server import checkpoint
from server.begin import first_state
from server.live.folder import StateFolder
from server.live.loop import RoundLine, federate
from server.round import ServerState
from simulations.compute.worker import Worker
from simulations.federate import load_state, read_history
from simulations.methods import methods_of
from simulations.populations.drift import Drifting
from simulations.populations.synthetic import SyntheticPopulation
from simulations.serve import Plan, Trained, propose_masks, serve_block, start_of, tune
from strategies import STRATEGIES, make_strategy
from strategies.conformance import check
from tests.server.admission.replies import bits
from tests.simulations.test_parity import NODES, PARTIAL, USERS_PER_NODE, deploy, nodes_of, parity_config, simulated
from tests.simulations.tiny import Interrupt, tiny_setup

LEARNED = ("rates/units", "rates/shared", "start")
SIGNALS = {
    "fomaml": "meta={signal='fomaml', rule={name='rates'}, start={name='contextual', hidden=5, combinations=2}}",
    "maml": "meta={signal='maml', rule={name='rates'}, start={name='contextual', hidden=5, combinations=2}}",
    "learned": "meta={signal='fomaml', rule={name='learned', hidden=3}, start={name='contextual', combinations=2}}",
}
LIMITS = "limits={pool_norm=0.05, gate_norm=0.0005, rates_norm=0.02, start_norm=0.002}"
"""All of them clip."""


def meta_config(signal: str, *overrides: str) -> RunConfig:
    """Each node trains one of the simulation's blocks."""
    return parity_config(SIGNALS[signal], LIMITS, f"compute.block={USERS_PER_NODE}", "codec.rows=fp32", *overrides)


def assert_same(state: ServerState, expected: ServerState) -> None:
    assert (state.round_index, state.version) == (expected.round_index, expected.version)
    assert state.values.keys() == expected.values.keys()
    for part in ("values", "optimizers", "strategy"):
        assert bits(getattr(state, part)) == bits(getattr(expected, part)), part


# -------------------------------------------------------------------------------- a federation


@pytest.mark.parametrize("rows", ["fp32", "ternary"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_nodes_learn_the_bits_of_a_simulation(tmp_path: Path, signal: str, rows: str) -> None:
    config = meta_config(signal, f"codec.rows={rows}")
    state, lines = deploy(config, tmp_path, USERS_PER_NODE)
    assert_same(state, simulated(config, tmp_path / "simulation"))
    first = first_state(config, make_population(config.population).base_model())[1]
    assert set(LEARNED) < state.values.keys()
    assert not [name for name, rows in state.values.items() if torch.equal(rows, first.values[name])]
    assert [line.admitted for line in lines] == [15] * 3
    for line, report in zip(lines, read_history(tmp_path / "simulation"), strict=True):
        assert line.metrics == report["metrics"]
        assert {"query_loss", "withheld"} < line.metrics.keys()


def test_users_who_teach_nothing_or_too_much_are_counted_in_the_same_rounds(tmp_path: Path) -> None:
    """At a rate at which some inner loops diverge; a gradient may be absurd too."""
    config = meta_config("fomaml", "local.steps=3", "local.learning_rate=2.0", "deployment.quorum=0.5")
    state, lines = deploy(config, tmp_path, USERS_PER_NODE)
    assert_same(state, simulated(config, tmp_path / "simulation"))
    reports = read_history(tmp_path / "simulation")
    assert [(line.metrics, line.rejected) for line in lines] == [(r["metrics"], r["rejected"]) for r in reports]
    assert all(line.admitted == 15 - sum(line.rejected.values()) for line in lines)
    assert 0 < sum(report["metrics"]["withheld"] for report in reports) < len(reports)


@pytest.mark.parametrize("signal", SIGNALS)
def test_with_other_blocks_they_differ_by_rounding_alone(tmp_path: Path, signal: str) -> None:
    config = meta_config(signal, "compute.block=4", f"federation.cohort={PARTIAL}")
    state, _ = deploy(config, tmp_path, 2)
    for name, values in simulated(config, tmp_path / "simulation").values.items():
        assert (state.values[name] - values).norm() <= 1e-5 * values.norm(), name


@pytest.mark.parametrize(
    ("other", "rounds", "changed"),
    [("codec.rows=fp32", 1, "pool"), ("limits.rates_norm=1e3", 1, "rates"), ("limits.start_norm=1e3", 2, "start")],
)
def test_rounding_and_clipping_are_at_work_in_what_is_compared(
    tmp_path: Path, other: str, rounds: int, changed: str
) -> None:
    """Rounded are the pool's rows alone. Fresh rows are zero, so that nothing is learned of their start in round 1."""
    usual = ("codec.rows=ternary", f"federation={{rounds={rounds}, shards=1, cohort=15}}")
    before = simulated(meta_config("fomaml", *usual), tmp_path / "usual").values
    after = simulated(meta_config("fomaml", *usual, other), tmp_path / "changed").values
    assert {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])} == {changed}


@pytest.mark.parametrize("signal", ["maml", "learned"])
def test_a_server_and_nodes_that_start_again_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    """Killed after round 3, they go on from the checkpoint of round 2."""
    config = meta_config(signal, "codec.rows=ternary", "federation.rounds=4", "federation.checkpoint_every=2")
    rules, first = first_state(config, make_population(config.population).base_model())

    def killed_at_3(line: RoundLine) -> None:
        if line.round_index == 3:
            patch.setattr(StateFolder, "save", lambda folder, record: None)
            raise Interrupt

    own = tmp_path / "nodes"
    with monkeypatch.context() as patch, nodes_of(config, own, USERS_PER_NODE) as nodes, pytest.raises(Interrupt):
        federate(config, rules, first, nodes, tmp_path / "server", on_round=killed_at_3)
    seen: list[RoundLine] = []
    with nodes_of(config, own, USERS_PER_NODE) as nodes:
        state = federate(config, rules, first, nodes, tmp_path / "server", on_round=seen.append)
    assert [line.round_index for line in seen] == [3, 4]
    assert_same(state, simulated(config, tmp_path / "simulation"))


def test_where_the_pool_rests_nothing_is_learned_besides_on_either_side(tmp_path: Path) -> None:
    """In round 2 the gate learns alone, so nobody takes a step."""
    config = meta_config("fomaml", "gate.every=2", "gate.schedule=alternate")
    state, lines = deploy(config, tmp_path, USERS_PER_NODE)
    assert_same(state, simulated(config, tmp_path / "simulation"))
    reports = read_history(tmp_path / "simulation")
    assert [line.metrics for line in lines] == [report["metrics"] for report in reports]
    folder = tmp_path / "server" / "checkpoints"
    first, second, third = (checkpoint.load(checkpoint.path_of(folder, r)).tensors["values"] for r in (1, 2, 3))
    assert {name for name in second if not torch.equal(first[name], second[name])} == {"gate", "load"}
    assert {name for name in third if torch.equal(second[name], third[name])} == {"gate"}


def wanderers() -> Population:
    """Users who meet two tasks in turn."""
    users = SyntheticPopulation(
        train_users=NODES * USERS_PER_NODE, new_users=4, widths=(8, 12, 4), rank=8, budget=2, types=3, examples=16
    )
    return Drifting(users, 2)


def test_nodes_adapt_to_users_tasks_in_turn_as_a_simulation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builtin = {**POPULATIONS.builtin, "wanderers": f"{__name__}:wanderers"}
    monkeypatch.setattr("federation.data.registry.POPULATIONS", replace(POPULATIONS, builtin=builtin))
    config = meta_config(
        "maml",
        "population={name='wanderers', options={}}",
        "meta.tasks=2",
        "meta.query_steps=[1, 2]",
        "local.gain_examples=4",
    )
    state, _ = deploy(config, tmp_path, USERS_PER_NODE)
    assert_same(state, simulated(config, tmp_path / "simulation"))
    once = meta_config("maml", "population={name='wanderers', options={}}", "meta.query_steps=[1, 2]")
    assert simulated(once, tmp_path / "once").version != state.version


def test_a_node_whose_users_have_no_tasks_says_so(tmp_path: Path) -> None:
    config = meta_config("maml", "meta.tasks=2", "local.gain_examples=4", "deployment.attempts=1")
    with nodes_of(config, tmp_path, USERS_PER_NODE) as nodes:
        first = first_state(config, make_population(config.population).base_model())[1]
        pool = PoolFile(0, first.values, config.task)
        wish = Instructions("tiny", 1, 1, pool.version, "train", (0, 1), 0, config.task.model_dump_json())
        (ticket,) = nodes.post({0: Letter("train", wish, pool.to_bytes())}, 1.0).values()
        (parcel,) = nodes.collect([ticket])
    assert isinstance(parcel.answer, Refusal)
    assert (parcel.answer.fault, "meta.tasks = 1" in parcel.answer.message) == ("failed", True), parcel.answer


# -------------------------------------------------------------------------------- a device

PERSONAL = "personal={steps=5, gain_examples=8, examples=4, rows={rows='ternary', top=0.5}}"
EVALUATE = "evaluate={users=4, tuning_users=2, examples=4, gain_examples=8, methods=['melpa[steps=5]']}"


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("user_id", [3, 16])
def test_a_device_keeps_the_bytes_that_a_simulation_gives_the_method_melpa(
    tmp_path: Path, signal: str, user_id: int
) -> None:
    """One of the training users, and a new one: their rows are tuned by the learned rule from the learned start."""
    config = meta_config(signal, PERSONAL, EVALUATE, "evaluate.personal={rows='ternary', top=0.5}")
    values = simulated(config, tmp_path / "simulation").values
    node = Node(NodeConfig(population=config.population, state=tmp_path / "node"))
    node.adopt(version := node.keep(PoolFile(3, values, config.task).to_bytes()))
    figures = Serving(node).personalize(str(user_id))
    kept = node.personal.get(user_id)
    node.close()

    worker, ids, trained = Worker(config), np.array([user_id]), Trained(config, {"pool": values}, {"pool": config})
    _, method = methods_of(config)
    assert method.choice is not None
    _, packed = propose_masks(worker, trained, ids, [method.choice])
    start = start_of(worker, trained, method, ids, packed)
    personal = tune(worker, trained, start, Plan(method, 0.0, 5), ids)
    sections, schema = personal_sections(start, personal), personal_schema(start.spec, "rows")
    assert kept is not None
    assert kept.payload == encode_personal(sections, 0, schema, {"pool": method.rows}, version)
    assert (figures.version, figures.steps, figures.personal_bytes) == (version, 5, len(kept.payload))
    fresh = worker.setup(config).begin().values
    for part in ("rates", "start"):
        unlearned = {name: (fresh if name.startswith(part) else values)[name] for name in values}
        other = tune(worker, replace(trained, values={"pool": unlearned}), start, Plan(method, 0.0, 5), ids)
        assert not [name for name in personal if torch.equal(personal[name], other[name])], part
    worker.close()


def test_a_deployed_evaluation_measures_the_method_melpa(tmp_path: Path) -> None:
    """Losses of numbers count one character per target."""
    config = meta_config("maml", PERSONAL, EVALUATE, "evaluate.personal={rows='ternary', top=0.5}")
    values = simulated(config, tmp_path / "simulation").values
    node = Node(NodeConfig(population=config.population, state=tmp_path / "node"))
    version = node.keep(PoolFile(3, values, config.task).to_bytes())
    wish = Instructions("tiny", 4, 1, version, "new", (0, 1, 2, 3), 0, config.task.model_dump_json())
    measures = node.evaluate(wish)
    node.close()

    worker, ids, trained = Worker(config), np.arange(15, 19), Trained(config, {"pool": values}, {"pool": config})
    _, method = methods_of(config)
    assert method.choice is not None
    _, packed = propose_masks(worker, trained, ids, [method.choice])
    plan = Plan(method, 0.0, 5)
    _, served = serve_block(worker, trained, ids, packed, [plan])
    worker.close()
    assert measures.measured == 4
    assert measures.sums["tuned_loss"] == pytest.approx(float(served[plan].loss_u.sum()) * math.log(2.0), rel=1e-12)
    assert measures.sums["tuned_loss"] != measures.sums["mask_loss"]


# -------------------------------------------------------------------------------- older and other tasks


def without_what_is_new(release: bytes) -> bytes:
    """A pool file as the version before wrote it: its task knows neither what is learned nor what is remembered."""
    length = int.from_bytes(release[:8], "little")
    said = json.loads(json.loads(release[8 : 8 + length])["__metadata__"]["fedquilt"])
    assert said["task"].pop("meta") == MetaConfig().model_dump(mode="json")
    assert said["task"]["personal"].pop("continual") == ContinualConfig().model_dump(mode="json")
    return save(load(release), {"fedquilt": json.dumps(said)})


def test_a_release_of_the_version_before_is_served_as_ever(tmp_path: Path) -> None:
    config = parity_config(PERSONAL)
    newer = PoolFile(3, simulated(config, tmp_path / "simulation").values, config.task).to_bytes()
    kept = []
    for name, release in (("older", without_what_is_new(newer)), ("newer", newer)):
        assert pool_file(release).task == config.task
        node = Node(NodeConfig(population=config.population, state=tmp_path / name))
        node.adopt(node.keep(release))
        Serving(node).personalize("3")
        kept.append(node.personal.get(3))
        node.close()
    assert kept[0] == kept[1] is not None


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ([SIGNALS["learned"]], "values/rates/shared"),
        (["meta.start.name=universal"], "values/start"),
        (["meta.start.hidden=6"], "values/start"),
        (["local.steps=3"], "values/rates/shared"),
        (["pool.rank=4"], "values/rates/units"),
    ],
)
def test_a_checkpoint_of_another_rule_is_refused(tmp_path: Path, changes: list[str], odd: str) -> None:
    simulated(meta_config("fomaml", "federation.rounds=1"), tmp_path)
    changed = meta_config("fomaml", *changes)
    with pytest.raises(CheckpointError, match=rf"that of round 1 lacks .*{odd}.*, or has it in another shape.*begin a"):
        load_state(tiny_setup(changed), tmp_path)


def test_a_server_goes_on_with_the_rule_that_it_began_with(tmp_path: Path) -> None:
    """Also where another one has as many parameters."""
    config = meta_config("fomaml", "federation.rounds=1")
    state, _ = deploy(config, tmp_path, USERS_PER_NODE)
    for change in ("meta.signal=maml", "meta.rule.bound=4.0", "rates_optimizer.learning_rate=0.5"):
        with pytest.raises(RunError, match="goes on with the configuration it was started with"):
            deploy(meta_config("fomaml", "federation.rounds=1", change), tmp_path, USERS_PER_NODE)
    again, lines = deploy(config, tmp_path, USERS_PER_NODE)
    assert_same(again, state)
    assert lines == []


@pytest.mark.parametrize("name", STRATEGIES.builtin)
@pytest.mark.parametrize("other", ["", "gate={distribution='bernoulli', reward={price=0.01, target=0.2}}"])
def test_our_strategies_keep_every_law_for_all_that_is_learned(name: str, other: str) -> None:
    setup = tiny_setup(meta_config("fomaml", f"strategy.name={name}", *([other] if other else [])))
    assert set(LEARNED) < setup.schema.sections.keys()
    for strategy in (make_strategy(name), setup.rules.strategy):
        assert check(strategy, setup.schema) == []
