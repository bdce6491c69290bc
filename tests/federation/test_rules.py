"""Update rules against their equations, unit by unit, and against parameters that have run away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federation.meta_config import RuleConfig
from federation.pool.spec import ModuleSpec
from federation.rules import Learned, Parameters, Rates, Rule, Sgd, Stepped, rule_of

MODULES = (ModuleSpec("a", 3, 4), ModuleSpec("b", 2, 5))
USERS, ROWS, STEPS, RATE, BOUND, HIDDEN = 2, 3, 4, 0.3, 16.0, 5
RULES = ("sgd", "rates", "learned")
FACTORS = [(j, m.section, u, k, column) for j, m in enumerate(MODULES) for u in range(USERS) for k in range(ROWS)
           for column in range(2)]  # fmt: skip
OFF = -1e3
"""A logit whose sigmoid is 0."""


def rule(name: str) -> Rule:
    return rule_of(RuleConfig(name=name, learning_rate=RATE, bound=BOUND, hidden=HIDDEN), MODULES, RATE, STEPS)


def randoms(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {m.section: torch.randn(USERS, ROWS, m.width, generator=generator) for m in MODULES}


def parameters(name: str, spread: float = 0.5, seed: int = 0) -> Parameters:
    made, generator = rule(name), torch.Generator().manual_seed(seed)
    unit, shared = made.first(generator)
    units = unit.expand(USERS, len(MODULES), ROWS, -1) + spread * torch.randn(
        USERS, len(MODULES), ROWS, made.unit_width, generator=generator
    )
    return Parameters(units, shared + spread * torch.randn(USERS, made.shared_width, generator=generator))


def without_decay_and_momentum(given: Parameters) -> Parameters:
    units, shared = given.units.clone(), given.shared.clone()
    units[..., 2], shared[:, STEPS] = OFF, OFF
    return Parameters(units, shared)


def columns(j: int, column: int) -> slice:
    """Of a factor in the rows of module j: 0 down, 1 up."""
    return slice(0, MODULES[j].d_in) if column == 0 else slice(MODULES[j].d_in, MODULES[j].width)


def walk(made: Rule, given: Parameters, start: dict[str, Tensor], gradients: Sequence[dict[str, Tensor]]) -> Stepped:
    now = made.begin(start)
    for at, gradient in enumerate(gradients):
        now = made.step(given, start, now, list(gradient.values()), at)
    return now


# -------------------------------------------------------------------------------- what all rules hold


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_parameters_of_the_widths_that_it_says_and_changes_nothing_that_it_was_given(name: str) -> None:
    made = rule(name)
    unit, shared = made.first(torch.Generator().manual_seed(0))
    assert (unit.shape, shared.shape) == ((made.unit_width,), (made.shared_width,))
    given, start, gradients = parameters(name), randoms(1), [randoms(seed) for seed in (2, 3)]
    kept = [t.clone() for t in (*start.values(), *gradients[0].values(), *gradients[1].values())]
    first = made.step(given, start, made.begin(start), list(gradients[0].values()), 0)
    rows = {section: row.clone() for section, row in first.rows.items()}
    again = walk(made, given, start, gradients)
    assert all(torch.equal(first.rows[section], row) for section, row in rows.items())
    left = (*start.values(), *gradients[0].values(), *gradients[1].values())
    assert all(torch.equal(a, b) for a, b in zip(kept, left, strict=True))
    assert list(again.rows) == [m.section for m in MODULES]
    assert all(not torch.equal(again.rows[section], row) for section, row in rows.items())


def test_sgd_is_sgd() -> None:
    start, gradients = randoms(1), [randoms(2), randoms(3)]
    now = walk(Sgd(RATE), parameters("sgd"), start, gradients)
    for section, row in now.rows.items():
        torch.testing.assert_close(row, start[section] - RATE * (gradients[0][section] + gradients[1][section]))


@pytest.mark.parametrize("name", ["rates", "learned"])
@pytest.mark.parametrize("size", [0.0, 1e30])
def test_zero_rows_and_gradients_and_huge_ones_are_no_nan(name: str, size: float) -> None:
    """A unit of padding is zero, and so is its gradient."""
    made, start = rule(name), {section: torch.zeros_like(row) for section, row in randoms(1).items()}
    given = parameters(name)
    leaves = Parameters(given.units.requires_grad_(), given.shared.requires_grad_())
    gradients = [{section: torch.full_like(row, size) for section, row in start.items()}] * 2
    now = walk(made, leaves, start, gradients)
    found = torch.autograd.grad(
        torch.stack([row.sum() for row in now.rows.values()]).sum(), [leaves.units, leaves.shared]
    )
    if size == 0.0 and name == "rates":
        assert all(not row.any() for row in now.rows.values())
    if size == 0.0:
        assert all(row.isfinite().all() for row in now.rows.values())
        assert all(part.isfinite().all() for part in found)
    if size and name == "rates":
        assert all(row.isfinite().all() for row in now.rows.values())


# -------------------------------------------------------------------------------- rates


@pytest.mark.usefixtures("float64")
def test_rates_follow_their_equation_unit_by_unit() -> None:
    """Also after the last step that has a rate of its own."""
    given, start, gradients = parameters("rates"), randoms(1), [randoms(seed) for seed in range(2, 2 + STEPS + 2)]
    now = walk(rule("rates"), given, start, gradients)
    for j, section, u, k, column in FACTORS:
        own, most = (u, k, columns(j, column)), math.log(BOUND)
        rows, velocity = start[section][own], torch.zeros(columns(j, column).stop - columns(j, column).start)
        decay, momentum = given.units[u, j, k, 2].sigmoid(), given.shared[u, STEPS].sigmoid()
        for at, gradient in enumerate(gradients):
            log_rate = float(given.units[u, j, k, column] + given.shared[u, min(at, STEPS - 1)])
            velocity = momentum * velocity + gradient[section][own]
            rate = RATE * math.exp(most * math.tanh(log_rate / most))
            rows = rows - rate * velocity - decay * (rows - start[section][own])
        torch.testing.assert_close(now.rows[section][own], rows, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_a_step_beyond_the_known_ones_is_as_the_last() -> None:
    given, start, now, gradient = parameters("rates"), randoms(1), Stepped(randoms(2), randoms(3)), randoms(4)
    made = rule("rates")
    steps = [made.step(given, start, now, list(gradient.values()), at) for at in range(STEPS + 3)]
    for section in start:
        later = [step.rows[section] for step in steps[STEPS - 1 :]]
        assert all(torch.equal(later[0], row) for row in later)
        assert not torch.equal(steps[STEPS - 2].rows[section], later[0])


def test_rates_begin_as_nearly_plain_descent() -> None:
    given, start, gradients = parameters("rates", spread=0.0), randoms(1), [randoms(2), randoms(3)]
    moved = walk(rule("rates"), given, start, gradients)
    plain = walk(Sgd(RATE), parameters("sgd"), start, gradients)
    off = walk(rule("rates"), without_decay_and_momentum(given), start, gradients)
    for section, row in plain.rows.items():
        assert 0 < (moved.rows[section] - row).norm() < 0.06 * (row - start[section]).norm()
        torch.testing.assert_close(off.rows[section], row, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["rates", "learned"])
@pytest.mark.parametrize("unit", [-1e6, -30.0, 0.0, 30.0, 1e6])
@pytest.mark.parametrize("shared", [-1e6, 0.0, 1e6])
def test_no_parameters_take_a_rule_out_of_its_bounds(name: str, unit: float, shared: float) -> None:
    given = parameters(name)
    given = Parameters(torch.full_like(given.units, unit), torch.full_like(given.shared, shared))
    leaves = Parameters(given.units.requires_grad_(), given.shared.requires_grad_())
    made, start, rows, velocity, gradient = rule(name), randoms(1), randoms(2), randoms(3), randoms(4)
    now = made.step(leaves, start, Stepped(rows, velocity), list(gradient.values()), 1)
    still = {section: torch.zeros_like(row) for section, row in start.items()}
    pulled = made.step(leaves, start, Stepped(rows, still), list(still.values()), 1)
    for section, row in now.rows.items():
        kept = (now.memory[section] - gradient[section]) / velocity[section]
        assert ((kept > -1e-5) & (kept < 1 + 1e-5)).all()
        if name == "rates":
            share = (pulled.rows[section] - start[section]) / (rows[section] - start[section])
            assert ((share > -1e-5) & (share < 1 + 1e-5)).all()
            rate = -(row - pulled.rows[section]) / now.memory[section]
            assert ((rate > RATE / BOUND * 0.99 - 1e-4) & (rate < RATE * BOUND * 1.01)).all()
        else:  # along is of root mean square 1, so an entry is at most sqrt(width); the MLP adds at most 2
            assert ((row - rows[section]).abs() <= RATE * BOUND * 5 + (rows[section] - start[section]).abs()).all()
    total = torch.stack([row.square().sum() for row in now.rows.values()]).sum()
    for slope in torch.autograd.grad(total, [leaves.units, leaves.shared]):
        assert slope.isfinite().all()


# -------------------------------------------------------------------------------- the learned rule


def factor_inputs(gradient: Tensor, along: Tensor, away: Tensor, at: int) -> Tensor:
    """What the MLP sees of one factor of one unit, (w, 5)."""
    size = gradient.square().mean().sqrt()
    rest = [torch.full_like(gradient, float(size.log()) / 10.0), away, torch.full_like(gradient, min(at / STEPS, 2.0))]
    return torch.stack([gradient / size, along, *rest], 1)


Seen = dict[tuple[int | str, ...], Tensor]
"""What the MLP saw, by factor and step."""


def learned_twin(
    given: Parameters, start: dict[str, Tensor], gradients: Sequence[dict[str, Tensor]], seen: Seen
) -> dict[str, Tensor]:
    """The learned rule's rows, factor by factor. `seen` keeps the MLP's inputs: those in it are taken as they are."""
    ends = {section: row.clone() for section, row in start.items()}
    most, memory = math.log(BOUND), STEPS + 1
    for place in FACTORS:
        j, section, u, k, column = place
        own, shared = (u, k, columns(j, column)), given.shared[u]
        inner, bias, outer, last = torch.split(shared[memory:], [5 * HIDDEN, HIDDEN, HIDDEN, 1])
        first = rows = start[section][own]
        velocity = torch.zeros_like(rows)
        for at, gradient in enumerate(gradients):
            g = gradient[section][own]
            velocity = shared[STEPS].sigmoid() * velocity + g
            along = velocity / velocity.square().mean().sqrt()
            away = ((rows - first) / first.square().mean().sqrt().clamp_min(1e-3)).clamp(-10, 10)
            inputs = seen.setdefault((*place, at), factor_inputs(g, along, away, at).detach())
            added = 2.0 * torch.tanh(torch.tanh(inputs @ inner.view(5, HIDDEN) + bias) @ outer + last)
            rate = RATE * (most * ((given.units[u, j, k, column] + shared[min(at, STEPS - 1)]) / most).tanh()).exp()
            rows = rows - rate * (along + added) - given.units[u, j, k, 2].sigmoid() * (rows - first)
        ends[section][own] = rows
    return ends


@pytest.mark.usefixtures("float64")
def test_the_learned_rule_follows_its_equations_and_takes_its_inputs_as_constants() -> None:
    """Slopes are those of finite differences in which the MLP goes on seeing what it saw."""
    given, start, gradients = parameters("learned", 0.3), randoms(1), [randoms(2), randoms(3), randoms(4)]
    lines, generator, step = randoms(5), torch.Generator().manual_seed(6), 1e-6
    leaves = Parameters(given.units.requires_grad_(), given.shared.requires_grad_())
    rows = walk(rule("learned"), leaves, start, gradients).rows
    total = torch.stack([(row * lines[section]).sum() for section, row in rows.items()]).sum()
    by_autograd = torch.autograd.grad(total, [leaves.units, leaves.shared])
    seen: Seen = {}
    with torch.no_grad():
        twin = learned_twin(given, start, gradients, seen)
        for section, row in rows.items():
            torch.testing.assert_close(row.detach(), twin[section], rtol=1e-11, atol=1e-12)

        def value(units: Tensor, shared: Tensor, seen: Seen) -> float:
            ends = learned_twin(Parameters(units, shared), start, gradients, seen)
            return float(sum((ends[section] * lines[section]).sum() for section in ends))

        for at, found in enumerate(by_autograd):
            line = step * torch.randn(found.shape, generator=generator)
            both = [
                [(given.units, given.shared)[i] + (sign * line if i == at else 0) for i in (0, 1)] for sign in (1, -1)
            ]
            slope = (value(*both[0], seen) - value(*both[1], seen)) / 2
            assert float((found * line).sum()) == pytest.approx(slope, rel=1e-5)
            free = (value(*both[0], {}) - value(*both[1], {})) / 2
            assert abs(free - slope) > 1e-3 * abs(slope), "what it sees hardly matters"


def test_the_learned_rule_takes_gradients_as_constants_though_they_have_a_graph() -> None:
    given, start, gradient = parameters("learned"), randoms(1), randoms(2)
    leaves = Parameters(given.units.requires_grad_(), given.shared.requires_grad_())
    for row in gradient.values():
        row.requires_grad_()
    total = torch.stack([row.sum() for row in walk(rule("learned"), leaves, start, [gradient]).rows.values()]).sum()
    slopes = torch.autograd.grad(total, [*gradient.values(), leaves.shared], allow_unused=True)
    assert [slope is None for slope in slopes] == [True, True, False]


def test_the_learned_rule_begins_as_descent_along_the_scaled_gradient() -> None:
    made = rule("learned")
    given = without_decay_and_momentum(parameters("learned", spread=0.0))
    start, gradients = randoms(1), [randoms(2), randoms(3)]
    gradients[1] = {section: 1e-3 * row for section, row in gradients[1].items()}
    now = walk(made, given, start, gradients)
    for j, section, u, k, column in FACTORS:
        own = (u, k, columns(j, column))
        directions = [g[section][own] / g[section][own].square().mean().sqrt() for g in gradients]
        expected = start[section][own] - RATE * (directions[0] + directions[1])
        torch.testing.assert_close(now.rows[section][own], expected, rtol=1e-5, atol=1e-6)


def test_the_learned_rules_first_mlp_has_something_to_learn() -> None:
    """Its last layer is zero, and has a gradient."""
    given = parameters("learned", spread=0.0)
    shared = given.shared.clone().requires_grad_()
    now = walk(rule("learned"), replace(given, shared=shared), randoms(1), [randoms(2)])
    slope = torch.autograd.grad(torch.stack([row.square().sum() for row in now.rows.values()]).sum(), shared)[0]
    outer = slice(-HIDDEN - 1, None)
    assert not given.shared[:, outer].any()
    assert slope[:, outer].ne(0).all()


def test_names_give_their_rules() -> None:
    assert isinstance(rule("sgd"), Sgd)
    assert rule("rates") == Rates(MODULES, RATE, STEPS, BOUND)
    assert rule("learned") == Learned(MODULES, RATE, STEPS, BOUND, HIDDEN)
