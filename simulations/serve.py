"""Serving a block of users by a method, and measuring it on their test part. Runs on workers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.adapt import Adam, ByRule, Tuner
from client.personal import (
    ActiveRows,
    Tuning,
    active_rows,
    known_of,
    learned_tuning,
    personal_schema,
    personal_sections,
    personal_values,
    personalised,
    proposed_mask,
)
from client.policies import Known
from federation import masks
from federation.codec import personal_bytes
from federation.config import Policy, RunConfig
from federation.data.population import Batch, Examples
from federation.devices import CPU, making_tensors_on, moved
from federation.formats import quantise
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec, Rows
from federation.qualities import make_quality
from federation.rules import Sgd
from federation.streams import UserIds
from federation.update import Values
from simulations.cached import TargetFigures, target_figures
from simulations.compute.worker import Worker
from simulations.few_shots import with_shots
from simulations.methods import Choice, Method, Stepping
from simulations.neighbours import votes
from simulations.setup import Setup, Teacher
from simulations.statistics import Floats


@dataclass(frozen=True)
class Trained:
    """What was trained before: the run's configuration, and for each federation its values and its configuration."""

    config: RunConfig
    values: Mapping[str, Values]
    configs: Mapping[str, RunConfig]


@dataclass(frozen=True)
class Plan:
    """A method with the rate and the number of steps of its tuning (0 where nothing is tuned)."""

    method: Method
    learning_rate: float
    steps: int


@dataclass(frozen=True)
class Served:
    """A method's result for U users. loss_u in bits per character, without a cache; bytes_u of the encoded payload.

    figures: what a cache is mixed from, where the method has one. quality_u: the run's quality, where that is not the
    loss; None with a cache too, which changes the losses alone.
    """

    loss_u: Floats
    bytes_u: npt.NDArray[np.int64]
    active_share: float
    seconds: float
    figures: TargetFigures | None = None
    quality_u: Floats | None = None


def propose_masks(
    worker: Worker, trained: Trained, user_ids: UserIds, choices: Sequence[Choice]
) -> tuple[None, dict[Choice, Tensor]]:
    """The users' masks by each choice of a policy, or of the population by what a policy sees, packed.

    Policies that see the same share what is computed from it.
    """
    known: dict[Choice, Known] = {}
    packed = {}
    for choice in choices:
        setup, seen = worker.setup(trained.configs.get(choice.pool, trained.config)), replace(choice, rule="random")
        if seen not in known:
            examples, windows = with_shots(worker, choice.shots, setup.streams), choice.seen
            known[seen] = known_of(setup, trained.values[choice.pool], examples, user_ids, windows, choice.budget)
        if choice.rule == "informed":
            mask_ug = informed_masks(worker, user_ids, known[seen].signals.examples)
        else:
            mask_ug = proposed_mask(setup, known[seen], user_ids, cast(Policy, choice.rule))
        packed[choice] = masks.pack(mask_ug)
    return None, packed


def informed_masks(worker: Worker, user_ids: UserIds, examples: Batch) -> Tensor:
    """The population's best masks given these examples, (U, G) bool on the worker's device."""
    population = worker.population
    assert isinstance(population, Teacher), population.name
    with making_tensors_on(CPU):
        return moved(population.informed_mask(user_ids, moved(examples, CPU)), worker.device)


def serve_block(
    worker: Worker, trained: Trained, user_ids: UserIds, packed: Mapping[Choice, Tensor], plans: Sequence[Plan]
) -> tuple[None, dict[Plan, Served]]:
    """Every plan's result on the users' test part. Plans that differ only in the format share their tuning."""
    test = worker.batch(user_ids, "test", None, worker.setup(trained.config).streams)
    nats_per_bit_u = math.log(2.0) * worker.population.chars_per_target(user_ids, "test")
    tuned: dict[Plan, tuple[Start, Rows, float]] = {}
    results = {}
    for plan in plans:
        if plan.method.neighbours:
            results[plan] = _by_votes(worker, trained, plan, user_ids, test)
            continue
        shared = replace(plan, method=plan.method.start)
        if shared not in tuned:
            started = time.perf_counter()
            start = start_of(worker, trained, plan.method, user_ids, packed)
            personal = tune(worker, trained, start, shared, user_ids)
            tuned[shared] = (start, personal, time.perf_counter() - started)
        start, personal, seconds = tuned[shared]
        kept, bytes_u = payload(start, personal, plan.method)
        model = start.setup.model
        with torch.no_grad(), model.bound(personalised(start.spec, start.rows, kept, plan.method.tuned)):
            loss_u = model.loss(test).double().numpy(force=True) / nats_per_bit_u
            figures = (
                target_figures(model, worker.population, user_ids, test, nats_per_bit_u) if plan.method.cache else None
            )
            quality_u = None if plan.method.cache else other_quality(model, test, trained.config)
        results[plan] = Served(loss_u, bytes_u.numpy(force=True), start.active_share, seconds, figures, quality_u)
    return None, results


