"""Outer signals: what U users send so that later users need only a few steps, by name, stacked over users.

| signal  | direction that is sent                                    | gradients it costs, K steps |
|---------|-----------------------------------------------------------|-----------------------------|
| delta   | rows after K steps of SGD minus rows before               | K                           |
| reptile | the same, where the steps see the query part too          | K + 1                       |
| fomaml  | minus the query loss's gradient, inner gradients constant | K + 1                       |
| maml    | minus the query loss's gradient, through all inner steps  | about 3 K + 1               |

Sources: Reptile (Nichol et al., 2018), MAML and FOMAML (Finn et al., ICML 2017). The last two are gradients with
respect to all that the adapted rows depend on: the pool's rows of the user's mask, the parameters of the update rule
and those of f_init. Per-unit rates cost nearly nothing: with constant inner gradients g_s, d query / d rate is
- <sum_s g_s, d query / d rows> (Meta-SGD).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from client.adapt import row_gradients, sgd
from client.inner import Inner
from federation.data.population import Batch
from federation.formats import RowFormat, quantise
from federation.meta_config import SignalName
from federation.pool.prefix import Prefix
from federation.pool.spec import Rows
from federation.rules import Parameters, Sgd, Stepped
from federation.update import Section

_RUNAWAY = 4.0
"""An inner loop diverged if it ends with so many times the query loss that it began with, or 1 nat if that is more."""


@dataclass(frozen=True)
class Lesson:
    """What a signal is made of.

    copies: of all that the adaptation depends on, (U, k, width) by section. batches: what the steps see, in turn.
    query_steps: after which steps the query loss counts, ascending. recompute: whether activations are computed again.
    written: how the difference to the pool is written before the query loss, as it will be kept. Its rounding counts as
    the identity in gradients (straight through; Bengio et al., 2013).
    """

    inner: Inner
    copies: Mapping[str, Tensor]
    batches: Sequence[Batch]
    steps: int
    query: Batch
    query_steps: Sequence[int]
    recompute: bool = False
    written: RowFormat = field(default_factory=lambda: RowFormat("fp32"))

    def batch(self, at: int) -> Batch:
        """What the step after `at` others sees."""
        return self.batches[at % len(self.batches)]

    def prefix(self, at: int) -> AbstractContextManager[None]:
        """In which what is frozen below the adapters is computed once for each batch that steps see again."""
        known = self._prefixes[at % len(self.batches)]
        return known.remembered() if self.steps > len(self.batches) else nullcontext()

    @cached_property
    def _prefixes(self) -> list[Prefix]:
        return [Prefix() for _ in self.batches]

    def as_kept(self, rows: Rows) -> dict[str, Tensor]:
        """The rows as they are read back, with the gradients of the rows themselves."""
        if self.written.kind == "fp32":
            return dict(rows)
        ids, valid = self.inner.active.ids_ujk.int(), self.inner.active.valid_ujk
        changed = {
            name: Section(ids[:, j], valid[:, j], (row - self.copies[name]).detach())
            for j, (name, row) in enumerate(rows.items())
        }
        read = quantise(changed, {"pool": self.written})
        return {name: row + (self.copies[name] + read[name].rows_ukw - row).detach() for name, row in rows.items()}


@dataclass(frozen=True)
class Outer:
    """What U users send: (U, k, width) by section, directions of improvement.

    support_loss_u: before the first step. query_loss_u: after the last that counts, and first_query_loss_u before the
    first; None for signals without them.
    """

    directions: Mapping[str, Tensor]
    support_loss_u: Tensor
    query_loss_u: Tensor | None = None
    first_query_loss_u: Tensor | None = None

    def withheld(self, query: Batch) -> Tensor:
        """(U,) bool, whose update would teach nothing: its inner loop diverged, or it has no query example."""
        if self.query_loss_u is None or self.first_query_loss_u is None:
            return torch.zeros_like(self.support_loss_u, dtype=torch.bool)
        finite_u = self.query_loss_u.isfinite()
        for direction in self.directions.values():
            finite_u = finite_u & direction.flatten(1).isfinite().all(1)
        runaway_u = self.query_loss_u > _RUNAWAY * self.first_query_loss_u.clamp_min(1.0)
        return ~finite_u | runaway_u | (query.weight.sum(1) == 0)


Signal = Callable[[Lesson], Outer]


def delta(lesson: Lesson) -> Outer:
    """Trained minus given rows."""
    return _difference(lesson, lesson.batches, lesson.steps)


def reptile(lesson: Lesson) -> Outer:
    """As `delta`, with a last step on the query part: Reptile knows no parts."""
    seen = [lesson.batch(at) for at in range(lesson.steps)]
    return _difference(lesson, [*seen, lesson.query], lesson.steps + 1)


def fomaml(lesson: Lesson) -> Outer:
    """The gradient of the query loss, where inner gradients are constants."""
    copies = _leaves(lesson.copies)
    trail, support_loss_u = _unrolled(lesson, copies, lesson.inner.first_order)
    query_loss_u, loss = _query(lesson, trail)
    return Outer(_descent(loss, copies), support_loss_u, query_loss_u, _query_loss(lesson, trail[0]))


def maml(lesson: Lesson) -> Outer:
    """The gradient of the query loss through all inner steps, which holds the activations of them all; or, with
    `recompute`, those of one step at a time, each computed once more."""
    if lesson.recompute:
        return _maml_recomputed(lesson)
    copies = _leaves(lesson.copies)
    trail, support_loss_u = _unrolled(lesson, copies, lesson.inner.second_order)
    query_loss_u, loss = _query(lesson, trail)
    return Outer(_descent(loss, copies), support_loss_u, query_loss_u, _query_loss(lesson, trail[0]))


def rested(lesson: Lesson) -> Outer:
    """Of a round in which the pool rests: nothing moves."""
    with torch.no_grad(), lesson.inner.model.bound(lesson.copies):
        loss_u = lesson.inner.model.loss(lesson.batch(0))
    return Outer({name: torch.zeros_like(copy) for name, copy in lesson.copies.items()}, loss_u)


SIGNALS: Mapping[SignalName, Signal] = {"delta": delta, "reptile": reptile, "fomaml": fomaml, "maml": maml}


def _difference(lesson: Lesson, batches: Sequence[Batch], steps: int) -> Outer:
    inner, rule = lesson.inner, lesson.inner.learner.rule
    assert isinstance(rule, Sgd), "what is learned besides the pool needs an outer gradient: see MetaConfig"
    trained, loss_u = sgd(inner.model, lesson.copies, batches, steps, rule.learning_rate, inner.factors)
    return Outer({name: row - lesson.copies[name] for name, row in trained.items()}, loss_u)


Step = Callable[..., tuple[Stepped, Tensor]]


def _unrolled(lesson: Lesson, copies: Mapping[str, Tensor], step: Step) -> tuple[list[Stepped], Tensor]:
    """The rows before and after every step, and the loss before the first."""
    inner = lesson.inner
    start, parameters = inner.start(copies), inner.parameters(copies)
    trail, losses = [inner.learner.rule.begin(start)], []
    for at in range(lesson.steps):
        with lesson.prefix(at):
            now, loss_u = step(parameters, start, trail[-1], lesson.batch(at), at)
        trail.append(now)
        losses.append(loss_u)
    return trail, losses[0]


def _query(lesson: Lesson, trail: Sequence[Stepped]) -> tuple[Tensor, Tensor]:
    """The query loss after the last step that counts (U,), and the sum over users of the mean over those steps."""
    losses = []
    for at in lesson.query_steps:
        with lesson.inner.model.bound(lesson.as_kept(trail[at].rows)):
            losses.append(lesson.inner.model.loss(lesson.query))
    return losses[-1].detach(), torch.stack(losses).mean(0).sum()


@torch.no_grad()
def _query_loss(lesson: Lesson, at: Stepped) -> Tensor:
    """(U,): as `_query` measures it, without a gradient."""
    with lesson.inner.model.bound(lesson.as_kept(at.rows)):
        return lesson.inner.model.loss(lesson.query)


def _leaves(tensors: Rows) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _descent(loss: Tensor, copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Minus the gradient; zero for what the loss does not depend on.

    That is why a step of second order must not run the fast forms: their gradients would count as constants, unsaid.
    """
    gradients = torch.autograd.grad(loss, list(copies.values()), allow_unused=True, materialize_grads=True)
    return {name: -gradient for name, gradient in zip(copies, gradients, strict=True)}


