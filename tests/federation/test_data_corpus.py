"""A corpus: thinning keeps order and whole lines, and what is read from disk is what was written."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.data.corpus import (
    BLOCK_CHARS,
    Document,
    TextCorpus,
    UserText,
    in_parts,
    load_corpus,
    normalise,
    save_corpus,
    thin,
)
from federation.errors import PopulationError

CORPUS = TextCorpus(
    name="code",
    pretraining=(Document("p", "p/one", "def f():\n"), Document("q", "q", "")),
    train=(UserText("r", "r/a", "support", "query", "test"),),
    new=(UserText("s", "s", "1", "22", "333"), UserText("s", "s/b", "4", "55", "666")),
    left_out={"tests": 3},
    versions={"python": "3.11"},
)


def test_other_characters_are_replaced():
    assert normalise("a\tb\r\ncaf\u00e9 \u4e2d") == "a    b\ncaf? ?"


@given(st.integers(0, 20_000), st.integers(1, 8), st.integers(1, 90))
def test_thinned_text_is_short_and_made_of_the_texts_lines_in_order(length, blocks, width):
    text = "".join(f"{number:0{width}d}\n" for number in range(length))
    limit = blocks * BLOCK_CHARS
    result = thin(text, limit)
    assert len(result) <= limit
    if len(text) <= limit:
        assert result == text
        return
    assert len(result) > limit / 2 - BLOCK_CHARS
    numbers = [int(line) for line in result.split("\n")[:-1]]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    if blocks > 1:
        assert numbers[-1] > 0.8 * length - BLOCK_CHARS


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([], ("", "", "")),
        (["a" * 70 + "b" * 15 + "c" * 15], ("a" * 70, "b" * 15, "c" * 15)),
        (["aa", "aa", "aa", "bc"], ("aa\n\naa\n\na", "a\n", "\nbc")),
        (["c", "b", "a", "a", "a"], ("a\n\na\n\na", "b", "c")),
        ([*"ccbbaaaaaaaaaa"], ("\n\n".join("a" * 10), "b\n\nb", "c\n\nc")),
    ],
)
def test_parts_are_documents_of_their_own_or_stretches_of_the_text(documents, expected):
    assert in_parts(documents) == expected


def test_a_corpus_read_is_the_corpus_written(tmp_path):
    save_corpus(CORPUS, tmp_path / "corpus")
    assert load_corpus(tmp_path / "corpus") == CORPUS


def test_the_fingerprint_sees_every_name_and_text_and_the_border_between_two_texts():
    def with_user(**changes):
        return replace(CORPUS, new=(replace(CORPUS.new[0], **changes), CORPUS.new[1]))

    variants = [
        CORPUS,
        with_user(test="334"),
        with_user(name="t"),
        with_user(project="t"),
        with_user(support="12", query="2"),
        replace(CORPUS, new=CORPUS.new[::-1]),
        replace(CORPUS, train=CORPUS.train + CORPUS.new[:1], new=CORPUS.new[1:]),
        replace(CORPUS, pretraining=CORPUS.pretraining[:1]),
    ]
    assert len({corpus.fingerprint for corpus in variants}) == len(variants)
    assert replace(CORPUS, left_out={}).fingerprint == CORPUS.fingerprint


@pytest.mark.parametrize("name", ["corpus.json", "text.npy"])
def test_a_missing_truncated_or_changed_file_is_said(tmp_path, name):
    folder = tmp_path / "corpus"
    save_corpus(CORPUS, folder)
    content = (folder / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b"", b"[]", b"{}"):
        (folder / name).write_bytes(damaged)
        with pytest.raises(PopulationError, match="corpus"):
            load_corpus(folder)
    (folder / name).unlink()
    with pytest.raises(PopulationError, match="delete it"):
        load_corpus(folder)
