"""What one worker does whatever its device and its memory, and what is said before any work is done."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import simulations.compute.worker
import simulations.compute.workers
from client.round import RoundState
from client.state import UserBlock
from federation.config import RunConfig
from federation.data.registry import make_population
from federation.devices import CPU, making_tensors_on, moved
from federation.errors import FedquiltWarning, RunError
from server.checkpoint import checksum
from simulations.cli import app
from simulations.compute.worker import halving_blocks
from simulations.compute.workers import InProcess, on_device, start_workers
from simulations.evaluate import Evaluation, evaluate
from simulations.federate import cohort_of, cut, federate, last_checkpoint, load_state, read_history
from simulations.progress import Silent
from simulations.record import users_table
from simulations.runs import run
from simulations.serve import Trained
from tests.elsewhere import ELSEWHERE, elsewhere
from tests.simulations.tiny import simulate, tiny_config, tiny_setup

# -------------------------------------------------------------------------------- devices


def on(device: torch.device, config: RunConfig) -> RunConfig:
    """The configuration with a device that none may ask for."""
    return config.model_copy(update={"compute": config.compute.model_copy(update={"device": device.type})})


def test_moving_reaches_every_tensor_and_leaves_the_rest_as_it_is() -> None:
    values, ids = {"pool": torch.ones(2)}, [1, 2]
    value = (RoundState(values, 3, "v"), [torch.zeros(1), "words"], ids)
    state, (zero, words), same_ids = moved(value, ELSEWHERE)
    assert state.values["pool"].device == zero.device == ELSEWHERE
    assert (state.round_index, state.pool_version, words) == (3, "v", "words")
    assert same_ids is ids
    assert moved(value, CPU) is value


def test_a_default_device_is_set_only_where_it_is_another() -> None:
    with making_tensors_on(ELSEWHERE):
        assert torch.ones(1).device == ELSEWHERE
        with making_tensors_on(CPU):
            assert torch.ones(1).device == CPU
    with making_tensors_on(CPU) as context:
        assert context is None


def test_the_other_device_refuses_what_lies_on_the_cpu() -> None:
    with elsewhere() as device, pytest.raises(RuntimeError, match="two devices"):
        torch.ones(2, device=device) + torch.ones(2)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("gate.distribution=bernoulli", "gate.reward.price=0.1", "gate.entropy=0.1"),
        ("gate.policy=saliency", "codec.rows=ternary", "codec.top=0.5"),
        ("gate.policy=random", "codec.rows=int8", "local.train=alternate"),
        ("strategy.name=fedavg", "limits.pool_norm=0.01"),
    ],
)
def test_on_another_device_a_federation_ends_with_the_same_bits(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = tiny_config("federation.rounds=2", *overrides)
    with elsewhere() as device:
        workers = InProcess(on(device, config))
        federate(tiny_setup(config), workers, range(60), tmp_path / "there", False, lambda report: None)
        workers.close()
    assert checksum(last_checkpoint(tmp_path / "there")) == simulate(config, tmp_path / "here")


def test_on_another_device_new_users_are_served_the_same(tmp_path: Path) -> None:
    config = tiny_config("federation.rounds=2", 'evaluate.methods=["dense_lora", "dsa_t1", "dsa_t2@int8"]')
    simulate(config, tmp_path)
    values = load_state(tiny_setup(config), tmp_path).values

    def evaluation_by(config_of_worker: RunConfig) -> Evaluation:
        trained = Trained(config, {"pool": values}, {"pool": config})
        return evaluate(InProcess(config_of_worker), make_population(config.population), trained, Silent())

    with elsewhere() as device:
        there = users_table(evaluation_by(on(device, config)))
    assert there == users_table(evaluation_by(config))


@pytest.mark.parametrize(("asked", "gpus", "found"), [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cuda", 1, "cuda")])
def test_the_device_is_what_there_is(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert on_device(tiny_config(f"compute.device={asked}")).compute.device == found


def test_a_gpu_that_is_not_there_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"'cuda' needs a GPU, torch on this machine has none; set it to 'cpu'"):
        run(tiny_config("compute.device=cuda"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- memory


def exhausted() -> Exception:
    """What torch says when the system gives it no memory."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("error", [exhausted(), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_the_rest_is_done_in_halves(error: Exception) -> None:
    tried: list[tuple[int, int]] = []

    def work(part: slice) -> range:
        tried.append((part.start, part.stop))
        if tried[-1] == (8, 16):
            raise error
        return range(part.start, part.stop)

    done = list(halving_blocks(work, 21, 8, 4))
    assert tried == [(0, 8), (8, 16), (8, 12), (12, 16), (16, 20), (20, 21)]
    assert [size for _, size in done] == [8, 4, 4, 4, 4]
    assert [user for users, _ in done for user in users] == list(range(21))


