"""Methods with a 5-gram cache of the user's own text (simulations/ngram.py) beside the model.

Workers send the figures of every test target; the driver fits the weights on training users and mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from federation.base import target_log_probs
from federation.data.population import Batch, Population
from federation.data.text import TextPopulation
from federation.errors import ConfigError
from federation.pool.model import PooledModel
from federation.streams import UserIds
from simulations.methods import Method
from simulations.ngram import Floats, Integers, cache_probabilities, fit_weights, mix


@dataclass(frozen=True)
class TargetFigures:
    """Of every target of U users' test parts: the model's log-probability (nats), the cache's probability and matched
    length, and whether it counts; all (U, N, T). nats_per_bit_u: (U,), nats per target of one bit per character."""

    model_logprob: Floats
    cache_prob: Floats
    matched: Integers
    counted: npt.NDArray[np.bool_]
    nats_per_bit_u: Floats


@torch.no_grad()
def target_figures(
    model: PooledModel, population: Population, user_ids: UserIds, test: Batch, nats_per_bit_u: Floats
) -> TargetFigures:
    """The figures with whatever rows are bound."""
    text = _of_text(population)
    inputs, targets = test.flat()
    log_prob = target_log_probs(model.base.module, inputs, targets).view(test.targets.shape).double().numpy(force=True)
    support = [text.tokens(int(user), "support") for user in user_ids]
    cache_prob, matched = cache_probabilities(
        support, test.inputs.numpy(force=True), test.targets.numpy(force=True), text.tokenizer.size
    )
    counted = np.broadcast_to(test.weight.numpy(force=True)[..., None] > 0, log_prob.shape)
    return TargetFigures(log_prob, cache_prob, matched, counted, nats_per_bit_u)


def check_caches(methods: Sequence[Method], population: Population) -> None:
    """Raises ConfigError when a method has a cache and the population is not text: before anything is trained."""
    if any(method.cache for method in methods):
        _of_text(population)


def _of_text(population: Population) -> TextPopulation:
    if not isinstance(population, TextPopulation):
        raise ConfigError(
            f"methods with an n-gram cache need a population of text, {population.name!r} is none; "
            "take them out of evaluate.methods"
        )
    return population


def fitted_weights(figures: Sequence[TargetFigures]) -> Floats:
    """The weight of the cache for each matched length that serves these users best."""
    flat = [[getattr(f, name)[f.counted] for f in figures] for name in ("model_logprob", "cache_prob", "matched")]
    model_logprob, cache_prob, matched = (np.concatenate(parts) for parts in flat)
    return fit_weights(model_logprob, cache_prob, matched, np.ones(len(matched), dtype=bool))


def mixed_loss(figures: TargetFigures, weight_l: Floats) -> Floats:
    """Each user's bits per character under model and cache: (U,)."""
    log_prob = mix(figures.model_logprob, figures.cache_prob, figures.matched, weight_l)
    total_u = np.where(figures.counted, -log_prob, 0.0).sum((1, 2))
    return np.asarray(total_u / figures.counted.sum((1, 2)) / figures.nats_per_bit_u)
