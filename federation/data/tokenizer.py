"""Byte pairs learnt from a corpus (Sennrich et al., 2016): twice the text of characters for the same cost.

A text is measured in bits per character, so every token knows how many characters it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from federation.errors import PopulationError

ASCII = "".join(map(chr, range(128)))

Tokens = npt.NDArray[np.uint16]


class BytePairs:
    """Tokens for ASCII text: the 128 characters, and frequent runs of them within words or spaces.

    >>> pairs = BytePairs.learn(["for i in range(n):"], size=140)
    >>> pairs.decode(pairs.encode("range"))
    'range'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def learn(texts: Iterable[str], size: int) -> BytePairs:
        """At most `size` tokens, learnt from the texts. Raises ValueError for a size that cannot be."""
        if not len(ASCII) <= size <= 2**16:
            raise ValueError(f"a vocabulary has 128 to 65536 tokens, got {size}")
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted({symbol for c in ASCII for word, _ in split.pre_tokenize_str(c) for symbol in word})
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return BytePairs(tokenizer)

    @staticmethod
    def load(path: Path) -> BytePairs:
        """Read what `save` wrote. Raises PopulationError when the file is missing or damaged."""
        try:
            return BytePairs(Tokenizer.from_str(path.read_text()))
        except Exception as error:  # the library raises bare Exceptions
            raise PopulationError(f"{path} is no tokenizer ({error}); delete its folder to train it anew") from error

    def save(self, path: Path) -> None:
        """Write one JSON file, which transformers reads too."""
        path.write_text(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        """How many tokens there are (V)."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def chars_v(self) -> npt.NDArray[np.int64]:
        """How many characters each token stands for, (V,)."""
        return np.array([len(self._tokenizer.decode([token])) for token in range(self.size)], dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        """The tokens of an ASCII text, (L,)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of many texts, each (L,); faster than one by one."""
        return [np.array(e.ids, np.uint16) for e in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """The text of some tokens, the inverse of `encode`."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist()))
