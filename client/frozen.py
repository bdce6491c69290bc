"""The model of a node: the frozen base, loaded when it is first needed, and wrapped for the first task that fits it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from client.task import Task
from federation.activations import with_fast_activations
from federation.base import BaseModel
from federation.config import PoolConfig, Precision, TaskConfig
from federation.errors import NodeError
from federation.pool.file import PoolFile
from federation.pool.model import PooledModel
from federation.precision import in_precision
from federation.update import Schema, Values


class NodeModel:
    """A base model on a device, and the pool's layers around it. May be used from several threads."""

    def __init__(self, load: Callable[[], BaseModel], device: torch.device, precision: Precision) -> None:
        self._load, self._device, self._precision = load, device, precision
        self._lock = threading.RLock()
        self._base: BaseModel | None = None
        self._wrapped: PooledModel | None = None

    def base(self) -> BaseModel:
        """The frozen model. It computes the same bits before and after it is wrapped."""
        with self._lock:
            if self._base is None:
                base = self._load()
                with_fast_activations(base.module.to(self._device))
                self._base = in_precision(base, self._precision)
            return self._base

    def task(self, config: TaskConfig, pool: PoolFile | None = None) -> Task:
        """A task on this model, whose layers are wrapped for the first one. pool: the values that it works with.

        Raises PoolError for targets that are no linear layers; NodeError for a task or a pool that does not fit the
        model. Then nothing is wrapped.
        """
        with self._lock:
            planned = _around(PooledModel.planned, self.base(), config.pool)
            task = Task(config, planned)
            if pool is not None:
                _check_pool(pool, task)
            if self._wrapped is None:
                self._wrapped = _around(PooledModel.around, self.base(), config.pool)
            _check_same_layers(planned, self._wrapped)
            return task


def _around(make: Callable[..., PooledModel], base: BaseModel, pool: PoolConfig) -> PooledModel:
    return make(base, pool.rank, pool.scale, pool.target_modules)


def _check_same_layers(wanted: PooledModel, wrapped: PooledModel) -> None:
    if (wanted.spec.scale, wanted.spec.modules) != (wrapped.spec.scale, wrapped.spec.modules):
        raise NodeError(
            "failed",
            "a node's model is wrapped once, with one pool.scale and pool.target_modules; it was with "
            f"{_said(wrapped)}, the task has {_said(wanted)}; restart the node",
        )


def _said(model: PooledModel) -> str:
    names = [module.name for module in model.spec.modules]
    return f"scale {model.spec.scale} around {len(names)} layers ({', '.join(names[:4])}{', ..' * (len(names) > 4)})"


def _check_pool(pool: PoolFile, task: Task) -> None:
    """Refuses a pool that is not of the task: it came from outside."""
    if pool.task.pool.scale != task.config.pool.scale:
        raise NodeError(
            "failed",
            f"a task has the pool.scale that its pool was trained with, {pool.task.pool.scale} for {pool.version}, "
            f"this one has {task.config.pool.scale}; is the experiment another one?",
        )
    _check_shapes(pool.values, task.schema, pool.version)
    for name, tensor in pool.values.items():
        if not tensor.isfinite().all():
            raise NodeError(
                "failed",
                f"a pool's values are finite, section {name!r} of pool {pool.version} has others; "
                "the training diverged: go on from an earlier version",
            )


def _check_shapes(values: Values, schema: Schema, version: str) -> None:
    """Shapes that broadcast would train nonsense."""
    wanted = {name: ((spec.rows, spec.width), torch.float32) for name, spec in schema.sections.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise NodeError(
                "failed",
                f"a pool holds what its task and model say, section {name!r} should be {wanted.get(name, 'absent')}, "
                f"pool {version} has {found.get(name, 'none')}; do server and node use the same base model?",
            )
