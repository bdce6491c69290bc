"""The metrics that a server expects are those that nodes report."""

from __future__ import annotations

import pytest
import torch

from client.round import RoundData, RoundState, local_round
from client.task import Task
from federation.config import TaskConfig
from federation.pool.model import PooledModel
from federation.settings import parse
from federation.state import initial_values, metric_names
from tests import models

USERS, RANK = 2, 4
RULES = {
    "gate": {"policy": "gate", "warmup": 0},
    "gate, budgets free": {"policy": "gate", "warmup": 0, "distribution": "bernoulli"},
    "gate, last round of its warm-up": {"policy": "gate", "warmup": 3},
    "gate, first round after it": {"policy": "gate", "warmup": 2},
    "gate, between the rounds in which it learns": {"policy": "gate", "warmup": 1, "every": 2},
    "gate, while the pool rests": {"policy": "gate", "warmup": 0, "every": 2, "schedule": "alternate"},
    "saliency": {"policy": "saliency", "warmup": 0},
    "saliency, warming up": {"policy": "saliency", "warmup": 3},
    "magnitude": {"policy": "magnitude"},
    "random": {"policy": "random"},
    "all": {"policy": "all"},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nodes_report_the_metrics_that_the_server_expects(rule: dict[str, object]) -> None:
    small = {"budget": 2, "embedding": 2, "hidden": 3, "factors": 2}
    local = {"steps": 1, "examples": 2, "gain_examples": 4, "query_examples": 2}
    config = parse(TaskConfig, {"gate": {**small, **rule}, "local": local, "pool": {"rank": RANK}})
    task = Task(config, PooledModel.around(models.mlp(), RANK, 1.0))
    values = initial_values(task.learner, task.gate, task.schema, config.gate, task.streams)
    users = task.record_layout.fresh(torch.arange(USERS).numpy())
    data = RoundData(models.batch_for(task.model.base, USERS, 4, 1), models.batch_for(task.model.base, USERS, 2, 2))
    update, _ = local_round(task.model, RoundState(values, 3, "v"), users, data, task.local, task.streams)
    assert sorted(metric_names(config, 3)) == sorted(update.metrics)
