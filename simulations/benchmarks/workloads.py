"""The two workloads that throughput is measured on: a perceptron (W1) and a small GPT-2 (W2), both untrained.

| | model | adapted | pool | a user's work |
|---|---|---|---|---|
| W1 | perceptron 64-128-10 | both layers | R = 32, k = 4 | 16 examples, 5 steps of SGD |
| W2 | GPT-2: 4 layers, 128 wide, 4 heads | c_attn, c_fc | R = 32, k = 4 | 4 windows of 64 tokens, 2 steps |

Every step of a user sees the same examples. Masks are random, so no time goes into choosing them well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation.base import BaseModel, causal_lm_base, frozen
from federation.config import ComputeConfig, GateConfig, LocalConfig, PoolConfig, RunConfig
from federation.data.population import Batch
from federation.errors import ConfigError
from federation.plugins import suggest

SEED = 0
WIDTHS = (64, 128, 10)
VOCABULARY, WINDOW = 128, 64


@dataclass(frozen=True)
class Workload:
    """A base model, users' data for it, and what a user does.

    draw(users, examples, generator): the users' examples. users: how many are timed. block: how many of them
    are trained in one stacked computation; the fastest we measured.
    """

    name: str
    base: Callable[[], BaseModel]
    draw: Callable[[int, int, torch.Generator], Batch]
    local: LocalConfig
    users: int
    block: int

    @property
    def config(self) -> RunConfig:
        """The configuration of a federation that does this work."""
        return RunConfig(
            name=self.name,
            seed=SEED,
            pool=PoolConfig(rank=32, scale=2.0),
            gate=GateConfig(policy="random", budget=4),
            local=self.local,
            compute=ComputeConfig(block=self.block),
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
        return F.cross_entropy(module(inputs), targets, reduction="none")

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


def classes(users: int, examples: int, generator: torch.Generator) -> Batch:
    """Normal inputs (U, N, 64) and classes (U, N) at random."""
    inputs = torch.randn(users, examples, WIDTHS[0], generator=generator)
    targets = torch.randint(0, WIDTHS[-1], (users, examples), generator=generator)
    return Batch(inputs, targets, torch.ones(users, examples))


def tokens(users: int, examples: int, generator: torch.Generator) -> Batch:
    """Tokens (U, N, 64) at random; each one's target is the next, the last one has none."""
    inputs = torch.randint(0, VOCABULARY, (users, examples, WINDOW), generator=generator)
    targets = F.pad(inputs[..., 1:], (0, 1), value=-100)
    return Batch(inputs, targets, torch.ones(users, examples))


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="w1",
            base=perceptron,
            draw=classes,
            local=LocalConfig(steps=5, learning_rate=0.05, examples=16),
            users=1024,
            block=256,
        ),
        Workload(
            name="w2",
            base=gpt2,
            draw=tokens,
            local=LocalConfig(steps=2, learning_rate=0.05, examples=4),
            users=48,
            block=4,
        ),
    )
}


def workload(name: str) -> Workload:
    """A workload by name. Raises ConfigError for an unknown one."""
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is called {name!r}; {suggest(name, WORKLOADS)}")
    return WORKLOADS[name]
