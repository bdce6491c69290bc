"""Methods that adapt in a few steps, from few examples: against loops in plain PyTorch, one user at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from client.adapt import unit_gains
from federation import masks
from federation.data.population import Batch
from federation.errors import ConfigError
from federation.learner import RATES_OF_UNITS, SHARED_RATES
from federation.streams import Streams
from simulations.evaluate import NEIGHBOURS, check_methods, plans_of
from simulations.methods import Choice, Method, methods_of
from simulations.serve import Plan, propose_masks, tune
from simulations.setup import set_up, wrap
from tests.simulations.sorters import (
    ACCURATE,
    IDS,
    OWNED,
    SHOTS,
    House,
    PlainUser,
    config_of,
    house,
    owned,
    registered,
    sorter_base,
    sorters,
)


@pytest.fixture(scope="module", autouse=True)
def population() -> Iterator[None]:
    with registered():
        yield


# -------------------------------------------------------------------------------- the plain twin


def learned_start(at: House, method: Method, u: int, seen: Batch) -> dict[str, Tensor]:
    """User u's rows where f_init says that they start, told of the examples that were seen."""
    start = at.start(method)
    setup, values = start.setup, at.trained.values[method.source]
    features = setup.model.base.features(setup.model.base.module, seen.inputs[u]).mean(0, keepdim=True)
    copies = {name: copy[u : u + 1] for name, copy in setup.learner.copies(values, start.units).items()}
    units = replace(start.units, ids_ujk=start.units.ids_ujk[u : u + 1], valid_ujk=start.units.valid_ujk[u : u + 1])
    rows = setup.learner.start(copies, units, features)
    return {m.name: rows[m.section][0] for m in start.spec.modules}


def step_by_rates(at: House, method: Method, plain: PlainUser, batch: Batch, steps: int) -> None:
    """rows - rate * velocity - decay * (rows - start), in a loop over modules and factors; see `Rates`."""
    start = at.start(method)
    values, known = at.trained.values[method.source], start.setup.config.local.steps
    shared, most = values[SHARED_RATES][0], math.log(8.0)
    first = [p.detach().clone() for p in plain.parameters]
    velocity = [torch.zeros_like(p) for p in first]
    for step in range(steps):
        plain.backward(batch)
        for i, parameter in enumerate(plain.parameters):
            j, factor = divmod(i, 2)
            units = values[RATES_OF_UNITS][start.units.ids_ujk[plain.u, j] + start.setup.model.spec.rank * j]
            log_rate = units[:, factor] + shared[min(step, known - 1)]
            rate = 0.1 * (most * (log_rate / most).tanh()).exp()
            assert parameter.grad is not None
            velocity[i] = shared[known].sigmoid() * velocity[i] + parameter.grad
            pull = units[:, 2].sigmoid()[:, None] * (parameter.detach() - first[i])
            parameter.data = parameter.detach() - rate[:, None] * velocity[i] - pull


def assert_tuned_as(at: House, plan: Plan, plain: Sequence[PlainUser]) -> None:
    """What users keep, and what it is worth, against their plain twins."""
    method = plan.method
    start = at.start(method)
    found = tune(at.worker, at.trained, start, plan, IDS)
    served = at.serve(method, plan)
    for u, user in enumerate(plain):
        pool, rows = at.pool_rows(method, u), user.rows()
        for m in start.spec.modules:
            expected = rows[m.name] - pool[m.name]
            # Adam divides by sqrt(v): where a gradient is nearly zero, rounding errors are as large as steps.
            assert (found[m.section][u] - expected).norm() < 2e-3 * expected.norm()
        assert served.loss_u[u] == pytest.approx(user.bits(), rel=1e-3)
    assert np.ptp(served.loss_u) > 0


def options(shots: int, **more: object) -> str:
    given = {"shots": shots, **more} if shots else more
    return "[" + ",".join(f"{name}={value}" for name, value in given.items()) + "]"


# -------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_melpa_is_the_rules_formula_from_the_learned_start(steps: int) -> None:
    """Five steps are more than the rule has rates for."""
    at = house(name := f"melpa[shots={SHOTS},steps={steps}]")
    method, seen = at.method(name), owned(SHOTS)
    users = [PlainUser(u, learned_start(at, method, u, seen)) for u in range(len(IDS))]
    for user in users:
        step_by_rates(at, method, user, seen, steps)
    (plan,) = plans_of(method, at.trained.config)
    assert_tuned_as(at, plan, users)


def test_without_a_step_a_user_starts_where_f_init_says() -> None:
    at = house(name := f"melpa[shots={SHOTS},steps=0]", more=("gate.policy=all",))
    method = at.method(name)
    assert (method.mask, method.budget, method.choice) == ("all", 5, None)
    users = [PlainUser(u, learned_start(at, method, u, owned(SHOTS))) for u in range(len(IDS))]
    (plan,) = plans_of(method, at.trained.config)
    assert plan.steps == 0
    assert_tuned_as(at, plan, users)


