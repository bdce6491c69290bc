"""Generation against a loop that keeps no cache, in a plain model; and against whatever else the process does."""

from __future__ import annotations

import math
import sys
import threading
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.adapt import row_gradients
from client.generate import Sampling, context_of, fitting, generate, streamed_text
from federation.errors import ConfigError, NodeError
from federation.pool.model import PooledModel
from tests import models

MAKERS = [models.gpt2, models.llama]
PROMPT = [3, 14, 15, 9]
CONTEXT = 16
SCALE = 1.5


def pooled(make) -> PooledModel:
    return PooledModel.around(make(), rank=4, scale=SCALE)


def rows_for(model: PooledModel, seed: int, units: int = 2) -> dict[str, torch.Tensor]:
    """One user's rows; the first module has none when `units` is 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [units, *[2] * (len(model.spec.modules) - 1)]
    return {m.section: 0.4 * torch.randn(1, k, m.width, generator=generator) for m, k in zip(model.spec.modules, sizes)}


def plain_continuation(make, rows: dict[str, torch.Tensor], sampling: Sampling) -> list[int]:
    """As anyone would write it: the whole text through the model for each token."""
    base = make()
    models.with_plain_lora(base, {name.removeprefix("pool/"): row[0] for name, row in rows.items()}, SCALE)
    generator = torch.Generator().manual_seed(sampling.seed)
    text = list(PROMPT)
    while len(text) < len(PROMPT) + sampling.max_tokens and len(text) <= CONTEXT:
        with torch.no_grad():
            logits = base.module(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].double()
        if sampling.temperature == 0:
            text.append(int(logits.argmax()))
        else:
            probabilities = (logits / sampling.temperature).exp()
            text.append(int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator)))
    return text[len(PROMPT) :]


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-12])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    model = pooled(models.gpt2)
    rows = rows_for(model, 1)
    greedy = list(generate(model, rows, PROMPT, Sampling(6)))
    assert list(generate(model, rows, PROMPT, Sampling(6, temperature, seed=2))) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_model_without_numbers_writes_nothing(temperature: float, wrong: float) -> None:
    model = pooled(models.gpt2)
    rows = {name: torch.full_like(row, wrong) for name, row in rows_for(model, 1).items()}
    with pytest.raises(NodeError, match=r"logits are numbers, the largest .* is (nan|inf); personalise the user again"):
        next(generate(model, rows, PROMPT, Sampling(3, temperature)))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("units", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.03, 1.0])
def test_it_is_the_plain_model_without_a_cache(make, units: int, temperature: float) -> None:
    model = pooled(make)
    continuations = set()
    for seed in range(4):
        rows, sampling = rows_for(model, seed, units), Sampling(9, temperature, seed)
        found = list(generate(model, rows, PROMPT, sampling))
        assert found == plain_continuation(make, rows, sampling)
        assert len(found) == 9
        continuations.add(tuple(found))
    assert len(continuations) > 1


@pytest.mark.parametrize("make", MAKERS)
def test_without_rows_it_is_the_base(make) -> None:
    assert list(generate(pooled(make), None, PROMPT, Sampling(6))) == plain_continuation(make, {}, Sampling(6))


@pytest.mark.parametrize("make", MAKERS)
def test_it_ends_with_the_context(make) -> None:
    """The last token of the context is still seen: the one after it is the last that can be told."""
    model = pooled(make)
    rows, sampling = rows_for(model, 0), Sampling(100)
    found = list(generate(model, rows, PROMPT, sampling))
    assert len(PROMPT) + len(found) == CONTEXT + 1
    assert found == plain_continuation(make, rows, sampling)


def test_it_ends_with_the_stop_token() -> None:
    model = pooled(models.gpt2)
    rows = rows_for(model, 1)
    whole = list(generate(model, rows, PROMPT, Sampling(9, 0.1, 5)))
    stop = whole[4]
    assert list(generate(model, rows, PROMPT, Sampling(9, 0.1, 5, stop))) == whole[: whole.index(stop)]


def test_draws_have_the_models_probabilities() -> None:
    model = pooled(models.gpt2)
    rows, draws = rows_for(model, 2), 700
    with torch.no_grad(), model.bound(rows):
        logits = model.base.module(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.softmax(logits / 0.05, -1).numpy()
    first = [next(generate(model, rows, PROMPT, Sampling(1, 0.05, seed))) for seed in range(draws)]
    found = np.bincount(first, minlength=models.VOCABULARY) / draws
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()


# -------------------------------------------------------------------------------- what else goes on


@pytest.mark.parametrize("make", MAKERS)
def test_between_tokens_nothing_is_bound(make) -> None:
    model = pooled(make)
    tokens = torch.tensor([PROMPT])
    users = [rows_for(model, seed) for seed in (1, 2)]
    sampling = Sampling(12, 0.03, 3)
    alone = [list(generate(model, rows, PROMPT, sampling)) for rows in users]
    assert alone[0] != alone[1]
    with torch.no_grad():
        base_logits = model.base.module(input_ids=tokens).logits
        found = [[], []]
        for pair in zip_longest(*(generate(model, rows, PROMPT, sampling) for rows in users)):
            for tokens_of_user, token in zip(found, pair):
                tokens_of_user.append(token)
            assert torch.equal(model.base.module(input_ids=tokens).logits, base_logits)
    assert found == alone
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", MAKERS)
def test_beside_training_it_is_the_same_bit_for_bit(make) -> None:
    """Logits, not only tokens: what the model computes is compared. And the training is as if alone, too."""
    model = pooled(make)
    rows, others = rows_for(model, 1), {n: r.repeat(3, 1, 1) for n, r in rows_for(model, 2).items()}
    batch = models.batch_for(model.base, 3, 2)
    sampling, tokens = Sampling(12, 0.03, 7), torch.tensor([PROMPT])
    alone = list(generate(model, rows, PROMPT, sampling))
    with torch.no_grad(), model.bound(rows):
        logits_alone = model.base.module(input_ids=tokens).logits
    loss_alone, gradients_alone = row_gradients(model, others, batch)
    done, failures, rounds = threading.Event(), [], []

    def train() -> None:
        while not done.is_set():
            loss_u, gradients = row_gradients(model, others, batch)
            rounds.append(1)
            same = torch.equal(loss_u, loss_alone) and all(map(torch.equal, gradients, gradients_alone))
            failures.extend([] if same else ["training"])

    threads = [threading.Thread(target=train) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while len(rounds) < 20:
            assert list(generate(model, rows, PROMPT, sampling)) == alone
            with torch.no_grad(), model.bound(rows):
                assert torch.equal(model.base.module(input_ids=tokens).logits, logits_alone)
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(interval)
    assert not failures


def test_a_generation_handed_to_another_thread_goes_on() -> None:
    model = pooled(models.gpt2)
    rows, sampling = rows_for(model, 1), Sampling(6, 0.03, 2)
    tokens = generate(model, rows, PROMPT, sampling)
    found = [next(tokens)]
    thread = threading.Thread(target=lambda: found.extend(tokens))
    thread.start()
    thread.join(60)
    assert found == list(generate(model, rows, PROMPT, sampling))


# -------------------------------------------------------------------------------- prompts


def test_a_models_context_is_that_of_its_configuration() -> None:
    model = pooled(models.gpt2)
    assert context_of(model) == CONTEXT
    model.base.module.config = SimpleNamespace()
    assert context_of(model) == sys.maxsize


@given(length=st.integers(1, 200), context=st.integers(1, 64), max_tokens=st.integers(1, 300))
def test_a_prompt_is_cut_at_its_beginning_and_only_when_it_must_be(length: int, context: int, max_tokens: int) -> None:
    prompt = list(range(length))
    kept = list(fitting(prompt, context, max_tokens))
    assert prompt[-len(kept) :] == kept
    assert 1 <= len(kept) <= context
    if length <= context:
        assert kept == prompt
    else:
        assert len(kept) >= context // 2
        room = context + 1 - len(kept)
        assert room >= min(max_tokens, (context + 1) // 2)


def test_prompts_that_cannot_be_continued_are_refused_at_once() -> None:
    model = pooled(models.gpt2)
    with pytest.raises(ConfigError, match="at least one token, got none; write something"):
        generate(model, None, [], Sampling(1))
    with pytest.raises(ConfigError, match=r"'tiny-gpt2' sees at most 16 tokens, got a prompt of 17; keep its end"):
        generate(model, None, [1] * 17, Sampling(1))
    assert len(list(generate(model, None, [1] * 16, Sampling(5)))) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_tokens": 0}, r"max_tokens=0; raise it"),
        ({"max_tokens": 1, "temperature": -0.1}, r"at least 0, got -0\.1; 0 takes"),
        ({"max_tokens": 1, "temperature": math.nan}, r"got nan"),
        ({"max_tokens": 1, "temperature": math.inf}, r"got inf"),
        ({"max_tokens": 1, "seed": 2**63}, r"a seed has 64 bits, got 9223372036854775808"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Sampling(**settings)


# -------------------------------------------------------------------------------- text


class Bytes:
    """A token for each byte of UTF-8, so that most characters take several. Counts what it decodes."""

    decoded = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens) -> str:
        self.decoded += len(tokens)
        return bytes(tokens).decode("utf-8", errors="replace")


class Pieces:
    """Words whose leading space is left out at the beginning of a text, as sentence-piece decoders do."""

    words = (" a", " bc", "d", " é")

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode(self, tokens) -> str:
        return "".join(self.words[token] for token in tokens).removeprefix(" ")


@given(prompt=st.text(), text=st.text())
def test_characters_are_told_whole(prompt: str, text: str) -> None:
    tokenizer = Bytes()
    pieces = list(streamed_text(tokenizer, tokenizer.encode(prompt).tolist(), iter(tokenizer.encode(text).tolist())))
    assert "".join(pieces) == text
    assert all(pieces)
    if "\ufffd" not in text:
        assert len(pieces) == len(text)


@given(st.binary(max_size=30))
def test_bytes_that_are_no_characters_are_told_as_such(tokens: bytes) -> None:
    pieces = streamed_text(Bytes(), [65], iter(tokens))
    assert "".join(pieces) == tokens.decode("utf-8", errors="replace")


@given(prompt=st.lists(st.integers(0, 3), min_size=1), tokens=st.lists(st.integers(0, 3)))
def test_a_space_at_the_beginning_of_a_piece_is_told(prompt: list[int], tokens: list[int]) -> None:
    tokenizer = Pieces()
    whole = tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    assert "".join(streamed_text(tokenizer, prompt, iter(tokens))) == whole


def test_a_character_is_told_as_soon_as_it_is_whole() -> None:
    asked = []

    def tokens():
        for token in "aé".encode():
            asked.append(token)
            yield token

    pieces = streamed_text(Bytes(), [], tokens())
    assert [next(pieces), len(asked)] == ["a", 1]
    assert [next(pieces), len(asked)] == ["é", 3]


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    tokenizer = Bytes()
    list(streamed_text(tokenizer, list(b"prompt"), iter(b"x" * 1000)))
    assert tokenizer.decoded < 10_000
