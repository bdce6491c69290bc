"""A user's round, stacked for a block of users, against one user's round as anyone would write it in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.policies import distribution_of
from client.round import LocalRule, RoundData, RoundState, local_round, round_data
from client.state import RecordLayout, UserBlock
from client.task import Task
from federation import masks
from federation.base import BaseModel
from federation.config import GateConfig, LocalConfig, PoolConfig, TaskConfig
from federation.data.population import Batch
from federation.exploration import Exploration, rarely_used
from federation.gate import GateState
from federation.learning import unit_costs
from federation.mask_distribution import MaskDistribution
from federation.pool.model import PooledModel
from federation.state import GATE_SECTION, LOAD_SECTION, PRICE_SECTION, gate_spec, initial_values, schema_of
from federation.streams import Streams
from federation.update import Limits, UpdateBlock, admit
from tests import models
from tests.populations import InMemory

MakeBase = Callable[[], BaseModel]
SCALE, RANK, BUDGET, ROUND = 1.5, 4, 2, 7
IDS = np.array([3, 10**12, 41, 8])
STREAMS = Streams(5).at("round", ROUND)
POLICIES: dict[str, dict[str, Any]] = {
    "gate": {},
    "gate, Bernoulli": {"distribution": "bernoulli", "reward": {"price": 0.02}},
    "gate, no entropy": {"entropy": 0.0},
    "gate, global budget": {"scope": "global"},
    "gate, gain as control variate": {"estimator": {"name": "reinforce_gain"}},
    "gate, price steered": {"distribution": "bernoulli", "reward": {"price": 0.02, "target": 0.4}},
    "gate, priced parameters": {"scope": "global", "reward": {"price": 0.02, "cost": "parameters"}},
    "gate, rewards after steps": {"reward": {"steps": 2}, "balance": 0.01},
    "gate with interactions": {"interactions": True},
    "gate without gains": {"inputs": ["context", "embedding"]},
    "gate with budgets and windows": {"budgets": [1, 3], "windows": [1, 2]},
    "gate, embedding rebuilt": {"rebuild": 2, "embedding_rate": 3.0},
    "gate, pool rests": {"schedule": "alternate", "every": 2},
    "gate rests": {"every": 4},
    "saliency": {"policy": "saliency"},
    "saliency, Bernoulli": {"policy": "saliency", "distribution": "bernoulli"},
    "saliency, global budget": {"policy": "saliency", "scope": "global"},
    "magnitude": {"policy": "magnitude"},
    "random": {"policy": "random"},
    "all": {"policy": "all"},
    "gate, warming up": {"warmup": ROUND},
}


@dataclass(frozen=True)
class Case:
    """Everything that `local_round` takes."""

    model: PooledModel
    state: RoundState
    users: UserBlock
    data: RoundData
    rule: LocalRule

    def run(self) -> tuple[UpdateBlock, UserBlock]:
        return local_round(self.model, self.state, self.users, self.data, self.rule, STREAMS)

    def only(self, u: int) -> Case:
        """The same with user u alone."""
        data = RoundData(self.data.support.take(slice(u, u + 1)), self.data.query.take(slice(u, u + 1)))
        return replace(self, users=self.users.take(slice(u, u + 1)), data=data)


def case_of(make: MakeBase, gate: Mapping[str, Any], **local: Any) -> Case:
    """Four users of a pool whose rows are all at work, and of a gate that is no longer the saliency rule."""
    widths = {"budget": BUDGET, "embedding": 3, "hidden": 5, "factors": 4, "samples": 3}
    defaults: dict[str, Any] = {"warmup": 0, "every": 1, "exploration": 0.3, "entropy": 0.01}
    config = GateConfig(**{**widths, **defaults, **gate})
    sizes = {"steps": 2, "examples": 3, "gain_examples": 4, "query_examples": 3}
    model = PooledModel.around(make(), RANK, SCALE)
    task = TaskConfig(pool=PoolConfig(rank=RANK), gate=config, local=LocalConfig(**{**sizes, **local}))
    whole = Task(task, model)
    rule = whole.local
    values = initial_values(whole.learner, whole.gate, whole.schema, config, Streams(1))
    generator = torch.Generator().manual_seed(2)
    values = {name: rows + 0.4 * torch.randn(rows.shape, generator=generator) for name, rows in values.items()}
    if LOAD_SECTION in values:
        values[LOAD_SECTION] = values[LOAD_SECTION].abs()
    users = RecordLayout(config.embedding, -(-model.spec.units // 8)).fresh(IDS)
    embedding_ue = torch.randn(len(IDS), config.embedding, generator=generator)
    embedding_ue[2] = 0.0  # of a user whose visits were all in the warm-up
    users = replace(users, embedding_ue=embedding_ue, visits_u=torch.tensor([3, 1, 2, 5], dtype=torch.int32))
    data = RoundData(models.batch_for(model.base, len(IDS), 6, 1), models.batch_for(model.base, len(IDS), 3, 2))
    return Case(model, RoundState(values, ROUND, "v"), users, data, rule)


# -------------------------------------------------------------------------------- the plain twin


class PlainUser:
    """One user's round: a fresh copy of the base for every loss, `torch.optim.SGD`, autograd for the gate."""

    def __init__(self, make: MakeBase, case: Case, u: int) -> None:
        self.make, self.case, self.u = make, case, u
        self.modules = case.model.spec.modules
        self.gate, self.local = case.rule.gate, case.rule.local

    def loss(self, base: BaseModel, batch: Batch, start: int, stop: int) -> Tensor:
        inputs, targets = batch.inputs[self.u, start:stop], batch.targets[self.u, start:stop]
        return base.loss(base.module, inputs, targets).mean()

    def rows(self, units: Tensor) -> dict[str, Tensor]:
        """The chosen units' rows by module's name; units (G,) bool."""
        values = self.case.state.values
        by_module = units.view(len(self.modules), RANK)
        return {m.name: values[m.section][by_module[j]] for j, m in enumerate(self.modules)}

    def slope(self, strength_g: Tensor, batch: Batch, stop: int) -> Tensor:
        """-d loss / d strength, (1, G): a unit's strength sits in `up`, so it is -(d loss / d up) . up."""
        base = self.make()
        everything = self.rows(torch.ones(self.case.model.spec.units, dtype=torch.bool))
        by_module = strength_g.view(len(self.modules), RANK, 1)
        rows = {
            m.name: torch.cat((everything[m.name][:, : m.d_in], by_module[j] * everything[m.name][:, m.d_in :]), 1)
            for j, m in enumerate(self.modules)
        }
        layers = models.with_plain_lora(base, rows, SCALE)
        self.loss(base, batch, 0, stop).backward()
        up = [everything[m.name][:, m.d_in :] for m in self.modules]
        return -torch.cat([(layer.up.grad * u).sum(1) for layer, u in zip(layers, up, strict=True)])[None]

    def gains(self) -> Tensor:
        """(1, G): every unit at strength k / R."""
        strength = torch.full((self.case.model.spec.units,), self.gate.share(BUDGET, RANK))
        return self.slope(strength, self.case.data.support, self.local.gain_examples)

    def train(self, units: Tensor) -> tuple[list[Tensor], float]:
        """What SGD changed in the rows of these units, by module, and the loss before it."""
        base = self.make()
        layers = models.with_plain_lora(base, self.rows(units), SCALE)
        start, first_loss = [layer.rows for layer in layers], None
        optimizer = torch.optim.SGD([p for layer in layers for p in (layer.down, layer.up)], self.local.learning_rate)
        for step in range(self.local.steps):
            optimizer.zero_grad()
            begin = step * self.local.examples
            loss = self.loss(base, self.case.data.support, begin, begin + self.local.examples)
            loss.backward()
            optimizer.step()
            first_loss = float(loss.detach()) if first_loss is None else first_loss
        assert first_loss is not None
        return [layer.rows - rows for layer, rows in zip(layers, start, strict=True)], first_loss

    def reward(self, units: Tensor, judged: Batch, stop: int) -> float:
        """Minus the loss with these units on the judged examples, after the reward's steps on the support part."""
        base = self.make()
        layers = models.with_plain_lora(base, self.rows(units), SCALE)
        optimizer = torch.optim.SGD([p for layer in layers for p in (layer.down, layer.up)], self.local.learning_rate)
        for step in range(self.gate.reward.steps):
            optimizer.zero_grad()
            begin = step * self.local.examples
            self.loss(base, self.case.data.support, begin, begin + self.local.examples).backward()
            optimizer.step()
        return -float(self.loss(base, judged, 0, stop).detach())

    def embedding(self) -> Tensor:
        """(1, E): what the user has; or, rebuilt from the examples that the gate sees, if it has none."""
        embedding = self.case.users.embedding_ue[self.u : self.u + 1]
        if embedding.any():
            return embedding
        for step in range(self.gate.rebuild):
            judged = (self.case.data.support, self.local.gain_examples)
            _, _, gradient = self.policy_gradient(embedding, STREAMS.at("rebuild", step), *judged)
            embedding = embedding + self.gate.embedding_rate * gradient
        return embedding

    def round_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the round itself, on the query part."""
        return self.policy_gradient(self.embedding(), STREAMS, self.case.data.query, self.local.query_examples)

    def policy_gradient(
        self, embedding: Tensor, streams: Streams, judged: Batch, stop: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The trained mask (G,), and the gradients of the gate (|phi|,) and the embedding (E,) by autograd."""
        base, units, gate = self.make(), self.case.model.spec.units, self.gate
        values, one = self.case.state.values, slice(self.u, self.u + 1)
        support = self.case.data.support.inputs[self.u, : self.local.gain_examples]
        phi = values[GATE_SECTION].clone().requires_grad_()
        embedding = embedding.clone().requires_grad_()
        features = base.features(base.module, support).mean(0, keepdim=True).detach()
        gains = self.gains() if "gains" in gate.inputs else torch.zeros(1, units)
        examples = torch.full((1,), float(self.local.gain_examples))
        state = GateState(features, embedding, gains, examples, gate.share(BUDGET, RANK))
        logits = gate_spec(self.case.model, gate).logits(phi, state)

        def law(logits_ug: Tensor) -> MaskDistribution:
            return distribution_of(logits_ug, len(self.modules), gate, BUDGET)

        policy, drawn_from = law(logits), law(logits.detach())
        exploration = Exploration(gate.exploration, law(rarely_used(values[LOAD_SECTION][0], gate.share(BUDGET, RANK))))
        sampled, log_weight = exploration.sample(
            drawn_from,
            streams.uniform("mask", IDS[one], (gate.samples, units)),
            streams.uniform("explore", IDS[one], (gate.samples,)),
        )
        slope = torch.zeros(1, units)
        if gate.estimator.name == "reinforce_gain":
            slope = self.slope(drawn_from.inclusion()[0], judged, stop)
        objective = gate.entropy * policy.entropy().sum() + (slope * policy.inclusion()).sum()
        unexplained = [self.reward(mask, judged, stop) - float((slope[0] * mask).sum()) for mask in sampled[0]]
        log_prob = policy.log_prob(sampled)[0]
        for k, reward in enumerate(unexplained):
            others = [r for i, r in enumerate(unexplained) if i != k]
            advantage = reward - sum(others) / len(others)
            objective = objective + log_weight[0, k].exp() * advantage * log_prob[k] / len(unexplained)
        if gate.reward.price:
            price = values[PRICE_SECTION].exp() if gate.reward.target is not None else gate.reward.price
            objective = objective - (price * unit_costs(self.case.model.spec, gate.reward) * policy.inclusion()).sum()
        if gate.balance:
            load = values[LOAD_SECTION][0]
            objective = objective - gate.balance * ((load / load.mean() - 1) * policy.inclusion()).sum()
        phi_gradient, embedding_gradient = torch.autograd.grad(objective, (phi, embedding))
        return sampled[0, 0], phi_gradient[0], embedding_gradient[0]


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """|actual - expected| <= tolerance * |expected|, as norms."""
    error, size = float((actual - expected).norm()), float(expected.norm())
    assert size > 0, "nothing was compared"
    assert error <= tolerance * size, f"relative error {error / size:.2e}"


