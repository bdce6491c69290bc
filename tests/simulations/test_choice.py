"""Who chooses rates, and by what: nothing that a trained pool or a new user could tilt."""

from types import SimpleNamespace

import numpy as np

from federation.config import load_config
from simulations import evaluate
from simulations.cached import TargetFigures
from simulations.methods import methods_of
from simulations.serve import Plan, Served


def test_relatives_of_those_who_choose_are_kept_out_of_the_federation() -> None:
    """Two users to a group: 7, 8 and 9 choose, so 6 stays out too."""
    splits = {"train": range(10), "new": range(10, 14)}
    population = SimpleNamespace(name="pairs", users=splits.__getitem__, groups=lambda ids: np.asarray(ids) // 2)
    config = load_config(None, ["evaluate.methods=['dsa_t0']", "evaluate.tuning_users=3", "evaluate.users=4"])
    assert evaluate.federated_users(population, config).tolist() == [0, 1, 2, 3, 4, 5]


def served(model_prob: float, cache_prob: float) -> Served:
    """Two users, all of whose targets the model and the cache give these probabilities."""
    shape = (2, 3, 4)
    figures = TargetFigures(
        np.full(shape, np.log(model_prob)),
        np.full(shape, cache_prob),
        np.full(shape, 4),
        np.ones(shape, bool),
        np.ones(2),
    )
    return Served(np.full(2, -np.log(model_prob)), np.zeros(2, np.int64), 0.0, 0.0, figures)


def test_the_caches_weight_is_the_trial_users_choice_and_rates_are_judged_with_it() -> None:
    """The trial's users want all of the cache, the served ones none of it: they get it all the same."""
    cached = methods_of(load_config(None, ["evaluate.methods=['dsa_t2_cache']"]))[1]
    plan, trial, new = Plan(cached, 0.01, 40), [served(0.1, 0.9)], [served(0.9, 0.1)]
    np.testing.assert_allclose(evaluate._loss(plan, new, trial), -np.log(0.1), rtol=1e-6)
    np.testing.assert_allclose(evaluate._mean_loss(plan, trial), -np.log(0.9), rtol=1e-6)
