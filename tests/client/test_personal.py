"""What users keep: a block of users against each user alone, and rows against the bytes that they are kept as.

Masks and tuning are compared with a loop over users in plain PyTorch in tests/simulations/test_evaluate.py.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from client.adapt import Adam, ByRule
from client.inner import Inner
from client.personal import (
    ActiveRows,
    Tuning,
    active_rows,
    known_of,
    personal_schema,
    personal_sections,
    personal_values,
    personalised,
    proposed_mask,
    served_rows,
    task_known,
    task_mask,
    tuning_of,
)
from federation.codec import decode_personal, encode_personal
from federation.config import Policy
from federation.formats import RowFormat, quantise
from federation.streams import UserIds
from simulations.compute.worker import Worker
from simulations.setup import Setup
from tests.client.lessons import steps_of
from tests.simulations.tiny import tiny_config

IDS = np.array([3, 61, 70])


class House:
    """A task with values as if they had been trained, and its users' examples."""

    def __init__(self, *overrides: str) -> None:
        config = tiny_config("personal={gain_examples=8}", *overrides)
        self.worker = Worker(config)
        self.task: Setup = self.worker.setup(config)
        generator = torch.Generator().manual_seed(5)
        first = self.task.begin().values
        spread = {"gate": 0.6, "load": 0.0}
        self.values = {
            name: rows + spread.get(name, 0.3) * torch.randn(rows.shape, generator=generator)
            for name, rows in first.items()
        }

    @property
    def spec(self):
        return self.task.model.spec


def proposed_masks(house: House, ids: UserIds, windows: int = 8, budget: int = 2) -> dict[Policy, Tensor]:
    known = known_of(house.task, house.values, house.worker, ids, windows, budget)
    policies = [
        policy for policy in get_args(Policy) if policy != "all" and (policy != "gate" or "gate" in house.values)
    ]
    return {policy: proposed_mask(house.task, known, ids, policy) for policy in policies}


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def test_masks_of_a_block_are_those_of_each_user_alone(house: House) -> None:
    together = proposed_masks(house, IDS)
    assert set(together) == {"gate", "saliency", "magnitude", "random"}
    for u, user_id in enumerate(IDS):
        alone = proposed_masks(house, np.array([user_id]))
        for name, mask_ug in together.items():
            assert torch.equal(mask_ug[u], alone[name][0])
            assert mask_ug.view(len(IDS), -1, house.spec.rank).sum(2).eq(2).all()
    assert len({tuple(mask_ug.flatten().tolist()) for mask_ug in together.values()}) == 4


def test_saliency_takes_the_largest_gains_on_the_first_support_examples(house: House) -> None:
    """A gain is minus the loss's slope along a unit's gate: here by central differences, all gates at k / R."""
    model, units, step = house.task.model, house.spec.units, 1e-2
    support = house.worker.batch(IDS, "support", 8, house.task.streams.at("serve", "gain"))

    def loss_u(gates: Tensor) -> Tensor:
        with torch.no_grad(), model.gated(house.values, gates.expand(len(IDS), units)):
            return model.loss(support)

    even = torch.full((units,), 2 / 8)
    gain_ug = torch.stack([loss_u(even - step * unit) - loss_u(even + step * unit) for unit in torch.eye(units)], 1)
    largest = gain_ug.view(len(IDS), -1, 8).topk(2).indices
    expected = torch.zeros(len(IDS), 2, 8, dtype=torch.bool).scatter(2, largest, True).flatten(1)
    assert torch.equal(proposed_masks(house, IDS)["saliency"], expected)


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_one_gate_serves_any_budget(house: House, budget: int) -> None:
    for mask_ug in proposed_masks(house, IDS, 8, budget).values():
        assert mask_ug.view(len(IDS), -1, house.spec.rank).sum(2).eq(budget).all()


