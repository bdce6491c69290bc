"""The laws that every strategy keeps, checked on random updates; `fedquilt check-strategy NAME` runs them.

A partial is opaque to all but its strategy, so two partials are the same when they finish to the same step.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from federation.streams import Streams
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from strategies.protocol import State, Step, StepSection, Strategy

TOLERANCE = 1e-4
"""Largest difference that rounding excuses, as a share of the largest number in the tensor."""

EXAMPLE_SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 3, "up": 2}, max_rows=4),
        "pool/b": SectionSpec(rows=5, factors={"down": 2, "up": 4}, max_rows=2),
        "gate": SectionSpec(rows=1, factors={"weights": 7}, max_rows=1),
    }
)


@dataclass(frozen=True)
class Finding:
    """A law that a strategy breaks, and how."""

    law: str
    detail: str

    def __str__(self) -> str:
        return f"{self.law}: {self.detail}"


@dataclass(frozen=True)
class Case:
    """A strategy, its state before the first round, and a source of random updates for it."""

    strategy: Strategy[Any]
    state: State
    streams: Streams

    def users(self, name: str, count: int) -> UpdateBlock:
        """The updates of `count` users; the same name gives the same users."""
        return random_block(self.state.schema, count, self.streams.at(name))

    def lift(self, name: str, count: int) -> Any:
        return self.strategy.lift(self.users(name, count), self.state)

    def finish(self, partial: Any) -> Step:
        return self.strategy.finish(partial, self.state)[0]


def check(strategy: Strategy[Any], schema: Schema = EXAMPLE_SCHEMA) -> list[Finding]:
    """What the strategy does against the laws; empty if it keeps them all. An exception is a finding too."""
    findings = []
    for law, details in LAWS.items():
        try:
            case = Case(strategy, strategy.init(schema), Streams(seed=0, path=("conformance",)))
            findings += [Finding(law, detail) for detail in details(case)]
        except Exception as error:  # a strategy under test may do anything
            findings.append(Finding(law, f"raised {error!r}"))
    return findings


def random_block(schema: Schema, users: int, streams: Streams) -> UpdateBlock:
    """Admitted updates of `users` users: distinct rows each, some padding, weights in (0.5, 1.5)."""
    generator = streams.generator("block")
    sections = {}
    for name, spec in schema.sections.items():
        order_ur = torch.rand(users, spec.rows, generator=generator).argsort(1)
        valid_uk = torch.rand(users, spec.max_rows, generator=generator) < 0.7
        rows_ukw = torch.randn(users, spec.max_rows, spec.width, generator=generator)
        sections[name] = Section(
            ids_uk=order_ur[:, : spec.max_rows].int().masked_fill(~valid_uk, 0),
            valid_uk=valid_uk,
            rows_ukw=rows_ukw.masked_fill(~valid_uk[..., None], 0.0),
        )
    weight_u = 0.5 + torch.rand(users, generator=generator)
    return UpdateBlock(sections, weight_u, metrics={}, round_index=0, pool_version="conformance")


def _commutes(case: Case) -> Iterator[str]:
    a, b = case.lift("a", 5), case.lift("b", 4)
    ab, ba = case.strategy.merge(a, b), case.strategy.merge(b, a)
    yield from _differences("merge(a, b) and merge(b, a)", case.finish(ab), case.finish(ba))


def _associates(case: Case) -> Iterator[str]:
    merge = case.strategy.merge
    left = merge(merge(case.lift("a", 5), case.lift("b", 4)), case.lift("c", 3))
    right = merge(case.lift("a", 5), merge(case.lift("b", 4), case.lift("c", 3)))
    yield from _differences("merge(merge(a, b), c) and merge(a, merge(b, c))", case.finish(left), case.finish(right))


def _block_is_its_users(case: Case) -> Iterator[str]:
    block = case.users("a", 6)
    merged = case.strategy.lift(block.take(torch.tensor([0])), case.state)
    for user in range(1, 6):
        merged = case.strategy.merge(merged, case.strategy.lift(block.take(torch.tensor([user])), case.state))
    whole = case.finish(case.strategy.lift(block, case.state))
    yield from _differences("lift(block) and the merged lifts of its users", whole, case.finish(merged))


def _ignores_padding(case: Case) -> Iterator[str]:
    clean = case.finish(case.lift("a", 6))
    dirty = case.finish(case.strategy.lift(_fill_padding(case.users("a", 6)), case.state))
    yield from _differences("lifts that differ only in what padding holds", clean, dirty)


def _empty_is_neutral(case: Case) -> Iterator[str]:
    nobody, a = case.lift("nobody", 0), case.lift("a", 5)
    alone = case.finish(nobody)
    yield from _faults(alone, case.state.schema)
    if any(section.contributors.any() for section in alone.sections.values()):
        yield "the lift of nobody has contributors"
    yield from _differences("merge(nobody, a) and a", case.finish(case.strategy.merge(nobody, a)), case.finish(a))


def _serves_one_user(case: Case) -> Iterator[str]:
    block = case.users("a", 1)
    step = case.finish(case.strategy.lift(block, case.state))
    yield from _faults(step, case.state.schema)
    for name, section in block.sections.items():
        silent = torch.ones(case.state.schema.sections[name].rows, dtype=torch.bool)
        silent[section.ids_uk[section.valid_uk].long()] = False
        if step.sections[name].contributors[silent].any():
            yield f"section {name!r}: rows that the only user did not send have contributors"


def _changes_no_argument(case: Case) -> Iterator[str]:
    strategy, state = case.strategy, case.state
    block, twin = case.users("a", 5), case.users("a", 5)
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    a, b = strategy.lift(block, state), case.lift("b", 4)
    if not _same_block(block, twin):
        yield "lift changed the block"
    a_before, b_before = case.finish(a), case.finish(b)
    if list(_differences("", a_before, case.finish(a), tolerance=0.0)):
        yield "finish changed the partial: a second finish gives another step"
    strategy.merge(a, b)
    for which, before, partial in (("first", a_before, a), ("second", b_before, b)):
        if list(_differences("", before, case.finish(partial), tolerance=0.0)):
            yield f"merge changed its {which} argument"
    if set(tensors) != set(state.tensors) or any(not tensors[n].equal(state.tensors[n]) for n in tensors):
        yield "the state was changed in place; return a new one"


def _steps_are_sound(case: Case) -> Iterator[str]:
    """Over two rounds, so that a state that changes is used."""
    state = case.state
    for round_name in ("first", "second"):
        partial = case.strategy.lift(case.users(round_name, 7), state)
        step, state = case.strategy.finish(partial, state)
        yield from _faults(step, case.state.schema)
        if not isinstance(state, State) or state.schema != case.state.schema:
            yield "finish must return a State with the schema it was given"
            return


def _partials_travel(case: Case) -> Iterator[str]:
    few, many = case.lift("few", 4), case.lift("many", 200)
    copied = pickle.loads(pickle.dumps(few))
    yield from _differences("a partial and its pickled copy", case.finish(few), case.finish(copied), tolerance=0.0)
    few_bytes, many_bytes = len(pickle.dumps(few)), len(pickle.dumps(many))
    if not case.strategy.linear_memory and many_bytes > 1.1 * few_bytes:
        yield (
            f"a partial of 4 users takes {few_bytes} bytes, of 200 users {many_bytes}: "
            f"it grows with the users, so linear_memory must be True"
        )


LAWS: dict[str, Callable[[Case], Iterator[str]]] = {
    "merge commutes": _commutes,
    "merge associates": _associates,
    "a block is its users": _block_is_its_users,
    "padding is ignored": _ignores_padding,
    "nobody is neutral": _empty_is_neutral,
    "one user is enough": _serves_one_user,
    "no argument changes": _changes_no_argument,
    "steps are sound": _steps_are_sound,
    "partials travel": _partials_travel,
}


def _differences(what: str, left: Step, right: Step, tolerance: float = TOLERANCE) -> Iterator[str]:
    for name, section in left.sections.items():
        for field in fields(StepSection):
            a: Tensor = getattr(section, field.name)
            b: Tensor = getattr(right.sections[name], field.name)
            gap = (a - b).abs().max()
            if not gap <= tolerance * a.abs().max():
                yield f"{what} differ: section {name!r}, {field.name}, by up to {gap:.3g}"


def _faults(step: Step, schema: Schema) -> Iterator[str]:
    """What makes a step unusable, whatever the strategy."""
    if set(step.sections) != set(schema.sections):
        yield f"the step must have the sections {sorted(schema.sections)}, it has {sorted(step.sections)}"
        return
    for name, spec in schema.sections.items():
        section = step.sections[name]
        wanted = ((spec.rows, spec.width), (spec.rows,), (spec.rows,))
        found = tuple(tuple(t.shape) for t in (section.mean, section.contributors, section.factor))
        if found != wanted:
            yield f"section {name!r}: mean, contributors, factor must have shapes {wanted}, they have {found}"
            continue
        if any(t.dtype != torch.float32 for t in (section.mean, section.contributors, section.factor)):
            yield f"section {name!r}: mean, contributors and factor must be float32"
        if not section.mean.isfinite().all():
            yield f"section {name!r}: the mean has numbers that are not finite"
        if not (section.contributors.isfinite() & (section.contributors >= 0)).all():
            yield f"section {name!r}: contributors must be finite and at least 0"
        if not ((section.factor >= 0) & (section.factor <= 1)).all():
            yield f"section {name!r}: the factor must lie in [0, 1]"


def _fill_padding(block: UpdateBlock) -> UpdateBlock:
    """The same updates with rubbish where padding is: NaN rows, and ids that no section has."""
    sections = {
        name: replace(
            section,
            ids_uk=section.ids_uk.masked_fill(~section.valid_uk, 2**31 - 1),
            rows_ukw=section.rows_ukw.masked_fill(~section.valid_uk[..., None], float("nan")),
        )
        for name, section in block.sections.items()
    }
    return replace(block, sections=sections)


def _same_block(a: UpdateBlock, b: UpdateBlock) -> bool:
    return a.weight_u.equal(b.weight_u) and all(
        x.ids_uk.equal(y.ids_uk) and x.valid_uk.equal(y.valid_uk) and x.rows_ukw.equal(y.rows_ukw)
        for x, y in ((a.sections[name], b.sections[name]) for name in a.sections)
    )