def sent(update: UpdateBlock, section: str, u: int) -> tuple[list[int], Tensor]:
    """What user u sends of a section, without padding."""
    one = update.sections[section]
    valid = one.valid_uk[u]
    return one.ids_uk[u][valid].tolist(), one.rows_ukw[u][valid]


def assert_trained(case: Case, update: UpdateBlock, users: UserBlock, plain: PlainUser, mask: Tensor) -> None:
    """User u trained the units of `mask` as plain SGD does, and remembers them."""
    deltas, first_loss = plain.train(mask)
    for m, units, delta in zip(plain.modules, mask.view(-1, RANK), deltas, strict=True):
        ids, rows = sent(update, m.section, plain.u)
        assert ids == units.nonzero().flatten().tolist()
        if ids:
            assert_relative(rows, delta, 1e-5)
    assert update.metrics["support_loss"][plain.u].item() == pytest.approx(first_loss, rel=1e-5)
    assert torch.equal(masks.unpack(users.mask_ub[plain.u], case.model.spec.units), mask)


@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_a_saliency_round_equals_a_plain_loop(make: MakeBase) -> None:
    case = case_of(make, POLICIES["saliency"])
    update, users = case.run()
    assert set(update.sections) == {m.section for m in case.model.spec.modules}
    for u in range(len(IDS)):
        plain = PlainUser(make, case, u)
        best = plain.gains().view(-1, RANK).topk(BUDGET, 1).indices
        mask = torch.zeros(len(plain.modules), RANK, dtype=torch.bool).scatter_(1, best, True).flatten()
        assert_trained(case, update, users, plain, mask)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "policy",
    [
        "gate",
        "gate, Bernoulli",
        "gate, no entropy",
        "gate, global budget",
        "gate, gain as control variate",
        "gate, price steered",
        "gate, priced parameters",
        "gate, rewards after steps",
        "gate with interactions",
        "gate without gains",
        "gate, embedding rebuilt",
    ],
)
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_a_round_of_the_gate_equals_a_plain_loop(make: MakeBase, policy: str) -> None:
    """In float64, since the gate learns from small differences between rewards."""
    case = case_of(make, POLICIES[policy])
    update, users = case.run()
    for u in range(len(IDS)):
        plain = PlainUser(make, case, u)
        mask, phi_gradient, embedding_gradient = plain.round_gradient()
        assert_trained(case, update, users, plain, mask)
        ids, rows = sent(update, GATE_SECTION, u)
        assert ids == [0]
        torch.testing.assert_close(rows[0], phi_gradient, rtol=1e-8, atol=1e-12)
        moved = users.embedding_ue[u] - plain.embedding()[0]
        expected = case.rule.gate.embedding_rate * embedding_gradient
        torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-12)
    assert (update.sections[GATE_SECTION].rows_ukw.flatten(1).norm(dim=1) > 1e-7).any()


