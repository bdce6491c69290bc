"""A cache of a user's own n-grams, interpolated with a language model: the plainest personal model there is.

The cache predicts the target after the longest context of at most `order - 1` tokens that the user's support
text also holds: p(target) = count(context, target) / count(context). Mixed with the model as in a cache
language model (Kuhn and De Mori, 1990), with one weight per length of the matched context,

    log p = log((1 - w_l) * p_model + w_l * p_cache),

where the weights are fitted on training users, never on those that are reported. Only contexts inside a
window count, so the cache sees no more of the text than the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ORDER = 5
_BISECTIONS = 40


@dataclass(frozen=True)
class Counts:
    """How often each key occurs: keys (K,) ascending, counts (K,)."""

    keys: Integers
    counts: Integers

    @staticmethod
    def of(keys: Integers) -> Counts:
        return Counts(*np.unique(keys, return_counts=True))

    def __getitem__(self, keys: Integers) -> Integers:
        """Counts of the keys, of any shape; 0 for one that never occurred."""
        if len(self.keys) == 0:
            return np.zeros_like(keys)
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)


@dataclass(frozen=True)
class NgramCache:
    """Counts of one user's n-grams, for each length l = 0..order-1 of the context.

    contexts[l] counts contexts of l tokens that some token follows, grams[l] the same with that token.
    An n-gram's key is the number whose digits, in base `vocabulary`, are its tokens.
    """

    vocabulary: int
    contexts: tuple[Counts, ...]
    grams: tuple[Counts, ...]

    @staticmethod
    def fit(tokens: npt.ArrayLike, vocabulary: int, order: int = ORDER) -> NgramCache:
        """Count the n-grams of a text. Shapes: tokens (L,), each in [0, vocabulary).

        Raises ValueError when a key would not fit 63 bits.
        """
        if vocabulary**order >= 2**63:
            raise ValueError(f"{order}-grams over {vocabulary} tokens do not fit 63 bits; use a smaller order")
        text = np.asarray(tokens, dtype=np.int64)
        contexts, grams = [], []
        context_keys = np.zeros(len(text), dtype=np.int64)  # of the l tokens before each position
        for length in range(order):
            valid = slice(length, None)
            contexts.append(Counts.of(context_keys[valid]))
            grams.append(Counts.of((context_keys * vocabulary + text)[valid]))
            context_keys = context_keys + _shifted(text, length + 1) * vocabulary**length
        return NgramCache(vocabulary, tuple(contexts), tuple(grams))

    def probabilities(self, inputs_nt: Integers, targets_nt: Integers) -> tuple[Floats, Integers]:
        """Probability of each target after its longest known context, and that context's length.

        Shapes: inputs (N, T), targets (N, T) the tokens that follow each input; results (N, T) and (N, T),
        where the length is -1 (and the probability 0) if the cache is empty.
        """
        probability = np.zeros(targets_nt.shape)
        matched = np.full(targets_nt.shape, -1, dtype=np.int64)
        context_keys = np.zeros_like(inputs_nt)
        for length, (contexts, grams) in enumerate(zip(self.contexts, self.grams)):
            seen = contexts[context_keys]
            seen[:, : max(0, length - 1)] = 0  # the window has no context of this length yet
            known = seen > 0
            followed = grams[context_keys * self.vocabulary + targets_nt]
            probability[known] = followed[known] / seen[known]
            matched[known] = length
            context_keys = context_keys + _shifted(inputs_nt, length) * self.vocabulary**length
        return probability, matched


def _shifted(tokens: Integers, places: int) -> Integers:
    """Tokens moved to the right along the last axis, zeros moving in."""
    moved = np.zeros_like(tokens)
    moved[..., places:] = tokens[..., : max(0, tokens.shape[-1] - places)]
    return moved


def cache_probabilities(
    support_u: Sequence[npt.ArrayLike],
    inputs_unt: Integers,
    targets_unt: Integers,
    vocabulary: int,
    order: int = ORDER,
) -> tuple[Floats, Integers]:
    """`NgramCache.probabilities` of each user, from its own support text: (U, N, T) and (U, N, T)."""
    caches = (NgramCache.fit(tokens, vocabulary, order) for tokens in support_u)
    results = [cache.probabilities(x, y) for cache, x, y in zip(caches, inputs_unt, targets_unt, strict=True)]
    return np.stack([p for p, _ in results]), np.stack([length for _, length in results])


def mix(model_logprob: Floats, cache_prob: Floats, matched: Integers, weight_l: Floats) -> Floats:
    """Log-probabilities (nats) of the targets under both; all of one shape (...), weight_l (order,).

    Where nothing matched (length -1) the model stands alone.
    """
    weight = np.where(matched >= 0, weight_l[matched], 0.0)
    return np.log((1.0 - weight) * np.exp(np.asarray(model_logprob, np.float64)) + weight * cache_prob)


def fit_weights(
    model_logprob: Floats,
    cache_prob: Floats,
    matched: Integers,
    counted: npt.NDArray[np.bool_],
    order: int = ORDER,
) -> Floats:
    """The weights (order,) that give the counted targets the highest likelihood under `mix`.

    Shapes: all (...) alike; counted marks the targets that are not padding. For each length the
    log-likelihood is concave in its weight, with the slope sum (c - p) / ((1 - w) p + w c); its zero is found
    by bisection, and a slope of one sign gives a weight next to 0 or 1. A length that never matched gets 0.
    """
    use = np.asarray(counted, bool) & (matched >= 0)
    length, cache = matched[use], cache_prob[use]
    model = np.exp(np.asarray(model_logprob, np.float64)[use])
    low, high = np.zeros(order), np.ones(order)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        weight = middle[length]
        slope = np.bincount(length, (cache - model) / ((1 - weight) * model + weight * cache), minlength=order)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    return np.where(np.bincount(length, minlength=order) > 0, low, 0.0)
