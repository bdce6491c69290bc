"""The n-gram cache against counting by hand and against a search over all weights."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.ngram import NgramCache, cache_probabilities, fit_weights, mix

texts = st.lists(st.integers(0, 2), max_size=30)
windows = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 2), min_size=width + 1, max_size=width + 1), min_size=1, max_size=3)
)


def counted_by_hand(text, window, position, order):
    """How often the text continues the longest context it holds with the target, and that length."""
    target = window[position + 1]
    for length in range(min(order - 1, position + 1), -1, -1):
        context = window[position + 1 - length : position + 1]
        continued = [text[i + length] for i in range(len(text) - length) if text[i : i + length] == context]
        if continued:
            return continued.count(target) / len(continued), length
    return 0.0, -1


@given(texts, windows, st.integers(1, 5))
def test_probabilities_are_those_counted_by_hand(text, window, order):
    tokens = np.array(window)
    probability, matched = NgramCache.fit(text, 3, order).probabilities(tokens[:, :-1], tokens[:, 1:])
    for n, row in enumerate(window):
        for t in range(len(row) - 1):
            assert (probability[n, t], matched[n, t]) == counted_by_hand(text, row, t, order)


def test_every_context_predicts_a_distribution():
    text = np.random.default_rng(0).integers(0, 5, 400)
    cache = NgramCache.fit(text, 5)
    inputs = np.repeat(text[None, :50], 5, 0)
    total = sum(cache.probabilities(inputs[:1], np.full((1, 50), token))[0] for token in range(5))
    np.testing.assert_allclose(total, 1.0)


def test_each_user_has_a_cache_of_its_own():
    inputs = np.zeros((2, 1, 3), int)
    targets = np.ones((2, 1, 3), int)
    probability, matched = cache_probabilities([[0, 1, 0, 1], [0, 0, 0]], inputs, targets, vocabulary=2)
    assert probability[0, 0, 0] == 1.0
    assert probability[1].max() == 0.0
    assert matched[1].tolist() == [[1, 2, 2]]


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="63 bits"):
        NgramCache.fit([1, 2], vocabulary=2**16, order=4)


def test_weights_are_the_best_of_a_fine_grid():
    rng = np.random.default_rng(1)
    model = np.log(rng.uniform(0.01, 0.6, (4, 5, 30)))
    cache = rng.uniform(0, 1, model.shape) * (rng.uniform(size=model.shape) < 0.4)
    matched = rng.integers(0, 3, model.shape)
    counted = rng.uniform(size=model.shape) < 0.8
    weights = fit_weights(model, cache, matched, counted, order=4)
    assert weights[3] == 0.0
    grid = np.linspace(0, 1, 10_001)[1:-1]
    for length in range(3):
        use = counted & (matched == length)
        likelihood = [np.log((1 - w) * np.exp(model[use]) + w * cache[use]).sum() for w in grid]
        assert weights[length] == pytest.approx(grid[np.argmax(likelihood)], abs=2e-4)


def test_a_cache_that_is_always_worse_gets_no_weight_and_one_that_is_always_better_gets_all():
    model, matched = np.log(np.full(6, 0.5)), np.array([0, 0, 0, 1, 1, 1])
    cache = np.array([0.1, 0.2, 0.0, 0.9, 0.8, 1.0])
    weights = fit_weights(model, cache, matched, np.ones(6, bool), order=2)
    np.testing.assert_allclose(weights, [0.0, 1.0], atol=1e-9)


def test_mixing_interpolates_probabilities_and_leaves_the_model_alone_where_nothing_matched():
    mixed = mix(np.log([0.5, 0.5, 0.5]), np.array([0.9, 0.0, 0.0]), np.array([2, 1, -1]), np.array([0.0, 0.2, 0.5]))
    np.testing.assert_allclose(mixed, [math.log(0.7), math.log(0.4), math.log(0.5)])
