"""The inner loop in a round and in serving: one loop, of first and of second order, stacked or alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from client.adapt import ByRule, row_gradients, sgd, tuned
from client.inner import Inner
from client.meta import Lesson
from federation.learner import ActiveUnits
from tests import models
from tests.client.lessons import USERS, MakeBase, lesson_of, steps_of

RULES = ["sgd", "rates", "learned"]


def lesson(make: MakeBase, rule: str, **local: Any) -> Lesson:
    start = "pool" if rule == "sgd" else "contextual"
    return lesson_of(make, {"signal": "fomaml", "rule": {"name": rule}, "start": {"name": start}}, **local)


@pytest.mark.parametrize("train", ["both", "down", "up"])
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
def test_without_anything_learned_it_is_sgd(make: MakeBase, train: str) -> None:
    given = lesson(make, "sgd", train=train)
    rows, first_loss_u = sgd(given.inner.model, given.copies, given.batches, given.steps, 0.3, given.inner.factors)
    stepped = list(steps_of(given.inner, given.copies, given.batches))
    assert len(stepped) == given.steps
    torch.testing.assert_close(stepped[0][1], first_loss_u)
    for name, row in stepped[-1][0].rows.items():
        torch.testing.assert_close(row, rows[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(row, given.copies[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
def test_steps_are_those_of_the_rule_along_the_gradients_and_of_a_tuner(make: MakeBase, rule: str) -> None:
    """A device that serves walks by `tuned`, with the rule's parameters as it was sent them."""
    given = lesson(make, rule)
    inner, losses = given.inner, []

    def gradients_of(rows: Any, at: int) -> list[torch.Tensor]:
        loss_u, gradients = row_gradients(inner.model, rows, given.batch(at))
        losses.append(loss_u)
        return gradients

    by_rule = ByRule(inner.learner.rule, inner.parameters(given.copies))
    served = tuned(by_rule, gradients_of, inner.start(given.copies), given.steps)
    stepped = list(steps_of(inner, given.copies, iter(given.batches)))
    for name, row in stepped[-1][0].rows.items():
        torch.testing.assert_close(row, served[name], rtol=1e-6, atol=1e-7)
    for (_, loss_u), expected_u in zip(stepped, losses, strict=True):
        torch.testing.assert_close(loss_u, expected_u, rtol=1e-6, atol=0)


@pytest.mark.parametrize("train", ["both", "up"])
@pytest.mark.parametrize("rule", ["sgd", "rates"])
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
def test_a_step_of_second_order_goes_where_one_of_first_order_goes(make: MakeBase, rule: str, train: str) -> None:
    given = lesson(make, rule, train=train)
    inner = given.inner
    leaves = {name: copy.detach().requires_grad_() for name, copy in given.copies.items()}
    start, parameters = inner.start(leaves), inner.parameters(leaves)
    cheap = exact = inner.learner.rule.begin(start)
    for at in range(given.steps):
        cheap, cheap_loss_u = inner.first_order(parameters, start, cheap, given.batch(at), at)
        exact, exact_loss_u = inner.second_order(parameters, start, exact, given.batch(at), at)
        torch.testing.assert_close(exact_loss_u, cheap_loss_u, rtol=1e-5, atol=0)
    for name, row in exact.rows.items():
        torch.testing.assert_close(row, cheap.rows[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
def test_a_user_alone_walks_as_among_others(make: MakeBase, rule: str) -> None:
    given = lesson(make, rule)
    together = [stepped.rows for stepped, _ in steps_of(given.inner, given.copies, given.batches)]
    for u in range(USERS):
        one, whole = slice(u, u + 1), given.inner
        active = ActiveUnits(whole.active.ids_ujk[one], whole.active.valid_ujk[one])
        alone = Inner(whole.model, whole.learner, active, whole.features_uf[one], whole.factors)
        copies = {name: copy[one] for name, copy in given.copies.items()}
        for rows, (stepped, _) in zip(
            together, steps_of(alone, copies, [batch.take(one) for batch in given.batches]), strict=True
        ):
            for name, row in rows.items():
                torch.testing.assert_close(stepped.rows[name][0], row[u], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_padding_stays_zero_in_every_step(rule: str) -> None:
    given = lesson(models.mlp, rule)
    valid_ujk = given.inner.active.valid_ujk
    assert not valid_ujk.all()
    for stepped, _ in steps_of(given.inner, given.copies, given.batches):
        for j, row in enumerate(stepped.rows.values()):
            assert not row[~valid_ujk[:, j]].any()
            assert row[valid_ujk[:, j]].any()


@pytest.mark.parametrize("factor", ["down", "up"])
@pytest.mark.parametrize("rule", RULES)
def test_a_factor_that_does_not_step_stays_where_it_starts(rule: str, factor: str) -> None:
    given = lesson(models.mlp, rule, train="up" if factor == "down" else "down")
    begun = given.inner.start(given.copies)
    *_, (last, _) = steps_of(given.inner, given.copies, given.batches)
    for m in given.inner.model.spec.modules:
        parts = torch.split(last.rows[m.section] - begun[m.section], [m.d_in, m.d_out], 2)
        still, moved = parts if factor == "down" else parts[::-1]
        assert not still.any()
        assert moved.any()
