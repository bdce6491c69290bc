"""Query losses of rows as they will be kept: the value of rounded rows, the gradient of the rows themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.adapt import row_gradients
from client.meta import Lesson, fomaml, maml
from client.round import RoundData, RoundState, local_round
from federation.codec import decode_personal, encode_personal
from federation.formats import RowFormat, quantise
from federation.pool.spec import Rows
from federation.streams import Streams
from federation.update import Schema, Section, SectionSpec
from tests import models
from tests.client.lessons import USERS, MakeBase, lesson_of, task_of, trained_values

COARSE = [RowFormat("int8"), RowFormat("ternary", 0.4), RowFormat("fp16")]
BASES = [models.mlp, models.gpt2]


def settings(signal: str, rule: str = "sgd", start: str = "pool", **more: Any) -> dict[str, Any]:
    return {"signal": signal, "rule": {"name": rule}, "start": {"name": start}, **more}


def written_lesson(make: MakeBase, written: RowFormat, signal: str = "maml", rule: str = "sgd", **more: Any) -> Lesson:
    start = more.pop("start", "pool")
    return replace(lesson_of(make, settings(signal, rule, start, **more)), written=written)


def read_back(lesson: Lesson, rows: Rows) -> dict[str, Tensor]:
    """The rows with every user's difference to its copies encoded to bytes, and those decoded."""
    modules, active = lesson.inner.model.spec.modules, lesson.inner.active
    rank = lesson.inner.model.spec.rank
    schema = Schema({m.section: SectionSpec(rank, {"down": m.d_in, "up": m.d_out}, rank) for m in modules})
    sections = {
        m.section: Section(
            active.ids_ujk[:, j].int(), active.valid_ujk[:, j], (rows[m.section] - lesson.copies[m.section]).detach()
        )
        for j, m in enumerate(modules)
    }
    found = {m.section: lesson.copies[m.section].clone() for m in modules}
    for u in range(USERS):
        data = encode_personal(sections, u, schema, {"pool": lesson.written}, "")
        for j, (name, decoded) in enumerate(decode_personal(data, schema, "").items()):
            found[name][u, active.valid_ujk[u, j]] += decoded.rows_ukw[0]
    return found


def end_of(lesson: Lesson, steps: int | None = None) -> dict[str, Tensor]:
    """The rows after the lesson's steps, without a graph."""
    inner = lesson.inner
    start, parameters = inner.start(lesson.copies), inner.parameters(lesson.copies)
    now = inner.learner.rule.begin(start)
    for at in range(lesson.steps if steps is None else steps):
        now = inner.first_order(parameters, start, now, lesson.batch(at), at)[0]
    return {name: row.detach() for name, row in now.rows.items()}


@pytest.mark.parametrize("written", COARSE, ids=lambda written: written.kind)
@pytest.mark.parametrize("start", ["pool", "contextual"])
def test_rows_are_what_is_read_from_their_bytes(written: RowFormat, start: str) -> None:
    lesson = written_lesson(models.mlp, written, rule="rates", start=start)
    rows = end_of(lesson)
    kept, expected = lesson.as_kept(rows), read_back(lesson, rows)
    for j, m in enumerate(lesson.inner.model.spec.modules):
        used = lesson.inner.active.valid_ujk[:, j]
        torch.testing.assert_close(kept[m.section][used], expected[m.section][used], rtol=1e-6, atol=1e-6)
        assert not torch.equal(kept[m.section][used], rows[m.section][used])


@pytest.mark.parametrize("written", COARSE, ids=lambda written: written.kind)
def test_the_gradient_goes_through_as_if_nothing_were_rounded(written: RowFormat) -> None:
    lesson = written_lesson(models.mlp, written)
    rows = {name: row.requires_grad_() for name, row in end_of(lesson).items()}
    generator = torch.Generator().manual_seed(6)
    slopes = {name: torch.randn(row.shape, generator=generator) for name, row in rows.items()}
    loss = torch.stack([(row * slopes[name]).sum() for name, row in lesson.as_kept(rows).items()]).sum()
    for name, gradient in zip(rows, torch.autograd.grad(loss, list(rows.values())), strict=True):
        assert torch.equal(gradient, slopes[name])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("written", COARSE, ids=lambda written: written.kind)
@pytest.mark.parametrize("make", BASES)
def test_the_query_loss_is_that_of_the_rows_read_back(make: MakeBase, written: RowFormat) -> None:
    lesson = written_lesson(make, written, rule="rates", start="contextual", query_steps=(1, 3))
    found = maml(lesson)
    assert found.query_loss_u is not None
    assert found.first_query_loss_u is not None
    for steps, loss_u in ((0, found.first_query_loss_u), (3, found.query_loss_u)):
        expected_u, _ = row_gradients(lesson.inner.model, read_back(lesson, end_of(lesson, steps)), lesson.query)
        torch.testing.assert_close(loss_u, expected_u, rtol=1e-10, atol=0)
    plain = maml(replace(lesson, written=RowFormat("fp32"))).query_loss_u
    assert plain is not None
    assert (plain - found.query_loss_u).abs().max() > 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("written", COARSE, ids=lambda written: written.kind)
