"""What is learned besides the pool: which rows users take of it, and send back to the same places."""

from __future__ import annotations

import pytest
import torch

from federation.config import GateConfig, LocalConfig, MetaConfig, TaskConfig
from federation.learner import (
    RATES_OF_UNITS,
    SHARED_RATES,
    START_SECTION,
    ActiveUnits,
    Learner,
    learner_of,
    rate_of,
)
from federation.pool.model import PooledModel
from federation.pool.spec import rows_of_mask
from federation.settings import parse
from federation.state import gate_spec, initial_values, schema_of
from federation.streams import Streams
from federation.update import Limits, UpdateBlock, admit
from tests import models

RANK, USERS, MOST, STEPS = 4, 3, 3, 2
MODEL = PooledModel.around(models.mlp(), RANK, 1.5)
MODULES = len(MODEL.spec.modules)
GATE = parse(GateConfig, {"policy": "random", "budget": MOST})
CASES = [("sgd", "pool"), ("sgd", "universal"), ("rates", "pool"), ("rates", "contextual"), ("learned", "universal")]


def learner(rule: str, start: str) -> Learner:
    meta = parse(MetaConfig, {"signal": "fomaml", "rule": {"name": rule}, "start": {"name": start}})
    return learner_of(meta, LocalConfig(steps=STEPS, learning_rate=0.25), MODEL)


def masks() -> torch.Tensor:
    """Of user 0 all that it may have; user 2 has nothing of module 0."""
    mask_ug = torch.zeros(USERS, MODULES * RANK, dtype=torch.bool)
    mask_ug[0, [0, 1, 3, 4, 6, 7]] = True
    mask_ug[1, [2, 4]] = True
    mask_ug[2, [5, 6, 7]] = True
    return mask_ug


ACTIVE = ActiveUnits(*rows_of_mask(masks(), MODULES, MOST))


def test_places_are_the_units_numbers_in_the_pool() -> None:
    numbers, valid = ACTIVE.places(RANK)
    assert numbers.shape == valid.shape == (USERS, MODULES * MOST)
    for u in range(USERS):
        assert numbers[u][valid[u]].tolist() == masks()[u].nonzero().flatten().tolist()
    assert not numbers[~valid].any()


@pytest.mark.parametrize(("rule", "start"), CASES)
def test_sections_have_the_values_of_the_schema(rule: str, start: str) -> None:
    made = learner(rule, start)
    schema = schema_of(made, gate_spec(MODEL, GATE), GATE)
    values = initial_values(made, gate_spec(MODEL, GATE), schema, GATE, Streams(3))
    assert {n: tuple(v.shape) for n, v in values.items()} == {n: (s.rows, s.width) for n, s in schema.sections.items()}
    expected = {RATES_OF_UNITS, SHARED_RATES} if rule != "sgd" else set()
    expected |= {START_SECTION} if start != "pool" else set()
    assert set(values) - set(made.spec.sections(1)) == expected == set(made.sections(MOST))
    again = initial_values(made, gate_spec(MODEL, GATE), schema, GATE, Streams(3))
    assert all(torch.equal(again[name], value) for name, value in values.items())
    if rule != "sgd":
        assert schema.sections[RATES_OF_UNITS].rows == MODULES * RANK
        assert schema.sections[RATES_OF_UNITS].max_rows == MODULES * MOST


def numbered(made: Learner) -> dict[str, torch.Tensor]:
    """Values of which every row says where it is from: module or section, row and column."""
    sections = {**MODEL.spec.sections(MOST), **made.sections(MOST)}
    values = {}
    for i, (name, spec) in enumerate(sections.items()):
        row, column = torch.arange(spec.rows)[:, None], torch.arange(spec.width)
        values[name] = 1.0 + 1e5 * i + 1e3 * row + column
    return values


