"""Users who meet tasks in turn, against a loop over users and tasks in plain PyTorch; who chooses; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import simulations.sequences
from client.adapt import Adam
from client.continual.course import Course, adapt_to, begin
from client.continual.rules import course_of
from client.personal import Tuning, active_rows, learned_tuning
from federation import masks
from federation.config import RunConfig
from federation.data.population import Part, Population
from federation.data.registry import POPULATIONS, make_population
from federation.errors import ConfigError
from federation.streams import Streams, UserIds
from simulations.compute.worker import Worker
from simulations.compute.workers import InProcess
from simulations.continual_metrics import METRICS
from simulations.evaluate import evaluated_users, usual_choice
from simulations.populations.drift import Drifting
from simulations.populations.synthetic import SyntheticPopulation
from simulations.progress import Silent
from simulations.record import read_record
from simulations.runs import run
from simulations.sequence_rules import CoursePlan, plans_of_rule, references_of, rules_of
from simulations.sequence_walks import (
    Classroom,
    Together,
    Walk,
    classroom,
    measured_quality,
    walk_block,
    watched_steps,
)
from simulations.sequences import check_sequences, evaluate_sequences
from simulations.serve import Trained, propose_masks
from simulations.statistics import clustered_error
from tests import models
from tests.simulations.tiny import tiny_config

TASKS, STEPS, EXAMPLES = 3, 4, 5
IDS = np.array([61, 64, 70, 79])
RULES = ("none", "ewc:20", "online_ewc:20", "replay", "isolation", "meta")


@dataclass(frozen=True)
class Texts(SyntheticPopulation):
    """Targets that stand for 1, 2 or 3 characters, by user."""

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        return np.asarray(1.0 + user_ids % 3, dtype=np.float64)


def wanderers(tasks: int = TASKS) -> Population:
    """Users who drift, or who have no tasks."""
    texts = Texts(train_users=60, new_users=20, widths=(8, 12, 4), rank=8, budget=2, types=3, examples=16, hit=1.0)
    return Drifting(texts, tasks) if tasks > 1 else texts


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = {**POPULATIONS.builtin, "wanderers": f"{__name__}:wanderers"}
    monkeypatch.setattr("federation.data.registry.POPULATIONS", replace(POPULATIONS, builtin=builtin))


def config_of(*overrides: str) -> RunConfig:
    return tiny_config(
        "population={name='wanderers', options={}}",
        "meta={signal='fomaml', rule={name='rates'}}",
        "evaluate.methods=['base']",
        f"evaluate.sequence={{steps={STEPS}, examples={EXAMPLES}, quality='bits', rules={list(RULES)}}}",
        "evaluate.sequence.learning_rates=[0.01, 0.05]",
        *overrides,
    )


def trained_of(config: RunConfig) -> Trained:
    """Values as if they had been trained."""
    generator = torch.Generator().manual_seed(5)
    first = Worker(config).setup(config).begin().values
    values = {name: rows + 0.3 * torch.randn(rows.shape, generator=generator) for name, rows in first.items()}
    return Trained(config, {"pool": values}, {"pool": config})


@dataclass(frozen=True)
class House:
    worker: Worker
    trained: Trained

    def room(self, ids: UserIds = IDS) -> Classroom:
        return classroom(self.worker, self.trained, ids, "pool", TASKS)

    def walk(self, plan: CoursePlan, ids: UserIds = IDS) -> Walk:
        return walk_block(self.worker, self.trained, ids, [plan], TASKS)[1][plan]


def house_of(*overrides: str) -> House:
    config = config_of(*overrides)
    return House(Worker(config), trained_of(config))


@pytest.fixture
def house() -> House:
    return house_of()


def plan_of(house: House, name: str, rate: float = 0.05) -> CoursePlan:
    rules = {rule.name: rule for rule in rules_of(house.trained.config)}
    rules |= {rule.name: rule for rule in references_of(list(rules.values()))}
    return replace(plans_of_rule(rules[name], house.trained.config)[0], learning_rate=rate)


# -------------------------------------------------------------------------------- the plain twin


class Plain:
    """One user in plain PyTorch: its rows in a base of its own, stepped by torch's Adam."""

    def __init__(self, house: House, u: int) -> None:
        room = house.room()
        units, self.population = room.active.units, house.worker.population
        rows = {
            m.name: room.active.rows[m.section][u][units.valid_ujk[u, j]]
            for j, m in enumerate(room.active.spec.modules)
        }
        self.u, self.base, self.streams = u, self.population.base_model(), Streams(0)
        self.layers = models.with_plain_lora(self.base, rows, house.trained.config.pool.scale)

    def task(self, index: int) -> Any:
        return self.population.of_task(index)  # type: ignore[attr-defined]

    def quality(self, index: int) -> float:
        """Minus bits per character on a task's test part."""
        test = self.task(index).batch(IDS, "test", None, self.streams)
        nats = self.base.loss(self.base.module, test.inputs[self.u], test.targets[self.u]).mean()
        (owner,) = self.population.owner(IDS[self.u : self.u + 1], index)  # type: ignore[attr-defined]
        return -float(nats.detach()) / math.log(2.0) / (1 + int(owner) % 3)

    def learn(self, batches: Sequence[Any], rate: float) -> None:
        optimizer = torch.optim.Adam([p for layer in self.layers for p in (layer.down, layer.up)], lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
        for batch in batches:
            optimizer.zero_grad()
            self.base.loss(self.base.module, batch.inputs[self.u], batch.targets[self.u]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

    def batches(self, index: int, seed: int) -> list[Any]:
        streams = Streams(seed).at("sequence", "task", index)
        return [self.task(index).batch(IDS, "support", EXAMPLES, streams.at("tune", step)) for step in range(STEPS)]


def test_fine_tuning_is_a_loop_over_users_and_tasks_in_plain_torch(house: House) -> None:
    seed = house.trained.config.seed
    walk, alone = house.walk(plan_of(house, "none")), house.walk(plan_of(house, "alone"))
    for u in range(len(IDS)):
        plain = Plain(house, u)
        assert walk.before_ui[u] == pytest.approx([plain.quality(i) for i in range(TASKS)], rel=1e-4)
        for t in range(TASKS):
            plain.learn(plain.batches(t, seed), 0.05)
            expected = [plain.quality(i) for i in range(TASKS)]
            assert walk.quality_uti[u, t] == pytest.approx(expected, rel=2e-3)
        for i in range(TASKS):
            fresh = Plain(house, u)
            fresh.learn(fresh.batches(i, seed), 0.05)
            assert alone.quality_uti[u, 0, i] == pytest.approx(fresh.quality(i), rel=2e-3)
    assert np.ptp(walk.quality_uti, axis=1).min() > 1e-3
    assert not walk.diverged_u.any()


def test_joint_learning_sees_all_tasks_in_as_many_steps(house: House) -> None:
    config, room = house.trained.config, house.room()
    walk = house.walk(plan_of(house, "joint"))
    together = Together([house.worker.of_task(i) for i in range(TASKS)])
    streams = Streams(config.seed).at("sequence", "joint")
    batches = [together.batch(IDS, "support", EXAMPLES, streams.at("tune", step)) for step in range(TASKS * STEPS)]
    for u in range(len(IDS)):
        plain = Plain(house, u)
        plain.learn(batches, 0.05)
        assert walk.quality_uti[u, 0] == pytest.approx([plain.quality(i) for i in range(TASKS)], rel=5e-3)
    assert walk.before_ui == pytest.approx(room.exam.of_all(begin_of(house, room, "none").rows))


def test_together_is_every_task_and_draws_are_of_all_of_them(house: House) -> None:
    tasks = [house.worker.of_task(i) for i in range(TASKS)]
    together, whole = Together(tasks), [task.batch(IDS, "support", None, Streams(0)) for task in tasks]
    assert torch.equal(together.batch(IDS, "support", None, Streams(0)).inputs, torch.cat([b.inputs for b in whole], 1))
    drawn = together.batch(IDS, "support", 60, Streams(1))
    assert drawn.weight.shape == (len(IDS), 60)
    for u in range(len(IDS)):
        owners = [
            {i for i in range(TASKS) for example in whole[i].inputs[u] if torch.equal(example, one)}
            for one in drawn.inputs[u]
        ]
        shares = [sum(i in found for found in owners) / 60 for i in range(TASKS)]
        assert all(owners)
        assert min(shares) > 0.15


def begin_of(house: House, room: Classroom, name: str) -> Any:
    return begin(course_for(house, room, name))


def course_for(house: House, room: Classroom, name: str) -> Course:
    """A course as a device would have it."""
    config, plan = house.trained.config, plan_of(house, name)
    tuning = Tuning("rows", Adam(0.05, STEPS), STEPS, EXAMPLES)
    if name == "meta":
        tuning = learned_tuning(room.setup, room.values, room.known, room.active, STEPS, EXAMPLES)
    kept = {"rule": "none" if name == "meta" else name.partition(":")[0], "strength": plan.strength, "tasks": TASKS}
    return course_of(room.setup.model, room.active, tuning, config.personal.continual.model_copy(update=kept))


def test_masks_are_those_that_users_are_served_by_and_are_told_of_the_first_task(house: House) -> None:
    """What users of this population have without a task is their first."""
    config, room = house.trained.config, house.room()
    choice = usual_choice(config)
    assert choice.rule == "gate"
    mask_ug = masks.unpack(propose_masks(house.worker, house.trained, IDS, [choice])[1][choice], 8 * 2)
    expected = active_rows(room.values, room.setup.model.spec, mask_ug)
    assert torch.equal(room.active.units.ids_ujk, expected.units.ids_ujk)
    seen = house.worker.population.batch(IDS, "support", choice.windows, room.setup.streams.at("serve", "gain"))
    assert torch.equal(room.known.signals.examples.inputs, seen.inputs)


@pytest.mark.parametrize("name", RULES)
def test_a_user_alone_walks_as_in_its_block(house: House, name: str) -> None:
    """By plain calls, task after task, of one user at a time."""
    walk = house.walk(plan_of(house, name))
    streams = Streams(house.trained.config.seed).at("sequence")
    for u in range(len(IDS)):
        own = IDS[u : u + 1]
        room = house.room(own)
        course = course_for(house, room, name)
        standing = begin(course)
        for t in range(TASKS):
            standing = adapt_to(course, standing, house.worker.of_task(t), own, streams.at("task", t))
            expected_i = room.exam.of_all(standing.rows)[0]
            assert walk.quality_uti[u, t] == pytest.approx(expected_i, rel=5e-3), (u, t)
        kept = [*standing.memory.values(), *standing.tuner.values()]
        assert walk.bytes_u[u] == sum(t.numel() * t.element_size() for t in kept)
    assert (walk.bytes_u > 0).all() == (name != "none")


def test_rules_differ_once_there_is_something_to_keep(house: House) -> None:
    walks = {name: house.walk(plan_of(house, name)) for name in RULES if name != "meta"}
    for name, walk in walks.items():
        assert walk.quality_uti[:, 0] == pytest.approx(walks["none"].quality_uti[:, 0], rel=1e-5), name
        if name != "none":
            assert np.abs(walk.quality_uti[:, -1] - walks["none"].quality_uti[:, -1]).max() > 1e-4, name


def test_the_first_task_in_turn_is_the_first_task_alone(house: House) -> None:
    walk, alone = house.walk(plan_of(house, "none")), house.walk(plan_of(house, "alone"))
    assert np.array_equal(walk.quality_uti[:, 0, 0], alone.quality_uti[:, 0, 0])
    assert np.array_equal(walk.before_ui, alone.before_ui)


@pytest.mark.parametrize("name", ["none", "isolation", "meta"])
def test_the_rise_on_a_task_is_that_of_fewer_steps(house: House, name: str) -> None:
    """A task broken off after so many steps; isolation holds rows fast meanwhile."""
    walk, room = house.walk(plan_of(house, name)), house.room()
    course, streams = course_for(house, room, name), Streams(house.trained.config.seed).at("sequence")
    standing, (*watched, last) = begin(course), watched_steps(STEPS)
    assert (watched, last) == ([0, 1, 2], STEPS)
    for t in range(TASKS):
        task = house.worker.of_task(t)
        for at, steps in enumerate(watched):
            broken = replace(course, tuning=replace(course.tuning, steps=steps))
            stopped = adapt_to(broken, standing, task, IDS, streams.at("task", t)) if steps else standing
            assert walk.rise_uis[:, t, at] == pytest.approx(room.exam.of(stopped.rows, t), rel=1e-4)
        standing = adapt_to(course, standing, task, IDS, streams.at("task", t))
        assert np.array_equal(walk.rise_uis[:, t, -1], walk.quality_uti[:, t, t])


def test_accuracy_is_measured_where_it_is_asked_for() -> None:
    house = house_of("evaluate.sequence.quality=accuracy")
    walk, plain = house.walk(plan_of(house, "none")), Plain(house, 1)
    test = plain.task(2).batch(IDS, "test", None, Streams(0))
    accuracy = plain.base.accuracy
    assert accuracy is not None
    expected = float(accuracy(plain.base.module, test.inputs[1], test.targets[1]).mean())
    assert walk.before_ui[1, 2] == pytest.approx(expected, abs=1e-6)
    assert ((walk.quality_uti >= 0) & (walk.quality_uti <= 1)).all()
    silent = replace(plain.base, accuracy=None)
    assert [measured_quality(house.trained.config, base) for base in (plain.base, silent)] == ["accuracy", "bits"]


def test_who_diverges_is_counted_and_keeps_what_it_had(house: House) -> None:
    walk = house.walk(plan_of(house, "none", rate=1e30))
    assert walk.diverged_u.all()
    assert walk.quality_uti == pytest.approx(np.repeat(walk.before_ui[:, None], TASKS, 1))


# -------------------------------------------------------------------------------- who chooses


def test_rates_and_strengths_are_the_choice_of_training_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mean of the last row of R: what new users would choose, and other rows, say the opposite."""
    config = config_of("evaluate.sequence.rules=['ewc', 'meta']", "evaluate.sequence.strengths=[1.0, 7.0]")
    population = make_population(config.population)
    tuning_ids, new_ids = evaluated_users(population, config)
    asked: list[int] = []

    def fake(worker: Worker, trained: Any, ids: UserIds, plans: Sequence[CoursePlan], tasks: int) -> Any:
        training = bool(np.isin(ids, tuning_ids).all())
        assert training or np.isin(ids, new_ids).all()
        asked.append(len(plans))

        def walk(plan: CoursePlan) -> Walk:
            liked = plan.learning_rate * (1 + plan.strength) * (1 if training else -1)
            rows = 1 if plan.rule.rule in ("alone", "joint") else tasks
            quality_uti = np.full((len(ids), rows, tasks), -3 * liked)
            quality_uti[:, -1] = liked + ids[:, None]
            nothing_u = np.zeros(len(ids))
            rise_uis = np.zeros((len(ids), tasks, len(watched_steps(STEPS))))
            return Walk(quality_uti, np.zeros((len(ids), tasks)), rise_uis, nothing_u.astype(int), nothing_u > 0)

        return None, {plan: walk(plan) for plan in plans}

    monkeypatch.setattr(simulations.sequences, "walk_block", fake)
    trained = Trained(config, {}, {})
    found = evaluate_sequences(InProcess(config), population, trained, Silent())
    assert found is not None
    plans = {result.name: result.plan for result in [*found.rules, *found.references.values()]}
    assert {name: (plan.learning_rate, plan.strength) for name, plan in plans.items()} == {
        "ewc": (0.05, 7.0), "meta": (0.0, 0.0), "alone": (0.05, 0.0), "joint": (0.05, 0.0),
    }  # fmt: skip
    assert set(asked) == {4 + 1 + 2 + 2, 4}
    assert np.array_equal(found.user_ids, new_ids)
    assert found.rules[0].walk.quality_uti[:, -1, 0] == pytest.approx(new_ids - 0.4)


# -------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        builtin = {**POPULATIONS.builtin, "wanderers": f"{__name__}:wanderers"}
        patch.setattr("federation.data.registry.POPULATIONS", replace(POPULATIONS, builtin=builtin))
        out = tmp_path_factory.mktemp("runs") / "run"
        learned = "meta={signal='fomaml', rule={name='rates'}, start={name='universal'}}"
        rules = "evaluate.sequence.rules=['none', 'replay[pool=random]', 'meta']"
        run(config_of(rules, "federation.rounds=2", learned, "start_optimizer.learning_rate=0.3"), out)
        yield out


def test_the_record_and_the_users_say_the_same(folder: Path) -> None:
    continual, users = read_record(folder)["continual"], json.loads((folder / "evaluation.json").read_text())
    walked, groups_u = users["continual"], np.array(users["continual"]["groups"])
    assert (continual["quality"], continual["tasks"], continual["users"]) == ("bits", TASKS, 8)
    assert list(continual["rules"]) == ["none", "replay[pool=random]", "meta"]
    assert list(continual["references"]) == ["alone", "joint", "alone[pool=random]", "joint[pool=random]"]
    assert (folder / "random").is_dir()
    assert walked["ids"] == users["ids"]
    for name, entry in continual["rules"].items():
        r = np.array(entry["r"])
        assert r.shape == (TASKS, TASKS)
        assert list(entry["metrics"]) == list(METRICS)
        for figure in ("acc", "bwt"):
            value_u = np.array(walked[figure][name])
            assert entry["metrics"][figure]["mean"] == pytest.approx(value_u.mean(), abs=2e-6)
            assert entry["metrics"][figure]["se"] == pytest.approx(clustered_error(value_u, groups_u), abs=2e-6)
        alone, joint = (
            np.array(continual["references"][kind + ("[pool=random]" if "random" in name else "")]["quality"])
            for kind in ("alone", "joint")
        )
        by_mean = {
            "acc": r[-1].mean(),
            "bwt": (r[-1] - r.diagonal())[:-1].mean(),
            "fwt": (r.diagonal(1) - entry["before"][1:]).mean(),
            "fwt_over_alone": (r.diagonal(1) - alone[1:]).mean(),
            "plasticity_gap": (r.diagonal() - alone).mean(),
            "intransigence": (joint - r.diagonal()).mean(),
        }
        for figure, expected in by_mean.items():  # all are linear, so means over users come first as well
            assert entry["metrics"][figure]["mean"] == pytest.approx(expected, abs=1e-5), (name, figure)
        assert 0 <= entry["metrics"]["steps_to_target"]["mean"] <= STEPS
        assert 0 <= entry["reached"] <= 1
    learned_start, start = (np.array(continual["rules"][name]["before"]) for name in ("meta", "none"))
    assert np.abs(learned_start - start)[1:].mean() > 1e-4
    assert continual["rules"]["meta"]["learning_rate"] is None
    assert continual["rules"]["none"]["learning_rate"] in (0.01, 0.05)
    assert continual["rules"]["replay[pool=random]"]["bytes_per_user"] > 0


def test_without_rules_nothing_is_measured() -> None:
    config = config_of("evaluate.sequence.rules=[]")
    check_sequences(config, make_population(config.population), {})
    assert (
        evaluate_sequences(InProcess(config), make_population(config.population), Trained(config, {}, {}), Silent())
        is None
    )


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.sequence.rules=['ecw']"], "unknown rule 'ecw' in evaluate.sequence.rules; did you mean 'ewc'"),
        (["evaluate.sequence.rules=['ewc@3']"], "written name:strength.*got 'ewc@3'.*for example"),
        (["evaluate.sequence.rules=['ewc:']"], "written name:strength.*got 'ewc:'"),
        (["evaluate.sequence.rules=['ewc:1e']"], "a number from 0, got '1e' in the rule 'ewc:1e'; for example ewc:10"),
        (["evaluate.sequence.rules=['ewc:-1']"], "a number from 0, got '-1'"),
        (["evaluate.sequence.rules=['replay:2']"], "only ewc, online_ewc, lwf have a strength.*write 'replay'"),
        (["evaluate.sequence.rules=['ewc:2', 'ewc:2.0']"], r"\['ewc:2'\] come twice.*drop one"),
        (["evaluate.sequence.rules=['ewc[pool=shraed]']"], "no federation is called 'shraed'.*did you mean 'shared'"),
        (["meta={}"], "'pool' learns neither a rule nor a start; set meta.rule.name"),
        (["evaluate.methods=[]"], r"got the rules \['none'.*set evaluate.methods = \['base'\]"),
        (["evaluate.sequence.rules=['lwf']"], "the base must classify.*take another rule"),
        (["evaluate.sequence.tasks=4"], "at least 4 tasks, users of 'synthetic' have 3; set tasks in"),
        (["population.options={tasks=1}"], "at least 2 tasks, users of 'synthetic' have 1; set tasks in"),
        (["evaluate.sequence.users=9"], r"some of evaluate.users \(8\), got evaluate.sequence.users = 9; lower it"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(config_of(*overrides), tmp_path)
    assert not (tmp_path / "pool").exists()