def _maml_recomputed(lesson: Lesson) -> Outer:
    """Exact MAML, step by step backwards: rows are kept, a step's activations live while it is differentiated."""
    inner, copies = lesson.inner, _leaves(lesson.copies)
    start, parameters = inner.start(copies), inner.parameters(copies)
    with torch.no_grad():
        trail, support_loss_u = _unrolled(lesson, lesson.copies, inner.first_order)
    found = {at: _query_slope(lesson, trail[at]) for at in lesson.query_steps}
    slopes = {at: slope for at, (_, slope) in found.items()}
    fixed = [*start.values(), parameters.units, parameters.shared]
    onto_now = [torch.zeros_like(t) for t in _tensors(trail[-1])]
    onto_fixed = [torch.zeros_like(t) for t in fixed]
    for at in reversed(range(lesson.steps)):
        onto_now = _plus(onto_now, slopes.get(at + 1, []))
        onto_now, more = _step_back(lesson, start, parameters, trail[at], at, onto_now)
        onto_fixed = _plus(onto_fixed, more)
    onto_fixed = _plus(onto_fixed, _plus(onto_now, slopes.get(0, []))[: len(start)])
    learned = [(t, onto) for t, onto in zip(fixed, onto_fixed, strict=True) if t.requires_grad]
    loss = torch.stack([(t * onto).sum() for t, onto in learned]).sum()
    query_loss_u, _ = found[lesson.query_steps[-1]]
    return Outer(_descent(loss, copies), support_loss_u, query_loss_u, _query_loss(lesson, trail[0]))


