"""What a device draws from: a population as it is, its tasks one by one, and a refusal where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from federation.data.population import Batch, Part, Sequenced, side_by_side
from federation.data.source import OnDevice
from federation.devices import CPU
from federation.errors import PopulationError
from federation.streams import Streams
from tests import models
from tests.client.lessons import TaskByTask
from tests.populations import InMemory

IDS, STREAMS, BASE = np.array([2, 0]), Streams(4).at("round", 1), models.mlp()
PARTS: tuple[Part, ...] = ("support", "query")


def population(seed: int) -> InMemory:
    return InMemory(BASE, {part: models.batch_for(BASE, 3, 6, 10 * seed + at) for at, part in enumerate(PARTS)})


def assert_same(a: Batch, b: Batch) -> None:
    for one, other in zip(vars(a).values(), vars(b).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("part", PARTS)
def test_it_draws_what_the_population_draws(part: Part, size: int | None) -> None:
    assert_same(
        OnDevice(population(1), CPU).batch(IDS, part, size, STREAMS), population(1).batch(IDS, part, size, STREAMS)
    )


def test_its_tasks_are_those_of_the_population_in_order() -> None:
    several = TaskByTask([population(seed) for seed in (1, 2, 3)])
    source = OnDevice(several, CPU)
    assert isinstance(source, Sequenced)
    assert source.tasks == 3
    for at, task in enumerate(several.sequence):
        assert_same(source.of_task(at).batch(IDS, "support", 4, STREAMS), task.batch(IDS, "support", 4, STREAMS))
    with pytest.raises(PopulationError):
        source.of_task(3)


def test_users_without_a_sequence_have_one_task_and_no_tasks_to_ask_for() -> None:
    source = OnDevice(population(1), CPU)
    assert source.tasks == 1
    with pytest.raises(PopulationError, match=r"this population has none; set meta.tasks = 1, or take a population"):
        source.of_task(0)


def test_batches_side_by_side_are_one_after_the_other_for_every_user() -> None:
    batches = [population(seed).batch(IDS, "support", size, STREAMS) for seed, size in ((1, 2), (2, None), (3, 1))]
    batches[1].weight[0, 3:] = 0.0
    whole = side_by_side(batches)
    assert whole.weight.shape == (2, 9)
    for batch, start in zip(batches, (0, 2, 8), strict=True):
        assert_same(whole.window(start, start + batch.weight.shape[1]), batch)
