"""Continual rules against plain loops over users and examples, and against the laws that they promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from client.adapt import Adam, ByRule, tuned
from client.continual import penalties
from client.continual.course import Memory, NextTask, adapt_to, begin, bytes_of
from client.continual.fisher import fisher
from client.continual.penalties import TEMPERATURE
from client.continual.reservoir import Replay, filled, kept_examples
from client.continual.rules import continual_rule_of
from client.personal import personal_values
from federation.base import BaseModel
from federation.continual_config import ContinualConfig
from federation.data.population import Batch, side_by_side
from federation.errors import ConfigError
from federation.rules import Parameters, Rates
from federation.streams import Streams
from tests import models
from tests.client.courses import (
    EXAMPLES,
    IDS,
    RULES,
    SCALE,
    STEPS,
    STREAMS,
    Stream,
    alone,
    course_with,
    pooled,
    taken,
    users_rows,
)

Rows = dict[str, Tensor]


def classifying(rule: str) -> Callable[[], BaseModel]:
    return models.gpt2 if rule == "lwf" else models.mlp


def rate_rule(course) -> ByRule:
    """A learned rule with rates per step, momentum and decay, of other parameters than it begins with."""
    units = course.active.units.valid_ujk
    rule = Rates(course.model.spec.modules, 0.05, 2 * STEPS, 8.0)
    unit, shared = rule.first(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(4)
    shared_up = shared + 0.5 * torch.randn(len(units), len(shared), generator=generator)
    shared_up[:, -1] = 0.5
    return ByRule(rule, Parameters((unit + torch.tensor([0.0, 0.2, 3.0])).expand(*units.shape, -1), shared_up))


# -------------------------------------------------------------------------------- against a plain loop


class PlainNothing:
    def extra(self, layers, inputs) -> Tensor:
        return torch.zeros(())

    def after(self, base: BaseModel, layers, inputs, targets) -> None: ...


class PlainEwc(PlainNothing):
    """What is remembered of each task: per layer and factor, the squared gradients' mean and the values."""

    strength = RULES["ewc"]["strength"]

    def __init__(self) -> None:
        self.tasks: list[list[tuple[Tensor, Tensor]]] = []

    def extra(self, layers, inputs) -> Tensor:
        loss = torch.zeros(())
        for task in self.tasks:
            for p, (importance, anchor) in zip(parameters(layers), task, strict=True):
                loss = loss + self.strength / 2 * (importance * (p - anchor) ** 2).sum()
        return loss

    def after(self, base: BaseModel, layers, inputs, targets) -> None:
        self.remember(fisher_by_loop(base, layers, inputs, targets), [p.detach().clone() for p in parameters(layers)])

    def remember(self, importance: list[Tensor], anchor: list[Tensor]) -> None:
        self.tasks.append(list(zip(importance, anchor, strict=True)))


class PlainOnline(PlainEwc):
    def remember(self, importance: list[Tensor], anchor: list[Tensor]) -> None:
        if self.tasks:
            keep = 1 - RULES["online_ewc"]["forget"]
            importance = [new + keep * old for new, (old, _) in zip(importance, self.tasks[0], strict=True)]
        self.tasks = [list(zip(importance, anchor, strict=True))]


class PlainLwf(PlainNothing):
    def __init__(self) -> None:
        self.teacher = None

    def extra(self, layers, inputs) -> Tensor:
        if self.teacher is None:
            return torch.zeros(())
        with torch.no_grad():
            soft = torch.softmax(self.teacher.module(input_ids=inputs).logits / TEMPERATURE, -1)
        said = torch.log_softmax(self.base.module(input_ids=inputs).logits / TEMPERATURE, -1)
        positions = -(soft * said).sum(-1)
        return RULES["lwf"]["strength"] * positions.mean()

    def after(self, base: BaseModel, layers, inputs, targets) -> None:
        self.teacher = models.gpt2()
        models.with_plain_lora(self.teacher, {name: layer.rows for name, layer in layers.items()}, SCALE)


