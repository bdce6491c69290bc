"""The throughput benchmark: its two sides agree, each is what it says, and its figures are arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from client.round import RoundState
from federation import masks
from federation.errors import ConfigError
from simulations.benchmarks.throughput import (
    NaiveRound,
    Throughput,
    engine_round,
    max_relative_difference,
    measure,
    pool_values,
    users_data,
)
from simulations.benchmarks.workloads import WORKLOADS, Workload, workload
from simulations.setup import Setup, set_up, wrap

USERS = 6
# A trained row is stored as float32, so its difference to the given row is known to about 1e-4 of W2's steps.
TOLERANCE = {"w1": 2e-6, "w2": 2e-4}


def setup_of(chosen: Workload) -> tuple[Setup, RoundState]:
    setup = set_up(chosen.config, wrap(chosen.config, chosen.base()))
    return setup, RoundState(pool_values(setup), 1, "test")


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_sides_aggregate_the_same(name: str) -> None:
    assert measure(WORKLOADS[name], USERS, 4, repetitions=1).max_relative_difference < TOLERANCE[name]


def test_a_wrong_engine_would_be_noticed() -> None:
    setup, state = setup_of(WORKLOADS["w1"])
    data = users_data(WORKLOADS["w1"], USERS)
    step, trained = engine_round(setup, state, data, USERS)
    mask_ug = masks.unpack(trained.mask_ub, setup.model.spec.units)
    local = WORKLOADS["w1"].local
    slower = replace(WORKLOADS["w1"], local=local.model_copy(update={"learning_rate": 0.0499}))
    naive = NaiveRound(slower, setup.model.spec)(state.values, mask_ug, data)
    assert max_relative_difference(step, naive) > 1e-3
    shorter = replace(WORKLOADS["w1"], local=local.model_copy(update={"steps": 4}))
    naive = NaiveRound(shorter, setup.model.spec)(state.values, mask_ug, data)
    assert max_relative_difference(step, naive) > 0.1


def test_the_block_size_changes_nothing_but_rounding() -> None:
    setup, state = setup_of(WORKLOADS["w1"])
    data = users_data(WORKLOADS["w1"], USERS)
    one, _ = engine_round(setup, state, data, 1)
    all_, _ = engine_round(setup, state, data, USERS)
    for name, section in all_.sections.items():
        torch.testing.assert_close(one.sections[name].mean, section.mean, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one.sections[name].contributors, section.contributors)


def test_every_user_trains_its_budget_in_every_module() -> None:
    setup, state = setup_of(WORKLOADS["w2"])
    step, trained = engine_round(setup, state, users_data(WORKLOADS["w2"], 2), 2)
    by_module = masks.unpack(trained.mask_ub, setup.model.spec.units).view(2, 8, 32)
    assert (by_module.sum(2) == 4).all()
    for j, m in enumerate(setup.model.spec.modules):
        torch.testing.assert_close(step.sections[m.section].contributors, by_module[:, j].sum(0).float())


def test_the_workloads_are_those_of_the_speed_figures() -> None:
    w1, w2 = workload("w1"), workload("w2")
    perceptron, gpt2 = w1.base().module, w2.base().module
    linear = [m for m in perceptron.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(64, 128), (128, 10)]
    shape = gpt2.config
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.vocab_size) == (4, 128, 4, 128)
    assert (w1.local.steps, w1.local.examples, w1.local.learning_rate) == (5, 16, 0.05)
    assert (w2.local.steps, w2.local.examples) == (2, 4)
    for chosen in (w1, w2):
        config = chosen.config
        assert (config.pool.rank, config.pool.scale, config.gate.budget) == (32, 2.0, 4)
    assert users_data(w1, 2).inputs.shape == (2, 16, 64)
    assert users_data(w2, 2).inputs.shape == (2, 4, 64)


def test_w2_predicts_the_next_token() -> None:
    data = users_data(WORKLOADS["w2"], 2)
    assert data.targets[..., :-1].equal(data.inputs[..., 1:])
    assert (data.targets[..., -1] == -100).all()


def test_the_line_is_made_of_medians() -> None:
    seconds = {"engine_seconds": (9.0, 0.5, 0.4), "naive_seconds": (5.0, 4.0, 0.1)}
    result = Throughput(WORKLOADS["w1"], users=100, block=10, max_relative_difference=0.0, **seconds)
    line = result.line
    assert (line["engine_fp32"], line["naive"], line["ratio"]) == (200.0, 25.0, 8.0)
    assert result.record()["engine_seconds"] == [9.0, 0.5, 0.4]


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        measure(WORKLOADS["w1"], 2, 2, repetitions=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_unknown_workload_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="known: w1, w2"):
        workload("w3")
