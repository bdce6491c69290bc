"""Tokenizers: nothing is lost, every token knows its characters, and a base's own is read as text alone."""

import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from federation.data.corpus import normalise
from federation.data.tokenizer import ASCII, BytePairs, PretrainedTokenizer
from federation.errors import PopulationError
from tests.bases import EOS, UNICODE_TEXT, unicode_tokenizer

PAIRS = BytePairs.learn(["    return self.value\n" * 9, "for value in values:\n        print(value)\n" * 9], size=150)
UNICODE = PretrainedTokenizer(unicode_tokenizer())
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    st.sampled_from(sorted(set(UNICODE_TEXT))), max_size=60
)


@given(st.text(st.sampled_from(ASCII), max_size=60))
def test_any_ascii_text_comes_back_and_its_characters_are_counted(text):
    tokens = PAIRS.encode(text)
    assert PAIRS.decode(tokens) == text
    assert PAIRS.chars_v[tokens].sum() == len(text)
    assert PAIRS.characters(text, tokens).tolist() == [len(PAIRS.decode([token])) for token in tokens]


def test_frequent_text_takes_fewer_tokens_than_characters():
    assert PAIRS.size == 150
    assert len(PAIRS.encode("return self.value")) <= 9
    assert len(BytePairs.learn(["abc abc"], size=128).encode("abc abc")) == 7


@pytest.mark.parametrize("tokenizer", [PAIRS, UNICODE])
def test_many_texts_are_encoded_as_one_by_one(tokenizer):
    texts = ["", "for value", "print(value)\n"]
    for together, alone in zip(tokenizer.encode_all(texts), map(tokenizer.encode, texts), strict=True):
        assert together.dtype == np.uint16
        np.testing.assert_array_equal(together, alone)


