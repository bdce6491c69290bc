"""Users' own texts on a node, over any causal language model: the population `texts`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from federation.base import BaseModel, causal_lm
from federation.data.corpus import TextCorpus, UserText, in_parts
from federation.data.readers import Documents, read_documents
from federation.data.text import TextPopulation
from federation.data.tokenizer import PretrainedTokenizer, Tokenizer
from federation.errors import ConfigError, PopulationError
from federation.streams import UserIds


def texts(
    base: str, data: str | None = None, window: int = 64, target_modules: Sequence[str] | None = None
) -> UserTexts:
    """Users with texts of their own. All of them are training users, and each is a group of its own.

    base: folder or hub name of a causal language model. data: what `readers` reads; without it there are no users, as
    on a server. window: tokens per example. target_modules: as in PEFT; PEFT's choice for the architecture by default.

    With at least five documents, each of a user's parts has documents of its own: an added document moves at most three
    others to a neighbouring part. With fewer, each part has its own stretch of the text.

    Raises PopulationError when the data or the tokenizer cannot be read, or nobody has enough text.
    """
    if window < 1:
        raise ConfigError(
            f"a window has at least one token, got {window}; give population.options.window another value"
        )
    base = _expanded(base)
    tokenizer = PretrainedTokenizer.load(base)
    documents = read_documents(Path(data).expanduser()) if data is not None else Documents({}, {})
    users = (UserText(name, name, *in_parts(own)) for name, own in documents.of_user.items())
    corpus = TextCorpus(
        name="texts",
        pretraining=(),
        train=tuple(sorted(users, key=lambda user: user_id(user.name))),
        new=(),
        left_out=documents.left_out,
    )
    population = UserTexts(corpus, tokenizer, partial(_base_model, base, tokenizer, window, target_modules), window)
    if data is not None and not population.texts:
        raise PopulationError(
            f"a user needs {window + 1} tokens in each of the three parts of its text, nobody in {data!r} has them "
            f"(left out: {population.left_out}); give more text, or a smaller window"
        )
    return population


def user_id(name: str) -> int:
    """A user's id, below 2**63: a hash of the name, so it is the same whatever other users there are."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


class UserTexts(TextPopulation):
    """Users whose ids are hashes of their names. The corpus has them in the order of their ids."""

    def __init__(
        self, corpus: TextCorpus, tokenizer: Tokenizer, base: Callable[[], BaseModel], window: int = 64
    ) -> None:
        super().__init__(corpus, tokenizer, base, window, _hashed)
        self._id_of = {user.name: user_id(user.name) for user in self.texts}

    def id_of(self, name: str) -> int:
        """The id of a user. Raises PopulationError when nobody who has enough text is called so."""
        try:
            return self._id_of[name]
        except KeyError:
            raise PopulationError(
                f"none of the {len(self.texts)} users of population {self.name!r} is called {name!r}; "
                "add the user's texts, or more of them, and start again"
            ) from None

    def stored_id(self, name: str) -> int:
        """The id that stores know a user of this name by, whether or not its texts are here."""
        return user_id(name)

    def name_of(self, user_id: int) -> str:
        """The name of the user with this id."""
        return self.texts[int(self._rows(np.array([user_id]))[0])].name


def _hashed(users: Sequence[UserText]) -> UserIds:
    names: dict[int, str] = {}
    for user in users:
        number = user_id(user.name)
        if number in names:
            raise PopulationError(
                f"users' ids are hashes of their names, {names[number]!r} and {user.name!r} have the same; rename one"
            )
        names[number] = user.name
    return np.array(list(names), dtype=np.int64)


def _expanded(base: str) -> str:
    """With `~` replaced, if it is a folder; a hub name as it is."""
    folder = Path(base).expanduser()
    return str(folder) if folder.exists() else base


def _base_model(base: str, tokenizer: Tokenizer, window: int, target_modules: Sequence[str] | None) -> BaseModel:
    """The base, in float32.

    Raises PopulationError when it cannot be read, or does not fit its tokenizer or the window; ConfigError when PEFT
    knows no target modules for it.
    """
    try:
        model = causal_lm(base, tuple(target_modules or ()), use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise PopulationError(
            f"a base is the folder or the hub name of a causal language model, {base!r} cannot be read: {error}"
        ) from error
    module: Any = model.module
    embeddings = module.get_input_embeddings().num_embeddings
    if tokenizer.size > embeddings:
        raise PopulationError(
            f"a base embeds every token, {base!r} has {embeddings} embeddings and a tokenizer of {tokenizer.size}; "
            "give it the tokenizer that it was trained with"
        )
    context = getattr(module.config, "max_position_embeddings", None)
    if context is not None and window > context:
        raise PopulationError(f"a window fits a base, {base!r} reads {context} tokens, not {window}; lower the window")
    return replace(model, target_modules=model.target_modules or _peft_modules(module.config.model_type))


def _peft_modules(architecture: str) -> tuple[str, ...]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    try:
        return tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[architecture])
    except KeyError:
        raise ConfigError(
            f"PEFT knows no target modules for the architecture {architecture!r}; "
            "give population.options.target_modules, the names of its linear layers"
        ) from None