def failing_above(users: int, error: Exception) -> Callable[[slice], None]:
    def work(part: slice) -> None:
        if part.stop - part.start > users:
            raise error

    return work


def test_out_of_memory_twice_and_other_errors_are_said() -> None:
    with pytest.raises(RunError, match=r"one of 4 does not \(.*can't allocate memory.*lower compute\.block"):
        list(halving_blocks(failing_above(3, exhausted()), 16, 8, 4))
    with pytest.raises(RunError, match="one of 1 does not"):
        list(halving_blocks(failing_above(0, exhausted()), 3, 1, 1))
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        list(halving_blocks(failing_above(0, RuntimeError("shapes differ")), 3, 2, 1))


def test_a_run_whose_blocks_were_halved_trains_everyone_and_is_not_called_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("federation.rounds=3")
    whole = run(config, tmp_path / "whole")
    real, failed = simulations.compute.worker.local_round, []

    def local_round(model: object, state: RoundState, users: UserBlock, *others: object) -> object:
        if state.round_index >= 2 and len(users) > 2:
            failed.append(state.round_index)
            raise exhausted()
        return real(model, state, users, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(simulations.compute.worker, "local_round", local_round)
    halved = run(config, tmp_path / "halved")
    assert failed == [2]  # a size that does not fit is not tried again
    setup = tiny_setup(config)
    parts = [len(part) for part in cut(cohort_of(setup, range(60), 3), config.federation.shards)]
    halves = [line["halved_blocks"] for line in read_history(tmp_path / "halved" / "pool")]
    assert (halves[0], halves[1] > 1, halves[2]) == (0, True, sum(-(-users // 2) for users in parts))
    assert (whole.record["bit_identical"], halved.record["bit_identical"]) == (True, False)
    assert halved.record["visits"] == whole.record["visits"]
    for name, rows in load_state(tiny_setup(config), tmp_path / "whole" / "pool").values.items():
        torch.testing.assert_close(load_state(tiny_setup(config), tmp_path / "halved" / "pool").values[name], rows)


# -------------------------------------------------------------------------------- too many


@pytest.mark.parametrize(
    ("workers", "cores", "words"),
    [
        (4, 2, ["4 workers of one thread share 2 cores", "at most 3 chunks.* of 4 workers 1 have nothing to do"]),
        (3, 2, ["3 workers of one thread share 2 cores"]),
        (3, 8, []),
        (5, 8, ["of 5 workers 2 have nothing to do"]),
    ],
)
def test_workers_in_each_others_way_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, workers: int, cores: int, words: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr("simulations.compute.ray_workers.RayWorkers", lambda config: None)
    start_workers(tiny_config(f"compute.workers={workers}"))
    said = [str(warning.message) for warning in recwarn if warning.category is FedquiltWarning]
    assert len(said) == len(words)
    for message, pattern in zip(said, words):
        assert re.search(pattern, message)


def test_without_a_bound_on_cores_all_of_them_count(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("simulations.compute.ray_workers.RayWorkers", lambda config: None)
    start_workers(tiny_config("compute.workers=3"))
    assert [str(warning.message).split(",")[0] for warning in recwarn] == ["3 workers of one thread share 2 cores"]


def test_a_warning_is_one_line_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_with_a_warning(config: RunConfig, *_: object) -> None:
        assert config.compute.ray_address == "10.0.0.7:6379"
        warnings.warn("worker 1 died; another takes its place", FedquiltWarning, stacklevel=1)
        raise RunError("that is all")

    monkeypatch.setattr("simulations.runs.run", run_with_a_warning)
    done = CliRunner().invoke(app, ["simulate", "--ray-address", "10.0.0.7:6379", "--out", str(tmp_path)])
    assert done.stderr.splitlines() == ["fedquilt: worker 1 died; another takes its place", "fedquilt: that is all"]
