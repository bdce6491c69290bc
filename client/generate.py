"""A user's personal language model at work: text token by token, with transformers' cache of keys and values; scores.

Rows are bound for each forward pass alone, never while a token is handed out: whoever asks for the next one, and
whatever else the process does meanwhile, meets no rows but its own.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from federation.base import at_least_fp32, target_log_probs
from federation.data.tokenizer import Tokenizer
from federation.errors import ConfigError, NodeError
from federation.pool.model import PooledModel

_INCOMPLETE = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
_SCORED = 1024
"""Most tokens that are scored in one forward pass: the logits of more are large."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    max_tokens: most tokens. temperature: 0 takes the likeliest token each time; above, tokens are drawn with the
    probabilities softmax(logits / temperature). seed: of the draws. stop: the token that ends a text, if there is one.

    Raises ConfigError for numbers out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"a text is continued by at least one token, got max_tokens={self.max_tokens}; raise it")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"a temperature is a number of at least 0, got {self.temperature}; 0 takes the likeliest token"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"a seed has 64 bits, got {self.seed}; give a smaller one")


def generate(
    model: PooledModel, rows: Mapping[str, Tensor] | None, prompt: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """The tokens that continue the prompt: until `max_tokens`, the stop token or the end of the model's context.

    rows: one user's, {section: (1, k, d_in + d_out)}; None for the base alone. prompt: see `fitting`. The stop token
    is not handed out. The same arguments give the same tokens.

    Raises ConfigError for an empty prompt, and one that is longer than the model's context. Raises NodeError when the
    model computes no numbers.
    """
    context = context_of(model)
    if not prompt:
        raise ConfigError("a prompt has at least one token, got none; write something")
    if len(prompt) > context:
        raise ConfigError(
            f"{model.base.name!r} sees at most {context} tokens, got a prompt of {len(prompt)}; keep its end"
        )
    return _continued(model, rows, list(prompt), sampling, context)


def context_of(model: PooledModel) -> int:
    """How many tokens the model sees at a time; `sys.maxsize` where its configuration names no limit."""
    return getattr(model.base.module.config, "max_position_embeddings", None) or sys.maxsize


def fitting(prompt: Sequence[int], context: int, max_tokens: int) -> Sequence[int]:
    """A prompt that fits into the context, as it is; of a longer one the end, so that there is room to go on.

    At least half of the context is kept, and more where `max_tokens` needs less.

    >>> fitting(range(100), 16, 4)
    range(87, 100)
    """
    if len(prompt) <= context:
        return prompt
    kept = max(context // 2, context + 1 - max_tokens, 1)
    return prompt[len(prompt) - kept :]


def streamed_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Generator[str, None, None]:
    """The text that the tokens add to the prompt's, piece by piece, as soon as its characters are whole.

    The bytes of a character may lie in several tokens. Joined, the pieces are the text of all tokens.
    """
    pending, told = list(prompt), tokenizer.decode(prompt)
    since = 0
    for token in tokens:
        pending.append(token)
        since += 1
        text = tokenizer.decode(pending)
        if len(text) > len(told) and not text.endswith(_INCOMPLETE):
            yield text[len(told) :]
            # The last tokens stay: some decoders write a token differently at the beginning of a text.
            pending, since = pending[-since:], 0
            told = tokenizer.decode(pending)
    rest = tokenizer.decode(pending)[len(told) :]
    if rest:
        yield rest


@torch.no_grad()
def log_probs(model: PooledModel, rows: Mapping[str, Tensor] | None, tokens: Sequence[int]) -> Tensor:
    """The log-probability of each token after the first, in nats: (L,) tokens give (L - 1,) of float32, on the CPU.

    A long text is read in windows, end to end, each of which knows of the text before it one token alone.
    """
    module = model.base.module
    text = torch.tensor(tokens, device=next(module.parameters()).device)
    window = min(context_of(model), _SCORED)
    with _bound(model, rows):
        found = [
            target_log_probs(module, inputs[None], targets[None])[0].cpu()
            for inputs, targets in zip(torch.split(text[:-1], window), torch.split(text[1:], window))
        ]
    return torch.cat(found)


def _continued(
    model: PooledModel, rows: Mapping[str, Tensor] | None, prompt: list[int], sampling: Sampling, context: int
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    unseen, cache, length = prompt, None, len(prompt)
    for _ in range(sampling.max_tokens):
        logits_v, cache = _next_logits(model, rows, unseen, cache)
        token = _chosen(logits_v, sampling.temperature, generator)
        if token == sampling.stop:
            return
        yield token
        unseen, length = [token], length + 1
        if length > context:
            return


@torch.no_grad()
def _next_logits(
    model: PooledModel, rows: Mapping[str, Tensor] | None, tokens: Sequence[int], cache: Any
) -> tuple[Tensor, Any]:
    """The logits (V,) of the token after these, on the CPU, and the cache that has seen them too."""
    module = model.base.module
    inputs = torch.tensor([tokens], device=next(module.parameters()).device)
    with _bound(model, rows):
        output = module(input_ids=inputs, past_key_values=cache, use_cache=True, **_last_alone(module))
    return at_least_fp32(output.logits[0, -1]).cpu(), output.past_key_values


def _bound(model: PooledModel, rows: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
    return nullcontext() if rows is None else model.bound(rows)


def _last_alone(module: nn.Module) -> dict[str, int]:
    """Asks for the last token's logits alone, of models that know how: those of a long prompt are large."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}


def _chosen(logits_v: Tensor, temperature: float, generator: torch.Generator) -> int:
    most = logits_v.max()
    if not most.isfinite():
        raise NodeError(
            "failed",
            f"a model's logits are numbers, the largest of a user's model is {float(most)}; personalise the user "
            "again, or have another release served",
        )
    if temperature == 0:
        return int(logits_v.argmax())
    # The largest is taken off first: divided by a tiny temperature it would be infinite.
    probabilities_v = torch.softmax((logits_v.double() - most) / temperature, -1)
    return int(torch.multinomial(probabilities_v, 1, generator=generator))
