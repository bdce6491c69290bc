"""The two workloads that throughput is measured on: a perceptron (W1) and a small GPT-2 (W2), both untrained.

| | model | adapted | pool | a user's work |
|---|---|---|---|---|
| W1 | perceptron 64-128-10 | both layers | R = 32, k = 4 | 16 examples, 5 steps of SGD |
| W2 | GPT-2: 4 layers, 128 wide, 4 heads | c_attn, c_fc | R = 32, k = 4 | 4 windows of 64 tokens, 2 steps |

Every step of a user sees the same examples. Masks are random, so no time goes into choosing them well. A round's
work (`Task`) follows from the workload and the number of users alone: each process makes it for itself, so every side
has it in memory before its time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.policies import highest
from federation.base import BaseModel, at_least_fp32, causal_lm_base, frozen
from federation.config import ComputeConfig, GateConfig, LocalConfig, PoolConfig, PopulationConfig, RunConfig
from federation.data.population import Batch, Part
from federation.errors import ConfigError, PopulationError
from federation.plugins import suggest
from federation.pool.spec import PoolSpec
from federation.streams import Streams, UserIds
from federation.update import Values
from simulations.setup import wrap

SEED = 0
ROUND = 1
"""The round that is timed, again and again: random masks are drawn anew in each round, these stay the same."""
PROCESSES = 2
UP_DEVIATION = 0.02
"""Standard deviation of the pool's `up`. Not zero, as in a fresh pool: then `down` would have no gradient."""
WIDTHS = (64, 128, 10)
VOCABULARY, WINDOW = 128, 64


@dataclass(frozen=True)
class Workload:
    """A base model, users' data for it, and what a user does.

    draw(user_ids, examples, streams): the users' examples, the same for a user whoever else is asked for. users: how
    many are timed. block: how many of them are trained in one stacked computation; the fastest we measured.
    """

    name: str
    base: Callable[[], BaseModel]
    draw: Callable[[UserIds, int, Streams], Batch]
    local: LocalConfig
    users: int
    block: int

    @property
    def config(self) -> RunConfig:
        """The configuration of a federation that does this work."""
        return RunConfig(
            name=self.name,
            seed=SEED,
            population=PopulationConfig(name="workload", options={"workload": self.name, "train_users": self.users}),
            pool=PoolConfig(rank=32, scale=2.0),
            gate=GateConfig(policy="random", budget=4),
            local=self.local,
            compute=ComputeConfig(workers=PROCESSES, block=self.block),
        )


class Perceptron(nn.Module):
    """Two linear layers with a ReLU between them: (.., 64) -> (.., 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(*WIDTHS[:2]), nn.Linear(*WIDTHS[1:])

    def hidden(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.fc1(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.fc2(self.hidden(inputs)))


def perceptron() -> BaseModel:
    """W1's base: classification by cross-entropy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = frozen(Perceptron())

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        # Classes first: torch's softmax is slow over an axis of 10 (4096 examples: 830 us, and 150 like this).
        logits = at_least_fp32(module(inputs)).t().contiguous()
        return F.cross_entropy(logits[None], targets[None], reduction="none")[0]

    def features(module: nn.Module, inputs: Tensor) -> Tensor:
        return torch.as_tensor(module.hidden(inputs))  # type: ignore[operator]

    return BaseModel(module, loss, features, WIDTHS[1], ("fc1", "fc2"), "perceptron-64-128-10")


def gpt2() -> BaseModel:
    """W2's base: next-token prediction."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, vocab_size=VOCABULARY, n_positions=WINDOW,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return causal_lm_base(GPT2LMHeadModel(shape), ("c_attn", "c_fc"), "gpt2-4x128")


def classes(user_ids: UserIds, examples: int, streams: Streams) -> Batch:
    """Normal inputs (U, N, 64) and classes (U, N) at random."""
    inputs = streams.normal("inputs", user_ids, (examples, WIDTHS[0]))
    targets = torch.from_numpy(streams.integers("targets", user_ids, WIDTHS[-1], examples))
    return Batch(inputs, targets, torch.ones(len(user_ids), examples))


def tokens(user_ids: UserIds, examples: int, streams: Streams) -> Batch:
    """Tokens (U, N, 64) at random; each one's target is the next, the last one has none."""
    flat = torch.from_numpy(streams.integers("inputs", user_ids, VOCABULARY, examples * WINDOW))
    inputs = flat.view(len(user_ids), examples, WINDOW)
    targets = F.pad(inputs[..., 1:], (0, 1), value=-100)
    return Batch(inputs, targets, torch.ones(len(user_ids), examples))


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="w1",
            base=perceptron,
            draw=classes,
            local=LocalConfig(steps=5, learning_rate=0.05, examples=16, batches=1),
            users=8192,
            block=512,
        ),
        Workload(
            name="w2",
            base=gpt2,
            draw=tokens,
            local=LocalConfig(steps=2, learning_rate=0.05, examples=4, batches=1),
            users=192,
            block=32,
        ),
    )
}


