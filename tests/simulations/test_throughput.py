"""The throughput benchmark: every side does the same task, each is what it says, and figures are arithmetic."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import nn
from typer.testing import CliRunner

from client.round import RoundState
from federation import masks
from federation.config import PopulationConfig
from federation.data.registry import make_population
from federation.errors import ConfigError, PopulationError, RunError
from federation.streams import Streams
from simulations.benchmarks import throughput
from simulations.benchmarks.flops import flops_per_user
from simulations.benchmarks.peers import flower, turns
from simulations.benchmarks.peers.naive import PlainModel, train_each
from simulations.benchmarks.peers.turns import Peer, PeerKind
from simulations.benchmarks.sides import Means, Naive, setup_of
from simulations.benchmarks.throughput import Throughput, engines, measure, relative_difference, sized
from simulations.benchmarks.workloads import ROUND, WORKLOADS, WorkloadPopulation, task, workload
from simulations.cli import app
from simulations.compute.environment import WORKER_ENVIRONMENT
from simulations.compute.worker import Broadcast, Worker, train_block
from simulations.compute.workers import InProcess

USERS = 6
KEYS = ["workload", "naive", "engine_fp32", "engine_bf16", "flower", "pfl", "gemm_share", "max_relative_difference"]
STREAMS = Streams(0)


@pytest.fixture(scope="module", params=WORKLOADS)
def means(request: pytest.FixtureRequest) -> dict[str, Means]:
    """What each side on our own workers aggregates, by side."""
    chosen = sized(workload(request.param), USERS, block=2)
    workers = InProcess(chosen.config)
    sides = {**engines(chosen, workers), "naive": Naive(workers, task(chosen.name, USERS))}
    return {name: side.warm_up() for name, side in sides.items()}


# -------------------------------------------------------------------------------- the task


def test_the_workloads_are_those_of_the_speed_figures() -> None:
    w1, w2 = workload("w1"), workload("w2")
    linear = [m for m in w1.base().module.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(64, 128), (128, 10)]
    shape = w2.base().module.config
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.vocab_size) == (4, 128, 4, 128)
    assert (w1.local.steps, w1.local.examples, w1.local.learning_rate) == (5, 16, 0.05)
    assert (w2.local.steps, w2.local.examples) == (2, 4)
    for chosen, example in ((w1, (64,)), (w2, (64,))):
        config = chosen.config
        assert (config.pool.rank, config.pool.scale, config.gate.budget, config.compute.workers) == (32, 2.0, 4, 2)
        assert task(chosen.name, 2).data.inputs.shape == (2, chosen.local.examples, *example)


def test_w2_predicts_the_next_token() -> None:
    data = task("w2", 2).data
    assert data.targets[..., :-1].equal(data.inputs[..., 1:])
    assert (data.targets[..., -1] == -100).all()


@pytest.mark.parametrize("name", WORKLOADS)
def test_fewer_users_are_the_first_of_more(name: str) -> None:
    few, more = task(name, 2), task(name, 5)
    assert few.mask_ug.equal(more.mask_ug[:2])
    assert few.data.inputs.equal(more.data.inputs[:2])
    assert few.data.targets.equal(more.data.targets[:2])
    assert all(few.values[section].equal(more.values[section]) for section in few.values)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_masks_are_those_that_the_engine_draws(name: str) -> None:
    config = sized(workload(name), 3, 3).config
    setup, given = setup_of(config.model_dump_json()), task(name, 3)
    broadcast = Broadcast(RoundState(given.values, ROUND, "test"), setup.rules.strategy.init(setup.schema))
    _, users, _ = train_block(Worker(config), setup, broadcast, setup.record_layout.fresh(np.arange(3)))
    assert masks.unpack(users.mask_ub, setup.model.spec.units).equal(given.mask_ug)
    assert (given.mask_ug.view(3, -1, 32).sum(2) == 4).all()


def test_the_population_is_a_population_that_gives_its_examples_in_order() -> None:
    population = make_population(PopulationConfig(name="workload", options={"workload": "w1", "train_users": 4}))
    assert (population.users("train"), len(population.users("new"))) == (range(4), 0)
    chosen = population.batch(np.array([2, 0]), "support", 18, STREAMS)
    owned = task("w1", 4).data
    assert chosen.inputs[:, :16].equal(owned.inputs[[2, 0]])
    assert chosen.inputs[:, 16:].equal(owned.inputs[[2, 0], :2])
    with pytest.raises(PopulationError, match="train"):
        population.users("old")
    with pytest.raises(ConfigError, match="known: w1, w2"):
        WorkloadPopulation("w3", 4)


# -------------------------------------------------------------------------------- the sides


def test_the_engine_equals_the_loop(means: dict[str, Means]) -> None:
    exact = [name for name in means if name.startswith("engine_fp32")]
    assert exact
    for name in exact:
        assert relative_difference(means[name], means["naive"]) < 1e-5


def test_bf16_is_another_number_near_by(means: dict[str, Means]) -> None:
    assert 1e-4 < relative_difference(means["naive"], means["engine_bf16"]) < 0.1


@pytest.mark.parametrize(("change", "least"), [({"learning_rate": 0.0499}, 1e-3), ({"steps": 4}, 0.1)])
def test_a_wrong_engine_would_be_noticed(change: dict[str, float], least: float) -> None:
    given = task("w1", USERS)
    wrong = replace(given.workload, local=given.workload.local.model_copy(update=change))
    right, other = (
        given.row_means(train_each(PlainModel(w, given.spec), given, range(USERS))) for w in (given.workload, wrong)
    )
    assert relative_difference(right, other) > least


def test_means_are_over_the_users_of_a_row() -> None:
    given = task("w1", USERS)
    model = PlainModel(given.workload, given.spec)
    mean = given.row_means(train_each(model, given, range(USERS)))["pool/fc1"]
    for row in range(given.spec.rank):
        owners = [u for u in range(USERS) if given.mask_ug[u, row]]
        alone = [train_each(model, given, range(u, u + 1))["pool/fc1"][row] for u in owners]
        expected = torch.stack(alone).mean(0) if owners else torch.zeros(192)
        torch.testing.assert_close(mean[row], expected, rtol=1e-5, atol=1e-9)


# -------------------------------------------------------------------------------- Flower and pfl-research


@pytest.mark.parametrize("name", WORKLOADS)
def test_flower_averages_what_the_loop_trains(name: str) -> None:
    given = task(name, USERS)
    model = PlainModel(given.workload, given.spec)
    pools = [
        flower.train_dense(model, given, {section: rows.clone() for section, rows in given.values.items()}, user)
        for user in range(USERS)
    ]
    replies = [RecordDict({"a": ArrayRecord(pool), "m": MetricRecord({"num-examples": 1})}) for pool in pools]
    average = aggregate_arrayrecords(replies, "num-examples").to_torch_state_dict()
    unrounded = {section: torch.stack([pool[section].double() for pool in pools]).mean(0) for section in pools[0]}
    expected = given.row_means(train_each(model, given, range(USERS)))
    assert relative_difference(expected, given.row_means_behind(unrounded)) < 1e-6
    assert relative_difference(expected, given.row_means_behind(average)) < 1e-3  # Flower's average is fp32


@pytest.mark.parametrize("name", WORKLOADS)
def test_pfl_trains_a_user_as_the_loop_does(name: str) -> None:
    pytest.importorskip("pfl", reason="pfl-research comes with fedquilt[bench]")
    from pfl.internal.bridge.pytorch.sgd import PyTorchSGDBridge

    from simulations.benchmarks.peers import pfl

    given, user = task(name, USERS), 4
    module = pfl.PoolModule(given)
    PyTorchSGDBridge.do_sgd(pfl.model_around(module), pfl.datasets(given)[user], pfl.training(given))
    expected = train_each(PlainModel(given.workload, given.spec), given, range(user, user + 1))
    for section, trained in module.values().items():
        torch.testing.assert_close(trained - given.values[section], expected[section], rtol=1e-4, atol=2e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_all_sides_agree_in_processes_of_their_own(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pfl", reason="pfl-research comes with fedquilt[bench]")
    size = ["--users", "8", "--block", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "throughput", "--workload", name, *size])
    assert result.exit_code == 0, result.output
    line = json.loads(result.output)
    assert all(line[side] > 0 for side in ("naive", "engine_fp32", "engine_bf16", "flower", "pfl"))
    assert line["max_relative_difference"] < 1e-5
    differences = json.loads((tmp_path / f"throughput-{name}.json").read_text())["differences"]
    assert differences["flower"] < 1e-3
    assert differences["pfl"] < 1e-3


# -------------------------------------------------------------------------------- taking turns

OBEDIENT = """
import sys, torch
from pathlib import Path
from simulations.benchmarks.peers.turns import Turns
turns = Turns(Path(sys.argv[-1]))
print("noise that is no answer")
turns.wait()
turns.first({"pool/a": torch.full((2, 3), float(sys.argv[-3]))})
for seconds in (9.0, 0.5, 0.25):
    turns.done(seconds)
    turns.wait()
