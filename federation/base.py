"""Frozen base models: an `nn.Module`, its per-example loss and its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BaseModel:
    """A frozen model as the rest of the system sees it.

    The module may compute in bfloat16: a loss takes its outputs through `at_least_fp32`.

    loss(module, inputs (B, ...), targets (B, ...)) -> (B,), mean nats per target of each example.
    features(module, inputs (B, ...)) -> (B, feature_width), what the gate may know of an example.
    name: goes into records and checkpoints.
    accuracy(module, inputs, targets) -> (B,), the share of an example's targets that are right, where it can be said.
    log_probs(module, inputs) -> (B, ..., C), of what is predicted, where the model classifies.
    head: the target module that classifies, where there is one.
    """

    module: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    features: Callable[[nn.Module, Tensor], Tensor]
    feature_width: int
    target_modules: tuple[str, ...]
    name: str
    accuracy: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    log_probs: Callable[[nn.Module, Tensor], Tensor] | None = None
    head: str | None = None


def frozen(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, without gradients for its parameters (changed in place)."""
    return module.eval().requires_grad_(False)


def at_least_fp32(outputs: Tensor) -> Tensor:
    """A module's outputs in float32, or as they are if they are finer."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def target_log_probs(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token under a transformers causal language model, in nats.

    Shapes: inputs (B, T) int64, targets (B, T) int64, already shifted: the token that follows; result (B, T).
    """
    logits = module(input_ids=inputs, use_cache=False).logits
    return -F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


def causal_lm_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean next-token loss of a window: (B, T) and (B, T) -> (B,) nats per token. See `target_log_probs`."""
    return -target_log_probs(module, inputs, targets).mean(1)


def causal_lm_log_probs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Log-probabilities of all tokens that may follow: (B, T) -> (B, T, vocabulary)."""
    return at_least_fp32(module(input_ids=inputs, use_cache=False).logits).log_softmax(2)


def causal_lm_accuracy(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Share of a window's next tokens that are the likeliest ones: (B, T) and (B, T) -> (B,)."""
    logits = module(input_ids=inputs, use_cache=False).logits
    right: Tensor = logits.argmax(2) == targets
    return right.float().mean(1)


def causal_lm_features(module: nn.Module, inputs: Tensor) -> Tensor:
    """Mean of the last hidden state over the window: (B, T) -> (B, hidden)."""
    hidden: Tensor = module.base_model(input_ids=inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden.mean(1)


def causal_lm(name_or_path: str | Path, target_modules: tuple[str, ...], **from_pretrained: Any) -> BaseModel:
    """A causal language model from a local path or a hub name, through transformers' `from_pretrained`.

    In float32 unless another dtype is asked for, in whatever precision it was saved.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, **from_pretrained}
    module = frozen(AutoModelForCausalLM.from_pretrained(name_or_path, **options))
    return causal_lm_base(module, target_modules, str(name_or_path))


def causal_lm_base(module: nn.Module, target_modules: tuple[str, ...], name: str) -> BaseModel:
    """A causal language model that is already in memory, as a BaseModel."""
    return BaseModel(
        module=frozen(module),
        loss=causal_lm_loss,
        features=causal_lm_features,
        feature_width=int(module.config.hidden_size),  # type: ignore[union-attr, arg-type]
        target_modules=target_modules,
        name=name,
        accuracy=causal_lm_accuracy,
        log_probs=causal_lm_log_probs,
    )
