"""Continual figures against sums on paper, loops over users, and the laws that give them their names."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.continual_metrics import METRICS, References, continual_metrics, steps_to_target
from simulations.statistics import Floats

# Row t: after task t. Column i: on task i.
ON_PAPER = np.array([[[0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.5, 0.6, 1.0]]])
PAPER = References(
    before_ui=np.array([[0.2, 0.1, 0.1]]), alone_ui=np.array([[0.9, 0.9, 0.9]]), joint_ui=np.array([[0.8, 0.9, 1.0]])
)
BY_HAND = {
    "acc": (0.5 + 0.6 + 1.0) / 3,
    "bwt": ((0.5 - 0.9) + (0.6 - 0.8)) / 2,
    "fwt": ((0.3 - 0.1) + (0.2 - 0.1)) / 2,
    "fwt_over_alone": ((0.3 - 0.9) + (0.2 - 0.9)) / 2,
    "plasticity_gap": (0.0 - 0.1 + 0.1) / 3,
    "intransigence": (-0.1 + 0.1 + 0.0) / 3,
}


def drawn(users: int = 4, tasks: int = 5) -> tuple[Floats, References]:
    random = np.random.default_rng(3)
    return random.random((users, tasks, tasks)), References(*random.random((3, users, tasks)))


@pytest.mark.parametrize("name", BY_HAND)
def test_figures_are_those_on_paper(name: str) -> None:
    assert continual_metrics(ON_PAPER, PAPER)[name] == pytest.approx([BY_HAND[name]])


def test_every_figure_is_explained_and_no_other() -> None:
    assert [*continual_metrics(*drawn()), "steps_to_target"] == list(METRICS)


def test_every_user_has_its_own_figures() -> None:
    r_uti, references = drawn()
    together = continual_metrics(r_uti, references)
    for u in range(len(r_uti)):
        part = slice(u, u + 1)
        own = References(references.before_ui[part], references.alone_ui[part], references.joint_ui[part])
        for name, value_u in continual_metrics(r_uti[part], own).items():
            assert value_u[0] == together[name][u], name


def test_figures_are_those_of_a_loop_over_tasks() -> None:
    r_uti, references = drawn(users=1)
    (r,), n = r_uti, r_uti.shape[1]
    before, alone, joint = references.before_ui[0], references.alone_ui[0], references.joint_ui[0]
    loops = {
        "acc": sum(r[n - 1][i] for i in range(n)) / n,
        "bwt": sum(r[n - 1][i] - r[i][i] for i in range(n - 1)) / (n - 1),
        "fwt": sum(r[i - 1][i] - before[i] for i in range(1, n)) / (n - 1),
        "fwt_over_alone": sum(r[i - 1][i] - alone[i] for i in range(1, n)) / (n - 1),
        "plasticity_gap": sum(r[i][i] - alone[i] for i in range(n)) / n,
        "intransigence": sum(joint[i] - r[i][i] for i in range(n)) / n,
    }
    assert {name: value_u[0] for name, value_u in continual_metrics(r_uti, references).items()} == pytest.approx(loops)


# -------------------------------------------------------------------------------- laws


def test_a_rule_that_keeps_everything_forgets_nothing() -> None:
    """What was learned stays as it is: from the diagonal on, a column does not change."""
    r_uti, references = drawn()
    for i in range(r_uti.shape[2]):
        r_uti[:, i:, i] = r_uti[:, i, i, None]
    assert continual_metrics(r_uti, references)["bwt"] == pytest.approx(0.0)


def test_a_rule_that_does_nothing_has_neither_forgetting_nor_a_head_start() -> None:
    _, references = drawn()
    r_uti = np.repeat(references.before_ui[:, None], references.before_ui.shape[1], axis=1)
    figures = continual_metrics(r_uti, references)
    assert figures["bwt"] == pytest.approx(0.0)
    assert figures["fwt"] == pytest.approx(0.0)
    assert figures["acc"] == pytest.approx(references.before_ui.mean(1))


def test_as_good_as_joint_is_not_intransigent_and_as_good_as_alone_has_no_gap() -> None:
    r_uti, references = drawn()
    n = np.arange(r_uti.shape[1])
    for reference_ui, name in ((references.joint_ui, "intransigence"), (references.alone_ui, "plasticity_gap")):
        changed_uti = r_uti.copy()
        changed_uti[:, n, n] = reference_ui
        assert continual_metrics(changed_uti, references)[name] == pytest.approx(0.0)
        assert np.abs(continual_metrics(r_uti, references)[name]).max() > 0.01


def test_forgetting_is_counted_from_what_was_learned() -> None:
    """ACC = mean of what was learned + BWT * (N - 1) / N: the last task has nothing to lose."""
    r_uti, references = drawn()
    figures, tasks = continual_metrics(r_uti, references), r_uti.shape[1]
    learned_u = references.alone_ui.mean(1) + figures["plasticity_gap"]
    assert figures["acc"] == pytest.approx(learned_u + figures["bwt"] * (tasks - 1) / tasks)


def test_differences_do_not_depend_on_where_quality_begins() -> None:
    """Bits with a minus serve as well as accuracies: only ACC moves with a constant."""
    r_uti, references = drawn()
    moved = References(references.before_ui - 7.0, references.alone_ui - 7.0, references.joint_ui - 7.0)
    figures, shifted = continual_metrics(r_uti, references), continual_metrics(r_uti - 7.0, moved)
    assert shifted.pop("acc") == pytest.approx(figures.pop("acc") - 7.0)
    for name, value_u in figures.items():
        assert shifted[name] == pytest.approx(value_u), name


# -------------------------------------------------------------------------------- steps


def test_steps_are_counted_to_the_first_time_that_nine_tenths_are_reached() -> None:
    """From 0 to 1 the target is 0.9; from 0.5 down to 0.3, 0.32: learning the task alone did harm."""
    references = References(np.array([[0.0, 0.0, 0.5]]), np.array([[1.0, 1.0, 0.3]]), np.zeros((1, 3)))
    quality_uis = np.array([[[0.1, 0.89, 0.95, 0.2], [0.1, 0.2, 0.3, 0.899], [0.5, 0.1, 0.1, 0.1]]])
    assert steps_to_target(quality_uis, (0, 1, 4, 10), references).tolist() == [[4.0, np.inf, 0.0]]
