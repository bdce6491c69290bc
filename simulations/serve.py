"""Serving a block of users by a method, and measuring it on their test part. Runs on workers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.adapt import Adam, Rows, unit_gains
from client.round import distribution_of
from federation import masks
from federation.codec import personal_bytes
from federation.config import RunConfig
from federation.devices import CPU, making_tensors_on, moved
from federation.formats import quantise
from federation.gate import GateState
from federation.pool.spec import ModuleSpec, PoolSpec, gather, rows_of_mask
from federation.state import GATE_SECTION
from federation.streams import UserIds
from federation.update import Schema, Section, SectionSpec, Values
from simulations.cached import TargetFigures, target_figures
from simulations.compute.worker import Worker
from simulations.methods import Method, Tuned
from simulations.setup import Setup
from simulations.statistics import Floats


@dataclass(frozen=True)
class Trained:
    """What was trained before: for each source its configuration and its values."""

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

    figures: what a cache is mixed from, where the method has one.
    """

    loss_u: Floats
    bytes_u: npt.NDArray[np.int64]
    active_share: float
    seconds: float
    figures: TargetFigures | None = None


def propose_masks(worker: Worker, trained: Trained, user_ids: UserIds) -> tuple[None, dict[str, Tensor]]:
    """The gate's and saliency's masks of each user, from `evaluate.gain_examples` support examples, packed."""
    setup = worker.setup(trained.config)
    gate, spec = trained.config.gate, setup.model.spec
    values = trained.values["pool"]
    streams = setup.streams.at("serve")
    support = worker.batch(user_ids, "support", trained.config.evaluate.gain_examples, streams.at("gain"))
    share = gate.budget / spec.rank
    gain_ug = unit_gains(setup.model, values, support, share)
    modules = len(spec.modules)
    proposals = {"saliency": distribution_of(gain_ug, modules, gate).mode()}
    if GATE_SECTION in values:
        fresh = moved(setup.record_layout.fresh(user_ids), worker.device)
        state = GateState(setup.model.features(support), fresh.embedding_ue, gain_ug, share)
        logits_ug = setup.gate.logits(values[GATE_SECTION], state)
        proposals["gate"] = distribution_of(logits_ug, modules, gate).mode()
    random = distribution_of(torch.zeros_like(gain_ug), modules, gate)
    uniform = streams.uniform("random mask", user_ids, (1, spec.units))
    proposals["random"] = random.sample(uniform)[:, 0]
    return None, {name: masks.pack(mask) for name, mask in proposals.items()}


def serve_block(
    worker: Worker, trained: Trained, user_ids: UserIds, packed: Mapping[str, Tensor], plans: Sequence[Plan]
) -> tuple[None, dict[Plan, Served]]:
    """Every plan's result on the users' test part. Plans that differ only in the format share their tuning."""
    test = worker.batch(user_ids, "test", None, worker.setup(trained.config).streams)
    nats_per_bit_u = math.log(2.0) * worker.population.chars_per_target(user_ids, "test")
    tuned: dict[Plan, tuple[Start, Rows, float]] = {}
    results = {}
    for plan in plans:
        shared = replace(plan, method=plan.method.start)
        if shared not in tuned:
            started = time.perf_counter()
            start = start_of(worker, trained, plan.method, user_ids, packed)
            personal = tune(worker, start, shared, user_ids)
            tuned[shared] = (start, personal, time.perf_counter() - started)
        start, personal, seconds = tuned[shared]
        kept, bytes_u = payload(start, personal, plan.method)
        model = start.setup.model
        with torch.no_grad(), model.bound(personalised(start.spec, start.rows, kept, plan.method.tuned)):
            loss_u = model.loss(test).double().numpy(force=True) / nats_per_bit_u
            figures = (
                target_figures(model, worker.population, user_ids, test, nats_per_bit_u) if plan.method.cache else None
            )
        results[plan] = Served(loss_u, bytes_u.numpy(force=True), start.active_share, seconds, figures)
    return None, results


@dataclass(frozen=True)
class Start:
    """Where a method starts for U users: rows of the source, and which they are."""

    setup: Setup
    spec: PoolSpec
    rows: Rows
    ids_ujk: Tensor
    valid_ujk: Tensor

    @property
    def active_share(self) -> float:
        """Mean share of the source's units that are active."""
        return float(self.valid_ujk.float().mean()) * self.ids_ujk.shape[2] / self.spec.rank