def test_a_saved_tokenizer_encodes_alike(tmp_path):
    PAIRS.save(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(
        BytePairs.load(tmp_path / "tokenizer.json").encode("in values"), PAIRS.encode("in values")
    )


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_missing_or_damaged_file_is_said(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PopulationError, match=r"tokenizer\.json is no tokenizer .*delete its folder"):
        BytePairs.load(path)


@pytest.mark.parametrize("size", [127, 2**16 + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="128 to 65536"):
        BytePairs.learn(["a"], size)


@given(TEXTS)
def test_any_unicode_text_comes_back(text):
    assert UNICODE.decode(UNICODE.encode(text)) == text


def bytes_of_tokens(tokenizer):
    """The bytes of each token of a byte-level vocabulary, by its published alphabet (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {number: bytes(map(byte_of.__getitem__, token)) for token, number in tokenizer.get_vocab().items()}


BYTES = bytes_of_tokens(unicode_tokenizer())


@given(TEXTS)
def test_a_character_of_several_tokens_counts_with_the_first(text):
    """A byte begins a character of UTF-8 unless its two highest bits are 10."""
    tokens = UNICODE.encode(text)
    begun = [sum(byte & 0xC0 != 0x80 for byte in BYTES[token]) for token in tokens.tolist()]
    assert UNICODE.characters(text, tokens).tolist() == begun


def sentence_pieces():
    """Characters after a visible space, as in Llama's: others fall back to bytes, and the first space is made up."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefé"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def words():
    """Lower case words; spaces leave no trace, and what is unknown is one token."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (sentence_pieces(), "a é中", [1, 0, 1, 1, 1, 0, 0]),  # the made-up space stands where the first character does
        (words(), " Hello  中国 hello. ", [6, 4, 6, 2]),
        (words(), "", []),
    ],
)
def test_what_no_token_shows_counts_with_the_next(tokenizer, text, expected):
    pretrained = PretrainedTokenizer(tokenizer)
    assert pretrained.characters(text, pretrained.encode(text)).tolist() == expected


def test_a_large_vocabulary_has_wider_tokens():
    symbols = [f"w{number}" for number in range(70_000)]
    model = models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token="w0")
    large = tokenizers.Tokenizer(model)
    large.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PretrainedTokenizer(large).encode("w3 w69999")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [3, 69999]
    assert PretrainedTokenizer(large).size == 70_000


@given(st.text(st.sampled_from([*ASCII, *"é中😀"]), max_size=40))
def test_a_base_that_knows_ascii_alone_reads_texts_as_it_learnt_to(text):
    pretrained = PretrainedTokenizer(tokenizers.Tokenizer.from_str(PAIRS._tokenizer.to_str()))
    tokens = pretrained.encode(text)
    np.testing.assert_array_equal(tokens, PAIRS.encode(normalise(text)))
    assert pretrained.characters(text, tokens).sum() == len(normalise(text))


def save(tokenizer, folder, **settings):
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_texts_are_neither_cut_nor_padded_and_special_tokens_in_them_are_text(tmp_path):
    tokenizer = unicode_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing(f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)])
    loaded = PretrainedTokenizer.load(save(tokenizer, tmp_path))
    text = f"bonjour {EOS} monde"
    assert loaded.decode(loaded.encode(text)) == text
    np.testing.assert_array_equal(loaded.encode(text), UNICODE.encode(text))
    assert tokenizer.token_to_id(EOS) not in loaded.encode(text)


@pytest.mark.parametrize(
    ("settings", "eos"),
    [
        ({"tokenizer_config": {"eos_token": EOS}}, 0),
        ({"tokenizer_config": {"eos_token": {"content": EOS, "special": True}}}, 0),
        ({"tokenizer_config": {"eos_token": "<unheard>"}, "config": {"eos_token_id": 0}}, None),
        ({"config": {"eos_token_id": 0}}, 0),
        ({"config": {"eos_token_id": [7, 0]}}, 0),
        ({"config": {"eos_token_id": 7}}, None),
        ({"config": {}}, None),
        ({"config": []}, None),
        ({}, None),
    ],
)
def test_a_text_ends_with_the_special_token_that_the_base_names(tmp_path, settings, eos):
    assert PretrainedTokenizer.load(save(unicode_tokenizer(), tmp_path, **settings)).eos == eos


@pytest.mark.parametrize("named", [5, True, ["<eos>"], {"content": None}, {}])
def test_an_end_that_is_no_token_is_refused(tmp_path, named):
    save(unicode_tokenizer(), tmp_path, tokenizer_config={"eos_token": named})
    words = f"eos_token names a token, or has it as its content, {tmp_path}/tokenizer_config.json has {named!r}; save"
    with pytest.raises(PopulationError, match=re.escape(words)):
        PretrainedTokenizer.load(tmp_path)


def test_an_ordinary_token_ends_no_text_even_if_it_was_added(tmp_path):
    tokenizer = unicode_tokenizer()
    tokenizer.add_tokens(["www"])
    settings = {"eos_token_id": tokenizer.token_to_id("www")}
    assert PretrainedTokenizer.load(save(tokenizer, tmp_path, config=settings)).eos is None


def test_a_base_without_a_tokenizer_file_has_it_made_by_transformers(tmp_path):
    tokenizer = unicode_tokenizer()
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 0, "bos_token_id": 0}))
    loaded = PretrainedTokenizer.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(UNICODE_TEXT), UNICODE.encode(UNICODE_TEXT))
    assert loaded.eos == 0


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(PopulationError, match=r"a folder or a name on the .* hub, the tokenizer of '.*nowhere'"):
        PretrainedTokenizer.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PopulationError, match=r"a base needs a tokenizer, '.*' has none; save its tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PopulationError, match=r"tokenizer\.json is no tokenizer .*save the base"):
        PretrainedTokenizer.load(tmp_path)
    save(unicode_tokenizer(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PopulationError, match=r"config\.json is no JSON .*save the base again"):
        PretrainedTokenizer.load(tmp_path)


def test_a_tokenizer_that_cannot_tell_where_its_tokens_lie_is_refused(tmp_path, monkeypatch):
    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda base: Slow())
    with pytest.raises(PopulationError, match=r"has a Slow; convert it to a tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)