def workload(name: str) -> Workload:
    """A workload by name. Raises ConfigError for an unknown one."""
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is called {name!r}; {suggest(name, WORKLOADS)}")
    return WORKLOADS[name]


@dataclass(frozen=True)
class WorkloadPopulation:
    """The users 0..train_users - 1 of a workload, all of them in memory. Every part of a user's data is the same.

    Raises ConfigError for an unknown workload.
    """

    workload: str
    train_users: int

    name = "workload"

    def __post_init__(self) -> None:
        workload(self.workload)

    def users(self, split: str) -> range:
        """The ids of "train"; nobody is new."""
        splits = {"train": range(self.train_users), "new": range(0)}
        if split not in splits:
            raise PopulationError(f"a workload has the splits {list(splits)}, got {split!r}")
        return splits[split]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """The user's examples in order, from the first one again when more are asked for than it owns."""
        owned = self.data.take(torch.from_numpy(user_ids))
        count = owned.weight.shape[1]
        if size is None or size == count:
            return owned
        chosen = torch.arange(size) % count
        return Batch(owned.inputs[:, chosen], owned.targets[:, chosen], owned.weight[:, chosen])

    def base_model(self) -> BaseModel:
        return workload(self.workload).base()

    def groups(self, user_ids: UserIds) -> UserIds:
        """Users are drawn independently: each is its own group."""
        return user_ids

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """Ones: targets are not text."""
        return np.ones(len(user_ids))

    def describe(self) -> dict[str, object]:
        return {"name": self.name, **asdict(self)}

    @cached_property
    def data(self) -> Batch:
        """All users' examples, (U, N, ..)."""
        chosen = workload(self.workload)
        return chosen.draw(np.arange(self.train_users), chosen.local.examples, Streams(SEED, (self.name,)))


@dataclass(frozen=True)
class Task:
    """The work of one round, which every side is given: the same rows, the same masks, the same examples.

    values: the pool, (R, d_in + d_out) by section. mask_ug: (U, G), the masks that the engine draws by itself.
    data: all users' examples, (U, N, ..), that every step sees. Users are numbered from 0.
    """

    workload: Workload
    spec: PoolSpec
    values: Values
    mask_ug: Tensor
    data: Batch

    @property
    def users(self) -> int:
        return self.data.users

    def active(self, user: int) -> dict[str, Tensor]:
        """The ids (k,) of a user's active rows, by section."""
        by_module = self.mask_ug[user].view(len(self.spec.modules), -1)
        return {m.section: by_module[j].nonzero()[:, 0] for j, m in enumerate(self.spec.modules)}

    def contributors(self) -> dict[str, Tensor]:
        """How many users train each row, (R,) by section."""
        by_module = self.mask_ug.view(self.users, len(self.spec.modules), -1).sum(0)
        return {m.section: by_module[j] for j, m in enumerate(self.spec.modules)}

    def row_means(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean difference of each row over the users that train it, from the sums over all users."""
        counts = self.contributors()
        return {name: total / counts[name].clamp_min(1)[:, None] for name, total in sums.items()}

    def row_means_behind(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same from the average of all users' dense pools, where rows that a user does not train are as given.

        The average is rounded to fp32 at the size of the pool's entries, not of the differences; here that error is
        multiplied by the number of users per row's user. So it agrees less well than sums of differences do.
        """
        sums = {name: (average[name].double() - rows.double()) * self.users for name, rows in self.values.items()}
        return {name: mean.float() for name, mean in self.row_means(sums).items()}


@cache
def task(name: str, users: int) -> Task:
    """The task of a workload's first users. In every process the same; with fewer users, the beginning of it."""
    chosen = workload(name)
    spec = wrap(chosen.config, chosen.base()).spec
    uniform_ug = Streams(SEED).at("round", ROUND).uniform("mask", np.arange(users), (spec.units,))
    gate = chosen.config.gate
    mask_ug = highest(uniform_ug, spec, gate, gate.budget, gate.budget / spec.rank)
    return Task(chosen, spec, pool_values(spec), mask_ug, WorkloadPopulation(name, users).data)


def pool_values(spec: PoolSpec) -> dict[str, Tensor]:
    """A pool in mid-training: `down` as it begins, `up` no longer zero."""
    generator = torch.Generator().manual_seed(SEED)
    values = spec.init(generator)
    for m in spec.modules:
        values[m.section][:, m.d_in :].normal_(std=UP_DEVIATION, generator=generator)
    return values