def start_of(
    worker: Worker, trained: Trained, method: Method, user_ids: UserIds, packed: Mapping[str, Tensor]
) -> Start:
    """The rows that the method's mask picks from its source. The base has none: all are padding."""
    setup = worker.setup(trained.configs.get(method.source, trained.config))
    users, spec = len(user_ids), setup.model.spec
    if method.mask == "all":
        spec = replace(spec, rank=method.rank)
        mask_ug = torch.ones(users, spec.units, dtype=torch.bool)
    elif method.mask == "none":
        mask_ug = torch.zeros(users, spec.units, dtype=torch.bool)
    else:
        mask_ug = masks.unpack(packed[method.mask], spec.units)
    most = int(mask_ug.view(users, len(spec.modules), -1).sum(2).max())
    ids_ujk, valid_ujk = rows_of_mask(mask_ug, len(spec.modules), max(1, most))
    fresh = method.source in ("fresh", "base")
    values = fresh_values(worker, setup, spec) if fresh else trained.values[method.source]
    return Start(setup, spec, gather(values, spec, ids_ujk, valid_ujk), ids_ujk, valid_ujk)


def fresh_values(worker: Worker, setup: Setup, spec: PoolSpec) -> Values:
    """The same rows on any device: torch's generators are not."""
    with making_tensors_on(CPU):
        return moved(spec.init(setup.streams.generator("fresh")), worker.device)


def personal_widths(module: ModuleSpec, tuned: Tuned) -> dict[str, int]:
    """What a user keeps of each active unit: nothing but its place, a scale, or a difference of its row."""
    widths: dict[Tuned, dict[str, int]] = {
        "nothing": {},
        "scales": {"scale": 1},
        "rows": {"down": module.d_in, "up": module.d_out},
    }
    return widths[tuned]


def personalised(spec: PoolSpec, rows: Rows, personal: Rows, tuned: Tuned) -> Rows:
    """The start's rows with what a user keeps: + difference, or the unit's strength times 1 + scale."""
    if tuned == "nothing":
        return rows
    if tuned == "rows":
        return {name: row + personal[name] for name, row in rows.items()}
    return {
        m.section: torch.cat(
            (rows[m.section][..., : m.d_in], rows[m.section][..., m.d_in :] * (1 + personal[m.section])), -1
        )
        for m in spec.modules
    }


def tune(worker: Worker, start: Start, plan: Plan, user_ids: UserIds) -> Rows:
    """What each user keeps after the plan's Adam steps on its support part, {section: (U, k, width)}.

    Every method sees the same examples in the same order.
    """
    model, spec, tuned = start.setup.model, start.spec, plan.method.tuned
    streams, examples = start.setup.streams.at("serve"), start.setup.config.evaluate.examples
    widths = {m.section: sum(personal_widths(m, tuned).values()) for m in spec.modules}
    zero = {name: row.new_zeros(*row.shape[:2], widths[name]) for name, row in start.rows.items()}
    if tuned == "nothing":
        return zero

    def gradients_of(personal: Rows, step: int) -> list[Tensor]:
        batch = worker.batch(user_ids, "support", examples, streams.at("tune", step))
        leaves = {name: values.detach().requires_grad_() for name, values in personal.items()}
        with model.bound(personalised(spec, start.rows, leaves, tuned)):
            loss_u = model.loss(batch)
        return list(torch.autograd.grad(loss_u.sum(), list(leaves.values())))

    return Adam(plan.learning_rate, plan.steps).tune(gradients_of, zero)


def payload(start: Start, personal: Rows, method: Method) -> tuple[Rows, Tensor]:
    """What users keep as it is read back from its bytes, and those bytes (U,). A shared method keeps nothing."""
    if method.mask in ("none", "all") and method.tuned == "nothing":
        return personal, torch.zeros(len(start.ids_ujk), dtype=torch.int64)
    schema = Schema(
        {
            m.section: SectionSpec(start.spec.rank, personal_widths(m, method.tuned), start.spec.rank)
            for m in start.spec.modules
        }
    )
    sections = {
        m.section: Section(start.ids_ujk[:, j].int(), start.valid_ujk[:, j], personal[m.section])
        for j, m in enumerate(start.spec.modules)
    }
    formats = {"pool": method.rows}
    read = {name: section.rows_ukw for name, section in quantise(sections, formats).items()}
    return read, personal_bytes(sections, schema, formats)
