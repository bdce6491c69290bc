"""Calibration: the fastest of the sizes it tries, written without touching anything else."""

import os
import tomllib

import pytest
from typer.testing import CliRunner

from federation.errors import ConfigError, RunError
from simulations import calibrate
from simulations.calibrate import Rate, with_block
from simulations.cli import app
from simulations.compute.environment import WORKER_ENVIRONMENT
from simulations.compute.worker import Worker
from simulations.compute.workers import InProcess
from tests.simulations.tiny import tiny_config


@pytest.mark.parametrize(
    ("speeds", "tried", "best"),
    [
        ((1.0, 3.0, 2.0, 2.5, 9.0), 4, 2),  # two doublings without a gain end it: the last is never seen
        ((1.0, 2.0, 3.0), 3, 4),
        ((5.0,), 1, 1),
    ],
)
def test_it_stops_when_larger_blocks_do_not_pay_and_names_the_fastest(monkeypatch, speeds, tried, best):
    rates = [Rate(2**i, speed) for i, speed in enumerate(speeds)]
    monkeypatch.setattr(calibrate, "_rates", lambda config, largest: (rate for rate in rates))
    seen = []
    assert calibrate.calibrate(tiny_config(), seen.append).block == best
    assert seen == rates[:tried]


def in_this_process(config):
    assert config.compute.workers == 1
    return InProcess(config)


def test_sizes_are_timed_on_a_worker_up_to_a_shards_part_of_a_cohort(monkeypatch):
    monkeypatch.setattr(calibrate, "start_workers", in_this_process)
    monkeypatch.setattr(calibrate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "GIVE_UP_AFTER", 99)
    rates = []
    calibrate.calibrate(tiny_config("federation.cohort=12", "federation.shards=3"), rates.append)
    assert [r.block for r in rates] == [1, 2, 4]
    assert all(r.users_per_second > 0 for r in rates)


def test_it_is_timed_in_the_environment_of_a_runs_workers(monkeypatch):
    monkeypatch.setattr(calibrate, "seconds_of_block", environment_of_block)
    rates = []
    calibrate.calibrate(tiny_config("federation.cohort=12", "federation.shards=3"), rates.append)
    assert [r.users_per_second for r in rates] == [1.0, 2.0]


def environment_of_block(worker, config, users):
    settings = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    return None, 1.0 if settings == WORKER_ENVIRONMENT and users < 4 else None


def test_a_size_that_does_not_fit_ends_it_with_the_best_so_far(monkeypatch):
    real = calibrate.train_block

    def train_block(worker, setup, broadcast, users):
        if len(users) > fitting:
            raise MemoryError
        return real(worker, setup, broadcast, users)

    monkeypatch.setattr(calibrate, "start_workers", in_this_process)
    monkeypatch.setattr(calibrate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "train_block", train_block)
    config, rates, fitting = tiny_config("federation.cohort=12", "federation.shards=3"), [], 2
    assert calibrate.calibrate(config, rates.append).block in (1, 2)
    assert [r.block for r in rates] == [1, 2]
    fitting = 0
    with pytest.raises(RunError, match="a block of one user must fit into memory"):
        calibrate.calibrate(config, rates.append)
    fitting = 99  # there are 60 users
    assert calibrate.seconds_of_block(Worker(config), config, 61) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        'name = "a"\n',
        'name = "a"\n[compute]\nworkers = 2  # both cores\n',
        "[compute]\nblock = 8  # as measured\nworkers = 1\n\n[evaluate]\nblock = 4\n",
        "[evaluate]\nblock = 4\n[compute]\nworkers = 1\nblock=8",
    ],
)
def test_only_the_block_size_changes(text):
    changed = with_block(text, 32)
    expected = tomllib.loads(text)
    expected.setdefault("compute", {})["block"] = 32
    assert tomllib.loads(changed) == expected
    assert changed.count("#") == text.count("#")


@pytest.mark.parametrize(
    "text",
    ["compute = {block = 8}\n", "compute.block = 8\n", "[ compute ]\nblock = 8\n", 'name = """\n[compute]\n"""\n'],
)
def test_a_form_that_cannot_be_replaced_is_refused(text):
    with pytest.raises(ConfigError, match="set it to 32 by hand"):
        with_block(text, 32)


def test_the_command_writes_a_new_experiment_and_never_over_one(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_rates", lambda config, largest: (rate for rate in (Rate(1, 1.0), Rate(2, 2.0))))
    out = tmp_path / "mine.toml"
    arguments = ["calibrate", "synthetic", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert tomllib.loads(out.read_text())["compute"]["block"] == 2
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists" in again.output
