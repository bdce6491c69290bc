"""Benchmarks at tiny sizes: both sides of a comparison do the same, and figures follow from the times taken."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from federation.cohorts import draw_cohort
from federation.errors import ConfigError, RunError
from federation.streams import Streams
from simulations import documents
from simulations.benchmarks import aggregation, pipeline, population, scaling
from simulations.benchmarks.clock import in_turns, one_thread
from simulations.benchmarks.commands import bench, record_of
from simulations.benchmarks.federations import Laps, synthetic
from simulations.benchmarks.figures import FIGURES, figures
from simulations.compute.worker import Worker
from tests.simulations.tiny import tiny_config

PROVENANCE = {"kind", "command", "commit", "versions", "machine"}


# -------------------------------------------------------------------------------- clock


def test_sides_take_turns_after_a_first_one_that_is_not_counted() -> None:
    log: list[str] = []
    times = in_turns({side: lambda side=side: log.append(side) for side in "ab"}, 3)
    assert "".join(log) == "ab" * 4
    assert {side: len(taken) for side, taken in times.items()} == {"a": 3, "b": 3}


def test_threads_are_as_before_even_after_an_error() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with suppress(ValueError), one_thread():
            raise ValueError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_lap_leaves_out_what_is_done_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((10.0, 11.5, 20.0, 22.0, 30.0))  # made; round 1 ends, goes on; round 2 ends, goes on
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    laps = Laps()
    laps(None)  # type: ignore[arg-type]
    laps(None)  # type: ignore[arg-type]
    assert laps.seconds == [1.5, 2.0]


# -------------------------------------------------------------------------------- aggregation


def test_sparse_flower_and_numpy_have_one_mean() -> None:
    block = aggregation.updates(3, torch.Generator().manual_seed(1))
    pools = aggregation.dense(block)
    flower = aggregation.flower_mean([aggregation.as_records(pool) for pool in pools])
    step = aggregation.sparse_mean([block.take(torch.arange(2)), block.take(torch.tensor([2]))])
    assert aggregation.max_relative_difference(step, flower, 3) < 1e-6
    assert aggregation.max_relative_difference(step, flower, 2) > 0.1
    for name, rows in aggregation.dense_mean(pools).items():
        np.testing.assert_allclose(rows, flower[name].numpy(), atol=1e-8)


def test_every_row_is_copied() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = [aggregation.updates(users, generator) for users in (3, 2)]
    buffers = {name: torch.zeros_like(section.rows_ukw) for name, section in blocks[0].sections.items()}
    aggregation.copy(blocks, buffers)
    for name, rows in buffers.items():
        first, last = (block.sections[name].rows_ukw for block in blocks)
        assert rows.equal(torch.cat((last, first[2:])))


def test_updates_are_admissible_and_not_clipped() -> None:
    block = aggregation.updates(4, torch.Generator().manual_seed(1))
    admitted, rejections = aggregation.admit(block, aggregation.SCHEMA, aggregation.LIMITS)
    assert len(rejections) == 0
    assert all(section.rows_ukw.equal(block.sections[name].rows_ukw) for name, section in admitted.sections.items())


def test_dense_clients_are_users_of_the_first_block() -> None:
    with pytest.raises(ConfigError, match=r"first block, which has 5, not 20; .*--clients"):
        aggregation.measure(users=5, block=128, clients=20, repetitions=3)
    with pytest.raises(ConfigError, match="which has 8, not 9"):
        aggregation.measure(users=16, block=8, clients=9, repetitions=3)


def test_aggregation_counts_updates_by_medians() -> None:
    seconds = {
        "sparse": (9.0, 0.5, 0.1),
        "admitted": (1.0,),
        "copy": (0.4,),
        "flower": (5.0, 4.0, 0.1),
        "dense": (2.0,),
    }
    line = aggregation.Aggregation(100, 10, 20, 900_000, seconds, 0.0).line
    assert (line["sparse_updates_per_second"], line["flower_dense_updates_per_second"]) == (200.0, 5.0)
    assert (line["numpy_dense_updates_per_second"], line["admitted_updates_per_second"]) == (10.0, 100.0)
    assert (line["ratio"], line["share_of_memcpy"]) == (40.0, 0.8)


# -------------------------------------------------------------------------------- population


def test_slope_is_that_of_the_second_half() -> None:
    warming = [1000.0, 2000.0, 0.0, 500.0]
    assert population.slope([*warming, 7.0, 7.25, 7.5, 7.75]) == pytest.approx(0.25)
    noisy = np.random.default_rng(0).normal(0, 1, 2000) + 0.01 * np.arange(2000)
    assert population.slope(noisy.tolist()) == pytest.approx(0.01, abs=1e-3)


def test_private_memory_grows_with_what_is_held() -> None:
    before = population.private_mib()
    held = np.ones(8 << 20)
    assert population.private_mib() - before == pytest.approx(held.nbytes / 2**20, abs=2)


def test_memory_is_noted_after_each_round_of_driver_and_worker() -> None:
    memory = population.memory_of(synthetic(registered=40, cohort=4, rounds=3, workers=0))
    assert {who: len(mib) for who, mib in memory.items()} == {"driver": 3, "worker": 3}
    # Without Ray they are one process.
    np.testing.assert_allclose(memory["driver"], memory["worker"], atol=2)


def test_populations_take_turns_in_processes_of_their_own() -> None:
    configs = {users: synthetic(users, 4, 2, workers=0) for users in (40, 80)}
    with population._processes(configs) as connections:
        for _ in range(2):
            for users, connection in connections.items():
                lap, mib = population._next_round(connection, users)
                assert 0 < lap < 60
                assert 10 < mib < 4096


def test_a_population_that_cannot_run_is_an_error_and_not_a_wait() -> None:
    too_few = {3: synthetic(registered=3, cohort=4, rounds=1, workers=0)}
    with (
        population._processes(too_few) as connections,
        pytest.raises(RunError, match="3 registered users ended early"),
    ):
        population._next_round(connections[3], 3)


def test_a_federation_that_no_one_listens_to_ends_quietly() -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send("next round")
    ours.close()
    population._rounds_when_told(theirs, synthetic(registered=8, cohort=4, rounds=2, workers=0))
    with pytest.raises(BrokenPipeError):
        theirs.send("heard by nobody")


def test_nobody_comes_twice() -> None:
    with pytest.raises(ConfigError, match="rounds of 4 users need 20, the smallest has 19"):
        population.measure((10**6, 19), cohort=4, rounds=3, memory_rounds=4)
    config = synthetic(registered=20, cohort=4, rounds=5, workers=0)
    cohorts = [draw_cohort(range(20), config.federation, Streams(config.seed), index) for index in range(1, 6)]
    assert len(set(np.concatenate(cohorts))) == 20


def test_population_states_medians_and_the_last_memory() -> None:
    measured = population.PopulationCost(
        synthetic(40, 4, 3, workers=0),
        {40: [9.0, 1.0, 2.0], 80: [3.0, 3.0, 1.0]},
        {40: [10.0, 30.0, 20.0], 80: [5.0, 5.0, 6.0]},
        2,
        {"driver": [0.0, 9.0, 1.0, 1.5, 2.0, 2.5], "worker": [4.0] * 6},
    )
    assert measured.line == {
        "registered": [40, 80],
        "round_seconds": [2.0, 3.0],
        "driver_mib": [20.0, 6.0],
        "mib_per_100_rounds": {"driver": 50.0, "worker": 0.0},
    }
    check_record(record_of(measured, "population", "population"), measured.line, "population")


# -------------------------------------------------------------------------------- workers


def test_runs_of_one_federation_are_equal() -> None:
    measured = scaling.measure((0,), registered=40, cohort=4, rounds=2, repetitions=2)
    assert (len(measured.round_seconds[0]), len(set(measured.checksums[0]))) == (4, 1)
    assert measured.line["equal"] is True
    check_record(record_of(measured, "workers", "workers"), measured.line, "workers")


def test_speed_up_and_inequality() -> None:
    config = synthetic(40, 4, 1, workers=0)
    line = scaling.Scaling(config, {1: (2.0, 1.0, 9.0), 2: (1.25,)}, {1: ("a", "a"), 2: ("a", "b")}).line
    assert line == {"workers": [1, 2], "users_per_second": [2.0, 3.2], "speed_up": 1.6, "equal": False}


# -------------------------------------------------------------------------------- pipeline


def test_a_pipeline_is_measured_round_by_round() -> None:
    measured = pipeline.measure(tiny_config("federation.cohort=8", "gate.warmup=3"), rounds=2)
    assert (len(measured.simulate), len(measured.engine)) == (2, 2)
    assert measured.line["share_of_engine"] > 0
    ran = measured.details["config"]
    assert (ran["federation"]["rounds"], ran["gate"]["warmup"]) == (3, 0)
    check_record(record_of(measured, "pipeline", "pipeline"), measured.line, "pipeline")


def test_the_parts_of_a_round_share_no_time() -> None:
    """Were one part within another, what is left for the rest would be negative."""
    parts = pipeline.breakdown(pipeline.with_rounds(tiny_config(), rounds=2))
    assert min(parts.values()) > 0
    assert {"training", "store", "checkpoint", "all else"} < parts.keys()


def test_the_bare_engine_trains_every_user_on_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[dict[str, torch.Tensor], list[Any], int]] = []
    monkeypatch.setattr(pipeline, "sgd", lambda model, rows, batches, steps, *_: calls.append((rows, batches, steps)))
    config = tiny_config("compute.block=4")
    worker = Worker(config)
    values = worker.setup(config).begin().values
    _, rate = pipeline.train_only(worker, values, config, np.arange(10, dtype=np.int64))
    assert rate > 0
    assert [len(rows["pool/fc1"]) for rows, _, _ in calls] == [4, 4, 2]
    for rows, batches, steps in calls:
        assert rows["pool/fc1"].shape[1:] == (config.gate.budget, 8 + 12)
        assert (len(batches), steps) == (config.local.steps, config.local.steps)
        assert {batch.weight.shape[1] for batch in batches} == {config.local.examples}


# -------------------------------------------------------------------------------- lines, records, tables


def check_record(record: dict[str, Any], line: dict[str, Any], kind: str) -> None:
    """A record is JSON, says how it was made, holds its line, and has every figure that is shown."""
    assert json.loads(json.dumps(record)) == record
    assert record.keys() >= PROVENANCE
    assert record["kind"] == kind
    assert {key: record[key] for key in line} == line
    assert len(figures(record, kind)) >= len(FIGURES[kind])


def test_a_command_prints_one_line_and_leaves_its_record(tmp_path: Path) -> None:
    size = ["--users", "5", "--block", "3", "--clients", "2", "--repetitions", "3"]
    result = CliRunner().invoke(bench, ["aggregation", *size, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout)
    record = json.loads((tmp_path / "aggregation.json").read_text())
    check_record(record, line, "aggregation")
    assert (record["users"], record["update_bytes"], record["dense_bytes"]) == (5, 884_736, 7_077_888)
    assert line["max_relative_difference"] < 1e-6
    assert {"sparse_updates_per_second", "flower_dense_updates_per_second", "share_of_memcpy", "ratio"} < line.keys()


def test_figures_are_rows_of_equal_length() -> None:
    record = {
        "registered": [10_000, 1_000_000],
        "round_seconds": [0.25, 0.2612345],
        "driver_mib": [300.0, 1234.5],
        "mib_per_100_rounds": {"driver": 0.0, "worker": -0.5},
    }
    assert figures(record, "population") == [
        ("registered users", "10,000", "1,000,000"),
        ("seconds per round", "0.25", "0.2612"),
        ("private memory, MiB", "300", "1,234"),
        ("MiB more per 100 rounds: driver", "0", ""),
        ("MiB more per 100 rounds: worker", "-0.5", ""),
    ]


def test_what_was_not_measured_has_no_row() -> None:
    record = dict.fromkeys(FIGURES["throughput"], 1.0) | {"workload": "w1", "flower": None}
    record["differences"] = {"engine_bf16": 1.0}
    words = [row[0] for row in figures(record, "throughput")]
    assert "Flower's simulation" not in words
    assert len(words) == len(FIGURES["throughput"]) - 1


def test_a_document_shows_a_benchmark_and_a_runs_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "HOUSE", tmp_path)
    of_workers = {"kind": "workers", "workers": [1, 2], "users_per_second": [2.0, 3.0], "speed_up": 1.5, "equal": True}
    (tmp_path / "workers.json").write_text(json.dumps(of_workers))
    run = {"users": 10**6, "seconds": 600, "peak_mib": 1.0, "object_store_mib": 2.0, "bytes_per_user": 99.5}
    (tmp_path / "million.json").write_text(json.dumps(run))
    text = "\n".join(f"<!-- {kind} -->\n<!-- end -->" for kind in ("bench: workers.json", "scale: million.json"))
    lines = documents.rendered(text).splitlines()
    assert {"| workers | 1 | 2 |", "| speed-up | 1.5 |  |", "| results equal to the last bit | yes |  |"} < set(lines)
    assert {"| figure | value |", "| users with a stored state | 1,000,000 |"} < set(lines)