@pytest.mark.parametrize(("target", "active"), [(None, 4), (0.5, 8)])
def test_policies_that_learn_nothing_take_the_share_of_independent_units_that_is_asked_for(
    target: float | None, active: int
) -> None:
    """Of 16 units: the budget's 2 in 8, or the target; and of the gains, the largest of all modules."""
    steered = [f"gate.reward={{price=0.01, target={target}}}"] if target else []
    house = House("gate.distribution='bernoulli'", *steered)
    proposals = proposed_masks(house, IDS)
    for policy in ("saliency", "magnitude", "random"):
        assert proposals[policy].sum(1).eq(active).all(), policy
    gain_ug = known_of(house.task, house.values, house.worker, IDS, 8, 2).signals.gain_ug
    for gain_g, mask_g in zip(gain_ug, proposals["saliency"], strict=True):
        assert gain_g[mask_g].min() > gain_g[~mask_g].max()


def test_a_rebuilt_embedding_follows_the_users_own_examples(house: House) -> None:
    """Each user's is rebuilt from its own examples alone, and it moves who is known by them alone."""
    changes = ("gate.rebuild=3", "gate.embedding_rate=300.0")
    rebuilding = House(*changes)
    plain = proposed_masks(house, IDS)["gate"]
    rebuilt = proposed_masks(rebuilding, IDS)["gate"]
    assert not torch.equal(plain, rebuilt)
    for u, user_id in enumerate(IDS):
        alone = proposed_masks(rebuilding, np.array([user_id]))
        assert torch.equal(rebuilt[u], alone["gate"][0])


@pytest.mark.parametrize("policy", ["gate", "saliency", "magnitude", "random", "all"])
def test_a_policy_proposes_its_own_masks(policy: str) -> None:
    house = House(f"gate.policy='{policy}'")
    found = task_mask(house.task, task_known(house.task, house.values, house.worker, IDS), IDS)
    proposals = proposed_masks(house, IDS)
    expected = torch.ones(3, house.spec.units, dtype=torch.bool) if policy == "all" else proposals[policy]
    assert torch.equal(found, expected)
    others = proposed_masks(house, IDS, 4)
    assert policy in ("magnitude", "random", "all") or not torch.equal(others[policy], expected)


def test_a_device_tunes_by_its_settings() -> None:
    house = House("personal={steps=3, learning_rate=0.25, examples=5, gain_examples=8}")
    known = task_known(house.task, house.values, house.worker, IDS)
    active = active_rows(house.values, house.spec, task_mask(house.task, known, IDS))
    assert tuning_of(house.task, house.values, known, active) == Tuning("rows", Adam(0.25, 3), 3, 5)


