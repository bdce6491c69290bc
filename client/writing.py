"""What the users' personal models do with text: go on with it, and score it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass

from client.generate import Sampling, context_of, fitting, generate, log_probs, streamed_text
from client.node import Node
from client.serving import Serving
from federation.data.tokenizer import Tokenizer
from federation.errors import FedquiltWarning, NodeError


@dataclass(frozen=True)
class Scored:
    """How well a text is foretold, from its second token on. tokens: how many that are."""

    tokens: int
    nats_per_token: float
    bits_per_char: float


class Writer:
    """Text for a node's users, by the models that it serves them. All calls may be made from several threads.

    Raises NodeError for users that are not the node's, and when the users' data are no text, from every method.
    """

    def __init__(self, node: Node, serving: Serving) -> None:
        self._node, self._serving = node, serving

    def generate(
        self, user: str, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Generator[str, None, None]:
        """The text with which the user's model continues the prompt, piece by piece; see `Sampling`.

        Of a prompt that is longer than the model's context, the end is used, with a warning. Raises ConfigError for an
        empty prompt or numbers out of range.
        """
        tokenizer = self._tokenizer()
        sampling = Sampling(max_tokens, temperature, seed, getattr(tokenizer, "eos", None))
        personal = self._serving.model_of(user)
        tokens = tokenizer.encode(prompt).tolist()
        used = fitting(tokens, context_of(personal.model), max_tokens)
        if len(used) < len(tokens):
            warnings.warn(
                FedquiltWarning(f"a prompt of {len(tokens)} tokens is too long: its last {len(used)} are used"),
                stacklevel=2,
            )
        return streamed_text(tokenizer, used, generate(personal.model, personal.rows, used, sampling))

    def score(self, user: str, text: str) -> Scored:
        """How well the user's model foretells a text. Raises NodeError when it has less than two tokens."""
        tokenizer = self._tokenizer()
        personal = self._serving.model_of(user)
        tokens = tokenizer.encode(text)
        if len(tokens) < 2:
            raise NodeError("failed", f"a text is scored from its second token on, it has {len(tokens)}; give more")
        nats = -float(log_probs(personal.model, personal.rows, tokens.tolist()).double().sum())
        characters = int(tokenizer.characters(text, tokens)[1:].sum())
        foretold = len(tokens) - 1
        return Scored(foretold, nats / foretold, nats / math.log(2.0) / max(1, characters))

    def _tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self._node.population, "tokenizer", None)
        if tokenizer is None:
            raise NodeError(
                "failed",
                f"text is generated and scored for users of text, those of population {self._node.population.name!r} "
                "have none; use its personal models from Python (`Serving.model_of`)",
            )
        return tokenizer
