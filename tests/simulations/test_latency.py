"""Measured costs of units: differences of times, as a setting that parses."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from federation.config import load_config
from federation.data.registry import make_population
from federation.errors import RunError
from federation.learning import unit_costs
from federation.pool.layers import _BOUND
from simulations import latency
from simulations.cli import app
from simulations.compute.worker import Worker
from simulations.latency import as_costs, cost_setting, measured, unit_seconds_job
from tests.simulations.tiny import tiny_config, tiny_setup

NAMES = ["fc1", "fc2"]


def test_a_units_cost_is_what_units_add_to_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that takes each module's rows for seconds: 10 for a pass, 3 per row of fc1, 5 per row of fc2."""
    config = tiny_config()
    setup, population = tiny_setup(config), make_population(config.population)
    batch = population.batch(np.arange(4, dtype=np.int64), "support", 4, setup.streams)
    bound: list[dict[str, tuple[int, ...]]] = []
    real = setup.model.base.loss

    def noting(module: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = _BOUND.get().rows  # type: ignore[union-attr]
        bound.append({name: tuple(rows[name].shape) for name in NAMES})
        return real(module, inputs, targets)

    def clock(work: Callable[[], object]) -> float:
        work()
        return 10.0 + sum(price * bound[-1][name][1] * bound[-1][name][0] for name, price in zip(NAMES, (3.0, 5.0)))

    monkeypatch.setitem(vars(setup.model.base), "loss", noting)
    assert measured(setup.model, batch, 2, clock) == {"fc1": 3.0, "fc2": 5.0}
    assert {tuple(shapes[name][1] for name in NAMES) for shapes in bound} == {(2, 0), (4, 0), (0, 2), (0, 4)}


def test_a_worker_measures_every_module_on_a_block() -> None:
    config = tiny_config()
    _, seconds = unit_seconds_job(Worker(config), config)
    assert list(seconds) == NAMES
    assert np.isfinite(list(seconds.values())).all()


def test_a_cost_that_is_lost_in_noise_is_refused() -> None:
    assert as_costs({"a": 1e-9}) == {"a": 1e-9}
    with pytest.raises(RunError, match=r"that of b, c is lost in their noise; .*compute.block"):
        as_costs({"a": 1e-9, "b": 0.0, "c": -1e-9})


def test_the_command_prints_a_setting_for_an_experiments_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "unit_seconds", lambda config: {"fc1": 3.21987e-06, "fc2": 9e-06})
    result = CliRunner().invoke(app, ["unit-costs", "synthetic"])
    assert result.exit_code == 0, result.output
    experiment = tmp_path / "priced.toml"
    experiment.write_text(
        f'[gate]\ndistribution = "bernoulli"\nreward.price = 0.1\n{result.stdout}\n[local]\nsteps = 3\n'
    )
    config = load_config(experiment)
    assert config.local.steps == 3
    assert config.gate.reward.cost == {"fc1": 3.22e-06, "fc2": 9e-06}
    costs_g = unit_costs(tiny_setup(tiny_config()).model.spec, config.gate.reward)
    assert float(costs_g[-1] / costs_g[0]) == pytest.approx(9 / 3.22)


def test_names_with_dots_are_one_key() -> None:
    setting = cost_setting({"h.0.attn.c_attn": 1.2e-6, 'odd"name': 12.0})
    assert tomllib.loads(setting)["reward"]["cost"] == {"h.0.attn.c_attn": 1.2e-6, 'odd"name': 12.0}
