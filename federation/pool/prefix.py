"""The frozen prefix: what lies below the first adapted layer depends on the data alone, so it is computed once.

A user's steps often see the same batch again. Of a model's maximal submodules without adapted layers, those whose
inputs need no gradient are then the same function of the same data: their outputs are kept for as long as the batch.
With the upper half of a model adapted, that is half of every forward pass.

A limit: what carries no gradient though it follows from adapted layers, such as the expert that a router picks, would
be taken for data. Adapt such models with a new batch for every step (`local.batches` at its default).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Prefix:
    """Outputs of frozen submodules on one batch of data, by the submodule's name and the number of the call."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, int], tuple[Any, list[int]]] = {}
        self._calls: Counter[str] = Counter()

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Around one forward pass on the batch."""
        self._calls.clear()
        token = _IN_FORCE.set(self)
        try:
            yield
        finally:
            _IN_FORCE.reset(token)

    def recall(self, name: str, compute: Callable[[], Any]) -> Any:
        """The output of this call of `name`, computed the first time. One that was changed in place is not used."""
        self._calls[name] += 1
        key = name, self._calls[name]
        if key in self._outputs:
            output, versions = self._outputs[key]
            if versions == _versions(output):
                return output
        output = compute()
        self._outputs[key] = output, _versions(output)
        return output


_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device)
_IN_FORCE: ContextVar[Prefix | None] = ContextVar("fedquilt_prefix", default=None)


def prefix_of(*inputs: Any) -> Prefix | None:
    """The prefix in force, for a computation on these inputs; None when they depend on rows that are trained.

    Without gradients that cannot be told, so then there is none; nor for objects that may hold tensors unseen.
    """
    prefix = _IN_FORCE.get()
    if prefix is None or not torch.is_grad_enabled():
        return None
    leaves = tree_leaves(inputs)
    known = all(leaf is None or isinstance(leaf, _PLAIN) for leaf in leaves)
    trained = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return prefix if known and not trained else None


def remember_frozen(module: nn.Module, adapted: type[nn.Module], name: str = "") -> None:
    """Lets every maximal submodule without an `adapted` layer look its output up in the prefix in force (in place)."""
    if isinstance(module, adapted):
        return
    if any(isinstance(m, adapted) for m in module.modules()):
        for child_name, child in module.named_children():
            remember_frozen(child, adapted, f"{name}.{child_name}")
    elif "forward" not in vars(module):  # else someone's hook is there, and is left alone
        module.forward = MethodType(_remembering(name), module)


def _remembering(name: str) -> Callable[..., Any]:
    """A method, not a closure over the module, so that a copied module calls its own."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prefix = prefix_of(args, kwargs)
        if prefix is None:
            return type(module).forward(module, *args, **kwargs)
        return prefix.recall(name, lambda: type(module).forward(module, *args, **kwargs))

    return forward


def _versions(output: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
