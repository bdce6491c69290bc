"""Rules over seeds: means and errors by hand, claims as pairs, and the cells of their tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from federation.errors import ConfigError, RunError
from simulations import sweep_tables
from simulations.comparison import MeasuredRun
from simulations.continual_metrics import METRICS
from simulations.sequence_comparison import continual_claims_of, continual_over_seeds
from simulations.sweep import claims_of
from simulations.tables import NOTHING
from tests.simulations.tiny import tiny_config

ACC = {"ewc": [[0.5, 0.6, 0.7, 0.8], [0.7, 0.6, 0.5, 0.8]], "meta": [[0.6, 0.8, 0.7, 0.9], [0.8, 0.8, 0.9, 0.9]]}
BWT = {"ewc": [[-0.1, -0.2, 0.0, -0.3], [-0.1, 0.0, 0.0, -0.1]], "meta": [[0.0, 0.0, 0.1, -0.1], [0.0, 0.0, 0.0, 0.1]]}


def entry(acc_u: list[float], bwt_u: list[float], rate: float | None, seed: int) -> dict[str, Any]:
    metrics = {name: {"mean": 0.25 + seed, "se": 0.5} for name in METRICS}
    metrics["acc"]["mean"], metrics["bwt"]["mean"] = float(np.mean(acc_u)), float(np.mean(bwt_u))
    matrix = [[0.5 + seed, 0.25], [0.25, 0.5]]
    chosen = {"pool": "pool", "learning_rate": rate, "strength": None}
    counted = {"reached": 0.5 + seed / 4, "bytes_per_user": 1000.0 + seed, "diverged": 1 + seed}
    return {**chosen, "r": matrix, "before": [0.1, 0.2], "metrics": metrics, **counted}


def measured(seed: int, **changes: Any) -> MeasuredRun:
    rules = {name: entry(ACC[name][seed], BWT[name][seed], 0.01 * (seed + 1), seed) for name in ACC}
    alone = {"learning_rate": 0.1, "strength": None, "quality": [0.5, 0.75 + seed], "before": [0.1, 0.2], "diverged": 0}
    references = {"alone": {**alone, "metrics": {"acc": {"mean": 0.7 + seed / 10, "se": 0.1}}}}
    record = {
        "quality": "accuracy", "tasks": 2, "steps": 4, "users": 4, "groups": 3, "rules": rules,
        "references": references,
    }  # fmt: skip
    users = {
        "ids": [5, 6, 7, 8], "groups": [0, 0, 1, 2],
        "acc": {name: values[seed] for name, values in ACC.items()},
        "bwt": {name: values[seed] for name, values in BWT.items()},
    }  # fmt: skip
    return MeasuredRun({"continual": record}, {"continual": {**users, **changes}})


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return continual_over_seeds([measured(0), measured(1)], [("meta", "ewc")])


def test_rules_are_means_over_seeds_with_what_each_seed_gave(summary: dict[str, Any]) -> None:
    ewc = summary["continual"]["rules"]["ewc"]
    assert ewc["metrics"]["acc"]["mean"] == pytest.approx(0.65)
    assert ewc["metrics"]["acc"]["seeds"] == pytest.approx([0.65, 0.65])
    assert ewc["metrics"]["bwt"]["mean"] == pytest.approx(-0.1)
    assert ewc["metrics"]["fwt"] == {"mean": 0.75, "seeds": [0.25, 1.25]}
    assert (ewc["r"], ewc["before"]) == ([[1.0, 0.25], [0.25, 0.5]], [0.1, 0.2])
    assert ewc["learning_rates"] == [0.01, 0.02]
    assert (ewc["reached"], ewc["bytes_per_user"], ewc["diverged"]) == (0.625, 1000.5, 3)
    alone = summary["continual"]["references"]["alone"]
    assert alone["quality"] == [0.5, 1.25]
    assert alone["metrics"]["acc"]["mean"] == pytest.approx(0.75)


def test_errors_are_of_users_whose_seeds_are_averaged_and_clustered(summary: dict[str, Any]) -> None:
    """ACC of ewc by user: 0.6, 0.6, 0.6, 0.8, mean 0.65; sums by group of what is over it: -0.1, -0.05, 0.15."""
    expected = math.sqrt(3 / 2 * (0.1**2 + 0.05**2 + 0.15**2)) / 4
    assert summary["continual"]["rules"]["ewc"]["metrics"]["acc"]["se"] == pytest.approx(expected, abs=1e-6)


def test_claims_are_paired_differences_of_each_figure(summary: dict[str, Any]) -> None:
    for figure, by_rule in (("acc", ACC), ("bwt", BWT)):
        (claim,) = summary["continual"]["claims"][figure]
        difference_u = np.mean(by_rule["meta"], 0) - np.mean(by_rule["ewc"], 0)
        assert (claim["better"], claim["worse"]) == ("meta", "ewc")
        assert claim["difference"] == pytest.approx(difference_u.mean(), abs=1e-6)
        by_seed = np.mean(by_rule["meta"], 1) - np.mean(by_rule["ewc"], 1)
        assert claim["seed_differences"] == pytest.approx(by_seed, abs=1e-6)
        sums = np.array([difference_u[:2].sum(), difference_u[2], difference_u[3]])
        over = sums - difference_u.mean() * np.array([2, 1, 1])
        assert claim["se"] == pytest.approx(math.sqrt(1.5 * np.square(over).sum()) / 4, abs=1e-6)


def test_tables_show_them(summary: dict[str, Any]) -> None:
    head, rows = sweep_tables.continual(summary)
    assert all(len(row) == len(head) for row in rows)
    ewc, _, alone = (dict(zip(head, row, strict=True)) for row in rows)
    assert (ewc["rule"], alone["rule"]) == ("`ewc`", "`alone`")
    assert ewc[METRICS["acc"].label].startswith("0.6500 ± 0.05")
    assert ewc[METRICS["fwt"].label] == "0.7500"
    assert ewc["BWT by seed"] == "-0.1500, -0.0500"
    assert (ewc["bytes"], ewc["diverged"]) == ("1,000", "3")
    assert alone[METRICS["acc"].label] == "0.7500"
    assert alone[METRICS["bwt"].label] == NOTHING
    head, rows = sweep_tables.continual_claims(summary)
    assert [row[0] for row in rows] == ["ACC, `meta` - `ewc`", "BWT, `meta` - `ewc`"]
    assert [row[1] for row in rows] == ["+0.1500", "+0.1125"]
    assert all(len(row) == len(head) for row in rows)


def test_runs_without_sequences_say_nothing_and_other_users_are_refused() -> None:
    without = MeasuredRun({}, {})
    assert continual_over_seeds([without, without], []) == {}
    with pytest.raises(RunError, match="walk with the same users"):
        continual_over_seeds([measured(0), measured(1, ids=[5, 6, 7, 9])], [])


# -------------------------------------------------------------------------------- claims of a configuration


RULES = ("evaluate.methods=['dsa_t0']", "evaluate.sequence.rules=['ewc:100', 'none']")


def test_methods_and_rules_have_claims_of_their_own() -> None:
    pairs = "[['dsa_t0', 'base'], ['continual:ewc:100', 'continual: none']]"
    config = tiny_config(*RULES, f"evaluate.claims={pairs}")
    assert claims_of(config) == [("dsa_t0", "base")]
    assert continual_claims_of(config) == [("ewc:100", "none")]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (["continual:ewc:100", "continual:ewc:100"], "'continual:ewc:100' in evaluate.claims with itself; drop it"),
        (["continual:ewc", "continual:none"], "'continual:ewc' in evaluate.claims is not in evaluate.sequence.rules"),
        (["continual:none", "dsa_t0"], "two rules of the run, 'dsa_t0'"),
        (["none", "continual:ewc:100"], "two rules of the run, 'none'.*known: continual:ewc:100, continual:none"),
    ],
)
def test_claims_that_cannot_be_are_refused(pair: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        claims_of(tiny_config(*RULES, f"evaluate.claims=[{pair}]"))
