"""A user's rows as a stock PEFT LoRA, which any serving engine loads without knowing of pools.

PEFT computes `y = base(x) + alpha / r * (x A^T) B^T`, a pool `y = base(x) + s * (x down^T) up`: A = down,
B = up^T. Engines differ in where they read alpha and r, hence two layouts:

universal: for all of them. vLLM, LoRAX, TGI and S-LoRA scale by the configuration's alpha / r, whatever its
    patterns; llama.cpp scales by alpha / rank of the tensor. So s is folded into B, every module is padded
    with zeros to one rank r that vLLM accepts, and alpha = r. Some want every module to be there: those
    without an active unit are zero.
pattern: for PEFT alone, and the smallest. Each module has its own rank and alpha; those without an active
    unit are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor
from transformers import GenerationMixin
from transformers.pytorch_utils import Conv1D

from federation.errors import ConfigError, PoolError, RunError
from federation.files import new_folder
from federation.plugins import suggest
from federation.pool.model import PooledModel

RANK_LADDER = (8, 16, 32, 64, 128, 256)
"""The ranks that vLLM accepts."""

_CONFIG_NAME, _TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA in memory: its configuration, and its tensors under the names that PEFT saves them by."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _LowRank:
    """One module's active rows: down (k, d_in), up (k, d_out); k may be 0."""

    name: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)


def export_lora(
    model: PooledModel, rows: Mapping[str, Tensor], out: Path, layout: str, base_name: str | None
) -> Adapter:
    """Writes one user's adapter as the folder `out`, whole or not at all, for `PeftModel.from_pretrained`.

    rows: the user's active rows of every module, {section: (k, d_in + d_out)}; k may differ, and may be 0.
    base_name: the hub name or path of the base, where engines will look for it.
    Raises what `lora_adapter` raises, and RunError when `out` is taken or cannot be written.
    """
    adapter = lora_adapter(model, rows, layout, base_name)
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise RunError(
                f"an adapter is written to a new or empty folder, {str(out)!r} is neither; give another --out"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as folder:
            settings = json.dumps(adapter.config.to_dict(), indent=2, sort_keys=True, default=sorted)
            (folder / _CONFIG_NAME).write_text(settings + "\n")
            (folder / _TENSORS_NAME).write_bytes(save(dict(adapter.tensors), {"format": "pt"}))
    except OSError as error:
        raise RunError(
            f"the adapter {str(out)!r} cannot be written ({error}); free space or give another --out"
        ) from error
    return adapter


def lora_adapter(model: PooledModel, rows: Mapping[str, Tensor], layout: str, base_name: str | None) -> Adapter:
    """One user's adapter in a layout, computing exactly what the rows do.

    Raises ConfigError for an unknown layout; PoolError for rows of another pool, rows that are not finite, a
    user without any active unit, and (universal) more active units in a module than an engine takes.
    """
    if layout not in _LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; {suggest(layout, _LAYOUTS)}")
    parts = _split(model, rows)
    if not any(part.rank for part in parts):
        raise PoolError("an adapter needs an active unit in some module, this user has none; serve the base as it is")
    settings, laid_out = _LAYOUTS[layout](parts, model.spec.scale)
    config = LoraConfig(
        **settings,
        task_type="CAUSAL_LM" if isinstance(model.base.module, GenerationMixin) else None,
        base_model_name_or_path=base_name,
        fan_in_fan_out=any(_is_conv1d(model, part.name) for part in laid_out),
        inference_mode=True,
    )
    tensors = {}
    for part in laid_out:
        tensors[f"base_model.model.{part.name}.lora_A.weight"] = _own(part.down)
        tensors[f"base_model.model.{part.name}.lora_B.weight"] = _own(part.up.t())
    return Adapter(config, tensors)


def _split(model: PooledModel, rows: Mapping[str, Tensor]) -> list[_LowRank]:
    parts = []
    for m in model.spec.modules:
        row = rows.get(m.section)
        if row is None or row.ndim != 2 or row.shape[1] != m.width:
            got = None if row is None else tuple(row.shape)
            raise PoolError(
                f"a user's rows must be (k, {m.width}), got {got} (module {m.name!r}); are they of another pool?"
            )
        if not row.isfinite().all():
            raise PoolError(f"a user's rows must be finite, module {m.name!r} has others; tune with a lower rate")
        parts.append(_LowRank(m.name, row[:, : m.d_in], row[:, m.d_in :]))
    return parts


def _universal(parts: Sequence[_LowRank], scale: float) -> tuple[dict[str, Any], list[_LowRank]]:
    most = max(part.rank for part in parts)
    rank = next((step for step in RANK_LADDER if step >= most), None)
    if rank is None:
        raise PoolError(
            f"the universal layout holds at most {RANK_LADDER[-1]} units per module, got {most}; "
            "export with --layout pattern, or train with a smaller gate.budget"
        )
    padded = [
        replace(
            part,
            down=F.pad(part.down, (0, 0, 0, rank - part.rank)),
            up=F.pad(part.up * scale, (0, 0, 0, rank - part.rank)),
        )
        for part in parts
    ]
    return {"r": rank, "lora_alpha": rank, "target_modules": [part.name for part in parts]}, padded


def _pattern(parts: Sequence[_LowRank], scale: float) -> tuple[dict[str, Any], list[_LowRank]]:
    """PEFT reads patterns as regular expressions, matched at the start of a name and after each of its dots:
    anchored and escaped, each matches one module."""
    present = [part for part in parts if part.rank]
    rank_of = {f"^{re.escape(part.name)}": part.rank for part in present}
    most = max(rank_of.values())
    settings = {
        "r": most,
        "lora_alpha": scale * most,
        "target_modules": "|".join(re.escape(part.name) for part in present),
        "rank_pattern": rank_of,
        "alpha_pattern": {key: scale * rank for key, rank in rank_of.items()},
    }
    return settings, present


_LAYOUTS: Mapping[str, Callable[[Sequence[_LowRank], float], tuple[dict[str, Any], list[_LowRank]]]] = {
    "universal": _universal,
    "pattern": _pattern,
}


def _is_conv1d(model: PooledModel, name: str) -> bool:
    """Whether the module stores its weight as (d_in, d_out), which PEFT calls fan_in_fan_out."""
    return isinstance(model.base.module.get_submodule(name).base_layer, Conv1D)


def _own(values: Tensor) -> Tensor:
    """A contiguous copy: safetensors stores no views."""
    return values.detach().clone(memory_format=torch.contiguous_format)