@pytest.mark.parametrize("query_steps", [(), (0, 3)])
def test_what_is_sent_is_the_gradient_at_the_rounded_point(written: RowFormat, query_steps: tuple[int, ...]) -> None:
    """With constant inner gradients and plain SGD, d rows / d copies is the identity: so FOMAML sends minus the slope
    of the query loss at the rows as they are read back, mean over the steps that count."""
    lesson = written_lesson(models.mlp, written, "fomaml", query_steps=query_steps)
    found = fomaml(lesson).directions
    at = [read_back(lesson, end_of(lesson, steps)) for steps in lesson.query_steps]
    slopes = [row_gradients(lesson.inner.model, rows, lesson.query)[1] for rows in at]
    plain = fomaml(replace(lesson, written=RowFormat("fp32"))).directions
    for j, m in enumerate(lesson.inner.model.spec.modules):
        expected = -torch.stack([slope[j] for slope in slopes]).mean(0)
        used = lesson.inner.active.valid_ujk[:, j]
        torch.testing.assert_close(found[m.section][used], expected[used], rtol=1e-9, atol=1e-12)
        assert (found[m.section] - plain[m.section])[used].norm() > 1e-7 * plain[m.section][used].norm()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("written", COARSE, ids=lambda written: written.kind)
@pytest.mark.parametrize("query_steps", [(), (0, 3), (1, 3)])
@pytest.mark.parametrize(("rule", "start"), [("sgd", "pool"), ("rates", "contextual")])
def test_activations_that_are_computed_again_change_nothing_but_rounding(
    rule: str, start: str, query_steps: tuple[int, ...], written: RowFormat
) -> None:
    lesson = written_lesson(models.mlp, written, "maml", rule, start=start, query_steps=query_steps)
    whole, again = maml(lesson), maml(replace(lesson, recompute=True))
    for one, other in (
        (whole.query_loss_u, again.query_loss_u),
        (whole.first_query_loss_u, again.first_query_loss_u),
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for name, direction in whole.directions.items():
        torch.testing.assert_close(again.directions[name], direction, rtol=1e-5, atol=1e-9)
        assert direction.any()


@pytest.mark.usefixtures("float64")
def test_exact_maml_is_the_slope_of_the_loss_whose_rounding_is_a_constant() -> None:
    """Straight through: minus the slope, along a line, of the query loss of rows + (what rounding added at the point
    itself), by finite differences."""
    lesson = written_lesson(models.mlp, RowFormat("ternary", 0.4), rule="rates", start="contextual")
    ended = end_of(lesson)
    added = {name: row - ended[name] for name, row in read_back(lesson, ended).items()}
    found, step, generator = maml(lesson).directions, 1e-5, torch.Generator().manual_seed(4)

    def loss_at(name: str, moved: Tensor) -> Tensor:
        rows = end_of(replace(lesson, copies={**lesson.copies, name: moved}))
        with torch.no_grad(), lesson.inner.model.bound({n: row + added[n] for n, row in rows.items()}):
            return lesson.inner.model.loss(lesson.query)

    for name, copy in lesson.copies.items():
        line = torch.randn(copy.shape, generator=generator)
        slope_u = (loss_at(name, copy + step * line) - loss_at(name, copy - step * line)) / (2 * step)
        sent_u = -(found[name] * line).flatten(1).sum(1)
        torch.testing.assert_close(sent_u, slope_u, rtol=1e-4, atol=1e-8, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("signal", ["maml", "fomaml"])
def test_fp32_changes_no_bit(signal: Any) -> None:
    lesson = lesson_of(models.mlp, settings(signal, "rates", "contextual"))
    rows = end_of(lesson)
    assert all(kept is rows[name] for name, kept in lesson.as_kept(rows).items())
    assert lesson.written == RowFormat("fp32")


@pytest.mark.parametrize("rows", ["ternary", "fp32"])
def test_a_round_measures_what_it_is_told_to_write(rows: str) -> None:
    """What users send in a round, against steps of SGD from the pool's rows, rounded, and the slope there."""
    written = RowFormat("ternary", 0.4) if rows == "ternary" else RowFormat("fp32")
    meta = {"signal": "fomaml", "written": {"rows": written.kind, "top": written.top}}
    task, ids = task_of(models.mlp, meta, steps=2, learning_rate=0.1), np.arange(USERS)
    values, model, size = trained_values(task), task.model, task.config.local.examples
    support, query = (models.batch_for(model.base, USERS, n, n) for n in (2 * size, task.config.local.query_examples))
    fresh, streams = task.record_layout.fresh(ids), Streams(5).at("round", 7)
    update = local_round(model, RoundState(values, 7, "v"), fresh, RoundData(support, query), task.local, streams)[0]
    units = {m.section: update.sections[m.section] for m in model.spec.modules}
    assert all(section.valid_uk.all() for section in units.values())
    first = {name: values[name][section.ids_uk.long()] for name, section in units.items()}
    now = first
    for step in range(2):
        slopes = row_gradients(model, now, support.window(step * size, (step + 1) * size))[1]
        now = {name: row - 0.1 * slope for (name, row), slope in zip(now.items(), slopes, strict=True)}
    changed = {name: replace(units[name], rows_ukw=row - first[name]) for name, row in now.items()}
    read = quantise(changed, {"pool": written})
    kept = {name: row + read[name].rows_ukw for name, row in first.items()}
    loss_u, slopes = row_gradients(model, kept, query)
    torch.testing.assert_close(update.metrics["query_loss"], loss_u, rtol=1e-5, atol=1e-6)
    for name, slope in zip(first, slopes, strict=True):
        torch.testing.assert_close(units[name].rows_ukw, -slope, rtol=1e-4, atol=1e-6)