"""


def peer_of(monkeypatch: pytest.MonkeyPatch, script: str, most_users: int | None = None) -> Peer:
    monkeypatch.setitem(turns.PEERS, "fake", PeerKind((), ("-c", script), most_users))
    return Peer("fake", task("w1", USERS), rounds=3)


def test_a_peer_works_when_told_to_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer_of(monkeypatch, OBEDIENT, most_users=4) as peer:
        assert peer.users == 4
        assert peer.warm_up()["pool/a"].equal(torch.full((2, 3), 4.0))
        assert [peer.round(), peer.round()] == [0.5, 0.25]
        process = peer._process
    assert process.returncode is not None
    assert not peer._folder.exists()


def test_a_peer_that_dies_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # its log is left for the reader
    peer = peer_of(monkeypatch, "raise ValueError('no such port')")
    with pytest.raises(RunError, match=r"fake ended with exit code 1 \(ValueError: no such port\)") as caught, peer:
        peer.round()
    assert str(peer._log) in str(caught.value)
    assert "Traceback" in peer._log.read_text()


def test_a_peer_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(turns, "ROUND_SECONDS", 0.2)
    monkeypatch.setattr(turns, "_PATIENCE_SECONDS", 0.1)
    peer = peer_of(monkeypatch, "import time; time.sleep(100)")
    with pytest.raises(RunError, match=r"at most 0.2 s, fake has not answered by then; .*--only engine"), peer:
        peer.round()
    assert peer._process.returncode == -signal.SIGTERM


def test_a_peer_has_the_environment_of_our_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = f"import os; raise ValueError(os.environ.items() >= {WORKER_ENVIRONMENT}.items())"
    peer = peer_of(monkeypatch, script)
    with pytest.raises(RunError, match="ValueError: True"), peer:
        peer.round()


def test_a_missing_peer_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(turns.PEERS, "fake", PeerKind(("flwr", "no_such_package")))
    with pytest.raises(RunError, match=r"'fake' needs no_such_package, .*fedquilt\[bench\].*--only engine"):
        measure(workload("w1"), 3, ("fake",))


# -------------------------------------------------------------------------------- figures


def test_flops_are_those_of_the_matrix_products() -> None:
    def low_rank(tokens: int, d_in: int, d_out: int) -> int:
        return 2 * tokens * 4 * (d_in + d_out)

    n = 16  # examples
    base_1, base_2, unit_1, unit_2 = 2 * n * 64 * 128, 2 * n * 128 * 10, low_rank(n, 64, 128), low_rank(n, 128, 10)
    forward = base_1 + base_2 + unit_1 + unit_2
    below_fc1 = 2 * n * 4 * 64  # nothing asks for the gradient of the input
    backward = base_2 + 2 * unit_2 + 2 * unit_1 - below_fc1
    assert flops_per_user("w1") == 5 * (forward + backward)

    n, wide, layers, vocabulary, window = 4 * 64, 128, 4, 128, 64
    linear = 2 * n * wide * wide * (3 + 1 + 4 + 4)
    attention = 2 * (2 * n * window * wide)
    units = low_rank(n, wide, 3 * wide) + low_rank(n, wide, 4 * wide)
    head = 2 * n * wide * vocabulary
    forward = layers * (linear + attention + units) + head
    below_first = 2 * n * wide * 3 * wide + 2 * n * 4 * wide
    backward = layers * (linear + 2 * attention + 2 * units) + head - below_first
    assert flops_per_user("w2") == 2 * (forward + backward)


def test_the_line_is_made_of_medians() -> None:
    seconds = {
        "engine_fp32": (0.25, 0.2, 7.0),
        "engine_bf16": (0.1, 0.1, 0.1),
        "naive": (5.0, 4.0, 0.1),
        "flower": (2.0, 5.0, 8.0),
    }
    differences = {"naive": 3e-6, "engine_bf16": 0.1, "flower": 1e-3}
    users = dict.fromkeys(seconds, 100) | {"flower": 10}
    line = Throughput(WORKLOADS["w2"], users, seconds, differences, flops_per_user=50, peak_flops=1e5).line
    assert list(line)[: len(KEYS)] == KEYS
    assert (line["naive"], line["engine_fp32"], line["engine_bf16"]) == (25.0, 400.0, 1000.0)
    assert (line["flower"], line["pfl"]) == (2.0, None)
    assert line["gemm_share"] == 0.2
    assert line["max_relative_difference"] == 3e-6
    assert (line["engine_fp32_over_flower"], line["engine_bf16_over_naive"]) == (200.0, 40.0)


def test_the_command_prints_one_line_and_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "start_workers", InProcess)
    size = ["--users", "4", "--block", "2", "--out", str(tmp_path / "speed")]
    result = CliRunner().invoke(app, ["bench", "throughput", "--workload", "w1", "--only", "engine", *size])
    assert result.exit_code == 0, result.output
    line = json.loads(result.output)
    assert list(line)[: len(KEYS)] == KEYS
    assert (line["flower"], line["pfl"]) == (None, None)
    assert line["max_relative_difference"] < 1e-5
    record = json.loads((tmp_path / "speed" / "throughput-w1.json").read_text())
    rate = record["users"] / median(record["seconds"]["engine_fp32"])
    share = rate * record["flops_per_user"] / (1e9 * record["peak_gflops"])
    assert 0 < share < 1
    assert line["gemm_share"] == pytest.approx(share, abs=1e-3)
    assert {key: record[key] for key in line} == line
    assert (record["kind"], record["users"], record["block"], record["processes"]) == ("throughput", 4, 2, 2)
    assert {side: len(taken) for side, taken in record["seconds"].items()} == dict.fromkeys(record["differences"], 3)
    assert {"command", "commit", "versions", "machine", "config"} <= record.keys()


def test_fewer_than_three_repetitions_are_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "throughput", "--workload", "w1", "--repetitions", "2"])
    assert result.exit_code == 2
    assert "x>=3" in result.output
