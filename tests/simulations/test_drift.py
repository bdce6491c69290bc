"""Users who move from project to project: whose data they meet, and what stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from federation.config import PopulationConfig
from federation.data.corpus import Document, TextCorpus, UserText
from federation.data.population import Population, Sequenced
from federation.data.text import TextPopulation
from federation.data.tokenizer import BytePairs
from federation.errors import ConfigError, PopulationError
from federation.plugins import check_contract
from federation.streams import Streams
from simulations.populations import text
from simulations.populations.drift import Drifting
from simulations.populations.synthetic import SyntheticPopulation
from simulations.pretrain import no_progress
from simulations.setup import Teacher

TASKS = 3
PAIRS = BytePairs.learn([" alpha beta gamma" * 20], size=150)


def user(project: str, number: int) -> UserText:
    """Texts with a word of the user's own, and tokens of a length of its own."""
    words = f"{project}{number} " + ("alpha " if number % 2 else "x(y) ")
    return UserText(project, str(number), *(words * (20 + number) for _ in range(3)))


def people(*sizes: int, prefix: str) -> tuple[UserText, ...]:
    """Projects of these numbers of users."""
    return tuple(user(f"{prefix}{project}", n) for project, size in enumerate(sizes) for n in range(size))


CORPUS = TextCorpus(
    name="words",
    pretraining=(Document("p", "p", "alpha"),),
    train=people(2, 1, 3, 2, 1, 1, 2, prefix="train"),
    new=people(1, 3, 2, prefix="new"),
)


@pytest.fixture(scope="module")
def whole() -> TextPopulation:
    return TextPopulation(CORPUS, PAIRS, base=object, window=8)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drifting(whole: TextPopulation) -> Drifting:
    return Drifting(whole, TASKS)


@pytest.mark.parametrize("split", ["train", "new"])
def test_every_task_is_of_another_project_of_the_split(drifting: Drifting, split: str) -> None:
    ids = np.asarray(drifting.users(split))
    owner_tu = np.stack([drifting.owner(ids, task) for task in range(TASKS)])
    assert np.array_equal(owner_tu[0], ids)
    assert set(owner_tu.flatten().tolist()) <= set(ids.tolist())
    for u in range(len(ids)):
        assert len(set(drifting.groups(owner_tu[:, u]).tolist())) == TASKS


def test_projects_stand_equally_far_apart(drifting: Drifting, whole: TextPopulation) -> None:
    """7 projects of training users and 3 tasks: strides of 2."""
    ids = np.asarray(whole.users("train"))
    projects = [row.project for row in whole.texts[: len(ids)]]
    for task in range(TASKS):
        met = [whole.texts[owner].project for owner in drifting.owner(ids, task)]
        assert met == [f"train{(int(project[5:]) + 2 * task) % 7}" for project in projects]


def test_users_of_one_project_meet_different_users_where_there_are_enough(drifting: Drifting) -> None:
    """Of the projects of 2, 1 and 3 users: the third user begins anew where there are 2."""
    ids = np.asarray(drifting.users("new"))[1:4]
    first = ids[0] - 1
    assert drifting.owner(ids, 1).tolist() == [first + 4, first + 5, first + 4]
    assert drifting.owner(ids, 2).tolist() == [first, first, first]


def test_a_task_is_the_data_of_its_owner(drifting: Drifting, whole: TextPopulation) -> None:
    ids = np.asarray(drifting.users("train"))[[3, 0, 5]]
    for task in range(TASKS):
        owners = drifting.owner(ids, task)
        for size in (None, 4):
            given = drifting.of_task(task).batch(ids, "support", size, Streams(1))
            expected = whole.batch(owners, "support", size, Streams(1))
            assert torch.equal(given.inputs, expected.inputs)
            assert torch.equal(given.weight, expected.weight)
        chars_u = drifting.of_task(task).chars_per_target(ids, "test")
        assert chars_u.tolist() == whole.chars_per_target(owners, "test").tolist()
    assert not torch.equal(*(drifting.of_task(t).batch(ids, "test", 2, Streams(1)).inputs for t in (0, 1)))


def test_without_a_task_users_are_as_they_were(drifting: Drifting, whole: TextPopulation) -> None:
    ids = np.asarray(drifting.users("new"))
    check_contract("drifting", drifting, Population)
    assert isinstance(drifting, Sequenced)
    assert torch.equal(
        drifting.batch(ids, "query", None, Streams(0)).inputs, whole.batch(ids, "query", None, Streams(0)).inputs
    )
    assert drifting.describe() == {**whole.describe(), "tasks": TASKS}
    assert drifting.name == whole.name
    assert drifting.base_model() is whole.base_model()
    assert np.array_equal(drifting.tokens(int(ids[0]), "test"), whole.tokens(int(ids[0]), "test"))


def test_what_a_teacher_knows_is_still_known() -> None:
    teacher = SyntheticPopulation(train_users=6, new_users=4, widths=(4, 6, 2), rank=4, budget=2, types=2, examples=4)
    assert isinstance(Drifting(teacher, 2), Teacher)
    assert not isinstance(Drifting(TextPopulation(CORPUS, PAIRS, base=object, window=8), 2), Teacher)  # type: ignore[arg-type]


def test_too_few_projects_tasks_that_are_not_there_and_strangers_are_refused(whole: TextPopulation) -> None:
    with pytest.raises(PopulationError, match=r"the new users of 'words' are of 3; lower tasks to 3"):
        Drifting(whole, 4)
    with pytest.raises(ConfigError, match="at least 2 tasks, got 1"):
        Drifting(whole, 1)
    with pytest.raises(PopulationError, match=r"have the tasks 0\.\.2, got 3"):
        Drifting(whole, 3).of_task(3)
    with pytest.raises(PopulationError, match="has the id 99"):
        Drifting(whole, 3).owner(np.array([0, 99]), 1)


def test_code_drifts_when_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, whole: TextPopulation) -> None:
    """And its base is the same: tasks are no option of pre-training."""
    asked: list[dict[str, Any]] = []

    def made(corpus: object, *positional: Any, progress: object = None, **options: Any) -> TextPopulation:
        asked.append(options)
        return whole

    monkeypatch.setattr(text, "_population", made)
    assert text.code() is whole
    drifting = text.code(tasks=2)
    assert isinstance(drifting, Drifting)
    assert drifting.tasks == 2
    text.prepare(PopulationConfig(name="code", options={"window": 16, "tasks": 2}), no_progress)
    assert asked[-1] == {"window": 16}
