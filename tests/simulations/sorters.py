"""Users who sort points into three classes, each by a rule of its own; and what of their support parts was drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation.base import BaseModel, frozen
from federation.config import RunConfig, load_config
from federation.data.population import Batch, Part
from federation.data.registry import POPULATIONS
from federation.streams import Streams, UserIds
from simulations.compute.worker import Worker
from simulations.methods import Choice, Method, methods_of
from simulations.serve import Plan, Served, Start, Trained, propose_masks, serve_block, start_of
from simulations.variants import federations_of
from tests import models
from tests.populations import InMemory

USERS, WIDTH, CLASSES, OWNED = 24, 4, 3, 10

SORTERS = (
    "population.name=sorters",
    "pool={rank=5, scale=1.0}",
    "gate={policy='saliency', budget=2}",
    "local={steps=3, learning_rate=0.1, examples=4, gain_examples=6, query_examples=4}",
    "evaluate={users=6, tuning_users=4, block=4, examples=6, gain_examples=6}",
    "evaluate.personal={rows='fp32'}",
    "evaluate.steps=[2, 4]",
    "evaluate.learning_rates=[0.01, 0.05]",
)


IDS = np.array([13, 16, 17, 22])
SHOTS = 3
ACCURATE = "gate.reward.quality.name=accuracy"
LEARNING = (
    "meta={signal='maml', rule={name='rates', bound=8.0}, start={name='contextual'}}",
    "variants.maml={meta={signal='maml', rule={name='sgd'}, start={name='pool'}}, local={learning_rate=0.3}}",
    "variants.reptile={meta={signal='reptile', rule={name='sgd'}, start={name='pool'}}, gate={policy='all'}}",
)


class Sorter(nn.Module):
    """Points to logits of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, 6)
        self.head = nn.Linear(6, CLASSES)

    def embed(self, points: Tensor) -> Tensor:
        return torch.as_tensor(self.body(points).tanh())

    def forward(self, points: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.embed(points)))


def sorter_base(head: str | None = "head") -> BaseModel:
    """The same untrained sorter at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        module = frozen(Sorter())
    return BaseModel(
        module,
        lambda module, points, targets: F.cross_entropy(module(points), targets, reduction="none"),
        lambda module, points: module.embed(points),
        6,
        ("body", "head"),
        "sorter",
        accuracy=lambda module, points, targets: (module(points).argmax(1) == targets).float(),
        head=head,
    )


@dataclass(frozen=True)
class Sorters(InMemory):
    """No two examples are equal, and no draw has one twice.

    asked: the inputs of every support batch that was drawn, with its users.
    """

    asked: list[tuple[UserIds, Tensor]] = field(default_factory=list)

    name = "sorters"

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        drawn = super().batch(user_ids, part, None, streams)
        if size is not None:
            drawn = drawn.pick(torch.from_numpy(streams.distinct(f"examples/{part}", user_ids, OWNED, size)))
        if part == "support":
            self.asked.append((user_ids, drawn.inputs))
        return drawn

    def base_model(self) -> BaseModel:
        return sorter_base(self.base.head)


def sorters(head: str | None = "head") -> Sorters:
    """In each user's test part the last examples are padding, of some users one more than of others."""
    generator = torch.Generator().manual_seed(1)
    rule_uwc = torch.randn(USERS, WIDTH, CLASSES, generator=generator)
    parts = {}
    for part in ("support", "query", "test"):
        points = torch.randn(USERS, OWNED, WIDTH, generator=generator)
        parts[part] = Batch(points, (points @ rule_uwc).argmax(2), torch.ones(USERS, OWNED))
    parts["test"].weight[:, -1] = 0.0
    parts["test"].weight[::2, -2] = 0.0
    return Sorters(sorter_base(head), parts)


@contextmanager
def registered() -> Iterator[None]:
    """In which configurations may name the population "sorters"."""
    builtin = {**POPULATIONS.builtin, "sorters": f"{__name__}:sorters"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("federation.data.registry.POPULATIONS", replace(POPULATIONS, builtin=builtin))
        yield


def config_of(*methods: str, more: Sequence[str] = ()) -> RunConfig:
    return load_config(overrides=[*SORTERS, *LEARNING, f"evaluate.methods={list(methods)}", *more])


def trained_of(config: RunConfig) -> Trained:
    """Values as if they had been trained: every row is at work, rates differ by unit and step."""
    federations, worker = federations_of(config), Worker(config)
    values = {}
    for name, own in federations.items():
        generator = torch.Generator().manual_seed(len(name))
        first = worker.setup(own).begin().values
        values[name] = {n: rows + 0.3 * torch.randn(rows.shape, generator=generator) for n, rows in first.items()}
    return Trained(config, values, federations)


@dataclass(frozen=True)
class House:
    """A worker of one configuration, and its methods by name."""

    worker: Worker
    trained: Trained

    @property
    def asked(self) -> list[Any]:
        assert isinstance(self.worker.population, Sorters)
        return self.worker.population.asked

    def method(self, name: str) -> Method:
        return next(method for method in methods_of(self.trained.config) if method.name == name)

    def masks_of(self, method: Method) -> dict[Choice, Tensor]:
        chosen = [method.choice] if method.choice else []
        return propose_masks(self.worker, self.trained, IDS, chosen)[1]

    def start(self, method: Method) -> Start:
        return start_of(self.worker, self.trained, method, IDS, self.masks_of(method))

    def serve(self, method: Method, plan: Plan) -> Served:
        return serve_block(self.worker, self.trained, IDS, self.masks_of(method), [plan])[1][plan]

    def pool_rows(self, method: Method, u: int) -> dict[str, Tensor]:
        """The rows of user u's mask in its source, by module's name; no masks: all."""
        start = self.start(method)
        values, found = self.trained.values[method.source], {}
        for j, m in enumerate(start.spec.modules):
            found[m.name] = values[m.section][start.units.ids_ujk[u, j][start.units.valid_ujk[u, j]]]
        return found


def house(*methods: str, more: Sequence[str] = ()) -> House:
    config = config_of(*methods, more=more)
    return House(Worker(config), trained_of(config))


def owned(shots: int) -> Batch:
    """The examples that users own, asked for in another way than a `FewExamples` that draws from them."""
    return sorters().batch(IDS, "support", shots, Streams(0).at("shots", shots))


class PlainUser:
    """User u's rows as ordinary LoRA layers in a base that is not wrapped."""

    def __init__(self, u: int, rows: Mapping[str, Tensor]) -> None:
        self.u, self.names, self.base = u, list(rows), sorter_base()
        self.layers = models.with_plain_lora(self.base, dict(rows), 1.0)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in (layer.down, layer.up)]

    def backward(self, batch: Batch) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        torch.autograd.backward(self.base.loss(self.base.module, batch.inputs[self.u], batch.targets[self.u]).mean())

    def rows(self) -> dict[str, Tensor]:
        return {name: layer.rows for name, layer in zip(self.names, self.layers, strict=True)}

    def descend(self, batch: Batch, optimizer: torch.optim.Optimizer, steps: int, falling: bool = False) -> None:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / steps if falling else 1.0)
        for _ in range(steps):
            self.backward(batch)
            optimizer.step()
            schedule.step()

    def bits(self) -> float:
        """On the user's test part."""
        test = sorters().parts["test"].take(torch.from_numpy(IDS))
        loss_n = self.base.loss(self.base.module, test.inputs[self.u], test.targets[self.u])
        return float((loss_n * test.weight[self.u]).sum().detach() / test.weight[self.u].sum()) / math.log(2.0)
