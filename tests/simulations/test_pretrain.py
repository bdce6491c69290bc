"""Pre-training: it learns, it is cached, a damaged cache is made anew, and its figure is the model's own."""

import copy
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from federation.data.corpus import Document, TextCorpus, UserText
from federation.data.tokenizer import BytePairs
from federation.errors import PopulationError
from federation.streams import Streams
from simulations.pretrain import (
    PretrainConfig,
    backward,
    bits_per_char,
    collect_gradients,
    learning_rate_factor,
    new_model,
    pretrain,
    pretrained_population,
    pretraining_report,
    sharing_weights,
    split_held_out,
)

CONFIG = PretrainConfig(
    vocabulary=140,
    layers=1,
    width=16,
    heads=2,
    context=16,
    steps=60,
    batch=8,
    learning_rate=1e-2,
    warmup=5,
    replicas=2,
)
DOCUMENTS = tuple(Document(f"p{p}", f"p{p}/{d}", "the cat sat on the mat\n" * 20) for p in range(4) for d in range(2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that already holds the base of CONFIG, and that base."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, pretrain(DOCUMENTS, CONFIG, folder)


def test_projects_are_held_out_whole_and_at_least_one():
    seen, held_out = split_held_out(DOCUMENTS)
    assert len({d.project for d in held_out}) == 1
    assert not {d.project for d in seen} & {d.project for d in held_out}
    assert {*seen, *held_out} == set(DOCUMENTS)
    with pytest.raises(PopulationError, match="at least 2, got 1"):
        split_held_out(DOCUMENTS[:2])


def test_it_learns_held_out_text_better_than_chance(cache):
    report = pretraining_report(cache[1])
    assert report["bits_per_char"] < 0.5 * 7  # 7 bits is a uniform guess among 128 characters


def test_bits_per_char_are_those_of_one_window_at_a_time(cache):
    model = GPT2LMHeadModel.from_pretrained(cache[1]).eval()
    tokenizer = BytePairs.load(cache[1] / "tokenizer.json")
    _, held_out = split_held_out(DOCUMENTS)
    nats, text = 0.0, ""
    for document in held_out:
        tokens = tokenizer.encode(document.text).astype(np.int64)
        for start in range(0, len(tokens) - CONFIG.context, CONFIG.context):
            window = torch.from_numpy(tokens[start : start + CONFIG.context + 1])
            with torch.no_grad():
                logprob = model(input_ids=window[None, :-1]).logits[0].log_softmax(-1)
            nats -= logprob.gather(1, window[1:, None]).sum().item()
            text += tokenizer.decode(window[1:])
    expected = nats / len(text) / math.log(2)
    assert bits_per_char(model, held_out, tokenizer, CONFIG.context) == pytest.approx(expected, rel=1e-5)
    assert pretraining_report(cache[1])["bits_per_char"] == pytest.approx(expected, rel=1e-5)


def test_the_cache_is_used_for_the_same_request_only(cache):
    folder, base = cache

    def fail(step, total, loss):
        raise AssertionError("trained again")

    assert pretrain(DOCUMENTS, CONFIG, folder, progress=fail) == base
    with pytest.raises(AssertionError, match="trained again"):
        pretrain(DOCUMENTS, replace(CONFIG, seed=1), folder, progress=fail)
    with pytest.raises(AssertionError, match="trained again"):
        pretrain(DOCUMENTS[:-1], CONFIG, folder, progress=fail)
    assert [entry.name for entry in (folder / "bases").iterdir()] == [base.name]  # nothing half made is left


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pretraining.json"])
def test_a_damaged_cache_is_said_and_the_same_base_trained_anew(cache, tmp_path, caplog, name):
    folder = Path(shutil.copytree(cache[1], tmp_path / "bases" / cache[1].name))
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    steps = []
    if name == "pretraining.json":
        path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert (
            pretrain(DOCUMENTS, CONFIG, tmp_path, progress=lambda step, total, loss: steps.append((step, total)))
            == folder
        )
    assert "damaged" in caplog.text
    assert steps[-1] == (CONFIG.steps, CONFIG.steps)
    first, again = (json.loads((base / "pretraining.json").read_text())["sha256"] for base in (cache[1], folder))
    assert first == again


def test_an_interrupted_training_leaves_nothing(tmp_path):
    def stop(step, total, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(DOCUMENTS, CONFIG, tmp_path, progress=stop)
    assert list(tmp_path.rglob("*")) == []


def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, same, other = (new_model(replace(CONFIG, seed=seed), 140) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(first.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_gradients_collected_from_replicas_are_those_of_the_whole_batch():
    model = new_model(CONFIG, 140)
    replicas = [model, sharing_weights(model)]
    windows = torch.randint(140, (8, 17), generator=torch.Generator().manual_seed(0))
    whole = copy.deepcopy(model)
    loss = backward(whole, windows, 1 / 128)
    parts = [backward(replica, part, 1 / 128) for replica, part in zip(replicas, windows.chunk(2), strict=True)]
    collect_gradients(replicas)
    assert sum(parts) == pytest.approx(loss, rel=1e-3)
    for expected, p in zip(whole.parameters(), model.parameters(), strict=True):
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(p.grad, expected.grad, rtol=0, atol=0.02 * scale)  # bfloat16 has 8 bits


def test_replicas_follow_the_weights_but_not_the_gradients():
    model = new_model(CONFIG, 140)
    replica = sharing_weights(model)
    model.lm_head.weight.data.add_(1.0)
    assert torch.equal(replica.transformer.wte.weight, model.lm_head.weight)  # tied, as in the model
    backward(replica, torch.zeros(1, 5, dtype=torch.int64), 1.0)
    assert model.lm_head.weight.grad is None


def test_the_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, CONFIG) for step in range(CONFIG.steps + 1)]
    assert factors[CONFIG.warmup - 1] == max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert np.all(np.diff(factors[: CONFIG.warmup]) > 0)
    assert np.all(np.diff(factors[CONFIG.warmup :]) < 0)


def test_too_little_text_is_said():
    short = [Document(project, project, "tiny") for project in ("a", "b")]
    with pytest.raises(PopulationError, match="17 tokens or more, got"):
        pretrain(short, CONFIG)


def test_a_user_who_owns_a_held_out_document_has_the_bits_per_char_of_the_report(cache, monkeypatch):
    monkeypatch.setenv("FEDQUILT_CACHE", str(cache[0]))
    (document, twin) = split_held_out(DOCUMENTS)[1]
    assert document.text == twin.text
    user = UserText("p", "p/a", support=document.text, query=document.text, test=document.text)
    population = pretrained_population(TextCorpus("cats", DOCUMENTS, (), (user,)), CONFIG, window=CONFIG.context)
    base = population.base_model()
    inputs, targets = population.batch(np.array([0]), "test", None, Streams(0)).flat()
    with torch.no_grad():
        nats = base.loss(base.module, inputs, targets).mean().item()
    bits = nats / math.log(2) / population.chars_per_target(np.array([0]), "test").item()
    assert bits == pytest.approx(pretraining_report(cache[1])["bits_per_char"], rel=1e-5)
    assert base is population.base_model()
    assert not any(p.requires_grad for p in base.module.parameters())