@pytest.mark.parametrize(("rule", "start"), CASES)
def test_what_is_sent_goes_back_to_where_the_copies_came_from(rule: str, start: str) -> None:
    made = learner(rule, start)
    values = numbered(made)
    kept = {name: value.clone() for name, value in values.items()}
    copies = made.copies(values, ACTIVE)
    sections = made.sent(copies, ACTIVE, torch.ones(USERS, dtype=torch.bool))
    schema = schema_of(made, gate_spec(MODEL, GATE), GATE)
    assert set(sections) == set(schema.sections) == set(copies)
    seen = 0
    for name, section in sections.items():
        for u in range(USERS):
            valid = section.valid_uk[u]
            assert torch.equal(section.rows_ukw[u][valid], values[name][section.ids_uk[u][valid].long()])
            seen += int(valid.sum())
    dense = len(made.sections(MOST)) - (RATES_OF_UNITS in sections)
    units = int(masks().sum())
    assert seen == units * (2 if RATES_OF_UNITS in sections else 1) + USERS * dense
    block = UpdateBlock(sections, torch.ones(USERS), {}, 1, "v")
    admitted, rejections = admit(block, schema, Limits())
    assert not rejections.reasons
    for name in MODEL.spec.sections(MOST):
        assert torch.equal(admitted.sections[name].rows_ukw, copies[name])
    assert all(torch.equal(values[name], value) for name, value in kept.items())


@pytest.mark.parametrize(("rule", "start"), CASES)
def test_a_user_who_teaches_nothing_sends_padding_alone(rule: str, start: str) -> None:
    made = learner(rule, start)
    taught_u = torch.tensor([True, False, True])
    sections = made.sent(made.copies(numbered(made), ACTIVE), ACTIVE, taught_u)
    for section in sections.values():
        assert section.valid_uk.any(1).tolist()[1] is False
        assert section.valid_uk[0].any()


@pytest.mark.parametrize(("rule", "start"), CASES)
def test_parameters_are_those_of_each_users_units(rule: str, start: str) -> None:
    made = learner(rule, start)
    values = numbered(made)
    found = made.parameters(made.copies(values, ACTIVE), ACTIVE)
    assert found.units.shape == (USERS, MODULES, MOST, made.rule.unit_width)
    assert found.shared.shape == (USERS, made.rule.shared_width)
    if rule == "sgd":
        return
    for u, j, k in ACTIVE.valid_ujk.nonzero().tolist():
        unit = j * RANK + int(ACTIVE.ids_ujk[u, j, k])
        assert torch.equal(found.units[u, j, k], values[RATES_OF_UNITS][unit])
    assert torch.equal(found.shared, values[SHARED_RATES].expand(USERS, -1))


@pytest.mark.parametrize(("rule", "start"), CASES)
def test_before_anything_is_learned_rows_start_as_the_pools_own(rule: str, start: str) -> None:
    made = learner(rule, start)
    values = {**numbered(made), **made.initial(Streams(1))}
    copies = made.copies(values, ACTIVE)
    features = torch.randn(USERS, MODEL.base.feature_width if start == "contextual" else 0)
    started = made.start(copies, ACTIVE, features)
    assert all(torch.equal(started[name], copies[name]) for name in MODEL.spec.sections(MOST))
    assert list(started) == list(MODEL.spec.sections(MOST))


@pytest.mark.parametrize("own", [None, 0.5])
@pytest.mark.parametrize(
    ("rule", "setting", "usual"),
    [
        ("sgd", "local.learning_rate", 0.125),
        ("rates", "local.learning_rate", 0.125),
        ("learned", "meta.rule.learning_rate", 0.01),
    ],
)
def test_a_rules_rate_is_its_own_or_the_usual_one(rule: str, setting: str, usual: float, own: float | None) -> None:
    described = {
        "local": {"learning_rate": 0.125},
        "meta": {"signal": "fomaml", "rule": {"name": rule, "learning_rate": own}},
    }
    config = parse(TaskConfig, described)
    expected = (setting, usual) if own is None else ("meta.rule.learning_rate", own)
    assert rate_of(config.meta, config.local) == expected
    assert learner_of(config.meta, config.local, MODEL).rule.learning_rate == expected[1]


def test_a_task_makes_the_learner_that_it_describes() -> None:
    config = parse(
        TaskConfig,
        {
            "local": {"steps": 5, "learning_rate": 0.125},
            "meta": {"signal": "maml", "rule": {"name": "rates", "bound": 4.0}, "start": {"name": "contextual"}},
        },
    )
    made = learner_of(config.meta, config.local, MODEL)
    assert vars(made.rule) == {"modules": MODEL.spec.modules, "learning_rate": 0.125, "steps": 5, "bound": 4.0}
    assert made.network is not None
    assert (made.network.modules, made.network.rank, made.network.feature_width) == (MODULES, RANK, 5)
    assert made.network.contextual
