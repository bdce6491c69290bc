"""Serving new users against a loop over users in plain PyTorch, and who may choose what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

import simulations.evaluate
from client.personal import personal_widths, personalised
from federation import masks
from federation.base import BaseModel
from federation.codec import decode_personal, encode_personal, quantise
from federation.config import RunConfig
from federation.data.population import Batch, Part
from federation.data.registry import POPULATIONS, make_population
from federation.formats import RowFormat
from federation.state import GATE_SECTION
from federation.streams import Streams, UserIds
from federation.update import Schema, Section, SectionSpec
from simulations.compute.worker import Worker
from simulations.compute.workers import InProcess
from simulations.evaluate import Evaluation, MethodResult, evaluate, evaluated_users, federated_users, plans_of
from simulations.methods import Choice, Method, known_methods, methods_of
from simulations.populations.synthetic import SyntheticPopulation
from simulations.progress import Silent, Stage
from simulations.record import method_table
from simulations.serve import (
    Plan,
    Start,
    Trained,
    payload,
    propose_masks,
    serve_block,
    start_of,
    tune,
)
from simulations.setup import Setup
from tests import models
from tests.simulations.tiny import tiny_config

METHODS = (
    "shared", "dense_lora", "dense_lora_full_rank", "shared_tuned", "random_mask", "other_mask", "saliency_mask",
    "magnitude_mask", "dsa_t0", "dsa_t1", "dsa_t2", "dsa_t2@int8", "dsa_t2@ternary:0.2",
)  # fmt: skip
IDS = np.array([61, 64, 70, 77, 79])
PLAN = {"learning_rate": 0.05, "steps": 4}
HITS = "population.options={train_users=60, new_users=20, widths=[8, 12, 4], rank=8, budget=2, examples=16, hit=1.0}"


def config_of(*overrides: str) -> RunConfig:
    return tiny_config(f"evaluate.methods={list(METHODS)}", *overrides)


def trained_of(config: RunConfig) -> Trained:
    """Values as if they had been trained: every row is at work, and the gate is not the saliency rule."""
    narrow = config.pool.model_copy(update={"rank": config.gate.budget})
    everyone = config.gate.model_copy(update={"policy": "all"})
    shared = config.model_copy(update={"pool": narrow, "gate": everyone})
    worker, values = Worker(config), {}
    generator = torch.Generator().manual_seed(5)
    for name, own in (("pool", config), ("shared", shared)):
        first = worker.setup(own).begin().values
        values[name] = {n: rows + 0.3 * torch.randn(rows.shape, generator=generator) for n, rows in first.items()}
    return Trained(config, values, {"pool": config, "shared": shared})


@dataclass(frozen=True)
class House:
    """A worker with values, and its users' masks."""

    worker: Worker
    trained: Trained
    packed: Mapping[Choice, Tensor]

    @property
    def setup(self) -> Setup:
        return self.worker.setup(self.trained.config)

    def method(self, name: str) -> Method:
        return known_methods(self.trained.config)[name]

    def choice(self, name: str) -> Choice:
        choice = self.method(name).choice
        assert choice is not None
        return choice

    def start(self, method: Method) -> Start:
        return start_of(self.worker, self.trained, method, IDS, self.packed)


def proposed_by(config: RunConfig) -> list[Choice]:
    """The choices of policies that METHODS make."""
    found = [method.choice for method in methods_of(config)]
    return list({choice: None for choice in found if choice is not None and choice.rule != "other"})


