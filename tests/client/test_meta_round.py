"""A round whose updates are outer signals: who is withheld, what the server takes, and what it is for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.meta import Outer
from client.round import RoundData, RoundState, local_round, round_data
from client.task import Task
from federation.base import BaseModel, frozen
from federation.config import load_config
from federation.data.population import Batch
from federation.data.source import OnDevice
from federation.devices import CPU
from federation.errors import PopulationError
from federation.pool.model import PooledModel
from federation.state import initial_values, metric_names
from federation.streams import Streams
from federation.update import Limits, UpdateBlock, admit
from server.round import begin, close, lift, rules_of
from tests import models
from tests.client.lessons import RANDOM, MakeBase, TaskByTask, task_of, trained_values
from tests.populations import InMemory

IDS, ROUND = np.array([3, 10**12, 41, 8]), 7
STREAMS = Streams(5).at("round", ROUND)
META: dict[str, dict[str, Any]] = {
    "delta": {"signal": "delta"},
    "reptile": {"signal": "reptile"},
    "fomaml": {"signal": "fomaml"},
    "fomaml, rates": {"signal": "fomaml", "rule": {"name": "rates"}},
    "fomaml, learned": {"signal": "fomaml", "rule": {"name": "learned"}, "start": {"name": "universal"}},
    "maml": {"signal": "maml"},
    "maml, recomputed": {"signal": "maml", "recompute": True, "rule": {"name": "rates"}},
    "maml, everything": {"signal": "maml", "rule": {"name": "rates"}, "start": {"name": "contextual"}},
    "maml, after several steps": {"signal": "maml", "query_steps": [0, 2], "start": {"name": "universal"}},
}
OUTER = [name for name in META if META[name]["signal"] in ("fomaml", "maml")]


class Round:
    """Four users' round with given settings, and data that tests may spoil."""

    def __init__(self, make: MakeBase, meta: Mapping[str, Any], gate: Mapping[str, Any] = RANDOM) -> None:
        self.task = task_of(make, meta, gate, steps=2, learning_rate=0.1)
        base, settings = self.task.model.base, self.task.config.local
        self.support = models.batch_for(base, len(IDS), settings.steps * settings.examples, 1)
        self.query = models.batch_for(base, len(IDS), settings.query_examples, 2)
        self.values = trained_values(self.task)

    def run(self, users: slice = slice(None), round_index: int = ROUND) -> UpdateBlock:
        state = RoundState(self.values, round_index, "v")
        data = RoundData(self.support.take(users), self.query.take(users))
        fresh = self.task.record_layout.fresh(IDS[users])
        return local_round(self.task.model, state, fresh, data, self.task.local, STREAMS)[0]


def sent(update: UpdateBlock, name: str, u: int) -> tuple[Tensor, Tensor]:
    """The ids and rows that user u sends of a section, without padding."""
    section = update.sections[name]
    return section.ids_uk[u][section.valid_uk[u]], section.rows_ukw[u][section.valid_uk[u]]


def assert_same_bits(update: UpdateBlock, other: UpdateBlock, u: int) -> None:
    for name in update.sections:
        for one, another in zip(sent(update, name, u), sent(other, name, u), strict=True):
            assert torch.equal(one, another)
    for name, values_u in update.metrics.items():
        assert torch.equal(values_u[u], other.metrics[name][u])


def assert_sends_nothing(update: UpdateBlock, u: int) -> None:
    assert all(not section.valid_uk[u].any() for section in update.sections.values())


def linear(seed: int = 0) -> BaseModel:
    """y = W x with the squared error: what is large stays large."""
    torch.manual_seed(seed)

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (module(inputs) - targets).square().mean(1)

    return BaseModel(frozen(nn.Sequential(nn.Linear(5, 3))), loss, lambda module, inputs: inputs, 5, ("0",), "tiny-mlp")


