"""Tiny models from random configurations, and the plain loop that the stacked layers must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from federation.base import BaseModel, causal_lm_base, frozen
from federation.data.population import Batch

VOCABULARY, WINDOW = 31, 6


def gpt2(seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return causal_lm_base(GPT2LMHeadModel(config), ("c_attn", "c_fc"), "tiny-gpt2")


def llama(seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=16,
    )  # fmt: skip
    return causal_lm_base(LlamaForCausalLM(config), ("q_proj", "v_proj", "down_proj"), "tiny-llama")


def bert(seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=VOCABULARY,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def loss(module: nn.Module, inputs, targets):
        logits = module(input_ids=inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)

    def features(module: nn.Module, inputs):
        return module.base_model(input_ids=inputs).last_hidden_state.mean(1)

    return BaseModel(frozen(BertForMaskedLM(config)), loss, features, 16, ("query", "value"), "tiny-bert")


def mlp(seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))

    def loss(module: nn.Module, inputs, targets):
        return (module(inputs) - targets).square().mean(1)

    return BaseModel(frozen(module), loss, lambda module, inputs: inputs, 5, ("0", "2"), "tiny-mlp")


def batch_for(base: BaseModel, users: int, examples: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(users, examples)
    if base.name == "tiny-mlp":
        inputs = torch.randn(users, examples, 5, generator=generator)
        return Batch(inputs, torch.randn(users, examples, 3, generator=generator), weight)
    tokens = torch.randint(0, VOCABULARY, (users, examples, WINDOW + 1), generator=generator)
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), weight)


class PlainLora(nn.Module):
    """One user's LoRA as anyone would write it: the oracle of the stacked layers."""

    def __init__(self, base: nn.Module, rows: torch.Tensor, scale: float) -> None:
        super().__init__()
        d_in = base.weight.shape[0] if isinstance(base, Conv1D) else base.weight.shape[1]
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(rows[:, :d_in].clone()), nn.Parameter(rows[:, d_in:].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * ((x @ self.down.T) @ self.up)

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat((self.down, self.up), 1).detach()


def with_plain_lora(base: BaseModel, rows: dict[str, torch.Tensor], scale: float) -> list[PlainLora]:
    """Puts one user's rows ({module name: (k, d_in + d_out)}) into the base's module, in place."""
    layers = []
    for name, row in rows.items():
        parent_name, _, child = name.rpartition(".")
        parent = base.module.get_submodule(parent_name)
        layers.append(PlainLora(getattr(parent, child), row, scale))
        setattr(parent, child, layers[-1])
    return layers
