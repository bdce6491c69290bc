"""What a sequence of tasks says of a rule: figures of the matrix R, and words for them.

R[u, t, i] is user u's quality on the test part of task i, after it has adapted to the tasks up to t in turn. Higher is
better: accuracies, or bits with a minus. Every figure is one number of each user, (U,). A sequence has N >= 2 tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simulations.statistics import Floats


@dataclass(frozen=True)
class References:
    """What a user gets on each task without a sequence, (U, N) each.

    before_ui: at the rule's own start, nothing adapted. alone_ui: adapted to that task alone, from the start. joint_ui:
    adapted to the data of all tasks at once, from the start.
    """

    before_ui: Floats
    alone_ui: Floats
    joint_ui: Floats


@dataclass(frozen=True)
class Words:
    """A figure for a reader who has never heard of it."""

    label: str
    meaning: str


METRICS: Mapping[str, Words] = {
    "acc": Words(
        "ACC: at the end",
        "Quality on all tasks once the last one was learned, on average: what the user is left with.",
    ),
    "bwt": Words(
        "BWT: forgetting",
        "Change of a task's quality from right after it was learned to the end: below zero, the user forgot; zero, "
        "nothing was lost; above zero, later tasks helped earlier ones.",
    ),
    "fwt": Words(
        "FWT: a head start",
        "Quality on a task just before it is learned, over that of the rule's own start, where nothing was learned: "
        "above zero, earlier tasks help with one that was not seen yet.",
    ),
    "fwt_over_alone": Words(
        "FWT, against learning it",
        "Quality on a task just before it is learned, over that after learning it alone: below zero, which is usual, "
        "says how much there is still to learn.",
    ),
    "plasticity_gap": Words(
        "Plasticity gap",
        "Quality on a task right after it is learned, over that after learning it alone: below zero, what was kept of "
        "earlier tasks stood in the way.",
    ),
    "intransigence": Words(
        "Intransigence",
        "How much better learning all tasks at once does on a task than learning it in its turn did: above zero, the "
        "sequence made the task harder to learn.",
    ),
    "steps_to_target": Words(
        "Steps to target",
        "Steps on a task until it is at nine tenths of what learning it alone gains, looked at after 0, 1, 2, 4, 8, .. "
        "steps and after the last; a task that does not get there counts all its steps.",
    ),
}
"""What is measured of a rule, in the order of tables."""

REFERENCES: Mapping[str, Words] = {
    "before": Words("Before", "Nothing adapted: a user at the rule's own start."),
    "alone": Words("Alone", "Each task learned by itself, from the start: nothing to forget, and one model per task."),
    "joint": Words("Joint", "All tasks learned at once: what forgetting nothing could give."),
}
"""The references' rows, whose only figure is the mean over tasks."""


def continual_metrics(r_uti: Floats, references: References) -> dict[str, Floats]:
    """Every figure of `METRICS` that the matrix alone decides, by user: (U,) each."""
    return {
        "acc": final_accuracy(r_uti),
        "bwt": backward_transfer(r_uti),
        "fwt": forward_transfer(r_uti, references.before_ui),
        "fwt_over_alone": forward_transfer(r_uti, references.alone_ui),
        "plasticity_gap": plasticity_gap(r_uti, references.alone_ui),
        "intransigence": intransigence(r_uti, references.joint_ui),
    }


def final_accuracy(r_uti: Floats) -> Floats:
    """ACC = mean_i R[N, i] (Lopez-Paz & Ranzato, NeurIPS 2017)."""
    return _mean(r_uti[:, -1])


def backward_transfer(r_uti: Floats) -> Floats:
    """BWT = mean_{i<N} (R[N, i] - R[i, i]) (Lopez-Paz & Ranzato, 2017). The last task has nothing after it."""
    return _mean((r_uti[:, -1] - learned(r_uti))[:, :-1])


def forward_transfer(r_uti: Floats, reference_ui: Floats) -> Floats:
    """FWT = mean_{i>1} (R[i-1, i] - reference_i). The first task has nothing before it.

    The reference of Lopez-Paz & Ranzato (2017) is the model before any task. Against the task learned alone, it is
    what was still to be learned.
    """
    just_before_ui = r_uti.diagonal(1, 1, 2)
    return _mean(just_before_ui - reference_ui[:, 1:])


def plasticity_gap(r_uti: Floats, alone_ui: Floats) -> Floats:
    """mean_i (R[i, i] - alone_i)."""
    return _mean(learned(r_uti) - alone_ui)


def intransigence(r_uti: Floats, joint_ui: Floats) -> Floats:
    """mean_i (joint_i - R[i, i]) (Chaudhry et al., ECCV 2018), with one joint model of all tasks for every i."""
    return _mean(joint_ui - learned(r_uti))


def learned(r_uti: Floats) -> Floats:
    """R[i, i], each task right after it was learned: (U, N)."""
    return r_uti.diagonal(0, 1, 2)


TARGET_SHARE = 0.9
"""Of what learning a task alone gains over the start: the quality that `steps_to_target` counts to."""


def steps_to_target(quality_uis: Floats, steps_s: Sequence[int], references: References) -> Floats:
    """The steps after which a user first has `TARGET_SHARE` of each task, (U, N); infinity where it never does.

    quality_uis: (U, N, S), of each task while it is learned, after so many steps (S,), ascending.
    """
    target_ui = references.before_ui + TARGET_SHARE * (references.alone_ui - references.before_ui)
    reached_uis = quality_uis >= target_ui[..., None]
    first_ui = np.asarray(steps_s, dtype=np.float64)[reached_uis.argmax(2)]
    return np.where(reached_uis.any(2), first_ui, np.inf)


def _mean(values_ui: Floats) -> Floats:
    return np.asarray(values_ui.mean(1), dtype=np.float64)
