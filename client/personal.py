"""What a user keeps of its own: a mask that the policy proposes, its rows tuned on the user's support part, as bytes.

The same functions serve a block of users in an evaluation and one user on its device. All of them are on the device
of their arguments. Which examples are drawn follows from the task's seed and the user's id alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from client.adapt import Adam, ByRule, Tuner, tuned
from client.gate_round import UserDraws, rebuilt
from client.policies import Known, Signals, policy_masks
from client.task import Task
from federation.config import Policy
from federation.data.population import Examples
from federation.learner import ActiveUnits
from federation.pool.spec import ModuleSpec, PoolSpec, Rows, gather, rows_of_mask
from federation.streams import UserIds
from federation.update import Schema, Section, SectionSpec, Values

Tuned = Literal["nothing", "scales", "rows"]
"""What a user tunes, and keeps, of each active unit: nothing but its place, a scale, or a difference of its row."""

STREAM = "serve"


@dataclass(frozen=True)
class ActiveRows:
    """The rows that U users' masks pick from a pool, and which they are: {section: (U, k, d_in + d_out)}."""

    spec: PoolSpec
    rows: Rows
    units: ActiveUnits


@dataclass(frozen=True)
class Tuning:
    """How U users tune: what they keep, by which steps, and how many support examples each step sees.

    start: where rows begin, if not as they are in the pool.
    """

    kept: Tuned
    tuner: Tuner
    steps: int
    examples: int
    start: Rows | None = None


def known_of(task: Task, values: Values, examples: Examples, user_ids: UserIds, windows: int, budget: int) -> Known:
    """What a policy is told of users that it does not know, from `windows` of their support examples."""
    gate, streams = task.config.gate, task.streams.at(STREAM)
    support = examples.batch(user_ids, "support", windows, streams.at("gain"))
    unknown_ue = support.weight.new_zeros(len(user_ids), gate.embedding)
    uniform_ug = streams.uniform("random mask", user_ids, (task.model.spec.units,))
    signals = Signals(task.model, values, support, budget, gate.share(budget, task.model.spec.rank))
    return Known(signals, unknown_ue, uniform_ug)


def proposed_mask(task: Task, known: Known, user_ids: UserIds, policy: Policy) -> Tensor:
    """One policy's mask of each user, (U, G) bool."""
    gate = task.config.gate
    if policy == "gate" and gate.rebuild:
        known = rebuilt(known, task.local.learning, gate, UserDraws(task.streams.at(STREAM), user_ids))
    return policy_masks(policy, known, gate)


def task_known(task: Task, values: Values, examples: Examples, user_ids: UserIds) -> Known:
    """What the task's own policy, and its initialisation, are told of users."""
    return known_of(task, values, examples, user_ids, task.config.personal.gain_examples, task.config.gate.budget)


def task_mask(task: Task, known: Known, user_ids: UserIds) -> Tensor:
    """The mask of each user that the task's own policy proposes, (U, G) bool."""
    return proposed_mask(task, known, user_ids, task.config.gate.policy)


def tuning_of(task: Task, values: Values, known: Known, active: ActiveRows) -> Tuning:
    """How a device tunes its users' rows: by the steps that the pool was meta-trained for, if it was; else by Adam."""
    personal = task.config.personal
    if task.config.meta.adapts:
        return learned_tuning(task, values, known, active, personal.steps, personal.examples)
    return Tuning("rows", Adam(personal.learning_rate, personal.steps), personal.steps, personal.examples)


def learned_tuning(task: Task, values: Values, known: Known, active: ActiveRows, steps: int, examples: int) -> Tuning:
    """Steps of the task's update rule, from where its initialisation says that the users' rows start."""
    learner, units = task.learner, active.units
    copies = learner.copies(values, units)
    with torch.no_grad():
        start = learner.start(copies, units, known.signals.context(task.config.meta.start))
    return Tuning("rows", ByRule(learner.rule, learner.parameters(copies, units)), steps, examples, start)


def active_rows(values: Values, spec: PoolSpec, mask_ug: Tensor) -> ActiveRows:
    """The rows of the masks (U, G). A user without any active unit has one row of padding in each module."""
    users, modules = len(mask_ug), len(spec.modules)
    most = int(mask_ug.view(users, modules, -1).sum(2).max())
    units = ActiveUnits(*rows_of_mask(mask_ug, modules, max(1, most)))
    return ActiveRows(spec, gather(values, spec, units.ids_ujk, units.valid_ujk), units)


def personal_values(task: Task, active: ActiveRows, tuning: Tuning, examples: Examples, user_ids: UserIds) -> Rows:
    """What each user keeps after its steps on its support part: {section: (U, k, width)}, a difference to the pool.

    Every way to tune sees the same examples in the same order.
    """
    model, spec, kept = task.model, active.spec, tuning.kept
    if kept == "nothing":
        return {name: row.new_zeros(*row.shape[:2], 0) for name, row in active.rows.items()}

    def gradients_of(values: Rows, step: int) -> list[Tensor]:
        batch = examples.batch(user_ids, "support", tuning.examples, task.streams.at(STREAM, "tune", step))
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with model.bound(leaves if kept == "rows" else personalised(spec, active.rows, leaves, kept)):
            loss_u = model.loss(batch)
        return list(torch.autograd.grad(loss_u.sum(), list(leaves.values())))

    if kept == "scales":
        first = {name: row.new_zeros(*row.shape[:2], 1) for name, row in active.rows.items()}
        return tuned(tuning.tuner, gradients_of, first, tuning.steps)
    rows = tuned(tuning.tuner, gradients_of, tuning.start or active.rows, tuning.steps)
    return {name: row - active.rows[name] for name, row in rows.items()}


def personal_widths(module: ModuleSpec, tuned: Tuned) -> dict[str, int]:
    """The widths of what a user keeps of each active unit of a module, by factor."""
    widths: dict[Tuned, dict[str, int]] = {
        "nothing": {},
        "scales": {"scale": 1},
        "rows": {"down": module.d_in, "up": module.d_out},
    }
    return widths[tuned]


def personal_schema(spec: PoolSpec, tuned: Tuned) -> Schema:
    """The layout of what users of a pool keep."""
    return Schema({m.section: SectionSpec(spec.rank, personal_widths(m, tuned), spec.rank) for m in spec.modules})


def personal_sections(active: ActiveRows, personal: Rows) -> dict[str, Section]:
    """What U users keep, as the codec takes it."""
    return {
        m.section: Section(active.units.ids_ujk[:, j].int(), active.units.valid_ujk[:, j], personal[m.section])
        for j, m in enumerate(active.spec.modules)
    }


def personalised(spec: PoolSpec, rows: Rows, personal: Rows, tuned: Tuned) -> Rows:
    """The rows with what users keep: + difference, or the unit's strength times 1 + scale."""
    if tuned == "nothing":
        return rows
    if tuned == "rows":
        return {name: row + personal[name] for name, row in rows.items()}
    return {
        m.section: torch.cat(
            (rows[m.section][..., : m.d_in], rows[m.section][..., m.d_in :] * (1 + personal[m.section])), -1
        )
        for m in spec.modules
    }


def served_rows(values: Values, spec: PoolSpec, kept: Mapping[str, Section], tuned: Tuned) -> dict[str, Tensor]:
    """One user's rows, {section: (1, k, d_in + d_out)}: the pool's with what its decoded bytes keep. k may be 0."""
    rows = {m.section: values[m.section][kept[m.section].ids_uk.long()] for m in spec.modules}
    personal = {name: section.rows_ukw.to(rows[name].device) for name, section in kept.items()}
    return dict(personalised(spec, rows, personal, tuned))
