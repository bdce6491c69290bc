"""Few-shot curves and the run's quality in a whole evaluation, and what methods may choose from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from client.personal import personalised
from federation.codec import quantise
from federation.config import MetaConfig
from federation.formats import RowFormat
from federation.update import Section
from simulations.compute.worker import Worker
from simulations.compute.workers import InProcess
from simulations.evaluate import NEIGHBOURS, Evaluation, evaluate, plans_of
from simulations.methods import curve_names, methods_of
from simulations.progress import Silent
from simulations.record import comparisons, method_table, users_table
from simulations.serve import Plan, payload, tune
from simulations.variants import federations_of
from tests.simulations.sorters import ACCURATE, IDS, PlainUser, config_of, house, registered, trained_of


@pytest.fixture(scope="module", autouse=True)
def population() -> Iterator[None]:
    with registered():
        yield


def test_the_shared_adapter_sends_plain_differences_whatever_the_pool_learns() -> None:
    """It has nothing but a pool, and its methods tune by Adam."""
    config = config_of("shared_tuned")
    federations = federations_of(config)
    assert federations["pool"].meta.learns
    assert federations["shared"].meta == MetaConfig()
    assert federations["random"].meta == federations["pool"].meta
    learner = Worker(config).setup(federations["shared"]).learner
    assert learner.sections(5) == {}
    assert learner.network is None


def test_plans_are_every_rate_or_the_rules_own() -> None:
    names = ("melpa", "melpa[steps=7]", "melpa[by=sgd]", "melpa[steps=7,by=adam]", "head_only[steps=0]", "neighbours")
    config = config_of(*names)
    found = {m.name: [(p.learning_rate, p.steps) for p in plans_of(m, config)] for m in methods_of(config)}
    assert found == {
        "base": [(0.0, 0)],
        "melpa": [(0.0, 2), (0.0, 4)],
        "melpa[steps=7]": [(0.0, 7)],
        "melpa[by=sgd]": [(0.01, 2), (0.01, 4), (0.05, 2), (0.05, 4)],
        "melpa[steps=7,by=adam]": [(0.01, 7), (0.05, 7)],
        "head_only[steps=0]": [(0.0, 0)],
        "neighbours": [(0.0, 1), (0.0, 3), (0.0, 5), (0.0, 10)],
    }


CURVES = "evaluate.curves={methods=['melpa', 'shared_tuned@int8'], steps=[0, 2], shots=[2, 5]}"
POINTS = [
    f"{base}[shots={shots},steps={steps}]{written}"
    for base, written in (("melpa", ""), ("shared_tuned", "@int8"))
    for shots in (2, 5)
    for steps in (0, 2)
]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    config = config_of("neighbours", "melpa", "shared_tuned", more=(CURVES, ACCURATE))
    return evaluate(InProcess(config), Worker(config).population, trained_of(config), Silent())


def test_the_points_of_curves_are_methods(evaluation: Evaluation) -> None:
    names = [result.method.name for result in evaluation.results]
    assert names == ["base", "neighbours", "melpa", "shared_tuned", *POINTS]
    steps = {result.method.name: result.steps for result in evaluation.results}
    assert all(steps[name] == int(name.partition("steps=")[2][0]) for name in POINTS)
    assert steps["neighbours"] in NEIGHBOURS
    assert steps["melpa"] in (2, 4)
    rates = {result.method.name: result.learning_rate for result in evaluation.results}
    assert rates["melpa"] == rates["melpa[shots=5,steps=2]"] == rates["shared_tuned[shots=2,steps=0]@int8"] == 0
    assert rates["shared_tuned[shots=2,steps=2]@int8"] in (0.01, 0.05)


def test_the_points_of_curves_are_not_compared_pairwise(evaluation: Evaluation) -> None:
    config = config_of("neighbours", "melpa", "shared_tuned", more=(CURVES,))
    pairs = comparisons(evaluation, curve_names(config.evaluate.curves))
    rows = ("base", "neighbours", "melpa", "shared_tuned")
    assert [(pair["a"], pair["b"]) for pair in pairs] == [(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]]


def test_users_and_methods_have_the_runs_quality(evaluation: Evaluation) -> None:
    """Of every method; its error is that of a mean over users, each of whom is a group here."""
    users, table = users_table(evaluation), method_table(evaluation)
    assert list(users["quality"]) == list(users["loss"]) == list(table)
    for result in evaluation.results:
        name = result.method.name
        assert result.quality_u is not None
        assert users["quality"][name] == pytest.approx(result.quality_u, abs=1e-6)
        assert table[name]["quality"] == pytest.approx(np.mean(result.quality_u))
        assert table[name]["quality_se"] == pytest.approx(np.std(result.quality_u, ddof=1) / np.sqrt(6))
        assert all(0 <= quality <= 1 for quality in users["quality"][name])


def test_a_point_is_measured_as_it_is_kept() -> None:
    """The same tuning in another format: coarser rows are fewer bytes."""
    at = house("melpa[shots=2,steps=2]@int8", "melpa[shots=2,steps=2]")
    fine, coarse = (at.method(name) for name in ("melpa[shots=2,steps=2]", "melpa[shots=2,steps=2]@int8"))
    assert fine.start == coarse.start
    start = at.start(coarse)
    personal = tune(at.worker, at.trained, start, Plan(coarse, 0.0, 2), IDS)
    kept, bytes_u = payload(start, personal, coarse)
    assert (bytes_u < payload(start, personal, fine)[1]).all()
    sections = {
        m.section: Section(start.units.ids_ujk[:, j].int(), start.units.valid_ujk[:, j], personal[m.section])
        for j, m in enumerate(start.spec.modules)
    }
    read = {n: section.rows_ukw for n, section in quantise(sections, {"pool": RowFormat("int8")}).items()}
    rows = personalised(start.spec, start.rows, read, "rows")
    served = at.serve(coarse, Plan(coarse, 0.0, 2))
    for u in range(len(IDS)):
        user = PlainUser(u, {m.name: rows[m.section][u] for m in start.spec.modules})
        assert served.loss_u[u] == pytest.approx(user.bits(), rel=1e-4)
    assert all(not torch.equal(kept[name], personal[name]) for name in kept)