@pytest.fixture(scope="module")
def house() -> House:
    trained = trained_of(config_of())
    worker = Worker(trained.config)
    _, packed = propose_masks(worker, trained, IDS, proposed_by(trained.config))
    other = {replace(choice, rule="other"): mask for choice, mask in packed.items() if choice.rule == "gate"}
    packed |= {choice: mask.roll(len(IDS) // 2, 0) for choice, mask in other.items()}
    return House(worker, trained, packed)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluation_of(config_of())


def evaluation_of(config: RunConfig) -> Evaluation:
    population = make_population(config.population)
    return evaluate(InProcess(config), population, trained_of(config), Silent())


# -------------------------------------------------------------------------------- the plain twin


def plain_base(house: House) -> BaseModel:
    """A base that is not wrapped."""
    return make_population(house.trained.config.population).base_model()


def final_part(house: House) -> Batch:
    return house.worker.population.batch(IDS, "test", None, Streams(99))


def plain_bits(house: House, u: int, rows: Mapping[str, Tensor]) -> float:
    """User u's loss on its test part with these rows by module's name, in bits per target."""
    base, test = plain_base(house), final_part(house)
    models.with_plain_lora(base, dict(rows), house.trained.config.pool.scale)
    return float(base.loss(base.module, test.inputs[u], test.targets[u]).mean().detach()) / math.log(2.0)


def rows_of(house: House, values: str, u: int, method: str | None) -> dict[str, Tensor]:
    """The rows of a source by module's name: all, or those of user u's mask by a method."""
    spec = house.setup.model.spec
    source = house.trained.values[values]
    if method is None:
        return {m.name: source[m.section] for m in spec.modules}
    mask = masks.unpack(house.packed[house.choice(method)][u], spec.units).view(-1, spec.rank)
    return {m.name: source[m.section][mask[j]] for j, m in enumerate(spec.modules)}


def serve(house: House, method: Method) -> Any:
    tuned = PLAN if method.tuned != "nothing" else {"learning_rate": 0.0, "steps": 0}
    plan = Plan(method, **tuned)  # type: ignore[arg-type]
    return serve_block(house.worker, house.trained, IDS, house.packed, [plan])[1][plan]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shared", "shared"),
        ("dsa_t0", "pool"),
        ("other_mask", "pool"),
        ("saliency_mask", "pool"),
        ("magnitude_mask", "pool"),
        ("random_mask", "pool"),
    ],
)
def test_a_method_without_tuning_is_its_rows_in_a_plain_model(house: House, name: str, source: str) -> None:
    served, chosen = serve(house, house.method(name)), name if source == "pool" else None
    expected = [plain_bits(house, u, rows_of(house, source, u, chosen)) for u in range(len(IDS))]
    np.testing.assert_allclose(served.loss_u, expected, rtol=1e-5)
    assert np.ptp(expected) > 0


def test_base_is_the_model_alone(house: House) -> None:
    served = serve(house, house.method("base"))
    np.testing.assert_allclose(served.loss_u, [plain_bits(house, u, {}) for u in range(len(IDS))], rtol=1e-6)
    assert served.bytes_u.tolist() == [0] * len(IDS)
    assert served.active_share == 0


def test_the_runs_quality_is_measured_where_it_is_not_the_loss() -> None:
    """On the test part, against each user's plain model."""
    config = tiny_config("evaluate.methods=['dsa_t0']", "gate.reward.quality.name=accuracy", HITS)
    found, trained = evaluation_of(config), trained_of(config)
    population, spec = make_population(config.population), Worker(config).setup(config).model.spec
    test = population.batch(found.user_ids, "test", None, Streams(99))
    for result in found.results:
        for u in range(len(found.user_ids)):
            base = population.base_model()
            if result.method.choice is not None:
                mask_jr = found.masks[result.method.choice][u].view(-1, spec.rank)
                rows = {m.name: trained.values["pool"][m.section][mask_jr[j]] for j, m in enumerate(spec.modules)}
                models.with_plain_lora(base, rows, config.pool.scale)
            assert base.accuracy is not None
            expected = float(base.accuracy(base.module, test.inputs[u], test.targets[u]).mean())
            assert result.quality_u is not None
            assert result.quality_u[u] == pytest.approx(expected, abs=1e-6)
        assert method_table(found)[result.method.name]["quality"] == pytest.approx(result.quality_u.mean())
    base_u, chosen_u = (result.quality_u for result in found.results)
    assert (base_u != chosen_u).any()


def test_the_loss_is_not_measured_twice(evaluation: Evaluation) -> None:
    assert all("quality" not in entry for entry in method_table(evaluation).values())