# -------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("meta", META.values(), ids=META)
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
def test_the_server_takes_what_a_round_sends_and_expects_its_metrics(make: MakeBase, meta: Mapping[str, Any]) -> None:
    case = Round(make, meta)
    update = case.run()
    admitted, rejections = admit(update, case.task.schema, Limits())
    assert not rejections.reasons
    assert set(update.metrics) == set(metric_names(case.task.config, ROUND))
    assert all(values_u.isfinite().all() and values_u.dtype == torch.float32 for values_u in update.metrics.values())
    for name, section in admitted.sections.items():
        for u in range(len(IDS)):
            assert section.rows_ukw[u].any(), name
            assert all(torch.equal(a, b) for a, b in zip(sent(admitted, name, u), sent(update, name, u), strict=True))
    assert not update.metrics.get("withheld", torch.zeros(1)).any()


@pytest.mark.parametrize("meta", META.values(), ids=META)
def test_a_block_of_users_equals_each_user_alone(meta: Mapping[str, Any]) -> None:
    case = Round(models.mlp, meta)
    together = case.run()
    for u in range(len(IDS)):
        alone = case.run(slice(u, u + 1))
        for name in together.sections:
            (ids, rows), (own_ids, own_rows) = sent(together, name, u), sent(alone, name, 0)
            assert torch.equal(ids, own_ids)
            torch.testing.assert_close(rows, own_rows, rtol=1e-4, atol=1e-5)
        for name, values_u in together.metrics.items():
            torch.testing.assert_close(values_u[u], alone.metrics[name][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("meta", META.values(), ids=META)
def test_a_user_with_one_example_teaches_by_it(meta: Mapping[str, Any]) -> None:
    """It has it for every step, again and again, and for the query part: drawn with replacement, or with padding."""
    case = Round(models.mlp, meta)
    u = 1
    for batch in (case.support, case.query):
        batch.inputs[u], batch.targets[u] = case.support.inputs[u, 0].clone(), case.support.targets[u, 0].clone()
    drawn = case.run()
    case.support.weight[u] = case.query.weight[u] = 0.0
    case.support.weight[u, :: case.task.config.local.examples] = case.query.weight[u, 0] = 1.0
    padded = case.run()
    for name in drawn.sections:
        assert sent(drawn, name, u)[1].any()
        torch.testing.assert_close(sent(padded, name, u)[1], sent(drawn, name, u)[1], rtol=1e-3, atol=1e-5)
    assert all(values_u.isfinite().all() for values_u in padded.metrics.values())


@pytest.mark.parametrize("round_index", [3, 4])
@pytest.mark.parametrize("meta", ["maml, everything", "fomaml, learned"])
def test_while_the_pool_rests_nothing_is_learned_besides_the_gate(meta: str, round_index: int) -> None:
    gate = {"policy": "gate", "warmup": 0, "every": 2, "schedule": "alternate", "samples": 2}
    gate |= {"embedding": 2, "hidden": 3, "factors": 2}
    case = Round(models.mlp, META[meta], gate)
    rests = case.task.config.gate.rests(round_index)
    assert rests == (round_index == 3)
    update = case.run(round_index=round_index)
    for name, section in update.sections.items():
        taught = name == "load" or (name == "gate") == rests
        assert section.valid_uk.any() == section.valid_uk.any(1).all() == taught, name
    assert set(update.metrics) == set(metric_names(case.task.config, round_index))
    assert not admit(update, case.task.schema, Limits())[1].reasons


# -------------------------------------------------------------------------------- withheld


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("meta", OUTER)
def test_who_diverges_or_has_no_query_example_sends_padding_and_changes_nobodys_bits(meta: str, bad: int) -> None:
    case = Round(linear, META[meta])
    before = case.run()
    assert not before.metrics["withheld"].any()
    empty = 3
    case.support.inputs[bad] *= 1e6
    case.query.weight[empty] = 0.0
    update = case.run()
    diverges = META[meta].get("rule", {}).get("name") != "learned"  # whose steps do not grow with the gradient
    expected = [float(u == empty or (u == bad and diverges)) for u in range(len(IDS))]
    assert update.metrics["withheld"].tolist() == expected
    for u in range(len(IDS)):
        if expected[u]:
            assert_sends_nothing(update, u)
        elif u != bad:
            assert_same_bits(update, before, u)
    assert all(values_u.isfinite().all() for values_u in update.metrics.values())
    assert update.metrics["query_loss"][empty] == update.metrics["support_loss"][empty]
    assert not admit(update, case.task.schema, Limits())[1].reasons


def test_an_inner_loop_that_ends_far_above_where_it_began_is_withheld_though_finite() -> None:
    case = Round(linear, META["maml"])
    case.support.inputs[1] *= 6.0
    update = case.run()
    assert update.metrics["withheld"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert_sends_nothing(update, 1)


@pytest.mark.parametrize(
    ("first", "query", "direction", "withheld"),
    [
        (0.5, 3.9, 0.0, False),
        (0.5, 4.1, 0.0, True),
        (2.0, 7.9, 0.0, False),
        (2.0, 8.1, 0.0, True),
        (2.0, math.nan, 0.0, True),
        (2.0, math.inf, 0.0, True),
        (2.0, 1.0, math.nan, True),
        (2.0, 1.0, -math.inf, True),
    ],
)
def test_what_counts_as_divergence(first: float, query: float, direction: float, withheld: bool) -> None:
    outer = Outer(
        {"a": torch.zeros(2, 1, 3), "b": torch.tensor([[[0.0]], [[direction]]])},
        torch.tensor([9.0, 0.1]),
        torch.tensor([1.0, query]),
        torch.tensor([1.0, first]),
    )
    batch = models.batch_for(models.mlp(), 2, 2)
    assert outer.withheld(batch).tolist() == [False, withheld]
    assert not replace(outer, query_loss_u=None).withheld(batch).any()


# -------------------------------------------------------------------------------- tasks


def tasks(count: int) -> TaskByTask:
    base = models.mlp()
    parts = [
        {part: models.batch_for(base, 9, 20, 10 * at + i) for i, part in enumerate(("support", "query"))}
        for at in range(count)
    ]
    return TaskByTask([InMemory(base, own) for own in parts])


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_steps_see_one_task_after_the_other_and_the_query_part_all(wrapped: bool) -> None:
    case = task_of(models.mlp, {"signal": "maml", "tasks": 2}, steps=4, examples=3, query_examples=5)
    several, ids = tasks(3), np.array([4, 0])
    data = round_data(OnDevice(several, CPU) if wrapped else several, ids, case.local, STREAMS)
    assert (data.support.weight.shape, data.query.weight.shape) == ((2, 12), (2, 10))

    def of_task(batch: Batch, u: int, at: int, part: str) -> bool:
        own = several.sequence[at].parts[part].inputs[ids[u]]
        return all((own == x).all(1).any() for x in batch.inputs[u])

    for u in range(2):
        for step, at in enumerate((0, 0, 1, 1)):
            seen = data.support.window(3 * step, 3 * step + 3)
            assert [of_task(seen, u, task, "support") for task in range(3)] == [task == at for task in range(3)]
        for at in (0, 1):
            assert of_task(data.query.window(5 * at, 5 * at + 5), u, at, "query")
    again = round_data(several, ids[1:], case.local, STREAMS)
    assert torch.equal(again.support.inputs, data.support.inputs[1:])
    alone = round_data(several, ids, task_of(models.mlp, {"signal": "maml"}, steps=4, examples=3).local, STREAMS)
    assert all(of_task(alone.support, u, 0, "support") for u in range(2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_several_tasks_of_users_that_have_none_are_refused(wrapped: bool) -> None:
    case = task_of(models.mlp, {"signal": "maml", "tasks": 2}, steps=4)
    population = tasks(1).sequence[0]
    with pytest.raises(PopulationError, match=r"tasks.*set"):
        round_data(OnDevice(population, CPU) if wrapped else population, np.array([1]), case.local, STREAMS)


def test_more_tasks_than_there_are_are_refused() -> None:
    case = task_of(models.mlp, {"signal": "maml", "tasks": 4}, steps=4, gain_examples=3)
    with pytest.raises(PopulationError):
        round_data(tasks(3), np.array([1]), case.local, STREAMS)


# -------------------------------------------------------------------------------- what it is for


def slope_base() -> BaseModel:
    """y = up . down . x: with a pool of one unit, a user's task is which multiple of one hidden line it is."""

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (module(inputs) - targets).square().mean(1)

    module = nn.Sequential(nn.Linear(6, 1, bias=False))
    nn.init.zeros_(module[0].weight)
    return BaseModel(frozen(module), loss, lambda module, inputs: inputs, 6, ("0",), "line")


LINE = torch.nn.functional.normalize(torch.randn(6, generator=torch.Generator().manual_seed(8)), dim=0)


def line_users(users: int, examples: int, slope_u: Tensor, seed: int) -> Batch:
    inputs = torch.randn(users, examples, 6, generator=torch.Generator().manual_seed(seed))
    return Batch(inputs, slope_u[:, None, None] * (inputs @ LINE)[..., None], torch.ones(users, examples))


def meta_trained(signal: str) -> float:
    """The query loss of new users after one step, from the values that 60 rounds with Adam on the server left."""
    config = load_config(
        overrides=[
            f"meta.signal={signal}",
            "pool={rank=2, scale=1.0}",
            "gate={policy='all', budget=2}",
            "local={steps=1, examples=4, gain_examples=4, query_examples=8, learning_rate=0.1}",
            "pool_optimizer={learning_rate=0.05, schedule='constant'}",
        ]
    )
    task = Task(config.task, PooledModel.around(slope_base(), 2, 1.0))
    rules = rules_of(config, task.schema)
    values = initial_values(task.learner, task.gate, task.schema, config.gate, task.streams)
    state, generator = begin(rules, values), torch.Generator().manual_seed(9)
    for index in range(1, 61):
        slope_u = 2.0 * torch.randn(16, generator=generator)
        data = RoundData(line_users(16, 4, slope_u, 2 * index), line_users(16, 8, slope_u, 2 * index + 1))
        given, users = RoundState(state.values, index, "v"), task.record_layout.fresh(np.arange(16))
        update, _ = local_round(task.model, given, users, data, task.local, task.streams.at("round", index))
        state = close(state, lift(update, state.strategy, rules)[0], rules)
    slope_u = 2.0 * torch.randn(200, generator=generator)
    rows = {name: value.repeat(200, 1, 1) for name, value in state.values.items() if name.startswith("pool")}
    support, query = line_users(200, 4, slope_u, 1000), line_users(200, 8, slope_u, 1001)
    leaves = {name: row.requires_grad_() for name, row in rows.items()}
    with task.model.bound(leaves):
        gradients = torch.autograd.grad(task.model.loss(support).sum(), list(leaves.values()))
    stepped = {name: row - 0.1 * g for (name, row), g in zip(leaves.items(), gradients, strict=True)}
    with torch.no_grad(), task.model.bound(stepped):
        return float(task.model.loss(query).mean())


def test_a_pool_that_maml_taught_adapts_better_in_one_step_than_one_of_mean_deltas() -> None:
    """Slopes have mean zero, so the mean user is served by nothing: only readiness to adapt can be learned."""
    untrained = 4.0  # the mean of slope^2, where inputs along the line have a variance of 1
    taught, averaged = meta_trained("maml"), meta_trained("delta")
    assert taught < 0.5 * averaged
    assert taught < 0.5 * untrained
