"""Users' own texts over a base from a folder: stable ids, exact characters, and a federation of them."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from federation.config import PopulationConfig, load_config
from federation.data import texts as module
from federation.data.code import CodeLimits, user_text
from federation.data.corpus import normalise
from federation.data.registry import make_population
from federation.data.sources import Unit
from federation.data.text import PARTS
from federation.data.texts import texts, user_id
from federation.data.tokenizer import BytePairs
from federation.errors import ConfigError, PopulationError
from federation.streams import Streams
from simulations.runs import run
from tests.bases import UNICODE_TEXT, save_base, save_gpt2, unicode_tokenizer

WINDOW = 6
WORDS = UNICODE_TEXT.split(" ")


def story(name, words=60):
    """A text of its own for each name."""
    rng = np.random.default_rng(list(name.encode()))
    return " ".join(rng.choice(WORDS, words))


def write_users(path, *names):
    """Each has six documents; as JSON lines."""
    rows = [{"user": name, "text": story(f"{name} {n}")} for name in names for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def data(tmp_path):
    return write_users(tmp_path / "texts.jsonl", "ada", "Zoë", "李", "ben")


@pytest.fixture
def population(base, data):
    return texts(base=base, data=data, window=WINDOW)


def test_ids_are_hashes_of_names(population):
    """Golden, since stores and servers keep them: blake2b of 8 bytes, as `b2sum -l 64` prints it, halved."""
    assert user_id("ada") == 0x15B0DA4321160527 >> 1
    ids = population.users("train")
    assert ids.dtype == np.int64
    assert ids.tolist() == sorted(map(user_id, ("ada", "Zoë", "李", "ben")))
    assert len(population.users("new")) == 0
    for name in ("ada", "Zoë", "李", "ben"):
        assert population.name_of(population.id_of(name)) == name
        assert population.id_of(name) == user_id(name)
    assert len(set(population.groups(ids))) == 4
    assert population.stored_id("nobody here") == user_id("nobody here")


def test_more_users_change_nothing_of_those_there_are(population, base, tmp_path):
    names = ["eva", "ada", "Zoë", "0", "李", "ben", "fritz"]
    more = texts(base=base, data=write_users(tmp_path / "more.jsonl", *names), window=WINDOW)
    ids = population.users("train")
    assert set(ids) < set(more.users("train"))
    for part in PARTS:
        for size in (3, None):
            ours, theirs = (p.batch(ids, part, size, Streams(5)) for p in (population, more))
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.weight, theirs.weight)


def test_a_users_parts_are_cut_as_those_of_code_are(population, base, tmp_path):
    limits = CodeLimits(least_support=1, least_query=1, least_test=1)
    few = tmp_path / "few" / "ada"
    few.mkdir(parents=True)
    (few / "one.md").write_text(story("one", 200))
    (one,) = texts(base=base, data=str(few.parent), window=WINDOW).texts
    for user in (*population.texts, one):
        assert user.support
        assert user.project == user.name
    expected = user_text(Unit("", "", ()), [story("one", 200)], limits)
    assert (one.support, one.query, one.test) == (expected.support, expected.query, expected.test)
    ada = next(user for user in population.texts if user.name == "ada")
    stories = {story(f"ada {n}") for n in range(6)}
    assert {ada.query, ada.test, *ada.support.split("\n\n")} == stories


@pytest.mark.parametrize("part", PARTS)
def test_a_batch_is_what_a_loop_over_users_and_windows_gives(population, part):
    tokenizer, ids = unicode_tokenizer(), population.users("train")[[2, 0, 3]]
    drawn, whole = (population.batch(ids, part, size, Streams(2)) for size in (3, None))
    for row, number in enumerate(ids.tolist()):
        (user,) = (user for user in population.texts if user_id(user.name) == number)
        tokens = tokenizer.encode(getattr(user, part)).ids
        starts = Streams(2).integers(f"windows/{part}", np.array([number]), len(tokens) - WINDOW, 3)[0]
        for n, start in enumerate(starts):
            assert drawn.inputs[row, n].tolist() == tokens[start : start + WINDOW]
            assert drawn.targets[row, n].tolist() == tokens[start + 1 : start + 1 + WINDOW]
        count = (len(tokens) - 1) // WINDOW
        assert whole.inputs[row, :count].flatten().tolist() == tokens[: count * WINDOW]
        assert whole.weight[row].sum() == count


def test_characters_per_target_are_those_of_the_windows_text(population):
    tokenizer, ids = unicode_tokenizer(), population.users("train")
    for part in PARTS:
        for number, per_target in zip(ids.tolist(), population.chars_per_target(ids, part)):
            text = getattr(next(user for user in population.texts if user_id(user.name) == number), part)
            tokens = tokenizer.encode(text).ids
            last = (len(tokens) - 1) // WINDOW * WINDOW
            begun = [len(tokenizer.decode(tokens[:end]).rstrip("\ufffd")) for end in (1, last + 1)]
            assert per_target * last == pytest.approx(
                begun[1] - begun[0], abs=1
            )  # a character may be cut at either end


def test_without_data_there_are_no_users_but_the_base(base):
    population = make_population(PopulationConfig(name="texts", options={"base": base, "window": 16}))
    assert len(population.users("train")) == len(population.users("new")) == 0
    model = population.base_model()
    assert isinstance(model.module, GPT2LMHeadModel)
    assert (model.target_modules, model.name) == (("c_attn",), base)
    assert all(parameter.dtype == torch.float32 for parameter in model.module.parameters())
    assert population.describe()["users"] == {"train": 0, "new": 0}


def test_target_modules_are_those_asked_for_or_pefts(base, tmp_path, monkeypatch):
    assert texts(base=base, window=4, target_modules=["c_fc"]).base_model().target_modules == ("c_fc",)
    from peft.utils import constants

    monkeypatch.delitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "gpt2")
    with pytest.raises(ConfigError, match=r"architecture 'gpt2'; give population\.options\.target_modules"):
        texts(base=base, window=4).base_model()


def test_a_base_that_does_not_fit_is_refused(base, tmp_path):
    with pytest.raises(PopulationError, match="reads 16 tokens, not 17; lower the window"):
        texts(base=base, window=17).base_model()
    with pytest.raises(ConfigError, match="at least one token, got 0"):
        texts(base=base, window=0)
    small = save_base(tmp_path / "small")
    save_gpt2(small, 40)
    with pytest.raises(
        PopulationError, match=r"small' has 40 embeddings and a tokenizer of \d+; give it the tokenizer"
    ):
        texts(base=str(small)).base_model()
    weights = small / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(PopulationError, match="small' cannot be read: "):
        texts(base=str(small)).base_model()
    weights.unlink()
    torch.save({}, small / "pytorch_model.bin")
    with pytest.raises(PopulationError, match=r"small' cannot be read: .*safetensors"):
        texts(base=str(small)).base_model()
    with pytest.raises(PopulationError, match="nowhere' cannot be read"):
        texts(base=str(tmp_path / "nowhere"))


def test_users_with_too_little_text_are_left_out_and_counted(base, tmp_path):
    root = tmp_path / "all"
    for name, words in {"ada": 200, "ben": 3, "cleo": 200, "dan": 0}.items():
        (root / name).mkdir(parents=True)
        (root / name / "notes.txt").write_text(story(name, words) if words else "")
    population = texts(base=base, data=str(root), window=WINDOW)
    assert {user.name for user in population.texts} == {"ada", "cleo"}
    assert population.describe()["left_out"] == {
        "users without text": 1,
        f"users with a part of less than {WINDOW + 1} tokens": 1,
    }
    with pytest.raises(PopulationError, match="none of the 2 users of population 'texts' is called 'ben'; add"):
        population.id_of("ben")
    with pytest.raises(PopulationError, match="none has the id 5"):
        population.name_of(5)


def test_data_in_which_nobody_has_enough_is_refused(base, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"user": "ada", "text": "little"}\n{"user": "ben", "text": " "}\n')
    with pytest.raises(
        PopulationError, match=r"needs 7 tokens .* nobody in '.*few\.jsonl' .*without text': 1.*: 1}.*give"
    ):
        texts(base=base, data=str(path), window=WINDOW)


def test_names_of_equal_hash_are_refused(base, data, monkeypatch):
    monkeypatch.setattr(module, "user_id", lambda name: 3 if name in ("ada", "ben") else user_id(name))
    with pytest.raises(PopulationError, match=r"'ada' and 'ben' have the same; rename one"):
        texts(base=base, data=data, window=WINDOW)


def test_a_base_pre_trained_on_ascii_reads_other_texts_as_it_learnt_to(tmp_path, data):
    """As `simulations.pretrain` leaves one: the tokens are those of the normalised text."""
    pairs = BytePairs.learn([normalise(UNICODE_TEXT) * 9], size=150)
    save_gpt2(tmp_path / "base", pairs.size)
    pairs.save(tmp_path / "base" / "tokenizer.json")
    population = texts(base=str(tmp_path / "base"), data=data, window=WINDOW)
    assert population.base_model().module.config.vocab_size == population.tokenizer.size == 150
    for user in population.texts:
        expected = pairs.encode(normalise(user.support))
        np.testing.assert_array_equal(population.tokens(user_id(user.name), "support"), expected)


def test_a_federation_of_users_own_texts_runs_and_repeats(base, data, tmp_path):
    config = load_config(
        overrides=[
            "population.name=texts",
            f"population.options={{base={json.dumps(base)}, data={json.dumps(data)}, window={WINDOW}}}",
            "pool={rank=4, scale=1.0}",
            "gate={budget=2, warmup=1, hidden=6, factors=4, embedding=3, samples=2}",
            "local={steps=1, examples=2, gain_examples=2, query_examples=2}",
            "federation={rounds=2, cohort=3, shards=2}",
            "compute={workers=0, block=2}",
        ]
    )
    first = run(config, tmp_path / "run").record
    assert first["visits"] == 6
    assert first["splits"] == {"train": 4, "new": 0}
    assert first["rejected"] == 0
    assert all(math.isfinite(line["support_loss"]) for line in first["history"])
    assert run(config, tmp_path / "again").record["checksum"] == first["checksum"]
