"""The metrics that a server expects are those that nodes report."""

from __future__ import annotations

import pytest
import torch

from client.round import LocalRule, RoundData, RoundState, local_round
from client.state import RecordLayout
from federation.config import GateConfig, LocalConfig
from federation.pool.model import PooledModel
from federation.state import gate_spec, initial_values, metric_names, schema_of
from federation.streams import Streams
from tests import models

USERS, RANK = 2, 4
RULES = {
    "gate": {"policy": "gate", "warmup": 0},
    "gate, budgets free": {"policy": "gate", "warmup": 0, "distribution": "bernoulli"},
    "gate, last round of its warm-up": {"policy": "gate", "warmup": 3},
    "gate, first round after it": {"policy": "gate", "warmup": 2},
    "saliency": {"policy": "saliency", "warmup": 0},
    "saliency, warming up": {"policy": "saliency", "warmup": 3},
    "random": {"policy": "random"},
    "all": {"policy": "all"},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nodes_report_the_metrics_that_the_server_expects(rule: dict[str, object]) -> None:
    gate = GateConfig(budget=2, embedding=2, hidden=3, factors=2, samples=2, **rule)  # type: ignore[arg-type]
    model = PooledModel.around(models.mlp(), RANK, 1.0)
    schema = schema_of(model.spec, gate_spec(model, gate), gate)
    streams = Streams(0)
    values = initial_values(model.spec, gate_spec(model, gate), schema, streams)
    users = RecordLayout(gate.embedding, -(-model.spec.units // 8)).fresh(torch.arange(USERS).numpy())
    data = RoundData(models.batch_for(model.base, USERS, 4, 1), models.batch_for(model.base, USERS, 2, 2))
    local = LocalConfig(steps=1, examples=2, gain_examples=4, query_examples=2)
    update, _ = local_round(model, RoundState(values, 3, "v"), users, data, LocalRule(gate, local), streams)
    assert sorted(metric_names(gate, 3)) == sorted(update.metrics)