# -------------------------------------------------------------------------------- blocks and padding


def assert_same_round(update: UpdateBlock, users: UserBlock, u: int, one: UpdateBlock, user: UserBlock) -> None:
    """User u of a block sends and keeps what the single user of `one` does."""
    assert set(update.sections) == set(one.sections)
    for section in update.sections:
        (ids, rows), (expected_ids, expected_rows) = sent(update, section, u), sent(one, section, 0)
        assert ids == expected_ids
        torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=2e-5)
    assert set(update.metrics) == set(one.metrics)
    for name, values_u in update.metrics.items():
        torch.testing.assert_close(values_u[u], one.metrics[name][0], rtol=1e-4, atol=2e-6)
    assert update.weight_u[u] == one.weight_u[0]
    torch.testing.assert_close(users.embedding_ue[u], user.embedding_ue[0], rtol=1e-4, atol=2e-6)
    assert torch.equal(users.mask_ub[u], user.mask_ub[0])
    assert users.visits_u[u] == user.visits_u[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_a_block_of_users_equals_each_user_alone(make: MakeBase, policy: str) -> None:
    case = case_of(make, POLICIES[policy])
    update, users = case.run()
    for u in range(len(IDS)):
        assert_same_round(update, users, u, *case.only(u).run())


@pytest.mark.parametrize("policy", ["gate", "saliency"])
def test_padded_examples_do_not_count(policy: str) -> None:
    """A user who owns two of the three examples of each step, of the gains and of the query."""
    case = case_of(models.mlp, POLICIES[policy], gain_examples=3)

    def cut(batch: Batch) -> Batch:
        weight = batch.weight.clone()
        weight[:, 2::3] = 0.0
        return Batch(torch.where(weight[..., None] > 0, batch.inputs, 1e3), batch.targets, weight)

    def without(batch: Batch) -> Batch:
        kept = [n for n in range(batch.weight.shape[1]) if n % 3 != 2]
        return Batch(batch.inputs[:, kept], batch.targets[:, kept], batch.weight[:, kept])

    padded = replace(case, data=RoundData(cut(case.data.support), cut(case.data.query)))
    fewer = replace(case.rule, local=case.rule.local.model_copy(update={"examples": 2, "gain_examples": 2}))
    bare = replace(case, data=RoundData(without(case.data.support), without(case.data.query)), rule=fewer)
    update, users = padded.run()
    for u in range(len(IDS)):
        assert_same_round(update, users, u, *bare.only(u).run())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_server_admits_what_a_round_sends(policy: str) -> None:
    case = case_of(models.mlp, POLICIES[policy])
    update, _ = case.run()
    schema = schema_of(case.rule.learner, gate_spec(case.model, case.rule.gate), case.rule.gate)
    admitted, rejections = admit(update, schema, Limits())
    assert not rejections.reasons
    for section in update.sections:
        for u in range(len(IDS)):
            assert sent(admitted, section, u)[0] == sent(update, section, u)[0]
            assert torch.equal(sent(admitted, section, u)[1], sent(update, section, u)[1])


@pytest.mark.parametrize("policy", ["gate", "gate, Bernoulli", "saliency"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e38])
def test_a_user_whose_numbers_overflow_harms_nobody_and_keeps_a_finite_embedding(policy: str, number: float) -> None:
    case, bad = case_of(models.mlp, POLICIES[policy]), 1
    for batch in (case.data.support, case.data.query):
        batch.inputs[bad] = number
    update, users = case.run()
    schema = schema_of(case.rule.learner, gate_spec(case.model, case.rule.gate), case.rule.gate)
    refused = set(admit(update, schema, Limits())[1].reasons)
    assert refused == {bad} if math.isnan(number) else refused <= {bad}  # a tanh may save who is merely too large
    assert users.embedding_ue.isfinite().all()
    for u in set(range(len(IDS))) - {bad}:
        assert_same_round(update, users, u, *case.only(u).run())


@pytest.mark.parametrize("policy", ["gate", "gate, Bernoulli", "gate, global budget"])
def test_a_gate_that_has_run_away_stops_no_round_and_its_users_are_refused(policy: str) -> None:
    """Its logits are numbers still, but larger than a distribution over masks can take."""
    case = case_of(models.mlp, POLICIES[policy])
    values = {name: rows.clone() for name, rows in case.state.values.items()}
    gate_spec(case.model, case.rule.gate).parts(values[GATE_SECTION])["log_alpha"].fill_(40.0)
    update, _ = replace(case, state=replace(case.state, values=values)).run()
    schema = schema_of(case.rule.learner, gate_spec(case.model, case.rule.gate), case.rule.gate)
    assert set(admit(update, schema, Limits())[1].reasons) == set(range(len(IDS)))


# -------------------------------------------------------------------------------- state


@pytest.mark.parametrize("policy", POLICIES)
def test_a_round_changes_nothing_that_it_was_given(policy: str) -> None:
    case = case_of(models.mlp, POLICIES[policy])
    values = {name: rows.clone() for name, rows in case.state.values.items()}
    given = [t.clone() for t in (case.users.embedding_ue, case.users.mask_ub, case.users.visits_u)]
    _, users = case.run()
    assert all(torch.equal(case.state.values[name], rows) for name, rows in values.items())
    left = (case.users.embedding_ue, case.users.mask_ub, case.users.visits_u)
    assert all(torch.equal(a, b) for a, b in zip(given, left, strict=True))
    assert users.visits_u.tolist() == [4, 2, 3, 6]


def test_a_warming_up_gate_draws_masks_at_random_and_learns_nothing() -> None:
    case = case_of(models.mlp, POLICIES["gate, warming up"])
    update, users = case.run()
    mask_ug = masks.unpack(users.mask_ub, case.model.spec.units)
    assert (mask_ug.view(len(IDS), -1, RANK).sum(2) == BUDGET).all()
    assert not update.sections[GATE_SECTION].valid_uk.any()
    assert torch.equal(users.embedding_ue, case.users.embedding_ue)
    after = replace(case, state=replace(case.state, round_index=ROUND + 1))
    assert after.run()[0].sections[GATE_SECTION].valid_uk.all()


def test_alternate_training_moves_one_factor_per_round() -> None:
    case = case_of(models.mlp, POLICIES["saliency"], train="alternate")
    for round_index, trained in ((1, "up"), (2, "down"), (3, "up")):
        update, _ = replace(case, state=replace(case.state, round_index=round_index)).run()
        for m in case.model.spec.modules:
            down, up = torch.split(update.sections[m.section].rows_ukw, [m.d_in, m.d_out], 2)
            moved, still = (down, up) if trained == "down" else (up, down)
            assert moved.any()
            assert not still.any()


# -------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("steps", "batches", "gain_examples", "wanted"), [(2, None, 4, 6), (1, None, 4, 4), (5, 2, 4, 6), (2, 3, 1, 6)]
)
def test_a_round_draws_what_it_needs_and_draws_it_again_alike(
    steps: int, batches: int | None, gain_examples: int, wanted: int
) -> None:
    base = models.mlp()
    support, query = models.batch_for(base, 9, 30, 1), models.batch_for(base, 9, 20, 2)
    population = InMemory(base, {"support": support, "query": query})
    rule = case_of(models.mlp, {}, steps=steps, batches=batches, gain_examples=gain_examples).rule
    ids = np.array([1, 7, 4])
    data = round_data(population, ids, rule, STREAMS)
    assert data.support.weight.shape == (3, wanted)
    assert data.query.weight.shape == (3, 3)
    alone = round_data(population, ids[1:2], rule, STREAMS)
    assert torch.equal(data.support.inputs[1:2], alone.support.inputs)
    assert torch.equal(data.query.targets[1:2], alone.query.targets)
    later = round_data(population, ids, rule, Streams(5).at("round", ROUND + 1))
    assert not torch.equal(data.support.inputs, later.support.inputs)
