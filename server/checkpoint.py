"""Checkpoints: everything the server needs to go on, in one folder per round.

    round-000123/
        manifest.json            what is in the folder, and its checksums
        pool.safetensors         one file per part
        optimizer.safetensors

The manifest is JSON with the keys, in this order:

    format, version   "fedquilt checkpoint", 1
    round             the round whose end this is
    parts             by name: bytes and sha256 of the file, and the names of its tensors in order
    meta              whatever JSON the caller keeps: seeds, ledger, versions
    sha256            of the manifest's text as it is without this key

It is read only in the exact text that `save` writes, so any changed bit is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as encode_tensors
from torch import Tensor

from federation.errors import CheckpointError
from federation.files import new_folder, remove_folder, remove_leftovers

FORMAT = "fedquilt checkpoint"
FORMAT_VERSION = 1
MIN_KEPT = 3
_MANIFEST_NAME = "manifest.json"
_FOLDER_NAME = re.compile(r"round-(\d{6,})")
_PART_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The server's state at the end of `round_index`: tensors by part and name, and JSON-able meta."""

    round_index: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]


def save(
    folder: Path,
    round_index: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    keep: int = MIN_KEPT,
) -> Path:
    """Write a checkpoint; once it is durable, remove all but the newest `keep`. Returns its own folder.

    A checkpoint of the same round is replaced. Those of later rounds are removed: who saves round t after a
    resume has given up what came after t.

    tensors: part -> name -> tensor, on any device; a part's name is lower-case letters, digits, "_" and "-".
    meta: must come back from JSON equal, so keys are strings, sequences are lists and numbers are finite.
    Raises CheckpointError when the disk is full or cannot be written (earlier checkpoints stand), when `meta`
    is not JSON, or when a part's name or `keep` is not allowed.
    """
    if keep < MIN_KEPT:
        raise CheckpointError(f"at least {MIN_KEPT} checkpoints are kept, got keep={keep}; raise it")
    target = path_of(folder, round_index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with new_folder(target) as partial:
            parts = {part: _write_part(partial, part, by_name) for part, by_name in tensors.items()}
            (partial / _MANIFEST_NAME).write_bytes(_manifest(round_index, parts, meta))
        present = rounds(folder)
        kept = [r for r in present if r <= round_index][-keep:]
        for outdated in sorted(set(present) - set(kept)):
            remove_folder(path_of(folder, outdated))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} cannot be written ({error}); the ones before it stand: free space or mend "
            "the folder, then resume"
        ) from error
    return target


def rounds(folder: Path) -> tuple[int, ...]:
    """The rounds of all checkpoints in a folder, damaged ones too, ascending.

    The first one bounds how far back a resume may fall, and so what the user store may compact.
    """
    matches = [_FOLDER_NAME.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    return tuple(sorted(int(match[1]) for match in matches if match))


def load_latest(folder: Path) -> Checkpoint:
    """The newest usable checkpoint. Every damaged one that is passed over is warned of and logged.

    Raises CheckpointError, naming all that were tried, when none is usable.
    """
    faults = []
    for round_index in reversed(rounds(folder)):
        try:
            return load(path_of(folder, round_index))
        except CheckpointError as error:
            faults.append(str(error))
            _log.error("%s; falling back to the checkpoint before it", error)
            warnings.warn(f"{error}; falling back to the checkpoint before it", RuntimeWarning, stacklevel=2)
    tried = "; ".join(faults) or "there is none"
    raise CheckpointError(
        f"no usable checkpoint in {folder}: {tried}; restore the folder from a copy, or start a new run"
    )


def load(path: Path) -> Checkpoint:
    """The checkpoint in its own folder `path`, on the CPU.

    Raises CheckpointError when anything in it is missing or is not what was saved.
    """
    try:
        manifest = _read_manifest(path)
        tensors = {part: _read_part(path, part, entry) for part, entry in manifest["parts"].items()}
    except _Fault as fault:
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}") from fault
    except (KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is not of the form that `save` writes: {error!r}") from error
    return Checkpoint(manifest["round"], tensors, manifest["meta"])


def checksum(checkpoint: Checkpoint) -> str:
    """SHA-256 over the round, all tensors bit for bit, and meta: equal for equal states, wherever they are.

    The order of parts, names and keys does not count. Runs can be compared if meta holds no clock times.
    """
    digest = hashlib.sha256()
    header = {
        part: {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in by_name.items()}
        for part, by_name in checkpoint.tensors.items()
    }
    state = {"round": checkpoint.round_index, "meta": checkpoint.meta, "tensors": header}
    digest.update(json.dumps(state, sort_keys=True).encode())
    for _, by_name in sorted(checkpoint.tensors.items()):
        for _, tensor in sorted(by_name.items()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Fault(Exception):
    """What is wrong with one file of a checkpoint."""


def path_of(folder: Path, round_index: int) -> Path:
    """Where the checkpoint of a round is."""
    return folder / f"round-{round_index:06d}"


def _part_path(path: Path, part: str) -> Path:
    if not _PART_NAME.fullmatch(part):
        raise CheckpointError(f"a part's name must match {_PART_NAME.pattern!r}, got {part!r}; rename it")
    return path / f"{part}.safetensors"


def _write_part(path: Path, part: str, by_name: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a part's file; its entry in the manifest.

    Tensors are copied, since safetensors refuses those that share memory or are not contiguous.
    """
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in by_name.items()
    }
    payload: bytes = encode_tensors(copies)
    _part_path(path, part).write_bytes(payload)
    return {"bytes": len(payload), "sha256": _sha256(payload), "tensors": list(by_name)}


def _manifest(round_index: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    body = {"format": FORMAT, "version": FORMAT_VERSION, "round": round_index, "parts": parts, "meta": meta}
    try:
        unchanged = json.loads(_text(body)) == body
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta must be JSON of finite numbers ({error}); convert it first") from error
    if not unchanged:
        raise CheckpointError("meta must come back from JSON equal; use string keys, and lists for tuples")
    return _text({**body, "sha256": _sha256(_text(body))})


def _text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, allow_nan=False).encode()


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    text = _read(path / _MANIFEST_NAME)
    try:
        manifest: dict[str, Any] = json.loads(text)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = manifest["sha256"] == _sha256(_text(body)) and text == _text(manifest)
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _Fault(f"{_MANIFEST_NAME} cannot be read ({error!r})") from error
    if not intact:
        raise _Fault(f"{_MANIFEST_NAME} does not match its sha256")
    if (manifest["format"], manifest["version"]) != (FORMAT, FORMAT_VERSION):
        raise _Fault(f"its format is {manifest['format']!r} {manifest['version']}, needs {FORMAT!r} {FORMAT_VERSION}")
    if path.name != f"round-{manifest['round']:06d}":
        raise _Fault(f"{_MANIFEST_NAME} is of round {manifest['round']}")
    return manifest


def _read_part(path: Path, part: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """A part's tensors in the order they were saved in."""
    file = _part_path(path, part)
    payload = _read(file)
    if len(payload) != entry["bytes"]:
        raise _Fault(f"part {part!r} has {len(payload)} bytes, was saved with {entry['bytes']}")
    if _sha256(payload) != entry["sha256"]:
        raise _Fault(f"part {part!r} does not match its sha256")
    by_name: dict[str, Tensor] = parse_tensors(payload)
    return {name: by_name[name] for name in entry["tensors"]}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _Fault(f"{file.name} cannot be read ({error})") from error
