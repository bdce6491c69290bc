"""The stacked `dense_lora` against stock PEFT: each user's LoRA in a loop of its own, with torch.optim.Adam.

This is why the result table may call the stacked baseline "per-user LoRA (PEFT)".
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from client.personal import personalised
from federation.config import RunConfig
from federation.data.population import Batch
from federation.settings import parse
from federation.streams import Streams
from simulations.methods import known_methods
from simulations.serve import Plan, Trained, start_of, tune
from simulations.setup import Setup, set_up, wrap
from tests import models

USERS, RANK, SCALE, EXAMPLES = np.array([3, 14, 15]), 4, 1.7, 5
RATE, STEPS = 5e-2, 5


class Writers:
    """Users with random tokens, each from its own stream."""

    def batch(self, user_ids, part, size, streams):
        shape = (len(user_ids), size or 8, models.WINDOW + 1)
        tokens = torch.from_numpy(streams.integers(part, user_ids, models.VOCABULARY, shape[1] * shape[2])).view(shape)
        return Batch(tokens[..., :-1], tokens[..., 1:], torch.ones(shape[:2]))


@dataclass(frozen=True)
class OneSetup:
    """A worker that works for one federation."""

    the_setup: Setup
    population: Writers
    device = torch.device("cpu")

    def batch(self, *args):
        return self.population.batch(*args)

    def setup(self, config):
        return self.the_setup


def config_for():
    settings = {
        "pool": {"rank": 8, "scale": SCALE},
        "gate": {"budget": RANK},
        "evaluate": {"examples": EXAMPLES},
    }
    return parse(RunConfig, settings)


def mean_loss(model, batch):
    """Of one user's batch, straight from the logits."""
    logits = model(input_ids=batch.inputs[0]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def tuned_by_peft(make, down_of, user_id, test):
    """One user's tuned A and B by module, and its loss on `test`, with nothing of ours but the data."""
    base = make()
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=list(base.target_modules),
        fan_in_fan_out=make is models.gpt2,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.module, config).eval()
    prefix = "base_model.model."
    layers = {n.removeprefix(prefix): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(down_of[name])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    streams, ids = Streams(0).at("serve"), np.array([user_id])
    for step in range(STEPS):
        batch = Writers().batch(ids, "support", EXAMPLES, streams.at("tune", step))
        optimizer.zero_grad()
        mean_loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    weights = {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }
    with torch.no_grad():
        return weights, mean_loss(model, test)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_stacked_dense_lora_equals_stock_peft_user_by_user(make):
    config = config_for()
    setup = set_up(config, wrap(config, make()))
    worker = OneSetup(setup, Writers())
    plan = Plan(known_methods(config)["dense_lora"], RATE, STEPS)
    trained = Trained(config, {}, {})
    start = start_of(worker, trained, plan.method, USERS, {})
    changes = tune(worker, trained, start, plan, USERS)
    test = Writers().batch(USERS, "test", None, Streams(0))
    with torch.no_grad(), setup.model.bound(personalised(start.spec, start.rows, changes, "rows")):
        loss_u = setup.model.loss(test)
    with torch.no_grad(), setup.model.bound(start.rows):
        untuned_u = setup.model.loss(test)
    assert ((loss_u - untuned_u).abs() > 1e-3).all()
    for u, user_id in enumerate(USERS):
        down_of = {m.name: start.rows[m.section][u, :, : m.d_in] for m in start.spec.modules}
        weights, loss = tuned_by_peft(make, down_of, user_id, test.take(slice(u, u + 1)))
        torch.testing.assert_close(loss_u[u], loss, rtol=0, atol=1e-5)
        assert weights.keys() == down_of.keys()
        for m in start.spec.modules:
            a, b = weights[m.name]
            expected = torch.cat((a - down_of[m.name], b.T), 1)
            assert expected.norm() > 0.01
            assert (changes[m.section][u] - expected).norm() < 1e-4 * expected.norm(), m.name
