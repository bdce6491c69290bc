"""Byte pairs: nothing is lost, and every token knows its characters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.data.tokenizer import ASCII, BytePairs
from federation.errors import PopulationError

PAIRS = BytePairs.learn(["    return self.value\n" * 9, "for value in values:\n        print(value)\n" * 9], size=150)


@given(st.text(st.sampled_from(ASCII), max_size=60))
def test_any_ascii_text_comes_back_and_its_characters_are_counted(text):
    tokens = PAIRS.encode(text)
    assert PAIRS.decode(tokens) == text
    assert PAIRS.chars_v[tokens].sum() == len(text)


def test_frequent_text_takes_fewer_tokens_than_characters():
    assert PAIRS.size == 150
    assert len(PAIRS.encode("return self.value")) <= 9
    assert len(BytePairs.learn(["abc abc"], size=128).encode("abc abc")) == 7


def test_many_texts_are_encoded_as_one_by_one():
    texts = ["", "for value", "print(value)\n"]
    for together, alone in zip(PAIRS.encode_all(texts), map(PAIRS.encode, texts), strict=True):
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
    with pytest.raises(PopulationError, match=r"tokenizer\.json is no tokenizer"):
        BytePairs.load(path)


@pytest.mark.parametrize("size", [127, 2**16 + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="128 to 65536"):
        BytePairs.learn(["a"], size)
