"""A federation is the same bits whoever works, and however often it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simulations.federate as federate_module
from client.round import RoundState
from client.state import RecordLayout, UserBlock
from client.store import UserStore, shard_of
from federation import masks
from federation.cohorts import draw_cohort
from federation.errors import ConfigError, FedquiltError, PluginError, PopulationError, RunError
from federation.state import GATE_SECTION
from federation.streams import UserIds
from server.checkpoint import checksum, rounds
from simulations.compute.ray_workers import RayWorkers
from simulations.compute.worker import Broadcast, Worker, run_chunk
from simulations.compute.workers import InProcess
from simulations.federate import (
    RoundReport,
    cut,
    federate,
    last_checkpoint,
    load_state,
    read_history,
)
from simulations.methods import methods_of
from simulations.populations.synthetic import SyntheticPopulation
from simulations.record import read_record
from simulations.runs import MAIN, run
from tests.simulations.tiny import Interrupt, interrupt_at, simulate, tiny_config, tiny_setup

# -------------------------------------------------------------------------------- who works


class FirstOf(RayWorkers):
    """The first few actors of a cluster that stands: starting one for each number of workers would take a minute."""

    def __init__(self, cluster: RayWorkers, count: int) -> None:
        vars(self).update(vars(cluster), _actors=dict(list(cluster._actors.items())[:count]))


@pytest.fixture(scope="module")
def three_workers() -> Iterator[RayWorkers]:
    cluster = RayWorkers(tiny_config("compute.workers=3"))
    yield cluster
    cluster.close()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_two_and_three_workers_give_the_bits_of_none(
    undisturbed: str, three_workers: RayWorkers, tmp_path: Path, count: int
) -> None:
    setup = tiny_setup(tiny_config())
    federate(setup, FirstOf(three_workers, count), range(60), tmp_path, False, lambda report: None)
    assert checksum(last_checkpoint(tmp_path)) == undisturbed


def test_a_run_of_two_workers_resumes_with_three(undisturbed: str, three_workers: RayWorkers, tmp_path: Path) -> None:
    setup = tiny_setup(tiny_config())
    with pytest.raises(Interrupt):
        federate(setup, FirstOf(three_workers, 2), range(60), tmp_path, False, interrupt_at(3))
    federate(setup, three_workers, range(60), tmp_path, True, lambda report: None)
    assert checksum(last_checkpoint(tmp_path)) == undisturbed


# -------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(("every", "stop"), [(1, 1), (1, 5), (1, 6), (2, 1), (2, 3), (4, 5)])
def test_a_run_that_was_interrupted_ends_with_the_bits_of_an_undisturbed_one(
    undisturbed: str, tmp_path: Path, every: int, stop: int
) -> None:
    config = tiny_config(f"federation.checkpoint_every={every}")
    with pytest.raises(Interrupt):
        simulate(config, tmp_path, on_round=interrupt_at(stop))
    seen: list[int] = []
    assert simulate(config, tmp_path, resume=True, on_round=lambda r: seen.append(r.round_index)) == undisturbed
    durable = stop if stop == 6 else stop - stop % every
    assert seen == list(range(durable + 1, 7))
    assert [line["round_index"] for line in read_history(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("place", "call", "kept"),
    [
        ("run_chunk", 10, 3),  # of three a round: the first of round 4
        ("_one_round", 4, 3),
        ("_finished", 4, 3),
        ("_save", 2, 4),  # after the one before round 1
    ],
)
def test_ctrl_c_leaves_a_checkpoint_of_the_last_finished_round(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int, kept: int
) -> None:
    config = tiny_config("federation.checkpoint_every=4")
    real, calls = getattr(federate_module, place), 0

    def pressing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(federate_module, place, pressing)
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path)
    assert rounds(tmp_path / "checkpoints") == (0, kept)
    assert [line["round_index"] for line in read_history(tmp_path)] == list(range(1, kept + 1))
    assert simulate(config, tmp_path, resume=True) == undisturbed


def test_without_resume_a_federation_that_is_there_is_refused_and_kept(undisturbed: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config(), tmp_path, on_round=interrupt_at(4))
    with pytest.raises(RunError, match="holds a federation already; resume it"):
        simulate(tiny_config(), tmp_path)
    assert rounds(tmp_path / "checkpoints") == (2, 3, 4)
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed


def test_a_finished_federation_resumes_to_what_it_is(undisturbed: str, tmp_path: Path) -> None:
    simulate(tiny_config(), tmp_path)
    seen: list[RoundReport] = []
    assert simulate(tiny_config(), tmp_path, resume=True, on_round=seen.append) == undisturbed
    assert seen == []


def test_who_works_and_how_often_is_saved_may_change_at_a_resume(undisturbed: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config("compute.workers=0"), tmp_path, on_round=interrupt_at(3))
    changed = tiny_config("federation.checkpoint_every=3", "name=other", "evaluate.users=3")
    assert simulate(changed, tmp_path, resume=True) == undisturbed


@pytest.mark.parametrize(
    "override",
    ["seed=1", "local.learning_rate=0.06", "compute.block=5", "federation.rounds=7", "population.options.noise=0.2"],
)
def test_another_configuration_does_not_resume_and_spoils_nothing(
    undisturbed: str, tmp_path: Path, override: str
) -> None:
    with pytest.raises(Interrupt):
        simulate(tiny_config(), tmp_path, on_round=interrupt_at(3))
    with pytest.raises(RunError, match=r"started with other config; give those, or another --out"):
        simulate(tiny_config(override), tmp_path, resume=True)
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed


def test_a_chunk_that_is_done_again_gives_the_same_and_keeps_the_same(tmp_path: Path) -> None:
    config, ids = tiny_config(), np.arange(10)
    worker = Worker(config)
    setup = worker.setup(config)
    generator = torch.Generator().manual_seed(0)
    values = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in setup.begin().values.items()}

    def chunk(round_index: int) -> tuple[dict[str, torch.Tensor], UserBlock]:
        broadcast = Broadcast(RoundState(values, round_index, "v"), setup.begin().strategy)
        partial, _ = run_chunk(worker, broadcast, config, tmp_path, ids)
        return partial[0].rows, worker.store(setup, tmp_path).read(ids, before_round=round_index + 1)

    chunk(2)
    (rows, users), (rows_again, users_again) = chunk(3), chunk(3)
    assert all(torch.equal(rows[name], rows_again[name]) for name in rows)
    assert torch.equal(users.embedding_ue, users_again.embedding_ue)
    assert users_again.visits_u.tolist() == [2] * 10
    assert not torch.equal(chunk(4)[0][GATE_SECTION], rows[GATE_SECTION])
    worker.close()


@pytest.mark.parametrize("users", [range(59), range(1, 61), np.arange(60), np.arange(60)[::-1].copy()])
def test_other_training_users_do_not_resume(tmp_path: Path, users: range | UserIds) -> None:
    """Cohorts would be drawn from others, so it would be another federation from there on."""
    config = tiny_config()
    with pytest.raises(Interrupt):
        simulate(config, tmp_path, on_round=interrupt_at(3))
    workers = InProcess(config)
    with pytest.raises(RunError, match=r"started with other users; give those, or another --out"):
        federate(tiny_setup(config), workers, users, tmp_path, True, interrupt_at(4))
    workers.close()


# -------------------------------------------------------------------------------- what a run leaves


def test_users_remember_their_visits_and_masks(tmp_path: Path) -> None:
    config = tiny_config()
    simulate(config, tmp_path)
    setup, users = tiny_setup(config), np.arange(60)
    cohorts = [draw_cohort(range(60), config.federation, setup.streams, r) for r in range(1, 7)]
    layout = RecordLayout(config.gate.embedding, 2)
    with UserStore(tmp_path / "users", config.federation.shards, layout) as store:
        block = store.read(users, before_round=7)
    visits = np.bincount(np.concatenate(cohorts), minlength=60)
    assert block.visits_u.tolist() == visits.tolist()
    counts = masks.count(block.mask_ub)
    assert counts.tolist() == np.where(visits > 0, 2 * config.gate.budget, 0).tolist()
    learned = (block.embedding_ue != 0).any(1).numpy()
    assert learned.any()
    assert set(users[learned]) <= set(np.concatenate(cohorts[config.gate.warmup :]))


def test_at_least_three_checkpoints_and_every_round_are_kept(tmp_path: Path) -> None:
    reports: list[RoundReport] = []
    simulate(tiny_config(), tmp_path, on_round=reports.append)
    assert rounds(tmp_path / "checkpoints") == (4, 5, 6)
    assert [line["metrics"] for line in read_history(tmp_path)] == [report.metrics for report in reports]
    assert all(report.users == 12 and not report.rejected and report.users_per_second > 0 for report in reports)
    share = tiny_config().gate.budget / tiny_config().pool.rank
    assert [report.metrics["active_share"] for report in reports] == pytest.approx([share] * 6)


def test_the_gate_waits_for_the_end_of_its_warm_up(tmp_path: Path) -> None:
    config = tiny_config("gate.warmup=2", "federation.rounds=3")
    before = tiny_setup(config).begin().values[GATE_SECTION]
    with pytest.raises(Interrupt):
        simulate(config, tmp_path, on_round=interrupt_at(2))
    assert torch.equal(load_state(tiny_setup(config), tmp_path).values[GATE_SECTION], before)
    simulate(config, tmp_path, resume=True)
    assert not torch.equal(load_state(tiny_setup(config), tmp_path).values[GATE_SECTION], before)


def test_alternate_rounds_leave_the_other_factor_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config('local.train="alternate"', "federation.rounds=3")
    setup = tiny_setup(config)
    states = [setup.begin()]
    for stop in (1, 2, 3):
        with pytest.raises(Interrupt):
            simulate(config, tmp_path, resume=stop > 1, on_round=interrupt_at(stop))
        states.append(load_state(setup, tmp_path))
    for before, after, trained in zip(states, states[1:], ("up", "down", "up")):
        for m in setup.model.spec.modules:
            columns = {"down": slice(0, m.d_in), "up": slice(m.d_in, None)}
            for factor, place in columns.items():
                same = torch.equal(before.values[m.section][:, place], after.values[m.section][:, place])
                assert same == (factor != trained)


def test_a_rejected_user_is_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    """fp16 rows beyond its range become infinite, and admission refuses those."""
    config = tiny_config("codec.rows=fp16", "local.learning_rate=1e8", "gate.policy=saliency", "local.steps=1")
    reports: list[RoundReport] = []
    simulate(config, tmp_path, on_round=reports.append)
    assert len(reports) == 6
    refused = sum(sum(report.rejected.values()) for report in reports)
    assert refused > 0
    assert any("not finite" in reason for report in reports for reason in report.rejected)
    assert all(torch.isfinite(v).all() for v in last_checkpoint(tmp_path).tensors["values"].values())


# -------------------------------------------------------------------------------- chunks


def test_chunks_are_the_cohort_cut_by_shard() -> None:
    cohort = np.sort(np.random.default_rng(0).choice(10**9, 50, replace=False))
    chunks = cut(cohort, 7)
    assert sorted(np.concatenate(chunks).tolist()) == cohort.tolist()
    assert [sorted(chunk.tolist()) for chunk in chunks] == [chunk.tolist() for chunk in chunks]
    shards = [set(shard_of(chunk, 7).tolist()) for chunk in chunks]
    assert all(len(shard) == 1 for shard in shards)
    assert shards == sorted(shards, key=min)


# -------------------------------------------------------------------------------- bad input


def test_too_few_users_are_refused_with_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(PopulationError, match=r"cohort of 61 .* the population has 60; lower federation.cohort"):
        simulate(tiny_config("federation.cohort=61"), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.users=21", r"wants 21 new users, .*'synthetic' has 20; lower evaluate.users"),
        ("evaluate.tuning_users=61", r"wants 61 train users, .* has 60; lower evaluate.tuning_users"),
    ],
)
def test_too_few_users_to_evaluate_are_refused_before_anything_is_trained(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(PopulationError, match=message):
        run(tiny_config(override, "evaluate.methods=['dsa_t0']"), tmp_path / "out")
    assert not read_history(tmp_path / "out" / MAIN)


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("population.name=synthetik", PluginError, r"no population is called 'synthetik'; did you mean 'synthetic'\?"),
        ("population.options.rnak=4", ConfigError, r"'synthetic' has no option 'rnak'; did you mean 'rank'\?"),
        ("strategy.name=fedavgg", PluginError, r"no strategy is called 'fedavgg'; did you mean 'fedavg'\?"),
        ("pool.target_modules=['fc9']", FedquiltError, r"\['fc9'\] match no linear layer .*'fc1', 'fc2'"),
    ],
)
def test_an_unknown_name_tells_the_nearest(tmp_path: Path, override: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        simulate(tiny_config(override), tmp_path)


def test_an_unknown_method_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'dsa_t9'.*did you mean 'dsa_t.'\?.*random_mask"):
        methods_of(tiny_config("evaluate.methods=['shared', 'dsa_t9']"))
    with pytest.raises(ConfigError, match=r"method@kind or method@ternary:share, got 'dsa_t2@int9'"):
        methods_of(tiny_config("evaluate.methods=['dsa_t2@int9']"))


def test_a_folder_with_a_run_is_not_started_over(tmp_path: Path) -> None:
    config = tiny_config("federation.rounds=1")
    first = run(config, tmp_path / "out").record["checksum"]
    with pytest.raises(RunError, match=r"holds a run already; continue it with --resume"):
        run(config, tmp_path / "out")
    assert run(config, tmp_path / "out", resume=True).record["checksum"] == first


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"rounds": 3}', "{"])
def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(RunError, match=r"record"):
        read_record(tmp_path)
    with pytest.raises(RunError, match=r"absent"):
        read_record(tmp_path / "absent")


def test_a_record_without_methods_tells_the_run_apart(tmp_path: Path) -> None:
    made = run(tiny_config("kind=benchmark", "name=small"), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record == json.loads(json.dumps(made.record)) == read_record(tmp_path / "out")
    assert (record["kind"], record["name"], record["rounds"]) == ("benchmark", "small", 6)
    assert (record["splits"]["train"], record["splits"]["new"]) == (60, 20)
    assert record["population"]["name"] == "synthetic"
    assert record["seconds"] > 0
    assert record["users_per_second"] > 0
    assert "methods" not in record
    assert made.evaluation is None


def test_other_data_under_the_same_ids_does_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny_config(), tmp_path / "run")
    described = SyntheticPopulation.describe
    monkeypatch.setattr(SyntheticPopulation, "describe", lambda self: {**described(self), "fingerprint": "another"})
    with pytest.raises(RunError, match=r"'synthetic' has changed since .*population\.json"):
        run(tiny_config(), tmp_path / "run", resume=True)