def plain_tuning(house: House, u: int, start: dict[str, Tensor], scales_only: bool) -> list[Tensor]:
    """What torch's Adam changes in user u's rows, by module; or the strengths that it finds for the units.

    d loss / d strength of unit r is (d loss / d up_r) . up_r, with up at its strength.
    """
    base, config = plain_base(house), house.trained.config
    layers = models.with_plain_lora(base, start, config.pool.scale)
    streams = house.setup.streams.at("serve")
    first_up = [layer.up.detach().clone() for layer in layers]
    strength = [torch.ones(len(up), requires_grad=True) for up in first_up]
    tuned = strength if scales_only else [p for layer in layers for p in (layer.down, layer.up)]
    optimizer = torch.optim.Adam(tuned, lr=PLAN["learning_rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / PLAN["steps"])
    for step in range(int(PLAN["steps"])):
        batch = house.worker.population.batch(IDS, "support", config.evaluate.examples, streams.at("tune", step))
        for layer in layers:
            layer.down.grad = layer.up.grad = None
        base.loss(base.module, batch.inputs[u], batch.targets[u]).mean().backward()
        if scales_only:
            for s, layer, up in zip(strength, layers, first_up, strict=True):
                s.grad = (layer.up.grad * up).sum(1)
        optimizer.step()
        schedule.step()
        if scales_only:
            for s, layer, up in zip(strength, layers, first_up, strict=True):
                layer.up.data = up * s.detach()[:, None]
    if scales_only:
        return [s.detach() - 1 for s in strength]
    return [layer.rows - start[name] for layer, name in zip(layers, start, strict=True)]


@pytest.mark.parametrize(
    ("name", "chosen"), [("dense_lora", None), ("shared_tuned", None), ("dsa_t2", "dsa_t2"), ("dsa_t1", "dsa_t1")]
)
def test_tuning_is_torchs_adam_user_by_user(house: House, name: str, chosen: str | None) -> None:
    method = house.method(name)
    start = house.start(method)
    found = tune(house.worker, house.trained, start, Plan(method, **PLAN), IDS)  # type: ignore[arg-type]
    for u in range(len(IDS)):
        if method.source == "fresh":
            fresh = start.spec.init(house.setup.streams.generator("fresh"))
            rows = {m.name: fresh[m.section] for m in start.spec.modules}
            assert all(not row[:, m.d_in :].any() for row, m in zip(rows.values(), start.spec.modules))
        else:
            rows = rows_of(house, method.source, u, chosen)
        plain = plain_tuning(house, u, rows, method.tuned == "scales")
        for m, expected in zip(start.spec.modules, plain, strict=True):
            # Adam divides by sqrt(v): where a gradient is nearly zero, rounding errors are as large as steps.
            error = (found[m.section][u].squeeze(-1) - expected).norm() / expected.norm()
            assert error < 2e-3


# -------------------------------------------------------------------------------- bytes


def sections_of(start: Start, personal: Mapping[str, Tensor], method: Method) -> tuple[dict[str, Section], Schema]:
    sections, specs = {}, {}
    for j, m in enumerate(start.spec.modules):
        ids, valid = start.units.ids_ujk[:, j].int(), start.units.valid_ujk[:, j]
        sections[m.section] = Section(ids, valid, personal[m.section])
        specs[m.section] = SectionSpec(start.spec.rank, personal_widths(m, method.tuned), start.spec.rank)
    return sections, Schema(specs)


@pytest.mark.parametrize("written", ["fp32", "fp16", "int8", "ternary"])
@pytest.mark.parametrize("name", ["dense_lora", "shared_tuned", "dsa_t0", "dsa_t1", "dsa_t2"])
def test_what_is_measured_is_what_was_encoded_and_decoded(house: House, name: str, written: str) -> None:
    top = 0.3 if written == "ternary" else 1.0
    method = replace(house.method(name), rows=RowFormat(written, top))  # type: ignore[arg-type]
    start = house.start(method)
    personal = tune(house.worker, house.trained, start, Plan(method, **PLAN), IDS)  # type: ignore[arg-type]
    kept, bytes_u = payload(start, personal, method)
    sections, schema = sections_of(start, personal, method)
    for u in range(len(IDS)):
        data = encode_personal(sections, u, schema, {"pool": method.rows}, "")
        assert bytes_u[u] == len(data)
        for name_of_section, decoded in decode_personal(data, schema, "").items():
            valid = start.units.valid_ujk[u, list(schema.sections).index(name_of_section)]
            assert torch.equal(kept[name_of_section][u][valid], decoded.rows_ukw[0])
    served = serve(house, method)
    assert served.bytes_u.tolist() == bytes_u.tolist()
    read = {section: rows.rows_ukw for section, rows in quantise(sections, {"pool": method.rows}).items()}
    rows = personalised(start.spec, start.rows, read, method.tuned)
    for u in range(len(IDS)):
        by_name = {m.name: rows[m.section][u][start.units.valid_ujk[u, j]] for j, m in enumerate(start.spec.modules)}
        assert served.loss_u[u] == pytest.approx(plain_bits(house, u, by_name), rel=1e-5)


def test_a_mask_costs_a_bit_per_unit_and_coarser_rows_cost_less(house: House) -> None:
    cost = {name: int(serve(house, house.method(name)).bytes_u.max()) for name in ("dsa_t0", "dsa_t1", "dsa_t2")}
    assert cost["dsa_t0"] == 12 + 16 // 8
    assert cost["dsa_t0"] < cost["dsa_t1"] < cost["dsa_t2"]
    assert serve(house, house.method("shared")).bytes_u.tolist() == [0] * len(IDS)


def test_masks_of_different_sizes_are_served_alike(house: House) -> None:
    """Bernoulli masks: users whose masks are padded equal those users alone."""
    units = torch.rand(len(IDS), house.setup.model.spec.units, generator=torch.Generator().manual_seed(0)) < 0.4
    method = house.method("dsa_t2")
    sized = replace(house, packed={**house.packed, house.choice("dsa_t2"): masks.pack(units)})
    together = serve(sized, method)
    for u in range(len(IDS)):
        plan = Plan(method, **PLAN)  # type: ignore[arg-type]
        one = {name: mask[u : u + 1] for name, mask in sized.packed.items()}
        alone = serve_block(house.worker, house.trained, IDS[u : u + 1], one, [plan])[1][plan]
        assert together.loss_u[u] == pytest.approx(alone.loss_u[0], rel=1e-3)
        assert together.bytes_u[u] == pytest.approx(alone.bytes_u[0], abs=4)
    assert together.active_share == pytest.approx(float(units.float().mean()))


def test_the_active_share_is_that_of_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def propose(
        worker: Worker, trained: Trained, ids: UserIds, choices: Sequence[Choice]
    ) -> tuple[None, dict[Choice, Tensor]]:
        chosen_ug = torch.arange(16) < torch.from_numpy(ids % 7 + 1)[:, None]
        return None, dict.fromkeys(choices, masks.pack(chosen_ug))

    monkeypatch.setattr(simulations.evaluate, "propose_masks", propose)
    found = evaluation_of(config_of("evaluate.methods=['dsa_t0']"))
    assert found.results[1].active_share == pytest.approx((found.user_ids % 7 + 1).mean() / 16)


# -------------------------------------------------------------------------------- who chooses


@dataclass(frozen=True)
class Contrary(SyntheticPopulation):
    """A population in which the test parts of one split say the opposite of their support parts."""

    contrary: str = "nobody"

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        batch = super().batch(user_ids, part, size, streams)
        if part != "test" or self.contrary == "nobody":
            return batch
        opposed = torch.from_numpy(np.isin(user_ids, self.users(self.contrary)))[:, None, None]
        return replace(batch, targets=torch.where(opposed, -10.0 * batch.targets, batch.targets))


@pytest.fixture
def contrary(monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = {**POPULATIONS.builtin, "contrary": f"{__name__}:Contrary"}
    monkeypatch.setattr("federation.data.registry.POPULATIONS", replace(POPULATIONS, builtin=builtin))


def choices(evaluation: Evaluation) -> dict[str, tuple[float, int]]:
    return {r.method.name: (r.learning_rate, r.steps) for r in evaluation.results if r.method.tuned != "nothing"}


@pytest.mark.usefixtures("contrary")
def test_rates_and_steps_are_the_choice_of_training_users_alone() -> None:
    def evaluated(contrary: str) -> Evaluation:
        return evaluation_of(config_of("population.name=contrary", f"population.options.contrary={contrary}"))

    plain, train, new = evaluated("nobody"), evaluated("train"), evaluated("new")
    assert choices(new) == choices(plain)
    assert not np.allclose(new.results[0].loss_u, plain.results[0].loss_u)
    # Fresh rows that learn the opposite of what they are tested on should learn as little as they can.
    for name in ("dense_lora", "dense_lora_full_rank"):
        assert choices(train)[name] == (0.01, 2)
        assert choices(plain)[name] == (0.05, 4)


def test_the_choice_is_the_best_of_the_grid_on_training_users(evaluation: Evaluation, house: House) -> None:
    config = house.trained.config
    tuning_ids, _ = evaluated_users(house.worker.population, config)
    _, packed = propose_masks(house.worker, house.trained, tuning_ids, proposed_by(config))
    for result in evaluation.results:
        if result.method.mask in ("other", "none") or result.method.tuned == "nothing":
            continue
        plans = plans_of(result.method, config)
        assert len(plans) == 4
        _, trials = serve_block(house.worker, house.trained, tuning_ids, packed, plans)
        best = min(plans, key=lambda plan: trials[plan].loss_u.mean())
        assert (result.learning_rate, result.steps) == (best.learning_rate, best.steps)


def test_who_chooses_takes_no_part_in_the_federations_and_is_never_measured(house: House) -> None:
    population, config = house.worker.population, house.trained.config
    tuning_ids, new_ids = (set(ids.tolist()) for ids in evaluated_users(population, config))
    federated = set(federated_users(population, config))
    assert (len(tuning_ids), len(new_ids)) == (5, 8)
    assert tuning_ids | federated == set(population.users("train"))
    assert not tuning_ids & federated
    assert new_ids <= set(population.users("new"))
    everyone = federated_users(population, config_of("evaluate.methods=[]"))
    assert list(everyone) == list(population.users("train"))


def test_a_rate_that_diverges_is_never_chosen() -> None:
    config = config_of("evaluate.learning_rates=[1e30, 0.01]", "evaluate.methods=['dense_lora', 'dsa_t2']")
    evaluation = evaluation_of(config)
    assert {rate for rate, _ in choices(evaluation).values()} == {0.01}
    assert all(np.isfinite(result.loss_u).all() for result in evaluation.results)


# -------------------------------------------------------------------------------- the table


def test_every_method_serves_the_same_new_users_and_base_gains_exactly_nothing(evaluation: Evaluation) -> None:
    population = make_population(config_of().population)
    assert evaluation.user_ids.tolist() == evaluated_users(population, config_of())[1].tolist()
    assert set(evaluation.user_ids) <= set(population.users("new"))
    table = method_table(evaluation)
    assert list(table) == ["base", *METHODS]
    assert all(len(result.loss_u) == 8 for result in evaluation.results)
    base = table["base"]
    assert [base[key] for key in ("mean", "p10", "p90", "harmed", "se", "bytes_per_user", "active_share")] == [0.0] * 7
    wanted = {"mean", "p10", "p90", "harmed", "se", "bytes_per_user", "active_share", "seconds_per_user"}
    assert all(wanted <= set(entry) for entry in table.values())
    share = config_of().gate.budget / config_of().pool.rank
    assert {name: entry["active_share"] for name, entry in table.items()} == pytest.approx(
        {name: 0 if name == "base" else share if "mask" in name or "dsa" in name else 1 for name in table}
    )


def test_the_cut_into_blocks_changes_nothing(evaluation: Evaluation) -> None:
    whole = evaluation_of(config_of("evaluate.block=100"))
    for cut, uncut in zip(evaluation.results, whole.results, strict=True):
        np.testing.assert_allclose(cut.loss_u, uncut.loss_u, rtol=2e-2, atol=1e-3)
        assert (cut.learning_rate, cut.steps) == (uncut.learning_rate, uncut.steps)


def test_progress_ends_with_all_of_the_work() -> None:
    told: list[tuple[str, int, int]] = []

    class Told(Silent):
        def stage(self, name: str, total: int) -> Stage:
            stage = Mock()
            stage.update.side_effect = lambda done, note: told.append((name, done, total))
            return stage

    config = config_of("evaluate.methods=['dsa_t0']")
    evaluate(InProcess(config), make_population(config.population), trained_of(config), Told())
    tuning, new = math.ceil(5 / 3), math.ceil(8 / 3)
    stages = [("propose masks", tuning), ("choose rates", tuning), ("propose new masks", new), ("serve new users", new)]
    assert told == [(name, done, total) for name, total in stages for done in range(1, total + 1)]


@pytest.mark.parametrize("users", [2, 3, 5, 8])
def test_the_mask_of_another_is_never_ones_own_and_everyones_is_given_once(
    users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a user's mask spells its id."""

    def propose(
        worker: Worker, trained: Trained, ids: UserIds, choices: Sequence[Choice]
    ) -> tuple[None, dict[Choice, Tensor]]:
        return None, dict.fromkeys(choices, torch.from_numpy(ids.astype("<u2").view(np.uint8).reshape(-1, 2).copy()))

    monkeypatch.setattr(simulations.evaluate, "propose_masks", propose)
    found = evaluation_of(config_of("evaluate.methods=['other_mask']", f"evaluate.users={users}"))
    spelled = masks.pack(found.masks[replace(found.usual, rule="other")]).numpy().copy().view("<u2").ravel()
    assert sorted(spelled.tolist()) == sorted(found.user_ids.tolist())
    assert (spelled != found.user_ids).all()


def test_the_gates_masks_keep_their_budget_and_are_not_saliencys(house: House) -> None:
    spec = house.setup.model.spec
    unpacked = {choice.rule: masks.unpack(packed, spec.units) for choice, packed in house.packed.items()}
    assert set(unpacked) == {"gate", "other", "saliency", "magnitude", "random"}
    for mask_ug in unpacked.values():
        assert (mask_ug.view(len(IDS), -1, spec.rank).sum(2) == house.trained.config.gate.budget).all()
    assert not torch.equal(unpacked["gate"], unpacked["saliency"])
    assert len({bytes(mask.tolist()) for mask in house.packed[house.choice("random_mask")]}) > 1


def test_a_gate_that_has_learned_nothing_is_the_saliency_rule(house: House) -> None:
    first = house.setup.begin().values
    values = {**house.trained.values["pool"], GATE_SECTION: first[GATE_SECTION]}
    fresh = replace(house.trained, values={**house.trained.values, "pool": values})
    choices = [house.choice("dsa_t0"), house.choice("saliency_mask")]
    _, packed = propose_masks(house.worker, fresh, IDS, choices)
    assert torch.equal(packed[choices[0]], packed[choices[1]])


def test_the_figures_of_a_row() -> None:
    base = np.array([3.0, 2.0, 4.0, 1.0])
    loss = np.array([2.0, 2.5, 1.0, 1.0])

    def result(name: str, loss_u: np.ndarray) -> MethodResult:
        method = Method(name, "pool", "gate", "rows", RowFormat("fp16"), 2)
        return MethodResult(method, 0.1, 5, loss_u, np.array([10.0, 20.0, 30.0, 40.0]), 0.25, 0.5)

    groups = np.array([0, 0, 1, 1])
    rows, usual = [result("base", base), result("x", loss)], Choice("gate", "pool", 4, 2)
    entry = method_table(Evaluation(np.arange(4), groups, rows, {}, usual, []))["x"]
    gains = sorted([1.0, -0.5, 3.0, 0.0])
    assert entry["mean"] == pytest.approx(sum(gains) / 4)
    assert entry["p10"] == pytest.approx(gains[0] + 0.3 * (gains[1] - gains[0]))
    assert entry["p90"] == pytest.approx(gains[2] + 0.7 * (gains[3] - gains[2]))
    assert entry["harmed"] == 0.25
    assert entry["loss"] == pytest.approx(loss.mean())
    assert entry["bytes_per_user"] == 25
    # Sums of the groups' residuals are -1.25 and 1.25.
    assert entry["se"] == pytest.approx(math.sqrt(2 * 2 * 1.25**2) / 4)