@pytest.mark.parametrize(("by", "falling"), [("adam", True), ("sgd", False)])
def test_a_learned_start_may_be_left_by_torchs_optimizers(by: str, falling: bool) -> None:
    at = house(name := f"melpa[shots={SHOTS},steps=4,by={by}]")
    method, seen, rate = at.method(name), owned(SHOTS), 0.05
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    users = [PlainUser(u, learned_start(at, method, u, seen)) for u in range(len(IDS))]
    for user in users:
        user.descend(seen, kinds[by](user.parameters, lr=rate), 4, falling)
    assert_tuned_as(at, Plan(method, rate, 4), users)


@pytest.mark.parametrize(("name", "kind", "units"), [("maml", "sgd", 2), ("reptile", "adam", 5)])
def test_maml_and_reptile_step_from_their_pools_rows(name: str, kind: str, units: int) -> None:
    """With the masks that their own federations train with; maml by the rate of its own, reptile by a chosen one."""
    at = house(full := f"{name}[shots={SHOTS},steps=4]")
    method = at.method(full)
    plans = plans_of(method, at.trained.config)
    assert [plan.learning_rate for plan in plans] == ([0.0] if kind == "sgd" else [0.01, 0.05])
    users = [PlainUser(u, at.pool_rows(method, u)) for u in range(len(IDS))]
    assert {len(rows) for user in users for rows in user.rows().values()} == {units}
    for user in users:
        if kind == "sgd":
            user.descend(owned(SHOTS), torch.optim.SGD(user.parameters, lr=0.3), 4)
        else:
            user.descend(owned(SHOTS), torch.optim.Adam(user.parameters, lr=0.05), 4, falling=True)
    assert_tuned_as(at, plans[-1], users)


def test_no_step_leaves_a_pool_as_it_is() -> None:
    at = house("shared_tuned[steps=0]", "shared")
    tuned, shared = (at.method(name) for name in ("shared_tuned[steps=0]", "shared"))
    assert plans_of(tuned, at.trained.config) == [Plan(tuned, 0.0, 0)]
    np.testing.assert_array_equal(
        at.serve(tuned, Plan(tuned, 0.0, 0)).loss_u, at.serve(shared, Plan(shared, 0.0, 0)).loss_u
    )


# -------------------------------------------------------------------------------- few examples


EVERY = [
    f"{base}{options(SHOTS, **more)}"
    for base, more in (
        ("dense_lora", {"steps": 5}),
        ("shared_tuned", {"steps": 5}),
        ("dsa_t1", {"pool": "gated", "steps": 5}),
        ("dsa_t2", {"pool": "gated", "steps": 5, "windows": 2}),
        ("melpa", {"steps": 5}),
        ("melpa", {"steps": 5, "by": "adam", "windows": 2}),
        ("maml", {"steps": 5}),
        ("reptile", {"steps": 5}),
        ("head_only", {"steps": 5}),
        ("neighbours", {}),
    )
]
GATED = ("variants.gated.gate={policy='gate'}",)


@pytest.mark.parametrize("examples", [2, 6])
def test_every_method_sees_the_same_few_examples_and_no_other(examples: int) -> None:
    """For its mask, its start and each of its steps, whether a step takes fewer or more than there are."""
    at = house(*EVERY, more=(*GATED, f"evaluate.examples={examples}"))
    expected = [{tuple(row.tolist()) for row in user} for user in owned(SHOTS).inputs]
    assert all(len(points) == SHOTS for points in expected)
    for name in EVERY:
        method = at.method(name)
        at.asked.clear()
        at.serve(method, plans_of(method, at.trained.config)[0])
        assert at.asked, name
        for ids, inputs in at.asked:
            assert ids.tolist() == IDS.tolist()
            assert [{tuple(row.tolist()) for row in user} for user in inputs] == expected, name


def test_with_all_examples_more_are_seen() -> None:
    at = house("dense_lora[steps=5]")
    method = at.method("dense_lora[steps=5]")
    at.serve(method, plans_of(method, at.trained.config)[0])
    seen = torch.cat([inputs for _, inputs in at.asked], 1)
    assert all(len({tuple(row.tolist()) for row in user}) > SHOTS for user in seen)


def test_a_mask_is_chosen_from_the_few_examples_alone() -> None:
    """The two units of each module that promise most, first order, by the examples that are owned."""
    at = house(name := f"melpa[shots={SHOTS},steps=1]")
    method = at.method(name)
    assert method.choice == Choice("saliency", "pool", 6, 2, SHOTS)
    assert method.choice.seen == method.seen == SHOTS
    model, values = at.start(method).setup.model, at.trained.values["pool"]
    chosen = masks.unpack(at.masks_of(method)[method.choice], model.spec.units)
    gain_ujr = unit_gains(model, values, owned(SHOTS), 2 / 5).view(len(IDS), 2, 5)
    expected = torch.zeros_like(gain_ujr, dtype=torch.bool).scatter(2, gain_ujr.topk(2, 2).indices, True)
    assert torch.equal(chosen.view(len(IDS), 2, 5), expected)
    everything = propose_masks(at.worker, at.trained, IDS, [replace(method.choice, shots=0)])[1]
    assert not torch.equal(next(iter(everything.values())), masks.pack(chosen))


