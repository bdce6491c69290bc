"""How near masks come to the best ones, in a population that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from federation.config import RunConfig
from federation.data.population import Population
from simulations.evaluate import Evaluation
from simulations.populations.synthetic import f1
from simulations.record import rounded
from simulations.setup import Teacher
from simulations.statistics import Floats
from simulations.variants import begins_as_the_teachers


def mask_quality(
    evaluation: Evaluation, population: Population, federations: Mapping[str, RunConfig]
) -> dict[str, dict[str, Any]]:
    """Of each method that is a mask alone, by its name: means over users, and over those of each type (`by_type`).

    f1, f1_of_type: F1 against the user's best mask, and against its type's. reward_share: how much the mask lowers
    the expected loss, as a share of what the best mask does; means over users are taken before they are divided, and
    the rows are the population's own, whatever a pool has become. The method `informed_mask` says how far a mask
    could come by what its policy sees.

    Nothing where the population knows no best masks, and for a pool of other units than they are of: only the units
    of a pool that begins as the teacher's are the teacher's.
    """
    if not isinstance(population, Teacher):
        return {}
    ids = evaluation.user_ids
    best_ug, habit_ug = population.best_mask(ids), population.state_best_mask(ids)
    type_u, nothing_u = population.type_of(ids), population.expected_loss(ids, torch.zeros_like(best_ug))
    everyone_u = np.ones(len(ids), dtype=bool)

    def quality(mask_ug: Tensor) -> dict[str, Any]:
        figures = {
            "f1": _by_user(f1(mask_ug, best_ug)),
            "f1_of_type": _by_user(f1(mask_ug, habit_ug)),
            "saved": _by_user(nothing_u - population.expected_loss(ids, mask_ug)),
            "most": _by_user(nothing_u - population.expected_loss(ids, best_ug)),
        }
        by_type = {str(kind): _means(figures, type_u == kind) for kind in np.unique(type_u)}
        return {**_means(figures, everyone_u), "by_type": by_type}

    masks = {
        r.method.name: evaluation.masks[r.method.choice]
        for r in evaluation.results
        if r.method.choice is not None
        and r.method.tuned == "nothing"
        and begins_as_the_teachers(federations, r.method.source)
    }
    return {name: quality(mask_ug) for name, mask_ug in masks.items() if mask_ug.shape == best_ug.shape}


def _by_user(values_u: Tensor) -> Floats:
    return values_u.double().numpy()


def _means(figures: Mapping[str, Floats], some_u: np.typing.NDArray[np.bool_]) -> dict[str, float]:
    mean = {name: float(values_u[some_u].mean()) for name, values_u in figures.items()}
    share = mean["saved"] / mean["most"]
    return rounded({"f1": mean["f1"], "f1_of_type": mean["f1_of_type"], "reward_share": share})
