"""Nodes that serve releases, for the tests of what they serve."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from client.node import Node, NodeConfig
from client.serving import Serving
from federation.config import PopulationConfig, TaskConfig
from federation.exchange import Instructions
from federation.pool.file import PoolFile
from federation.settings import parse
from federation.state import initial_values
from federation.streams import Streams
from tests.bases import UNICODE_TEXT, save_base

SYNTHETIC = {
    "name": "synthetic",
    "options": {"train_users": 9, "new_users": 4, "widths": [8, 12, 4], "rank": 8, "budget": 2, "types": 3},
}
TASK = {
    "pool": {"rank": 8, "scale": 1.0},
    "gate": {"budget": 2, "warmup": 1, "hidden": 6, "factors": 4, "embedding": 3, "samples": 3},
    "local": {"steps": 2, "learning_rate": 0.05},
    "personal": {"steps": 4, "learning_rate": 0.05, "examples": 4, "gain_examples": 8, "rows": {"rows": "int8"}},
}


def task_config(**changes: object) -> TaskConfig:
    return parse(TaskConfig, TASK | changes)


def pool_of(node: Node, config: TaskConfig, round_index: int, noise: float = 0.2) -> PoolFile:
    """A pool as if it had been trained: every row is at work, and the gate is not the saliency rule."""
    task = node.task(config)
    first = initial_values(task.learner, task.gate, task.schema, task.config.gate, Streams(1))
    generator = torch.Generator().manual_seed(round_index)
    values = {name: rows + noise * torch.randn(rows.shape, generator=generator) for name, rows in first.items()}
    return PoolFile(round_index, values, config)


def released(node: Node, round_index: int = 3, config: TaskConfig | None = None, noise: float = 0.2) -> str:
    """The version of a pool that the node now serves."""
    version = node.keep(pool_of(node, config or task_config(), round_index, noise).to_bytes())
    node.adopt(version)
    return version


def users_with_texts(folder: Path, *names: str) -> dict[str, object]:
    """A population of users with texts, over a base of 16 tokens of context."""
    base = save_base(folder / "base")
    for name in names:
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "notes.txt").write_text(f"{name} " + UNICODE_TEXT * 12)
    options = {"base": str(base), "data": str(folder / "data"), "window": 8, "target_modules": ["c_attn", "c_fc"]}
    return {"name": "texts", "options": options}


def opened(folder: Path, population: dict[str, object] = SYNTHETIC) -> Node:
    return Node(NodeConfig(population=parse(PopulationConfig, population), state=folder))


def rows_of(serving: Serving, user: str) -> dict[str, Tensor]:
    rows = serving.model_of(user).rows
    assert rows is not None
    return dict(rows)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def instructions(version: str, positions: tuple[int, ...], federation: str = "one", at: int = 1) -> Instructions:
    task = task_config().model_dump_json()
    return Instructions(federation, at, 1, version, "train", positions, 0, task)