@pytest.mark.parametrize("budget", ["gate.distribution='bernoulli'", "gate.distribution='budget'"])
@pytest.mark.parametrize(
    ("signal", "rule", "start"),
    [
        ("maml", "sgd", "contextual"),
        ("maml", "rates", "pool"),
        ("maml", "rates", "contextual"),
        ("fomaml", "learned", "universal"),
    ],
)
def test_a_device_walks_as_the_inner_loop_of_a_round_from_the_same_start(
    signal: str, rule: str, start: str, budget: str
) -> None:
    """For more steps than a round takes, on the examples that it serves by."""
    house = House(
        "personal={steps=4, examples=5, gain_examples=8}",
        f"meta={{signal='{signal}', rule={{name='{rule}'}}, start={{name='{start}'}}}}",
        budget,
    )
    task, values, known = house.task, house.values, task_known(house.task, house.values, house.worker, IDS)
    assert task.config.local.steps < 4
    active = active_rows(values, house.spec, task_mask(task, known, IDS))
    tuning = tuning_of(task, values, known, active)
    assert isinstance(tuning.tuner, ByRule)
    assert (tuning.kept, tuning.steps, tuning.examples) == ("rows", 4, 5)
    personal = personal_values(task, active, tuning, house.worker, IDS)
    seen = [house.worker.batch(IDS, "support", 5, task.streams.at("serve", "tune", step)) for step in range(4)]
    context = task.model.features(known.signals.examples)
    inner = Inner(task.model, task.learner, active.units, context)
    copies = task.learner.copies(values, active.units)
    *_, (last, _) = steps_of(inner, copies, seen)
    begun = inner.start(copies)
    for name, row in active.rows.items():
        torch.testing.assert_close(row + personal[name], last.rows[name].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(last.rows[name], begun[name])
        assert torch.equal(begun[name], row) == (start == "pool")
        assert not personal[name].requires_grad


def test_rows_are_those_of_the_mask_and_padding_is_zero(house: House) -> None:
    mask_ug = torch.zeros(3, house.spec.units, dtype=torch.bool)
    mask_ug[1, [2, 8, 9, 15]] = True
    active = active_rows(house.values, house.spec, mask_ug)
    fc1, fc2 = (house.values[m.section] for m in house.spec.modules)
    assert [rows.shape[1] for rows in active.rows.values()] == [3, 3]
    assert torch.equal(active.rows["pool/fc1"][1], torch.stack((fc1[2], torch.zeros(20), torch.zeros(20))))
    assert torch.equal(active.rows["pool/fc2"][1], fc2[[0, 1, 7]])
    assert all(not rows[[0, 2]].any() for rows in active.rows.values())
    nobody = active_rows(house.values, house.spec, mask_ug[:1])
    assert all(rows.shape[1] == 1 and not rows.any() for rows in nobody.rows.values())
    assert not nobody.units.valid_ujk.any()


def random_start(house: House, share: float) -> ActiveRows:
    """Users whose masks differ in size, one module of the first user empty."""
    mask_ug = torch.rand(3, house.spec.units, generator=torch.Generator().manual_seed(1)) < share
    mask_ug[0, : house.spec.rank] = False
    mask_ug[1, 0] = True
    return active_rows(house.values, house.spec, mask_ug)


@pytest.mark.parametrize("tuned", ["nothing", "scales", "rows"])
@pytest.mark.parametrize("row_format", [RowFormat("fp32"), RowFormat("int8"), RowFormat("ternary", 0.5)])
def test_served_rows_are_those_that_were_kept(house: House, tuned, row_format: RowFormat) -> None:
    active, formats = random_start(house, 0.4), {"pool": row_format}
    tuning = Tuning(tuned, Adam(0.05, 3), 3, 4)
    personal = personal_values(house.task, active, tuning, house.worker, IDS)
    sections, schema = personal_sections(active, personal), personal_schema(house.spec, tuned)
    read = {name: section.rows_ukw for name, section in quantise(sections, formats).items()}
    expected = personalised(house.spec, active.rows, read, tuned)
    for u in range(len(IDS)):
        payload = encode_personal(sections, u, schema, formats, "r1-00")
        served = served_rows(house.values, house.spec, decode_personal(payload, schema, "r1-00"), tuned)
        for j, m in enumerate(house.spec.modules):
            assert served[m.section].shape[0] == 1
            assert torch.equal(served[m.section][0], expected[m.section][u][active.units.valid_ujk[u, j]])
    assert served["pool/fc1"].shape[1] > 0
    moved = any(not torch.equal(expected[name], active.rows[name]) for name in expected)
    assert moved == (tuned != "nothing")


def test_served_rows_do_what_the_padded_rows_do(house: House) -> None:
    """A module in which the user has no active unit is the base's."""
    active = random_start(house, 0.3)
    tuning = Tuning("rows", Adam(0.05, 3), 3, 4)
    sections = personal_sections(active, personal_values(house.task, active, tuning, house.worker, IDS))
    schema, formats = personal_schema(house.spec, "rows"), {"pool": RowFormat("fp32")}
    test = house.worker.batch(IDS, "test", None, house.task.streams)
    model = house.task.model
    with torch.no_grad(), model.bound({n: active.rows[n] + sections[n].rows_ukw for n in active.rows}):
        expected_u = model.loss(test)
    for u in range(len(IDS)):
        kept = decode_personal(encode_personal(sections, u, schema, formats, ""), schema, "")
        rows = served_rows(house.values, house.spec, kept, "rows")
        with torch.no_grad(), model.bound(rows):
            torch.testing.assert_close(model.loss(test.take(slice(u, u + 1)))[0], expected_u[u], rtol=1e-5, atol=0)
    assert not active.units.valid_ujk[0, 0].any()