PLAIN = {"none": PlainNothing, "ewc": PlainEwc, "online_ewc": PlainOnline, "lwf": PlainLwf}


def parameters(layers) -> list[Tensor]:
    return [p for layer in layers.values() for p in (layer.down, layer.up)]


def fisher_by_loop(base: BaseModel, layers, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    squares = [torch.zeros_like(p) for p in parameters(layers)]
    for n in range(len(inputs)):
        loss = base.loss(base.module, inputs[n : n + 1], targets[n : n + 1]).sum()
        for square, gradient in zip(squares, torch.autograd.grad(loss, parameters(layers)), strict=True):
            square += gradient**2 / len(inputs)
    return squares


def own(rows: Rows, course, user: int) -> dict[str, Tensor]:
    """One user's rows without padding, by module's name."""
    valid_jk = course.active.units.valid_ujk[user]
    return {m.name: rows[m.section][user][valid_jk[j]] for j, m in enumerate(course.model.spec.modules)}


def plain_course(course, stream: Stream, user: int, make: Callable[[], BaseModel], plain) -> list[Rows]:
    """One user's rows after each task, by PyTorch's Adam."""
    rows, found = own(course.active.rows, course, user), []
    for index, part in enumerate(stream.parts):
        base = make()
        layers = dict(zip(rows, models.with_plain_lora(base, rows, SCALE), strict=True))
        plain.base = base
        optimizer = torch.optim.Adam(parameters(layers), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        for step in range(STEPS):
            streams = STREAMS.at("task", index).at("tune", step)
            batch = stream.task(index).batch(np.array([user]), "support", EXAMPLES, streams)
            own_n = batch.weight[0] > 0
            inputs, targets = batch.inputs[0][own_n], batch.targets[0][own_n]
            optimizer.zero_grad()
            (base.loss(base.module, inputs, targets).mean() + plain.extra(layers, inputs)).backward()
            optimizer.step()
            schedule.step()
        owned = part.weight[user] > 0
        plain.after(base, layers, part.inputs[user][owned], part.targets[user][owned])
        rows = {name: layer.rows for name, layer in layers.items()}
        found.append(rows)
    return found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", PLAIN)
def test_a_course_is_a_plain_loop_over_users(rule: str) -> None:
    make = classifying(rule)
    course = course_with(make, rule)
    stream = Stream.of(course.model.base, 3)
    standings = taken(course, stream)
    without = taken(course_with(make, "none"), stream)
    for user in range(len(IDS)):
        expected = plain_course(course, stream, user, make, PLAIN[rule]())
        for standing, rows in zip(standings[1:], expected, strict=True):
            for name, row in own(standing.rows, course, user).items():
                torch.testing.assert_close(row, rows[name], rtol=1e-7, atol=1e-9)
    for name, row in standings[3].rows.items():
        assert torch.equal(standings[1].rows[name], without[1].rows[name])
        assert (rule == "none") == torch.equal(row, without[3].rows[name])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [models.mlp, models.gpt2])
@pytest.mark.parametrize("part", [1, 4, 64])
def test_the_fisher_is_a_loop_over_examples(make, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.continual.fisher._PART", part)
    course = course_with(make, "none")
    examples = Stream.of(course.model.base, 1).parts[0]
    found = fisher(course.model, course.active, course.active.rows, examples)
    for j, m in enumerate(course.model.spec.modules):
        assert not found[m.section][~course.active.units.valid_ujk[:, j]].any()
    for user in range(len(IDS)):
        base, owned = make(), examples.weight[user] > 0
        rows = own(course.active.rows, course, user)
        layers = dict(zip(rows, models.with_plain_lora(base, rows, SCALE), strict=True))
        squares = fisher_by_loop(base, layers, examples.inputs[user][owned], examples.targets[user][owned])
        expected = [torch.cat(pair, 1) for pair in zip(squares[::2], squares[1::2], strict=True)]
        for row, square in zip(own(found, course, user).values(), expected, strict=True):
            assert square.any()
            torch.testing.assert_close(row, square, rtol=1e-9, atol=1e-15)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", ["ewc", "online_ewc", "lwf"])
def test_a_penalty_has_the_gradient_of_its_finite_differences(rule: str) -> None:
    course = course_with(classifying(rule), rule)
    stream = Stream.of(course.model.base, 3)
    standing = taken(course, stream, tasks=2)[-1]
    lesson = NextTask(course, standing, stream.parts[2], IDS, STREAMS)
    generator = torch.Generator().manual_seed(1)
    point = {name: row + 0.1 * torch.randn(row.shape, generator=generator) for name, row in standing.rows.items()}
    along = {name: torch.randn(row.shape, generator=generator) for name, row in point.items()}

    def penalty_u(size: float) -> Tensor:
        rows = {name: (row + size * along[name]).requires_grad_() for name, row in point.items()}
        with course.model.bound(rows):
            loss_u = course.rule.penalty(lesson, rows, stream.parts[2])
        slopes = torch.autograd.grad(loss_u.sum(), list(rows.values()))
        slope_u = sum((g * along[name]).flatten(1).sum(1) for g, name in zip(slopes, rows, strict=True))
        return torch.stack((loss_u.detach(), slope_u))

    (above, _), (below, _), (_, slope_u) = penalty_u(1e-5), penalty_u(-1e-5), penalty_u(0.0)
    assert slope_u.abs().min() > 1e-4
    torch.testing.assert_close(slope_u, (above - below) / 2e-5, rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------- steps


def test_without_a_rule_a_task_is_a_personalisation() -> None:
    course = course_with(models.mlp, "none")
    stream = Stream.of(course.model.base, 1)

    class Alike:
        model, streams = course.model, STREAMS

    kept = personal_values(Alike, course.active, course.tuning, stream.task(0), IDS)
    after = adapt_to(course, begin(course), stream.task(0), IDS, STREAMS.at("serve"))
    for name, row in after.rows.items():
        assert torch.equal(row - course.active.rows[name], kept[name])
        assert kept[name].any()


def task_gradients(course, stream: Stream):
    """Of step s of the whole stream, without any rule."""

    def gradients_of(rows: Rows, at: int) -> list[Tensor]:
        index, step = divmod(at, STEPS)
        batch = stream.task(index).batch(IDS, "support", EXAMPLES, STREAMS.at("task", index).at("tune", step))
        leaves = {name: row.detach().requires_grad_() for name, row in rows.items()}
        with course.model.bound(leaves):
            loss = course.model.loss(batch).sum()
        return list(torch.autograd.grad(loss, list(leaves.values())))

    return gradients_of


def test_the_learned_rule_goes_on_over_tasks_and_adam_begins_anew() -> None:
    """The learned rule's steps, velocity and start are those of one long adaptation."""
    course = course_with(models.mlp, "none")
    stream = Stream.of(course.model.base, 2)
    rule = rate_rule(course)
    learned = replace(course, tuning=replace(course.tuning, tuner=rule))
    expected = tuned(rule, task_gradients(course, stream), course.active.rows, 2 * STEPS)
    found = taken(learned, stream)[-1]
    assert (found.tasks, found.at) == (2, 2 * STEPS)
    assert all(torch.equal(found.rows[name], row) for name, row in expected.items())

    gradients_of, adam = task_gradients(course, stream), Adam(0.05, STEPS)
    rows = tuned(adam, gradients_of, course.active.rows, STEPS)
    rows = tuned(adam, lambda values, at: gradients_of(values, STEPS + at), rows, STEPS)
    again = taken(course, stream)[-1]
    assert (again.at, again.tuner) == (0, {})
    assert all(torch.equal(again.rows[name], row) for name, row in rows.items())


@pytest.mark.parametrize("learned", ["adam", "rates"])
@pytest.mark.parametrize("rule", RULES)
def test_a_block_of_users_has_what_each_has_alone(rule: str, learned: str) -> None:
    course = course_with(classifying(rule), rule)
    if learned == "rates":
        course = replace(course, tuning=replace(course.tuning, tuner=rate_rule(course)))
    stream = Stream.of(course.model.base, 3)
    together = taken(course, stream)[-1]
    for user in range(len(IDS)):
        single = alone(course, user)
        if isinstance(tuner := single.tuning.tuner, ByRule):
            own_parameters = Parameters(
                tuner.parameters.units[user : user + 1], tuner.parameters.shared[user : user + 1]
            )
            single = replace(single, tuning=replace(single.tuning, tuner=replace(tuner, parameters=own_parameters)))
        by_itself = taken(single, stream, np.array([user]))[-1]
        for kind in ("rows", "tuner", "memory"):
            both = getattr(together, kind), getattr(by_itself, kind)
            assert both[0].keys() == both[1].keys()
            for name, tensor in both[0].items():
                torch.testing.assert_close(tensor[user], both[1][name][0], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------- replay


def passing(tasks: list[int], users: int, slots: int) -> tuple[Memory, list[Tensor]]:
    """A memory after so many examples passed by, which are numbered, and the numbers by task."""
    ids, number, seen = np.arange(users), 0, []
    memory: Memory = {
        "inputs": torch.full((users, slots, 1), -1.0),
        "targets": torch.full((users, slots), -1),
        "seen": torch.zeros(users, dtype=torch.int64),
    }
    for task, count in enumerate(tasks):
        numbers = torch.arange(number, number + count).expand(users, -1)
        weight = torch.ones(users, count)
        memory = filled(memory, Batch(numbers.float()[..., None], numbers, weight), ids, Streams(task))
        seen.append(numbers)
        number += count
    return memory, seen


def test_each_example_is_kept_with_equal_probability() -> None:
    """m of n: the share of 6,000 users that keep an example is within 5 standard deviations, for every example."""
    users, slots, tasks = 6000, 4, [3, 5, 1, 9]
    memory, _ = passing(tasks, users, slots)
    kept_um, n = memory["targets"], sum(tasks)
    assert torch.equal(memory["inputs"][..., 0].long(), kept_um)
    assert (kept_um.sort(1).values.diff(dim=1) > 0).all(), "an example is kept once"
    assert kept_um.min() >= 0
    assert memory["seen"].eq(n).all()
    count_n = torch.bincount(kept_um.flatten(), minlength=n)
    probability = slots / n
    deviation = (users * probability * (1 - probability)) ** 0.5
    assert len(count_n) == n
    assert ((count_n - users * probability).abs() < 5 * deviation).all(), count_n
    together_u = ((kept_um == 0).any(1) & (kept_um == n - 1).any(1)).float()
    pair = probability * (slots - 1) / (n - 1)
    assert abs(float(together_u.mean()) - pair) < 5 * (pair * (1 - pair) / users) ** 0.5


def test_what_fits_is_kept_in_order_and_padding_passes_unseen() -> None:
    memory, _ = passing([2], 3, 5)
    more = torch.tensor([[7, 8, 9], [7, 8, 9], [7, 8, 9]])
    weight = torch.tensor([[1.0, 1, 1], [0, 1, 0], [0, 0, 0]])
    found = filled(memory, Batch(more.float()[..., None], more, weight), np.arange(3), Streams(9))
    assert found["targets"].tolist() == [[0, 1, 7, 8, 9], [0, 1, 8, -1, -1], [0, 1, -1, -1, -1]]
    assert found["seen"].tolist() == [5, 3, 2]
    assert kept_examples(found).weight.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]


def test_a_users_reservoir_depends_on_nobody_else_and_on_no_padding() -> None:
    slots, count, users = 3, 9, 5
    numbers = torch.arange(count).expand(users, -1)
    whole = Batch(numbers.float()[..., None], numbers, torch.ones(users, count))
    empty = {"inputs": torch.zeros(5, slots, 1), "targets": torch.zeros(5, slots, dtype=torch.int64)}
    memory = {**empty, "seen": torch.zeros(5, dtype=torch.int64)}
    together = filled(memory, whole, np.arange(users), Streams(2))["targets"]
    spread = Batch(torch.zeros(1, 2 * count, 1), torch.zeros(1, 2 * count, dtype=torch.int64), torch.zeros(1, 18))
    spread.targets[0, ::2], spread.weight[0, ::2] = numbers[0], 1.0
    for user in range(users):
        single = {name: value[:1] for name, value in memory.items()}
        assert torch.equal(filled(single, spread, np.array([user]), Streams(2))["targets"][0], together[user])
    assert len({tuple(row) for row in together.tolist()}) > 1


@pytest.mark.usefixtures("float64")
def test_with_room_for_all_a_step_sees_the_mean_over_all_that_was_met() -> None:
    course = course_with(models.mlp, "replay", examples=40)
    stream = Stream.of(course.model.base, 3)
    standing = taken(course, stream, tasks=2)[-1]
    lesson = NextTask(course, standing, stream.parts[2], IDS, STREAMS)
    with torch.no_grad(), course.model.bound(standing.rows):
        found_u = course.model.loss(course.rule.batch(lesson, stream.parts[2]))
        expected_u = course.model.loss(side_by_side(stream.parts))
    torch.testing.assert_close(found_u, expected_u, rtol=1e-9, atol=0)


@pytest.mark.usefixtures("float64")
def test_the_expected_loss_of_a_step_is_that_of_all_that_was_met() -> None:
    """2,000 users with the same rows and data, each with draws of its own: their mean, within 5 standard errors."""
    users, model = 2000, pooled(models.mlp)
    rows = {name: row[:1].expand(users, -1, -1) for name, row in users_rows(model).rows.items()}
    tasks = [models.batch_for(model.base, 1, count, seed=count) for count in (12, 7)]
    tasks[1] = replace(tasks[1], targets=3 * tasks[1].targets)
    first, second = (Batch(*(t.expand(users, *t.shape[1:]) for t in vars(part).values())) for part in tasks)
    ids, rule = np.arange(users), Replay(4)
    course = replace(course_with(models.mlp, "replay"), rule=rule)
    blank = {"inputs": torch.zeros(users, 4, 5), "targets": torch.zeros(users, 4, 3)}
    memory = filled({**blank, "seen": torch.zeros(users, dtype=torch.int64)}, first, ids, Streams(1))
    before = replace(begin(course), rows=rows, memory=memory)
    drawn = torch.from_numpy(Streams(2).integers("examples", ids, 7, 3))
    users_u1 = torch.arange(users)[:, None]
    batch = Batch(second.inputs[users_u1, drawn], second.targets[users_u1, drawn], torch.ones(users, 3))
    with torch.no_grad(), model.bound(rows):
        loss_u = model.loss(rule.batch(NextTask(course, before, second, ids, STREAMS), batch))
    with torch.no_grad(), model.bound({name: row[:1] for name, row in rows.items()}):
        expected = model.loss(side_by_side(tasks))[0]
    assert abs(loss_u.mean() - expected) < 5 * loss_u.std() / users**0.5
    assert loss_u.std() > 0.01 * expected


# -------------------------------------------------------------------------------- isolation


@pytest.mark.parametrize("learned", ["adam", "rates"])
def test_claimed_units_keep_every_bit_and_shares_add_up(learned: str) -> None:
    course = course_with(models.mlp, "isolation", tasks=3)
    if learned == "rates":
        course = replace(course, tuning=replace(course.tuning, tuner=rate_rule(course)))
    stream = Stream.of(course.model.base, 5)
    standings, valid_ujk = taken(course, stream), course.active.units.valid_ujk
    claimed = [standing.memory["claimed"] for standing in standings[1:]]
    for ended, claimed_ujk in enumerate(claimed, 1):
        assert torch.equal(claimed_ujk.sum(2), valid_ujk.sum(2) * min(ended, 3) // 3)
        assert not (claimed_ujk & ~valid_ujk).any()
    for ended, claimed_ujk in enumerate(claimed[:-1], 1):
        assert (claimed_ujk & ~claimed[ended]).sum() == 0, "what is claimed stays claimed"
        for j, name in enumerate(standings[ended].rows):
            now, later = standings[ended].rows[name], standings[ended + 1].rows[name]
            assert torch.equal(now[claimed_ujk[:, j]], later[claimed_ujk[:, j]])
            free = valid_ujk[:, j] & ~claimed_ujk[:, j]
            assert (now[free] != later[free]).any(1).all()
    assert torch.equal(claimed[2], valid_ujk)
    for name, row in standings[3].rows.items():
        assert torch.equal(row, standings[5].rows[name]), "when none is left, nothing moves"


def test_the_units_that_moved_most_are_claimed() -> None:
    course = course_with(models.mlp, "isolation", tasks=2)
    first, second = taken(course, Stream.of(course.model.base, 1))
    for j, name in enumerate(first.rows):
        moved_uk = (second.rows[name] - first.rows[name]).norm(dim=2)
        for user, valid_k in enumerate(course.active.units.valid_ujk[:, j]):
            claimed_k = second.memory["claimed"][user, j]
            free_k = valid_k & ~claimed_k
            if claimed_k.any() and free_k.any():
                assert moved_uk[user][claimed_k].min() >= moved_uk[user][free_k].max()
    assert second.memory["claimed"].any()


# -------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("rule", RULES)
def test_a_memory_takes_the_bytes_that_were_announced(rule: str) -> None:
    course = course_with(classifying(rule), rule)
    stream = Stream.of(course.model.base, 3)
    standings = taken(course, stream)
    row_bytes = sum(row[0].numel() * 4 for row in course.active.rows.values())
    valid = course.active.units.valid_ujk[0].numel()
    after = {"none": (0, 0), "ewc": (2 * row_bytes, 6 * row_bytes), "online_ewc": (2 * row_bytes,) * 2, "lwf": (1, 1)}
    after |= {"replay": (5 * (5 + 3) * 4 + 8,) * 2, "isolation": (valid + 8,) * 2}
    assert (bytes_of(standings[1].memory), bytes_of(standings[3].memory)) == after[rule]
    for index, standing in enumerate(standings[:3]):
        lesson = NextTask(course, standing, stream.parts[index], IDS, STREAMS)
        assert course.rule.bytes_after(lesson) == bytes_of(standings[index + 1].memory)
    sizes = [sum(t[user].numel() * t.element_size() for t in standings[3].memory.values()) for user in (0, 2)]
    assert set(sizes) == {after[rule][1]}


def test_a_rule_that_outgrows_its_memory_is_refused_and_nothing_is_lost() -> None:
    course = course_with(models.mlp, "ewc")
    row_bytes = sum(row[0].numel() * 4 for row in course.active.rows.values())
    course, stream = replace(course, most_bytes=5 * row_bytes), Stream.of(course.model.base, 3)
    standing = taken(course, stream, tasks=2)[-1]
    rows = {name: row.clone() for name, row in standing.rows.items()}

    class Untouched(type(stream.task(2))):
        def batch(self, user_ids, part, size, streams):
            assert size is None, "no step is taken"
            return super().batch(user_ids, part, size, streams)

    task = Untouched(stream.base, {"support": stream.parts[2]})
    said = rf"max_kib \(.*KiB\), the rule 'ewc' needs {6 * row_bytes} bytes after task 3; raise it, or take another"
    with pytest.raises(ConfigError, match=said):
        adapt_to(course, standing, task, IDS, STREAMS)
    assert all(torch.equal(standing.rows[name], row) for name, row in rows.items())


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("learned", ["adam", "rates"])
@pytest.mark.parametrize("rule", RULES)
def test_who_has_nothing_or_diverges_keeps_what_it_had_and_others_do_not_notice(rule: str, learned: str) -> None:
    """In the second task the first user has no example, and the last one's rows are beyond all measure."""
    course = course_with(classifying(rule), rule)
    if learned == "rates":
        course = replace(course, tuning=replace(course.tuning, tuner=rate_rule(course)))
    stream = Stream.of(course.model.base, 3)
    weight = stream.parts[1].weight.clone()
    weight[0] = 0.0
    hurt = stream.changed(1, replace(stream.parts[1], weight=weight))
    calm = taken(course, hurt)
    before = calm[1]
    name = next(iter(before.rows))
    wild_rows = {**before.rows, name: before.rows[name].clone()}
    wild_rows[name][2] = 1e38
    wild = replace(before, rows=wild_rows)
    after = adapt_to(course, wild, hurt.task(1), IDS, STREAMS.at("task", 1))
    assert after.diverged_u.tolist() == [False, False, True]
    assert calm[2].diverged_u.tolist() == [False] * 3
    for kind in ("rows", "tuner", "memory"):
        had, has, undisturbed = (getattr(standing, kind) for standing in (wild, after, calm[2]))
        for key, tensor in has.items():
            for user in (0, 2):
                assert torch.equal(tensor[user], had[key][user] if key in had else torch.zeros_like(tensor[user]))
            assert torch.equal(tensor[:2], undisturbed[key][:2])
    assert not all(torch.equal(after.rows[key][1], row[1]) for key, row in wild.rows.items())


@pytest.mark.parametrize("rule", ["ewc", "online_ewc"])
def test_who_would_remember_what_is_not_finite_keeps_what_it_had(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the squares of gradients overflow while the last user's rows do not, in the second task."""
    course = course_with(models.mlp, rule)
    stream = Stream.of(course.model.base, 2)
    calm = taken(course, stream)

    def overflowing(*args) -> dict[str, Tensor]:
        found = fisher(*args)
        next(iter(found.values()))[2, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(penalties, "fisher", overflowing)
    after = adapt_to(course, calm[1], stream.task(1), IDS, STREAMS.at("task", 1))
    assert after.diverged_u.tolist() == [False, False, True]
    for kind in ("rows", "memory"):
        had, has, undisturbed = (getattr(standing, kind) for standing in (calm[1], after, calm[2]))
        for name, tensor in has.items():
            assert torch.equal(tensor[2], had[name][2] if name in had else torch.zeros_like(tensor[2]))
            assert torch.equal(tensor[:2], undisturbed[name][:2])
    assert all(row.isfinite().all() for row in calm[2].rows.values())


@pytest.mark.parametrize("rule", RULES)
def test_one_example_a_task_that_repeats_and_a_block_without_any(rule: str) -> None:
    course = course_with(classifying(rule), rule)
    one = Stream.of(course.model.base, 1).parts[0].window(0, 1)
    nothing = replace(one, weight=torch.zeros_like(one.weight))
    stream = Stream(course.model.base, [one, one, nothing])
    standings = taken(course, stream)
    assert not any(standing.diverged_u.any() for standing in standings)
    for before, after in ((standings[0], standings[1]), (standings[1], standings[2])):
        assert any(not torch.equal(row, after.rows[name]) for name, row in before.rows.items())
    last, same = standings[2:]
    assert same.tasks == 3
    assert last.memory.keys() == same.memory.keys()
    for kind in ("rows", "memory"):
        for name, tensor in getattr(last, kind).items():
            assert torch.equal(tensor, getattr(same, kind)[name])


def test_who_missed_the_first_task_has_no_teacher_in_the_second() -> None:
    course = course_with(models.gpt2, "lwf")
    stream = Stream.of(course.model.base, 2)
    stream.parts[0].weight[1] = 0.0
    lesson = NextTask(course, taken(course, stream, tasks=1)[-1], stream.parts[1], IDS, STREAMS)
    with course.model.bound(lesson.before.rows):
        penalty_u = course.rule.penalty(lesson, lesson.before.rows, stream.parts[1])
    assert penalty_u.gt(0).tolist() == [True, False, True]


def test_lwf_needs_a_base_that_classifies() -> None:
    with pytest.raises(ConfigError, match=r"lwf .* 'tiny-mlp' has no log_probs: take another rule"):
        continual_rule_of(ContinualConfig(rule="lwf"), models.mlp())
