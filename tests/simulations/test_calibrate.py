"""Calibration: the fastest of the sizes it tries, written without touching anything else."""

import tomllib

import pytest
from typer.testing import CliRunner

from federation.errors import ConfigError
from simulations import calibrate
from simulations.calibrate import Rate, with_block
from simulations.cli import app
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
    monkeypatch.setattr(calibrate, "_rates", lambda config, largest: iter(rates))
    seen = []
    assert calibrate.calibrate(tiny_config(), seen.append).block == best
    assert seen == rates[:tried]


def test_sizes_are_timed_on_real_work_up_to_a_shards_part_of_a_cohort(monkeypatch):
    monkeypatch.setattr(calibrate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "GIVE_UP_AFTER", 99)
    rates = []
    calibrate.calibrate(tiny_config("federation.cohort=12", "federation.shards=3"), rates.append)
    assert [r.block for r in rates] == [1, 2, 4]
    assert all(r.users_per_second > 0 for r in rates)


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


def test_a_form_that_cannot_be_replaced_is_refused():
    with pytest.raises((ConfigError, tomllib.TOMLDecodeError)):
        with_block("compute = {block = 8}\n", 32)


def test_the_command_writes_a_new_experiment_and_never_over_one(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_rates", lambda config, largest: iter([Rate(1, 1.0), Rate(2, 2.0)]))
    out = tmp_path / "mine.toml"
    arguments = ["calibrate", "synthetic", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert tomllib.loads(out.read_text())["compute"]["block"] == 2
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists" in again.output
