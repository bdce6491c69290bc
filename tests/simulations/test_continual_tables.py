"""Rules that keep what users learned: tables, matrices and sentences against sums by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from simulations import continual_tables
from simulations.continual_metrics import METRICS
from simulations.sequence_rules import RuleName
from simulations.tables import NOTHING
from tests.simulations.meta_records import R, made_up_continual


def test_every_rule_has_its_figures_in_points() -> None:
    table = continual_tables.rules_table(made_up_continual())
    rows = {row.name: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows}
    acc, bwt = METRICS["acc"].label, METRICS["bwt"].label
    # none: (0.3 + 0.4 + 0.9) / 3, ((0.3 - 0.9) + (0.4 - 0.8)) / 2
    assert (rows["none"][acc], rows["none"][bwt]) == ("53.3 ± 1.0", "-50.0 ± 1.0")
    assert rows["none"][METRICS["steps_to_target"].label] == "7.2"
    assert (rows["none"]["bytes kept"], rows["ewc:10"]["bytes kept"]) == (NOTHING, "4,096")
    assert (rows["joint"][acc], rows["joint"][bwt]) == ("90.0 ± 2.0", NOTHING)
    assert [row.name for row in table.rows if row.emphasised] == ["ewc:10"]
    assert (table.names, rows["none"]["diverged"]) == ("rule", "1")


def test_bits_are_not_turned_into_points() -> None:
    table = continual_tables.rules_table(made_up_continual("bits"))
    assert table.rows[0].cells[:2] == ("0.533 ± 0.010", "-0.500 ± 0.010")
    assert continual_tables.matrices(made_up_continual("bits"))[0].rows[1:] == R["none"]
    assert "0.600 bits forgotten" in continual_tables.example(made_up_continual("bits"))


def test_matrices_begin_at_the_start() -> None:
    (none, ewc) = continual_tables.matrices(made_up_continual())
    assert (none.rule, ewc.rule) == tuple(R)
    assert np.array(none.rows) == pytest.approx(100 * np.array([[0.1] * 3, *R["none"]]))


def test_the_example_reads_the_first_matrix() -> None:
    text = continual_tables.example(made_up_continual())
    assert "begins at 10.0%, is at 90.0% right after it was learned, and at 30.0% when all 3 tasks were" in text
    assert "60.0 points forgotten" in text
    assert text.endswith("BWT: -50.0 here.")
    assert continual_tables.example(made_up_continual() | {"rules": {}}) == ""


@pytest.mark.parametrize(("change", "verdict"), [(-4e-6, "nothing"), (4e-6, "nothing"), (-6e-4, "0.1 points")])
def test_what_rounds_to_nothing_is_nothing_forgotten(change: float, verdict: str) -> None:
    continual = made_up_continual()
    r = continual["rules"]["none"]["r"]
    r[-1][0] = r[0][0] + change
    assert f"{verdict} forgotten" in continual_tables.example(continual)


@pytest.mark.parametrize("name", get_args(RuleName.__args__[0]) + get_args(RuleName.__args__[1]))
def test_every_rule_is_explained(name: str) -> None:
    assert continual_tables.rule_meaning(name)


def test_strengths_and_pools_are_said() -> None:
    meaning = continual_tables.rule_meaning("ewc:100[pool=random]")
    assert meaning == f"{continual_tables.RULES['ewc']}, strength 100, from the pool random"
