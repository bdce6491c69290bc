"""What a pool is worth to users, measured on the test part of their own data."""

from __future__ import annotations

import torch
from torch import Tensor

from client.adapt import Rows
from client.personal import (
    ActiveRows,
    active_rows,
    personal_sections,
    personal_values,
    personalised,
    task_masks,
    tuning_of,
)
from client.task import Task, row_format
from federation.data.population import Examples
from federation.formats import quantise
from federation.streams import UserIds
from federation.update import Values


def user_losses(task: Task, values: Values, examples: Examples, user_ids: UserIds) -> dict[str, Tensor]:
    """Each user's loss on its test part, (U,) nats per target, as `federation.exchange.MEASURES` names them.

    base_loss: of the frozen model alone. mask_loss: with the rows that the task's policy picks for the user, as they
    are in the pool. tuned_loss: with these rows tuned on the support part, as they are read back from their bytes.
    """
    model = task.model
    active = active_rows(values, model.spec, task_masks(task, values, examples, user_ids))
    tuned = _tuned(task, active, examples, user_ids)
    test = examples.batch(user_ids, "test", None, task.streams)
    losses = {}
    with torch.no_grad():
        losses["base_loss"] = model.loss(test)
        for name, rows in (("mask_loss", active.rows), ("tuned_loss", tuned)):
            with model.bound(rows):
                losses[name] = model.loss(test)
    return losses


def _tuned(task: Task, active: ActiveRows, examples: Examples, user_ids: UserIds) -> Rows:
    personal = task.config.personal
    values = personal_values(task, active, tuning_of(personal), examples, user_ids)
    kept = quantise(personal_sections(active, values), {"pool": row_format(personal.rows)})
    return personalised(active.spec, active.rows, {name: section.rows_ukw for name, section in kept.items()}, "rows")
