"""The population of digits: who owns what by content, conditions by counting, sequences, and the base in a pool."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.data.population import Batch, Part, Population, Sequenced
from federation.data.registry import POPULATIONS
from federation.errors import ConfigError, PopulationError
from federation.pool.model import PooledModel
from federation.second_order import twice_differentiable
from federation.streams import Streams
from simulations.populations.digits import DigitsPopulation
from simulations.populations.digits_images import CLASSES, as_pixels, digit_images, moved_patches
from tests.simulations.test_digits_images import contents

pytest.importorskip("sklearn")

STREAMS = Streams(3)
PARTS: tuple[Part, ...] = ("support", "query", "test")
QUICK = {"width": 16, "layers": 1, "heads": 2, "mlp": 16, "steps": 3, "batch": 8}
OFF = {"rotation": 0.0, "patches": 0, "contrast": 0.0, "inverted": 0.0, "labels": 0}
PLAIN = DigitsPopulation(60, 40, **OFF, pretraining=QUICK)  # type: ignore[arg-type]
OWN = DigitsPopulation(60, 40, patches=6, pretraining=QUICK)
IDS = np.array([3, 59, 60, 99])


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDQUILT_CACHE", str(folder))
        yield folder


def test_users_own_images_of_their_split_and_no_image_in_two_parts() -> None:
    """Without conditions, and over all users, so that whole pools are seen."""
    pools = [contents(as_pixels(pool)) for pool in digit_images().pools]
    for split, pool in zip(("train", "new"), pools):
        ids = np.array(PLAIN.users(split))
        owned = [PLAIN.batch(ids, part, None, STREAMS).inputs for part in PARTS]
        assert contents(torch.cat(owned, 1)) == pool
        for user in range(len(ids)):
            mine = [contents(part[user]) for part in owned]
            assert [len(part) for part in mine] == [40, 40, 100]
            assert len(set.union(*mine)) == 180


def test_classes_are_those_of_the_images() -> None:
    from sklearn.datasets import load_digits

    raw, class_n = load_digits(return_X_y=True)
    known = {(2 * row.astype(np.float32) / 16 - 1).tobytes(): int(c) for row, c in zip(raw, class_n)}
    batch = PLAIN.batch(IDS, "support", None, STREAMS)
    found = [known[image.numpy().tobytes()] for image in batch.inputs.reshape(-1, 64)]
    assert found == batch.targets.flatten().tolist()
    pretraining = [known[image.numpy().tobytes()] for image in as_pixels(digit_images().pretraining)]
    assert pretraining == digit_images().pretraining_classes.tolist()


def test_a_prefix_of_a_part_is_balanced() -> None:
    targets = OWN.batch(IDS, "support", None, STREAMS).window(0, 20).targets
    assert targets.sort(1).values.equal(torch.arange(CLASSES).repeat_interleave(2).expand(4, -1))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", [None, 7, 150])
def test_a_user_is_the_same_whoever_is_asked_for_along_with_it(part: Part, size: int | None) -> None:
    again = DigitsPopulation(60, 40, patches=6, pretraining=QUICK)
    sequence = [OWN, *(OWN.of_task(index) for index in range(5))]
    others = [again, *(again.of_task(index) for index in range(5))]
    for mine, other in zip(sequence, others):
        together = mine.batch(IDS, part, size, STREAMS)
        for u in range(len(IDS)):
            alone = other.batch(IDS[u : u + 1], part, size, STREAMS)
            torch.testing.assert_close(alone.inputs[0], together.inputs[u], rtol=0, atol=1e-5)
            assert alone.targets[0].equal(together.targets[u])


def test_batches_are_drawn_from_what_the_user_owns() -> None:
    owned = contents_by_user(PLAIN.batch(IDS, "support", None, STREAMS))
    assert contents_by_user(PLAIN.batch(IDS, "support", 40, STREAMS)) == owned
    few, many = (contents_by_user(PLAIN.batch(IDS, "support", size, STREAMS)) for size in (9, 90))
    assert [len(mine) for mine in few] == [9] * 4
    assert all(mine < own for mine, own in zip(few, owned))
    assert all(mine <= own for mine, own in zip(many, owned))
    other = PLAIN.batch(IDS, "support", 9, STREAMS.at("round", 1))
    assert contents_by_user(other) != few


def contents_by_user(batch: Batch) -> list[set[bytes]]:
    return [contents(images) for images in batch.inputs]


def test_another_seed_gives_other_users_of_the_same_images() -> None:
    other = DigitsPopulation(60, 40, **OFF, seed=1, pretraining=QUICK)  # type: ignore[arg-type]
    mine, theirs = (p.batch(IDS, "support", None, STREAMS) for p in (PLAIN, other))
    assert contents_by_user(mine) != contents_by_user(theirs)


# How users see images


def test_conditions_are_within_their_ranges_and_fill_them() -> None:
    ids = np.arange(4000)
    population = DigitsPopulation(rotation=60, patches=5, contrast=0.4, inverted=0.25, labels=3)
    seen = population.condition(ids)
    for found, most in ((seen.degree_u, 60), (seen.slope_u.abs() - 1, 0.4), (seen.offset_u, 0.4)):
        assert found.abs().max() <= most * (1 + 1e-5)
        assert found.mean().item() == pytest.approx(0, abs=4.5 * most / (3 * 4000) ** 0.5)
        assert found.square().mean().item() == pytest.approx(most**2 / 3, rel=0.1)
    assert (seen.slope_u < 0).float().mean().item() == pytest.approx(0.25, abs=4.5 * (0.1875 / 4000) ** 0.5)
    assert ((seen.patch_up != torch.arange(16)).sum(1) == 5).all()
    assert ((seen.name_uc != torch.arange(10)).sum(1) == 3).all()
    assert seen.name_uc.sort(1).values.equal(torch.arange(10).expand(4000, -1))
    moved_c = (seen.name_uc != torch.arange(10)).float().mean(0)
    torch.testing.assert_close(moved_c, torch.full((10,), 0.3), atol=4.5 * (0.21 / 4000) ** 0.5, rtol=0)
    assert abs(np.corrcoef(seen.degree_u, seen.offset_u)[0, 1]) < 4.5 / 4000**0.5


def test_without_options_a_user_sees_the_images_as_they_are() -> None:
    seen = PLAIN.condition(IDS)
    ink = digit_images().pools[0, :4, :3]
    assert seen.inputs(ink).equal((2 * ink - 1)[:, :, None])
    assert seen.targets(torch.arange(10).expand(4, -1)).equal(torch.arange(10).expand(4, -1))


def test_a_batch_is_the_owned_images_seen_by_the_user() -> None:
    """The same images, by way of the population without conditions."""
    plain, seen = PLAIN.batch(IDS, "query", None, STREAMS), OWN.batch(IDS, "query", None, STREAMS)
    condition = OWN.condition(IDS)
    assert seen.inputs.equal(condition.inputs((plain.inputs[:, :, 0] + 1) / 2))
    for u, (own, name) in enumerate(zip(plain.targets.tolist(), condition.name_uc.tolist())):
        assert [name[c] for c in own] == seen.targets[u].tolist()


# Sequences


def test_tasks_have_two_classes_each_and_all_of_them_together() -> None:
    population = DigitsPopulation(60, 40, **OFF, pretraining=QUICK)  # type: ignore[arg-type]
    assert isinstance(population, Sequenced)
    for part in PARTS:
        tasks = [population.of_task(index).batch(IDS, part, None, STREAMS) for index in range(population.tasks)]
        whole = population.batch(IDS, part, None, STREAMS)
        for u in range(len(IDS)):
            classes = [set(task.targets[u].tolist()) for task in tasks]
            assert [len(own) for own in classes] == [2] * 5
            assert set.union(*classes) == set(range(10))
            assert sum(len(contents(task.inputs[u])) for task in tasks) == whole.weight.shape[1]
            assert set.union(*(contents(task.inputs[u]) for task in tasks)) == contents(whole.inputs[u])
    orders = population.classes_of(np.arange(60), 0)
    assert len({tuple(own) for own in orders}) > 30


def test_examples_of_a_task_are_drawn_from_the_task() -> None:
    task = PLAIN.of_task(2)
    owned = contents_by_user(task.batch(IDS, "support", None, STREAMS))
    assert [len(own) for own in owned] == [8] * 4
    for size in (3, 30):
        drawn = contents_by_user(task.batch(IDS, "support", size, STREAMS))
        assert all(mine <= own for mine, own in zip(drawn, owned))


def test_private_names_hold_in_every_task() -> None:
    name_uc = OWN.condition(IDS).name_uc
    for index in range(5):
        targets = OWN.of_task(index).batch(IDS, "test", None, STREAMS).targets
        classes = torch.from_numpy(OWN.classes_of(IDS, index))
        assert [set(row) for row in targets.tolist()] == [set(r) for r in name_uc.gather(1, classes).tolist()]


def test_permuted_tasks_show_the_same_images_in_other_ways() -> None:
    options = {**OFF, "patches": 16, "inverted": 1.0, "labels": 4}
    population = DigitsPopulation(60, 40, **options, stream="permuted", tasks=3, pretraining=QUICK)  # type: ignore[arg-type]
    first = population.batch(IDS, "query", None, STREAMS)
    assert population.of_task(0).batch(IDS, "query", None, STREAMS).inputs.equal(first.inputs)
    patches = [population.condition(IDS, task).patch_up for task in range(3)]
    for index in (1, 2):
        later = population.of_task(index).batch(IDS, "query", None, STREAMS)
        assert later.targets.equal(first.targets)
        assert not any(a.equal(b) for a, b in zip(later.inputs, first.inputs))
        back = moved_patches(first.inputs[:, :, 0], patches[0].argsort(1))
        assert moved_patches(back, patches[index])[:, :, None].equal(later.inputs)
    assert not any(a.equal(b) for a, b in itertools.combinations(patches, 2))


def test_a_task_that_is_not_there_is_refused() -> None:
    for index in (-1, 5):
        with pytest.raises(PopulationError, match=rf"tasks 0\.\.4, got {index}"):
            PLAIN.of_task(index)


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rotation", 181.0), ("rotation", -1.0), ("patches", 1), ("patches", 17), ("contrast", 1.0), ("contrast", -0.1),
        ("inverted", 1.5), ("labels", 1), ("labels", 11), ("examples", 0), ("examples", 45), ("examples", 250),
        ("test_examples", 15), ("stream", "drift"), ("tasks", 0), ("tasks", 3), ("train_users", -1),
        ("pretraining", {"depth": 3}), ("pretraining", {"width": 10}), ("pretraining", {"steps": 0}),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(option: str, value: object) -> None:
    named = next(iter(value)) if isinstance(value, dict) else option
    with pytest.raises(ConfigError, match=named):
        POPULATIONS.make("digits", **{option: value})


def test_a_permuted_stream_without_anything_to_permute_is_refused() -> None:
    with pytest.raises(ConfigError, match="set patches = 16"):
        DigitsPopulation(rotation=0, patches=0, stream="permuted")


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    digit_images.cache_clear()
    with pytest.raises(PopulationError, match=r"pip install 'fedquilt\[digits\]'"):
        PLAIN.batch(IDS, "test", 1, STREAMS)


def test_splits_follow_the_protocol() -> None:
    population: Population = PLAIN
    assert (population.users("train"), population.users("new")) == (range(60), range(60, 100))
    assert population.groups(IDS).tolist() == IDS.tolist()
    assert population.chars_per_target(IDS, "test").tolist() == [1.0] * 4
    with pytest.raises(PopulationError, match=r"\['train', 'new'\], got 'test'"):
        population.users("test")


# The base


def test_pretraining_learns_upright_digits() -> None:
    steps = {"width": 32, "layers": 1, "mlp": 32, "heads": 2, "batch": 32, "steps": 200, "learning_rate": 1e-2}
    population = DigitsPopulation(10, 10, **OFF, pretraining=steps)  # type: ignore[arg-type]
    base = population.base_model()
    inputs, targets = population.batch(IDS % 20, "test", None, STREAMS).flat()
    accuracy = base.accuracy(base.module, inputs, targets).mean().item()  # type: ignore[misc]
    assert accuracy > 0.5
    assert population.describe()["base_upright_accuracy"] == pytest.approx(accuracy, abs=0.1)


def test_a_second_instance_has_the_same_base_and_a_damaged_one_is_made_anew(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def weights() -> dict[str, Tensor]:
        module = DigitsPopulation(5, 5, pretraining=QUICK).base_model().module
        return {name: value.clone() for name, value in module.state_dict().items()}

    def trained() -> float:
        return Path(PLAIN.base_model().name).joinpath("model.safetensors").stat().st_mtime_ns

    first, when = weights(), trained()
    assert all(value.equal(weights()[name]) for name, value in first.items())
    assert trained() == when
    Path(PLAIN.base_model().name).joinpath("model.safetensors").write_bytes(b"not a model")
    with caplog.at_level(logging.WARNING, "fedquilt"):
        assert all(value.equal(weights()[name]) for name, value in first.items())
    assert "is damaged; training it anew" in caplog.text
    other = DigitsPopulation(5, 5, pretraining={**QUICK, "seed": 1}).base_model()
    assert other.name != PLAIN.base_model().name
    assert Path(other.name).parent == cache / "bases"


def test_the_base_scores_images_one_by_one() -> None:
    base = PLAIN.base_model()
    inputs, targets = PLAIN.batch(IDS, "test", 3, STREAMS).flat()
    logits = base.module(pixel_values=inputs).logits
    expected = torch.stack([row.logsumexp(0) - row[target] for row, target in zip(logits, targets)])
    torch.testing.assert_close(base.loss(base.module, inputs, targets), expected)
    right = [float(row.argmax() == target) for row, target in zip(logits, targets)]
    assert base.accuracy is not None
    assert base.accuracy(base.module, inputs, targets).tolist() == right
    assert base.features(base.module, inputs).shape == (12, base.feature_width)
    assert not any(p.requires_grad for p in base.module.parameters())
    assert base.module is not PLAIN.base_model().module


def test_in_a_pool_first_and_second_order_gradients_are_those_of_finite_differences() -> None:
    """Float64, two users, along one random direction; all in forms that can be differentiated twice."""
    base = PLAIN.base_model()
    base.module.double()
    model = PooledModel.around(base, rank=2, scale=1.0)
    assert {m.name.rsplit(".", 1)[-1] for m in model.spec.modules} == set(base.target_modules)
    batch = OWN.batch(IDS[:2], "support", 3, STREAMS)
    generator = torch.Generator().manual_seed(0)
    shapes = {m.section: (2, 2, m.width) for m in model.spec.modules}
    at, way = ({s: torch.randn(n, generator=generator).double() for s, n in shapes.items()} for _ in range(2))

    def along(step: Tensor) -> tuple[Tensor, Tensor]:
        """The users' summed loss at a step along the way, and its slope."""
        with model.bound({s: 0.3 * at[s] + step * way[s] for s in shapes}), twice_differentiable():
            loss = model.loss(batch).sum()
        return loss, torch.autograd.grad(loss, step, create_graph=True)[0]

    def step(size: float) -> Tensor:
        return torch.tensor(size, dtype=torch.float64, requires_grad=True)

    here, (before, after) = step(0.0), (along(step(size)) for size in (-1e-5, 1e-5))
    slope = along(here)[1]
    curvature = torch.autograd.grad(slope, here)[0]
    torch.testing.assert_close(slope, (after[0] - before[0]) / 2e-5, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(curvature, (after[1] - before[1]) / 2e-5, rtol=1e-5, atol=1e-7)
