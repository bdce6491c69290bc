"""The frozen base of the digits: a small vision transformer (Dosovitskiy et al., 2021), pre-trained on upright digits.

A base is made once per (images, configuration) and kept in the cache folder as transformers' `save_pretrained` writes
it, with `pretraining.json`: how long it took, and its accuracy on upright images that it never saw.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from federation.base import BaseModel, at_least_fp32, frozen
from federation.data.cache import cache_dir, whole_folder
from federation.errors import ConfigError
from simulations.populations.digits_images import CLASSES, DigitImages, as_pixels
from simulations.pretrain import threads

log = logging.getLogger("fedquilt")

TARGET_MODULES = ("q_proj", "v_proj", "fc1", "fc2", "classifier")
RECIPE = 1
"""Part of the cache key: raised when this file would train another model from the same configuration."""
_REPORT = "pretraining.json"
_FILES = ("model.safetensors", "config.json")


@dataclass(frozen=True)
class DigitsBaseConfig:
    """A vision transformer of about 0.1M parameters, and how it is trained: about 20 seconds on one core.

    Raises ConfigError when a number is out of its range.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 128
    steps: int = 1000
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("width", "layers", "heads", "mlp", "steps", "batch"):
            if getattr(self, field) < 1:
                raise ConfigError(f"pretraining.{field} must be at least 1, got {getattr(self, field)}")
        if self.width % self.heads:
            raise ConfigError(
                f"pretraining.width must be a multiple of the {self.heads} heads, got {self.width}; "
                f"set {self.width - self.width % self.heads + self.heads}"
            )


def digits_base(folder: Path) -> BaseModel:
    """The base in a folder that `pretrained_digits` gave, anew at each call."""
    module = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    return BaseModel(
        module=frozen(module),
        loss=class_loss,
        features=token_features,
        feature_width=int(module.config.hidden_size),
        target_modules=TARGET_MODULES,
        name=str(folder),
        accuracy=class_accuracy,
        log_probs=class_log_probs,
        head="classifier",
    )


def class_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image's class: (B, 1, 8, 8) and (B,) -> (B,) nats."""
    return F.cross_entropy(at_least_fp32(module(pixel_values=inputs).logits), targets, reduction="none")


def class_log_probs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Log-probabilities of the ten classes: (B, ..) -> (B, 10)."""
    return at_least_fp32(module(pixel_values=inputs).logits).log_softmax(1)


def class_accuracy(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the likeliest class is the right one, else 0: (B, 1, 8, 8) and (B,) -> (B,)."""
    right: Tensor = module(pixel_values=inputs).logits.argmax(1) == targets
    return right.float()


def token_features(module: nn.Module, inputs: Tensor) -> Tensor:
    """Mean of the last hidden states over the tokens: (B, 1, 8, 8) -> (B, width)."""
    hidden: Tensor = module.base_model(pixel_values=inputs).last_hidden_state  # type: ignore[operator]
    return hidden.mean(1)


def pretrained_digits(images: DigitImages, config: DigitsBaseConfig, cache: Path | None = None) -> Path:
    """The folder of the base pre-trained on the images; trains it when the cache does not hold it intact."""
    folder = (cache or cache_dir()) / "bases" / f"vit-{_key(images, config)}"
    if folder.exists():
        if _intact(folder):
            return folder
        log.warning("the pre-trained base in %s is damaged; training it anew", folder)
    started = time.monotonic()
    with threads(1):
        model = _train(_new_model(config), images, config)
        accuracy = _upright_accuracy(model, images)
    report = {
        "upright_accuracy": accuracy,
        "images": len(images.pretraining),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.monotonic() - started,
        "config": asdict(config),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "scikit-learn")},
    }
    with whole_folder(folder) as work:
        model.save_pretrained(work)
        (work / _REPORT).write_text(json.dumps({**report, "sha256": _checksums(work)}, indent=1))
    return folder


def _key(images: DigitImages, config: DigitsBaseConfig) -> str:
    """Names a base: a hash of the images, the configuration and the recipe."""
    return hashlib.sha256(json.dumps([RECIPE, asdict(config), images.fingerprint]).encode()).hexdigest()[:20]


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _REPORT).read_text())["sha256"] == _checksums(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES}


def _new_model(config: DigitsBaseConfig) -> ViTForImageClassification:
    """A vision transformer with fresh weights, the same for the same seed; a token is a patch of 2x2 pixels."""
    shape = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp,
        hidden_act="gelu",  # the exact one, which can be differentiated twice
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ViTForImageClassification(shape)


def _train(
    model: ViTForImageClassification, images: DigitImages, config: DigitsBaseConfig
) -> ViTForImageClassification:
    """Train in place on images drawn at random, as they are: AdamW, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    model.train()
    for _ in range(config.steps):
        chosen = torch.randint(len(images.pretraining), (config.batch,), generator=generator)
        inputs, targets = as_pixels(images.pretraining[chosen]), images.pretraining_classes[chosen]
        loss = class_loss(model, inputs, targets).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _upright_accuracy(model: nn.Module, images: DigitImages) -> float:
    """On the users' images, as they are: none of them was trained on."""
    pool = images.pools.flatten(0, 2)
    class_n = torch.arange(CLASSES)[None, :, None].expand(images.pools.shape[:3]).flatten()
    return class_accuracy(model, as_pixels(pool), class_n).mean().item()
