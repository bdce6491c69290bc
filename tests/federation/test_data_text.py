"""Windows of users' texts, against slicing each text by hand."""

import numpy as np
import pytest
import torch

from federation.data.corpus import Document, TextCorpus, UserText
from federation.data.text import PARTS, TextPopulation
from federation.data.tokenizer import BytePairs
from federation.errors import PopulationError
from federation.streams import Streams

WINDOW = 8
RNG = np.random.default_rng(0)
WORDS = ["alpha", "beta", "gamma", " ", "\n", "(x)"]
PAIRS = BytePairs.learn([" alpha beta gamma" * 20], size=150)


def text(words):
    return "".join(RNG.choice(WORDS, words))


def user(project, name, words=(90, 40, 60)):
    return UserText(project, name, *map(text, words))


CORPUS = TextCorpus(
    name="words",
    pretraining=(Document("p", "p", "alpha"),),
    train=(user("p1", "a"), user("p2", "short", (90, 40, 2)), user("p2", "b", (50, 30, 30))),
    new=(user("p3", "c"), user("p3", "d", (70, 40, 45)), user("p1", "e")),
    left_out={"tests": 2},
)


@pytest.fixture
def population():
    return TextPopulation(CORPUS, PAIRS, base=object, window=WINDOW)


def tokens_of(population, u, part):
    return PAIRS.encode(getattr(population.texts[u], part)).astype(np.int64)


@pytest.mark.parametrize("part", PARTS)
def test_all_windows_lie_end_to_end_and_padding_has_no_weight(population, part):
    users = np.array([4, 0, 1])
    batch = population.batch(users, part, None, Streams(0))
    for row, u in enumerate(users):
        tokens = tokens_of(population, u, part)
        count = (len(tokens) - 1) // WINDOW
        assert batch.weight[row].tolist() == [1.0] * count + [0.0] * (batch.weight.shape[1] - count)
        np.testing.assert_array_equal(batch.inputs[row, :count].flatten(), tokens[: count * WINDOW])
        np.testing.assert_array_equal(batch.targets[row, :count].flatten(), tokens[1 : count * WINDOW + 1])
        np.testing.assert_array_equal(
            batch.inputs[row, count:], batch.inputs[row, :1].expand(batch.inputs.shape[1] - count, -1)
        )
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert population.tokens(0, part).dtype == np.uint16


def test_drawn_windows_are_the_users_own_and_reach_both_ends(population):
    batch = population.batch(np.array([1, 3]), "support", 4000, Streams(0))
    for row, u in enumerate((1, 3)):
        tokens = tokens_of(population, u, "support")
        possible = {tuple(tokens[start : start + WINDOW + 1]) for start in range(len(tokens) - WINDOW)}
        drawn = {(*x.tolist(), y[-1].item()) for x, y in zip(batch.inputs[row], batch.targets[row], strict=True)}
        assert drawn == possible
    assert torch.equal(batch.inputs[..., 1:], batch.targets[..., :-1])
    assert batch.weight.eq(1).all()


def test_draws_depend_on_user_part_and_stream_only(population):
    def draw(users, part, streams):
        return population.batch(np.array(users), part, 5, streams).inputs

    together = draw([0, 4, 2], "query", Streams(1))
    assert torch.equal(together[1:2], draw([4], "query", Streams(1)))
    assert not torch.equal(together, draw([0, 4, 2], "query", Streams(2)))
    assert not torch.equal(together, draw([0, 4, 2], "test", Streams(1)))


def test_characters_per_token_are_those_of_the_decoded_targets(population):
    users = np.arange(5)
    batch = population.batch(users, "test", None, Streams(0))
    expected = []
    for row in users:
        targets = batch.targets[row][batch.weight[row] > 0].flatten()
        expected.append(len(PAIRS.decode(targets)) / len(targets))
    np.testing.assert_allclose(population.chars_per_target(users, "test"), expected)


def test_users_are_numbered_by_split_and_grouped_by_project(population):
    assert population.users("train") == range(2)
    assert population.users("new") == range(2, 5)
    groups = population.groups(np.arange(5))
    assert [text.project for text in population.texts] == ["p1", "p2", "p3", "p3", "p1"]
    assert (groups[:, None] == groups).tolist() == [
        [a.project == b.project for b in population.texts] for a in population.texts
    ]
    np.testing.assert_array_equal(population.tokens(3, "query"), tokens_of(population, 3, "query"))


def test_the_description_says_what_was_left_out(population):
    description = population.describe()
    assert description["left_out"] == {"tests": 2, "users with a part of less than 9 tokens": 1}
    assert description["users"] == {"train": 2, "new": 3}
    assert description["groups"] == {"train": 2, "new": 2, "pretraining": 1}
    assert description["characters"]["test"] == sum(len(text.test) for text in population.texts)
    assert description["fingerprint"] == CORPUS.fingerprint


def test_the_base_is_made_once_and_only_when_asked_for():
    made = []
    population = TextPopulation(CORPUS, PAIRS, base=lambda: made.append(1) or object(), window=WINDOW)
    assert made == []
    assert population.base_model() is population.base_model()
    assert made == [1]


def test_what_does_not_exist_is_refused(population):
    with pytest.raises(PopulationError, match="train and new, not 'test'"):
        population.users("test")
    with pytest.raises(PopulationError, match=r"'words' has 5 users, none has the id 5; users\(\) gives"):
        population.batch(np.array([3, 5]), "test", 1, Streams(0))
    with pytest.raises(PopulationError, match="none has the id -1"):
        population.groups(np.array([-1]))
    with pytest.raises(PopulationError, match="none has the id 7"):
        population.tokens(7, "test")


def test_a_population_without_users_can_say_so():
    empty = TextPopulation(TextCorpus("none", (), (), ()), PAIRS, base=object)
    assert empty.describe()["users"] == {"train": 0, "new": 0}
    with pytest.raises(PopulationError, match="'none' has 0 users, none has the id 0"):
        empty.groups(np.array([0]))


def test_users_may_have_other_ids_which_alone_address_their_draws(population):
    ids = np.array([7, 2**62, 2**62 + 1, 40, 3])
    named = TextPopulation(CORPUS, PAIRS, base=object, window=WINDOW, ids=lambda users: ids[: len(users)])
    np.testing.assert_array_equal(named.users("train"), ids[:2])
    np.testing.assert_array_equal(named.users("new"), ids[2:])
    for part in PARTS:
        for users, rows in ((ids[[3, 0]], [3, 0]), (ids[2:], [2, 3, 4])):
            ours, theirs = (
                p.batch(u, part, None, Streams(0)) for p, u in ((named, users), (population, np.array(rows)))
            )
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets, theirs.targets)
            np.testing.assert_array_equal(named.chars_per_target(users, part), population.chars_per_target(rows, part))
            np.testing.assert_array_equal(named.groups(users), population.groups(rows))
    length = len(tokens_of(population, 3, "support"))
    start = Streams(1).integers("windows/support", np.array([40]), length - WINDOW, 5)[0]
    expected = [tokens_of(population, 3, "support")[s : s + WINDOW] for s in start]
    np.testing.assert_array_equal(named.batch(np.array([40]), "support", 5, Streams(1)).inputs[0], expected)