def test_steps_with_fewer_examples_than_are_owned_draw_anew() -> None:
    at = house(name := "dense_lora[shots=5,steps=3]", more=("evaluate.examples=2",))
    method, rate = at.method(name), 0.05
    start = at.start(method)
    found = tune(at.worker, at.trained, start, Plan(method, rate, 3), IDS)
    own = owned(5)
    fresh = start.spec.init(Streams(0).generator("fresh"))
    for u in range(len(IDS)):
        user = PlainUser(u, {m.name: fresh[m.section] for m in start.spec.modules})
        optimizer = torch.optim.Adam(user.parameters, lr=rate)
        for step in range(3):
            drawn = Streams(0).at("serve", "tune", step).distinct("shots", IDS, 5, 2)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 3)
            user.backward(own.pick(torch.from_numpy(drawn)))
            optimizer.step()
        for m in start.spec.modules:
            expected = user.rows()[m.name] - fresh[m.section]
            assert (found[m.section][u] - expected).norm() < 2e-3 * expected.norm()


# -------------------------------------------------------------------------------- controls


def test_head_only_moves_the_head_alone() -> None:
    at = house(name := f"head_only[shots={SHOTS},steps=6]")
    method, rate = at.method(name), 0.05
    start = at.start(method)
    spec = start.spec
    assert [m.name for m in spec.modules] == ["body", "head"]
    assert start.units.valid_ujk.sum(2).tolist() == [[0, 2]] * len(IDS)
    plan = Plan(method, rate, 6)
    found, fresh = tune(at.worker, at.trained, start, plan, IDS), spec.init(Streams(0).generator("fresh"))
    assert not found["pool/body"].any()
    served = at.serve(method, plan)
    for u in range(len(IDS)):
        user = PlainUser(u, {"head": fresh["pool/head"][:2]})
        user.descend(owned(SHOTS), torch.optim.Adam(user.parameters, lr=rate), 6, falling=True)
        expected = user.rows()["head"] - fresh["pool/head"][:2]
        assert (found["pool/head"][u] - expected).norm() < 2e-3 * expected.norm()
        assert served.loss_u[u] == pytest.approx(user.bits(), rel=1e-3)
    values = 2 * (6 + 3)
    assert ((served.bytes_u > 2 * values) & (served.bytes_u < 2 * values + 32)).all()


@pytest.mark.parametrize("shots", [0, SHOTS])
def test_neighbours_are_the_votes_of_the_examples_that_users_own(shots: int) -> None:
    """Users and their test examples in a loop; nothing is trained, nothing is sent."""
    name = f"neighbours[shots={shots}]" if shots else "neighbours"
    at = house(name, more=(ACCURATE,))
    method, base = at.method(name), sorter_base()
    support = owned(shots) if shots else sorters().batch(IDS, "support", None, Streams(0))
    test = sorters().parts["test"].take(torch.from_numpy(IDS))
    plans = plans_of(method, at.trained.config)
    assert [plan.steps for plan in plans] == list(NEIGHBOURS)
    for plan in plans:
        served, worth = at.serve(method, plan), []
        for u in range(len(IDS)):
            near, mine = (base.features(base.module, batch.inputs[u]) for batch in (support, test))
            for n in range(OWNED):
                similar = torch.cosine_similarity(near, mine[n][None])
                votes = torch.full((3,), 0.1)
                for i in similar.argsort(descending=True)[: plan.steps]:
                    votes[support.targets[u, i]] += ((similar[i] - similar.max()) / 0.1).exp()
                target = int(test.targets[u, n])
                bits = -float((votes[target] / votes.sum()).log2())
                worth.append((float(test.weight[u, n]), bits, float(votes.argmax() == target)))
        weight, loss, right = (np.reshape(column, (len(IDS), OWNED)) for column in zip(*worth))
        np.testing.assert_allclose(served.loss_u, (loss * weight).sum(1) / weight.sum(1), rtol=1e-4)
        assert served.quality_u is not None
        np.testing.assert_allclose(served.quality_u, (right * weight).sum(1) / weight.sum(1), atol=1e-6)
        assert (served.bytes_u.tolist(), served.active_share) == ([0] * len(IDS), 0.0)


@pytest.mark.parametrize("name", ["head_only", "neighbours", "head_only[shots=2,steps=1]", "neighbours[shots=2]"])
def test_a_base_without_a_head_has_no_such_controls(name: str) -> None:
    config = config_of(name)
    for head in ("head", None):
        headed = sorters(head)
        federations = {"pool": set_up(config, wrap(config, headed.base_model()))}
        if head:
            check_methods(methods_of(config), headed, federations)
        else:
            with pytest.raises(ConfigError, match=r"needs a base with a head.*'sorter' has none.*leave it out"):
                check_methods(methods_of(config), headed, federations)
