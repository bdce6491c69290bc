"""Pre-training of the small frozen base: a GPT-2 (Radford et al., 2019) on the documents of a corpus, cached.

A base is made once per (documents, configuration) and kept in the cache folder with its tokenizer, as
transformers' `save_pretrained` writes it, and with `pretraining.json`: how long it took, and its bits per
character on projects that it never saw. One project in `HELD_OUT` is held out for that figure.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from federation.base import BaseModel, causal_lm
from federation.data.cache import cache_dir, whole_folder
from federation.data.corpus import Document, TextCorpus, name_order
from federation.data.text import TextPopulation
from federation.data.tokenizer import BytePairs
from federation.errors import PopulationError

log = logging.getLogger("fedquilt")

HELD_OUT = 10
TARGET_MODULES = ("c_attn", "c_fc")
RECIPE = 1
"""Part of the cache key: raised when this file would train another model from the same configuration."""
_WEIGHTS, _TOKENIZER, _REPORT = "model.safetensors", "tokenizer.json", "pretraining.json"

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, the last batch's loss in nats per token)."""


@dataclass(frozen=True)
class PretrainConfig:
    """A GPT-2 of about 0.9M parameters, and how it is trained: about four minutes on two cores with AMX."""

    vocabulary: int = 512
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    steps: int = 4500
    batch: int = 16
    learning_rate: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    replicas: int = 2
    """Parts of a batch computed side by side, each on a thread of its own."""


def no_progress(step: int, total: int, loss: float) -> None:
    """Says nothing."""


def pretrained_population(
    corpus: TextCorpus,
    config: PretrainConfig,
    window: int = 64,
    attn_implementation: str = "sdpa",
    progress: Progress = no_progress,
) -> TextPopulation:
    """The users of a corpus over the base pre-trained on its documents: now, unless the cache has it."""
    folder = pretrain(corpus.pretraining, config, progress=progress)

    def base() -> BaseModel:
        return causal_lm(folder, TARGET_MODULES, attn_implementation=attn_implementation)

    return TextPopulation(corpus, BytePairs.load(folder / _TOKENIZER), base, window)


