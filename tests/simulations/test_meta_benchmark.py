"""The benchmark of outer signals: its sides agree, a peak is what is held at one time, and figures are medians."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from client.meta import fomaml
from federation.errors import ConfigError
from simulations.benchmarks.commands import record_of
from simulations.benchmarks.meta import (
    OWN,
    PEERS,
    MetaBench,
    agreement,
    lesson_of,
    measure,
    measured_here,
    peak_bytes,
    peers,
    signals,
)

MIB = 2**20


def test_all_sides_of_exact_maml_agree_and_others_differ() -> None:
    assert agreement(3) < 1e-5
    lesson = lesson_of(3, 5)
    exact = peers(lesson)["loop"]()
    first_order = fomaml(lesson).directions
    assert all((first_order[name] - exact[name]).norm() > 1e-2 * exact[name].norm() for name in exact)


def test_a_side_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.benchmarks.meta.maml", fomaml)
    with pytest.raises(AssertionError, match="not close"):
        measured_here(2, 1, (1,))


def test_a_peak_is_what_is_held_at_one_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(MIB, dtype=torch.uint8)

    def together() -> list[torch.Tensor]:
        return [torch.empty(MIB, dtype=torch.uint8) for _ in range(3)]

    sides = {"one": one_after_the_other, "three": together, "none": list, "one again": one_after_the_other}
    assert peak_bytes(sides) == {"one": MIB, "three": 3 * MIB, "none": 0, "one again": MIB}


def test_unrolled_steps_are_held_and_recomputed_ones_are_not() -> None:
    """With each step, exact MAML holds its activations, the recomputed one its rows alone (and their gradients)."""
    few, many = (peak_bytes(signals(lesson_of(4, steps))) for steps in (5, 20))
    assert few == peak_bytes(signals(lesson_of(4, 5)))
    rows = sum(4 * copy.numel() for copy in lesson_of(4, 1).copies.values())
    assert many["maml"] - few["maml"] > 15 * 2 * rows
    assert 15 * rows <= many["recomputed"] - few["recomputed"] < 15 * 1.1 * rows
    assert many["delta"] == few["delta"]


def test_figures_are_those_of_medians() -> None:
    seconds = {f"{name}, K = 2": (1.0, 9.0, 1.0) for name in (*OWN, *PEERS)}
    seconds |= {"maml, K = 2": (3.0, 4.0, 5.0), "loop, K = 2": (40.0, 40.0, 0.0), "vmap, K = 2": (2.0, 2.0, 2.0)}
    peaks = {f"{name}, K = 2": 3 * MIB for name in OWN}
    line = MetaBench(8, 2, [2], seconds, peaks, 0.0).line
    assert (line["maml_users_per_second"], line["loop_users_per_second"]) == (2.0, 0.2)
    assert (line["speedup"], line["over_vmap"], line["peak_mib"]) == (10.0, 0.5, 3.0)
    assert line["by_steps"]["delta_rounds"]["maml"] == [4.0]
    assert line["by_steps"]["gradients"] == {"reptile": [1.5], "fomaml": [1.5], "maml": [3.5], "recomputed": [4.5]}


def test_the_record_has_its_figures() -> None:
    record = json.loads(json.dumps(record_of(measure(4, 1, (1,)), "meta", "meta")))
    keys = {"maml_users_per_second", "loop_users_per_second", "vmap_users_per_second", "speedup", "peak_mib"}
    keys |= {"recomputed_peak_mib", "recomputed_users_per_second", "fomaml_users_per_second", "commit", "peak_bytes"}
    assert keys <= record.keys()
    assert (record["steps"], record["by_steps"]["steps"]) == (5, [1, 5])
    assert record["peak_bytes"]["maml, K = 1"] < record["peak_bytes"]["maml, K = 5"]
    assert min(record["seconds"]["loop, K = 5"]) > 0


def test_the_command_asks_for_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations.benchmarks.commands import bench

    asked: list[Any] = []

    def fake(users: int, repetitions: int) -> MetaBench:
        asked.append((users, repetitions))
        raise ConfigError("enough")

    monkeypatch.setattr("simulations.benchmarks.meta.measure", fake)
    CliRunner().invoke(bench, ["meta", "--users", "2", "--repetitions", "3"])
    CliRunner().invoke(bench, ["meta"])
    assert asked == [(2, 3), (256, 5)]
