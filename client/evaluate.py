"""What a pool is worth to users, measured on the test part of their own data."""

from __future__ import annotations

import torch
from torch import Tensor

from client.personal import (
    ActiveRows,
    active_rows,
    personal_sections,
    personal_values,
    personalised,
    task_known,
    task_mask,
    tuning_of,
)
from client.task import Task, row_format
from federation.data.population import Examples
from federation.formats import quantise
from federation.pool.spec import Rows
from federation.streams import UserIds
from federation.update import Values


def user_losses(task: Task, values: Values, examples: Examples, user_ids: UserIds) -> dict[str, Tensor]:
    """Each user's loss on its test part, (U,) nats per target, as `federation.exchange.MEASURES` names them.

    base_loss: of the frozen model alone. mask_loss: with the rows that the task's policy picks for the user, as they
    are in the pool. tuned_loss: with these rows tuned on the support part, as they are read back from their bytes.
    """
    model = task.model
    known = task_known(task, values, examples, user_ids)
    active = active_rows(values, model.spec, task_mask(task, known, user_ids))
    tuning = tuning_of(task, values, known, active)
    tuned = _as_kept(task, active, personal_values(task, active, tuning, examples, user_ids))
    test = examples.batch(user_ids, "test", None, task.streams)
    losses = {}
    with torch.no_grad():
        losses["base_loss"] = model.loss(test)
        for name, rows in (("mask_loss", active.rows), ("tuned_loss", tuned)):
            with model.bound(rows):
                losses[name] = model.loss(test)
    return losses


def _as_kept(task: Task, active: ActiveRows, personal: Rows) -> Rows:
    kept = quantise(personal_sections(active, personal), {"pool": row_format(task.config.personal.rows)})
    return personalised(active.spec, active.rows, {name: section.rows_ukw for name, section in kept.items()}, "rows")