def pretrain(
    documents: Sequence[Document],
    config: PretrainConfig,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """The folder of the base pre-trained on the documents; trains it when the cache does not hold it intact.

    Raises PopulationError when the documents are too few to hold a project out, or too short for a window.
    """
    folder = (cache or cache_dir()) / "bases" / f"gpt2-{base_key(documents, config)}"
    if folder.exists():
        if _intact(folder):
            return folder
        log.warning("the pre-trained base in %s is damaged; training it anew", folder)
    seen, held_out = split_held_out(documents)
    started = time.monotonic()
    with threads(1):
        tokenizer = BytePairs.learn((document.text for document in seen), config.vocabulary)
        model = train(new_model(config, tokenizer.size), concatenated(seen, tokenizer), config, progress)
        bits = bits_per_char(model, held_out, tokenizer, config.context)
    report = {
        "bits_per_char": bits,
        "held_out_projects": sorted({document.project for document in held_out}),
        "held_out_characters": sum(len(document.text) for document in held_out),
        "characters": sum(len(document.text) for document in seen),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.monotonic() - started,
        "config": asdict(config),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    with whole_folder(folder) as work:
        model.save_pretrained(work)
        tokenizer.save(work / _TOKENIZER)
        report["sha256"] = _checksums(work)
        (work / _REPORT).write_text(json.dumps(report, indent=1))
    return folder


def pretraining_report(folder: Path) -> dict[str, object]:
    """What `pretrain` wrote beside a base."""
    report: dict[str, object] = json.loads((folder / _REPORT).read_text())
    return report


def describe_base(base: BaseModel) -> dict[str, object]:
    """What a record says of a base: its name, and how it was pre-trained if that was done here."""
    folder = Path(base.name)
    report = pretraining_report(folder) if (folder / _REPORT).exists() else {}
    return {"name": folder.name, **report}


def base_key(documents: Sequence[Document], config: PretrainConfig) -> str:
    """Names a base: a hash of the documents, the configuration and the recipe."""
    digest = hashlib.sha256(json.dumps([RECIPE, asdict(config)]).encode())
    for document in documents:
        digest.update(json.dumps(asdict(document)).encode())
    return digest.hexdigest()[:20]


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _REPORT).read_text())["sha256"] == _checksums(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    files = (_WEIGHTS, _TOKENIZER, "config.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}


def split_held_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and those of every `HELD_OUT`-th project in hash order, the first included."""
    projects = sorted({document.project for document in documents}, key=name_order)
    if len(projects) < 2:
        raise PopulationError(f"pre-training holds a project out, so it needs at least 2, got {len(projects)}")
    held_out = set(projects[::HELD_OUT])
    return (
        [document for document in documents if document.project not in held_out],
        [document for document in documents if document.project in held_out],
    )


def concatenated(documents: Sequence[Document], tokenizer: BytePairs) -> Tensor:
    """All documents as one sequence of tokens, (L,) int64."""
    tokens = tokenizer.encode_all([document.text for document in documents])
    return torch.from_numpy(np.concatenate(tokens).astype(np.int64))


def new_model(config: PretrainConfig, vocabulary: int) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights, the same for the same seed. Attention is eager: see `train`."""
    shape = GPT2Config(
        vocab_size=vocabulary,
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own approximation, in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(shape)


def train(
    model: GPT2LMHeadModel, tokens: Tensor, config: PretrainConfig, progress: Progress = no_progress
) -> GPT2LMHeadModel:
    """Train in place on windows drawn at random from `tokens` (L,): AdamW, linear warm-up, cosine decay.

    Every batch is cut into `replicas` parts, computed side by side by copies that share the weights: torch's
    own threads wait busily for each other, and with other work on the machine made this ten times slower.
    """
    if len(tokens) <= config.context:
        raise PopulationError(f"pre-training needs {config.context + 1} tokens or more, got {len(tokens)}")
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    share = 1 / (config.batch * config.context)
    replicas = [model.train(), *(sharing_weights(model) for _ in range(config.replicas - 1))]
    with ThreadPoolExecutor(config.replicas) as pool:
        for step in range(config.steps):
            start = torch.randint(len(tokens) - config.context, (config.batch, 1), generator=generator)
            windows = tokens[start + torch.arange(config.context + 1)].chunk(config.replicas)
            loss = sum(pool.map(backward, replicas, windows, repeat(share)))
            collect_gradients(replicas)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(step + 1, config.steps, loss)
    return model.eval()


def sharing_weights(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A copy with gradients of its own, whose weights are the model's: they change with it."""
    replica = copy.deepcopy(model)
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return replica


def backward(model: GPT2LMHeadModel, windows: Tensor, share: float) -> float:
    """Leave the gradients of `share` times the summed loss of windows (B, T + 1) in the model; return it.

    Matrix products run in bfloat16, weights and losses stay float32. Attention must be eager: on a CPU the
    fused kernel's backward pass in bfloat16 is seven times slower.
    """
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    targets = windows[:, 1:].flatten()
    loss = share * F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def collect_gradients(replicas: Sequence[nn.Module]) -> None:
    """Add the gradients of all replicas to those of the first, in order."""
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        first, *others = (p.grad for p in parameters if p.grad is not None)
        for grad in others:
            first += grad


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Linear from 1/warmup to 1, then half a cosine down to 0 at the end."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * done))


@torch.no_grad()
def bits_per_char(model: nn.Module, documents: Sequence[Document], tokenizer: BytePairs, context: int) -> float:
    """Mean bits per character of the documents, in windows of `context` tokens that do not overlap.

    What does not fill a document's last window is left out. Raises PopulationError when no document fills
    one.
    """
    nats, characters = 0.0, 0
    for tokens in tokenizer.encode_all([document.text for document in documents]):
        for inputs, targets in _windows(torch.from_numpy(tokens.astype(np.int64)), context):
            logits = model(input_ids=inputs, use_cache=False).logits
            nats += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
            characters += int(tokenizer.chars_v[targets.numpy()].sum())
    if characters == 0:
        raise PopulationError(f"no held-out document has the {context + 1} tokens of a window")
    return nats / characters / math.log(2)


def _windows(tokens: Tensor, context: int, rows: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, at most (rows, context), of a document's windows."""
    count = (len(tokens) - 1) // context
    for first in range(0, count, rows):
        span = tokens[first * context : min(count, first + rows) * context + 1]
        yield span[:-1].view(-1, context), span[1:].view(-1, context)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