def _by_votes(worker: Worker, trained: Trained, plan: Plan, user_ids: UserIds, test: Batch) -> Served:
    """What users' own examples are worth as they are. They keep those, which are counted as no bytes."""
    setup = worker.setup(trained.config)
    size = plan.method.shots or None
    support = with_shots(worker, plan.method.shots, setup.streams).batch(user_ids, "support", size, setup.streams)
    loss_u, right_u, seconds = votes(setup.model, support, test, plan.steps)
    loss_bits_u = loss_u.double().numpy(force=True) / math.log(2.0)
    quality_u = right_u.double().numpy(force=True) if trained.config.gate.reward.quality.name == "accuracy" else None
    return Served(loss_bits_u, np.zeros(len(user_ids), np.int64), 0.0, seconds, None, quality_u)


def other_quality(model: PooledModel, test: Batch, config: RunConfig) -> Floats | None:
    """The quality that the run's masks are rewarded for, (U,), with whatever is bound; None where it is the loss."""
    quality = config.gate.reward.quality
    if quality.name == "loss":
        return None
    return np.asarray(model.quality(test, make_quality(quality)).double().numpy(force=True))


@dataclass(frozen=True)
class Start(ActiveRows):
    """Where a method starts for U users: rows of its source."""

    setup: Setup

    @property
    def active_share(self) -> float:
        """Mean share of the source's units that are active."""
        return float(self.units.valid_ujk.float().mean()) * self.units.ids_ujk.shape[2] / self.spec.rank


def start_of(
    worker: Worker, trained: Trained, method: Method, user_ids: UserIds, packed: Mapping[Choice, Tensor]
) -> Start:
    """The rows that the method's mask picks from its source. The base has none: all are padding."""
    setup = worker.setup(trained.configs.get(method.source, trained.config))
    users, spec = len(user_ids), setup.model.spec
    if method.choice is not None:
        mask_ug = masks.unpack(packed[method.choice], spec.units)
    elif method.mask == "all":
        spec = replace(spec, rank=method.budget)
        mask_ug = torch.ones(users, spec.units, dtype=torch.bool)
    elif method.mask == "head":
        spec = replace(spec, rank=method.budget)
        heads = [m.name == setup.model.base.head for m in spec.modules]
        mask_ug = torch.tensor(heads).repeat_interleave(spec.rank).repeat(users, 1)
    else:
        mask_ug = torch.zeros(users, spec.units, dtype=torch.bool)
    fresh = method.source in ("fresh", "base")
    values = fresh_values(worker, setup, spec) if fresh else trained.values[method.source]
    active = active_rows(values, spec, mask_ug)
    return Start(active.spec, active.rows, active.units, setup)


def fresh_values(worker: Worker, setup: Setup, spec: PoolSpec) -> Values:
    """The same rows on any device: torch's generators are not."""
    with making_tensors_on(CPU):
        return moved(spec.init(setup.streams.generator("fresh")), worker.device)


def tune(worker: Worker, trained: Trained, start: Start, plan: Plan, user_ids: UserIds) -> Rows:
    """What each user keeps after the plan's steps on its support part, {section: (U, k, width)}."""
    examples = with_shots(worker, plan.method.shots, start.setup.streams)
    tuning = tuning_of_plan(trained, start, plan, examples, user_ids)
    return personal_values(start.setup, start, tuning, examples, user_ids)


def tuning_of_plan(trained: Trained, start: Start, plan: Plan, examples: Examples, user_ids: UserIds) -> Tuning:
    """How users tune by a plan: by its rate, or by the rule that their federation has learned."""
    method, setup = plan.method, start.setup
    most = trained.config.evaluate.examples
    step_examples = min(most, method.shots) if method.shots else most
    tuners: Mapping[Stepping, Tuner] = {
        "adam": Adam(plan.learning_rate, max(plan.steps, 1)),
        "sgd": ByRule(Sgd(plan.learning_rate), setup.learner.no_parameters(start.units)),
    }
    if not method.learned:
        return Tuning(method.tuned, tuners[method.by], plan.steps, step_examples)
    values = trained.values[method.source]
    known = known_of(setup, values, examples, user_ids, method.seen, method.budget)
    learned = learned_tuning(setup, values, known, start, plan.steps, step_examples)
    return learned if method.by == "rule" else replace(learned, tuner=tuners[method.by])


def payload(start: Start, personal: Rows, method: Method) -> tuple[Rows, Tensor]:
    """What users keep as it is read back from its bytes, and those bytes (U,). A shared method keeps nothing."""
    if method.mask in ("none", "all") and method.tuned == "nothing":
        return personal, torch.zeros(len(start.units.ids_ujk), dtype=torch.int64)
    schema, sections = personal_schema(start.spec, method.tuned), personal_sections(start, personal)
    formats = {"pool": method.rows}
    read = {name: section.rows_ukw for name, section in quantise(sections, formats).items()}
    return read, personal_bytes(sections, schema, formats)
