"""The schema, first values and version of the trained state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from federation.config import GateConfig, LocalConfig, MetaConfig
from federation.learner import Learner, learner_of
from federation.pool.model import PooledModel
from federation.settings import parse
from federation.state import (
    GATE_SECTION,
    LOAD_SECTION,
    PRICE_SECTION,
    gate_spec,
    initial_values,
    schema_of,
    version_of,
)
from federation.streams import Streams
from federation.update import Schema, Values
from tests import models

RANK, BUDGET = 5, 2
UNITS = 2 * RANK
STEERED: dict[str, Any] = {"distribution": "bernoulli", "reward": {"price": 0.01, "target": 0.2}}


def model() -> PooledModel:
    return PooledModel.around(models.mlp(), RANK, 1.0)


def config_for(**gate: Any) -> GateConfig:
    return parse(GateConfig, {"budget": BUDGET, **gate})


def learner() -> Learner:
    return learner_of(MetaConfig(), LocalConfig(), model())


def schema_for(**gate: Any) -> Schema:
    config = config_for(**gate)
    return schema_of(learner(), gate_spec(model(), config), config)


def values_for(seed: int = 0, **gate: Any) -> Values:
    config = config_for(**gate)
    spec = gate_spec(model(), config)
    return initial_values(learner(), spec, schema_of(learner(), spec, config), config, Streams(seed))


@pytest.mark.parametrize(
    ("gate", "max_rows", "others"),
    [
        ({}, BUDGET, {GATE_SECTION, LOAD_SECTION}),
        ({"budgets": [1, 3]}, 3, {GATE_SECTION, LOAD_SECTION}),
        ({"scope": "global"}, RANK, {GATE_SECTION, LOAD_SECTION}),
        ({"distribution": "bernoulli"}, RANK, {GATE_SECTION, LOAD_SECTION}),
        ({"distribution": "bernoulli", "reward": {"price": 0.01}}, RANK, {GATE_SECTION, LOAD_SECTION}),
        (STEERED, RANK, {GATE_SECTION, LOAD_SECTION, PRICE_SECTION}),
        ({"policy": "saliency"}, BUDGET, set()),
        ({"policy": "random", **STEERED}, RANK, set()),
        ({"policy": "all"}, RANK, set()),
    ],
)
def test_a_user_may_send_its_budget_of_units_and_a_row_of_all_that_is_the_gates_where_one_is_trained(
    gate: dict[str, Any], max_rows: int, others: set[str]
) -> None:
    schema = schema_for(**gate)
    pool = [spec for name, spec in schema.sections.items() if name.startswith("pool/")]
    assert [(spec.rows, dict(spec.factors), spec.max_rows) for spec in pool] == [
        (RANK, {"down": 5, "up": 7}, max_rows),
        (RANK, {"down": 7, "up": 3}, max_rows),
    ]
    assert {name for name in schema.sections if not name.startswith("pool/")} == others
    assert all((schema.sections[name].rows, schema.sections[name].max_rows) == (1, 1) for name in others)
    widths = {GATE_SECTION: gate_spec(model(), config_for(**gate)).size, LOAD_SECTION: UNITS, PRICE_SECTION: 1}
    assert {name: schema.sections[name].width for name in others} == {name: widths[name] for name in others}


@pytest.mark.parametrize("gate", [{}, STEERED])
def test_first_values_fit_the_schema_and_change_nothing_yet(gate: dict[str, Any]) -> None:
    values, schema = values_for(**gate), schema_for(**gate)
    assert {n: tuple(v.shape) for n, v in values.items()} == {n: (s.rows, s.width) for n, s in schema.sections.items()}
    for name, spec in schema.sections.items():
        if name.startswith("pool/"):
            assert not values[name][:, spec.columns("up")].any()
            assert values[name][:, spec.columns("down")].all()
    assert not values[LOAD_SECTION].any()


def test_a_steered_price_begins_as_the_logarithm_of_what_is_configured() -> None:
    assert float(values_for(**STEERED)[PRICE_SECTION]) == pytest.approx(math.log(0.01))


def test_first_values_depend_on_the_seed_alone() -> None:
    once, again, other = values_for(0), values_for(0), values_for(1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not any(torch.equal(once[name], other[name]) for name in once if name != LOAD_SECTION)


def test_a_version_names_these_values_of_this_round() -> None:
    values = dict(values_for())
    version = version_of(values, 3)
    assert version.startswith("r3-")
    assert version_of(dict(reversed(values.items())), 3) == version
    names = {version, version_of(values, 4)}
    for name, rows in values.items():
        bits = rows.clone().view(torch.int32)
        bits[0, -1] ^= 1
        names.add(version_of({**values, name: bits.view(torch.float32)}, 3))
    swapped = dict(zip(values, [values[name] for name in reversed(list(values))]))
    names.add(version_of(swapped, 3))
    assert len(names) == 3 + len(values)


def test_values_of_the_same_bytes_differ_in_shape_and_type() -> None:
    rows = torch.arange(6, dtype=torch.float32)
    same_bytes = [rows.view(2, 3), rows.view(3, 2), rows, rows.view(torch.int32), rows.view(6, 1)]
    assert len({version_of({"a": values}, 1) for values in same_bytes}) == len(same_bytes)
    assert version_of({"a": rows.view(3, 2).t()}, 1) == version_of({"a": rows.view(3, 2).t().contiguous()}, 1)
