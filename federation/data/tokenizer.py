"""Text to tokens and back. A text is measured in bits per character, so tokens know how many characters they stand for.

`PretrainedTokenizer` is whatever a base was trained with. `BytePairs` are learnt from a corpus (Sennrich et al.,
2016): twice the text of characters for the same cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from federation.data.corpus import normalise
from federation.errors import PopulationError

ASCII = "".join(map(chr, range(128)))

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""(L,) uint16, or uint32 where the vocabulary is larger."""


class Tokenizer(Protocol):
    """What the users' texts and a base model have in common."""

    @property
    def size(self) -> int:
        """All tokens are below it (V)."""
        ...

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        ...

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, (L,)."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of many texts, each (L,); faster than one by one."""
        ...

    def decode(self, tokens: npt.ArrayLike) -> str:
        """The text of some tokens."""
        ...

    def characters(self, text: str, tokens: Tokens) -> npt.NDArray[np.int64]:
        """How many characters each of the text's tokens stands for, (L,): their sum is the length of what was encoded.

        tokens: what `encode` makes of the text.
        """
        ...


class BytePairs:
    """Tokens for ASCII text: the 128 characters, and frequent runs of them within words or spaces.

    >>> pairs = BytePairs.learn(["for i in range(n):"], size=140)
    >>> pairs.decode(pairs.encode("range"))
    'range'
    """

    eos: int | None = None

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def learn(texts: Iterable[str], size: int) -> BytePairs:
        """At most `size` tokens, learnt from the texts. Raises ValueError for a size that cannot be."""
        if not len(ASCII) <= size <= 2**16:
            raise ValueError(f"a vocabulary has 128 to 65536 tokens, got {size}")
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted({symbol for c in ASCII for word, _ in split.pre_tokenize_str(c) for symbol in word})
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return BytePairs(tokenizer)

    @staticmethod
    def load(path: Path) -> BytePairs:
        """Read what `save` wrote. Raises PopulationError when the file is missing or damaged."""
        return BytePairs(_read(path, "delete its folder to train it anew"))

    def save(self, path: Path) -> None:
        """Write one JSON file, which transformers reads too."""
        path.write_text(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        """How many tokens there are (V)."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def chars_v(self) -> npt.NDArray[np.int64]:
        """How many characters each token stands for, wherever it stands, (V,)."""
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

    def characters(self, text: str, tokens: Tokens) -> npt.NDArray[np.int64]:
        """See `Tokenizer`; here the tokens alone tell."""
        return self.chars_v[tokens]


class PretrainedTokenizer:
    """The tokenizer of a base, for text alone: nothing is cut, padded or added, and a text that spells a special token
    is text.

    Its vocabulary may lack all tokens beyond ASCII, as `BytePairs` do: such a base learnt from texts as
    `corpus.normalise` leaves them, and reads all texts so.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos: int | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._ascii_only = not tokenizer.encode("é中😀").ids
        self.eos = eos
        self.size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._dtype = np.uint16 if self.size <= 2**16 else np.uint32

    @staticmethod
    def load(base: str | Path) -> PretrainedTokenizer:
        """From the `tokenizer.json` in a base's folder; else, or for a hub name, whatever transformers finds.

        Raises PopulationError when there is none, or it is damaged.
        """
        path = Path(base) / "tokenizer.json"
        if path.is_file():
            tokenizer = _read(path, "save the base with its tokenizer again")
            loaded = PretrainedTokenizer(tokenizer, _declared_eos(tokenizer, Path(base)))
        else:
            loaded = _from_transformers(str(base))
        if not loaded.encode("a").size:  # transformers makes an empty one where it finds nothing
            raise PopulationError(f"a base needs a tokenizer, {str(base)!r} has none; save its tokenizer.json there")
        return loaded

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, (L,)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of many texts, each (L,); faster than one by one."""
        encodings = self._tokenizer.encode_batch_fast([self._readable(text) for text in texts])
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """The text of some tokens, without special ones; half a character is U+FFFD."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist()))

    def characters(self, text: str, tokens: Tokens) -> npt.NDArray[np.int64]:
        """See `Tokenizer`. A character of several tokens counts with the first; one of none, with the token after it
        (at the end of the text, with the last).
        """
        readable = self._readable(text)
        end_l = np.array([end for _, end in self._tokenizer.encode(readable).offsets], dtype=np.int64)
        end_l[-1:] = len(readable)
        return np.diff(end_l, prepend=0)

    def _readable(self, text: str) -> str:
        return normalise(text) if self._ascii_only else text


def _read(path: Path, remedy: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise PopulationError(f"{path} is no tokenizer ({error}); {remedy}") from error


def _from_transformers(base: str) -> PretrainedTokenizer:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # whatever is missing or damaged, a dozen kinds of exception tell
        raise PopulationError(
            f"a base is a folder or a name on the Hugging Face hub, the tokenizer of {base!r} cannot be read: {error}"
        ) from error
    if not found.is_fast:
        raise PopulationError(
            f"a base needs a tokenizer that the tokenizers library reads, {base!r} has a {type(found).__name__}; "
            "convert it to a tokenizer.json"
        )
    return PretrainedTokenizer(found.backend_tokenizer, found.eos_token_id)


def _declared_eos(tokenizer: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The end of a text as the tokenizer's settings name it; or as the model's do, if it is one of the special tokens.

    A model's settings hold a number in any case, be it that of an ordinary token.
    """
    path = folder / "tokenizer_config.json"
    named = _settings(path).get("eos_token")
    if named is not None:
        token = named.get("content") if isinstance(named, dict) else named
        if not isinstance(token, str):
            raise PopulationError(
                f"eos_token names a token, or has it as its content, {path} has {named!r}; save the base's tokenizer "
                "again"
            )
        found: int | None = tokenizer.token_to_id(token)
        return found
    declared = _settings(folder / "config.json").get("eos_token_id")
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    numbers = declared if isinstance(declared, list) else [declared]
    return next((number for number in numbers if number in special), None)


def _settings(path: Path) -> Mapping[str, Any]:
    """A JSON file's object; none where there is no file."""
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PopulationError(f"{path} is no JSON ({error}); save the base again") from error
    return settings if isinstance(settings, dict) else {}
