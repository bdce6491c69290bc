"""Texts of users' personal models against transformers' own generation and the plain loss."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from client.node import Node
from client.serving import Serving
from client.writing import Writer
from federation.errors import ConfigError, FedquiltWarning, NodeError
from tests.bases import UNICODE_TEXT
from tests.client.served import instructions, opened, released, rows_of, task_config, users_with_texts


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = opened(tmp_path / "state")
    yield made
    made.close()


def writer_of(node: Node) -> Writer:
    return Writer(node, Serving(node))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return users_with_texts(tmp_path_factory.mktemp("texts"), "ann", "bob")


@pytest.fixture
def home(tmp_path: Path, texts: dict[str, object]) -> Iterator[Node]:
    made = opened(tmp_path / "texts", texts)
    yield made
    made.close()


def by_transformers(node: Node, rows: dict[str, Tensor] | None, tokens: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy search, with the rows bound all the while."""
    task = node.task(task_config())
    module = task.model.base.module
    inputs = torch.tensor([tokens])
    options = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if rows is None:
        return module.generate(inputs, **options)[0, len(tokens) :].tolist()
    with task.model.bound(rows):
        return module.generate(inputs, **options)[0, len(tokens) :].tolist()


def test_text_is_what_transformers_generates_with_the_users_rows(home: Node) -> None:
    serving, tokenizer = Serving(home), home.population.tokenizer
    prompt, told = "hello é", []
    tokens = tokenizer.encode(prompt).tolist()

    def check(user: str, rows: dict[str, Tensor] | None) -> None:
        pieces = list(writer_of(home).generate(user, prompt, 6))
        found = by_transformers(home, rows, tokens, 6)
        whole = tokenizer.decode(tokens + found)
        assert prompt + "".join(pieces) == whole
        told.append(whole)

    check("ann", None)
    released(home)
    check("ann", rows_of(serving, "ann"))
    for user in ("ann", "bob"):
        serving.personalize(user)
        check(user, rows_of(serving, user))
    assert len(set(told)) > 1


def test_draws_are_those_of_the_seed(home: Node) -> None:
    released(home)
    texts = ["".join(writer_of(home).generate("ann", "hello", 8, 1.0, seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_a_text_ends_where_the_base_ends_it(home: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = home.population.tokenizer
    tokens = tokenizer.encode("hello").tolist()
    found = by_transformers(home, None, tokens, 8)
    monkeypatch.setattr(tokenizer, "eos", found[3])
    expected = tokenizer.decode(tokens + found[: found.index(found[3])])
    assert "hello" + "".join(writer_of(home).generate("ann", "hello", 8)) == expected


def test_of_a_long_prompt_the_end_is_used_and_that_is_said(home: Node) -> None:
    tokenizer = home.population.tokenizer
    prompt = UNICODE_TEXT
    tokens = tokenizer.encode(prompt).tolist()
    assert len(tokens) > 16
    with pytest.warns(FedquiltWarning, match=rf"a prompt of {len(tokens)} tokens is too long: its last 13 are used"):
        pieces = writer_of(home).generate("ann", prompt, 4)
    used = tokens[-13:]
    expected = tokenizer.decode(used + by_transformers(home, None, used, 4))
    assert tokenizer.decode(used) + "".join(pieces) == expected


def test_a_generation_beside_a_training_and_a_personalisation_is_the_same(home: Node) -> None:
    serving = Serving(home)
    version = released(home)
    serving.personalize("ann")
    alone = list(writer_of(home).generate("ann", "hello", 10, 0.5, 3))
    done, failures = threading.Event(), []

    def work() -> None:
        try:
            for round_index in range(1, 6):
                home.train(instructions(version, (0, 1), at=round_index))
                serving.personalize("bob")
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    generations = 0
    while not done.is_set() or not generations:
        assert list(writer_of(home).generate("ann", "hello", 10, 0.5, 3)) == alone
        generations += 1
    thread.join(60)
    assert not failures


def test_scores_are_those_of_the_plain_loss(home: Node) -> None:
    serving, tokenizer = Serving(home), home.population.tokenizer
    released(home)
    serving.personalize("ann")
    short, long = "straße 😀 naïve", UNICODE_TEXT * 2
    model, rows = serving.model_of("ann").model, rows_of(serving, "ann")

    def nats(tokens: list[int]) -> float:
        with torch.no_grad(), model.bound(rows):
            logits = model.base.module(input_ids=torch.tensor([tokens[:-1]])).logits[0]
        return float(F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))

    tokens = tokenizer.encode(short).tolist()
    assert len(tokens) <= 17
    scored = writer_of(home).score("ann", short)
    assert scored.tokens == len(tokens) - 1
    assert scored.nats_per_token == pytest.approx(nats(tokens) / (len(tokens) - 1), rel=1e-5)
    characters = len(short) - len(tokenizer.decode(tokens[:1]))
    assert scored.bits_per_char == pytest.approx(nats(tokens) / math.log(2) / characters, rel=1e-5)
    assert scored != writer_of(home).score("bob", short)

    tokens = tokenizer.encode(long).tolist()
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
    assert len(windows) > 2
    total = sum(map(nats, windows))
    assert writer_of(home).score("ann", long).nats_per_token == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def test_what_is_no_text_is_refused(node: Node, home: Node) -> None:
    for call in (lambda: writer_of(node).generate("2", "hello", 3), lambda: writer_of(node).score("2", "hello")):
        with pytest.raises(NodeError, match=r"users of text, those of population 'synthetic' have none; use .*Python"):
            call()
    with pytest.raises(NodeError, match=r"from its second token on, it has 0; give more"):
        writer_of(home).score("ann", "")
    with pytest.raises(ConfigError, match="at least one token, got none"):
        writer_of(home).generate("ann", "", 3)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        writer_of(home).generate("ann", "hello", 0)
    with pytest.raises(NodeError, match="is none of them; name another"):
        writer_of(home).generate("eve", "hello", 3)