def _query_slope(lesson: Lesson, at: Stepped) -> tuple[Tensor, list[Tensor]]:
    """The query loss (U,), and the gradient of its part of the whole with respect to rows."""
    loss_u, gradients = row_gradients(lesson.inner.model, lesson.as_kept(at.rows), lesson.query)
    return loss_u, [gradient / len(lesson.query_steps) for gradient in gradients]


def _step_back(
    lesson: Lesson, start: Rows, parameters: Parameters, before: Stepped, at: int, onto_after: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """From gradients of what follows a step to those of what precedes it, and of what all steps depend on."""
    now, fixed = Stepped(_leaves(before.rows), _leaves(before.memory)), _leaves(start)
    units, shared = (t.detach().requires_grad_() for t in (parameters.units, parameters.shared))
    with lesson.prefix(at):
        after, _ = lesson.inner.second_order(Parameters(units, shared), fixed, now, lesson.batch(at), at)
    inputs = [*_tensors(now), *fixed.values(), units, shared]
    found = torch.autograd.grad(_tensors(after), inputs, onto_after, allow_unused=True, materialize_grads=True)
    preceding = len(_tensors(now))
    return list(found[:preceding]), list(found[preceding:])


def _tensors(state: Stepped) -> list[Tensor]:
    return [*state.rows.values(), *state.memory.values()]


def _plus(tensors: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """With the first of them raised by those of `more`."""
    return [*(a + b for a, b in zip(tensors, more)), *tensors[len(more) :]]
