"""A device that is not the CPU, made of the CPU's memory: as strict as a GPU about tensors that are not on it.

Its tensors say that they are on "meta". Each holds a tensor on the CPU, with which operations are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

ELSEWHERE = torch.device("meta")


class _There(Tensor):
    """A tensor that says it is elsewhere."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _There:
        there = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
        )
        there.here = here
        return there

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a tensor that is elsewhere to numpy")
        return self.here.detach().numpy()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _do(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees to what makes tensors: they have no argument that is elsewhere."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _do(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Sees to `torch.tensor`, which makes tensors on "meta" without dispatching anything."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if function is torch.tensor and device is not None and torch.device(device) == ELSEWHERE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(ELSEWHERE)
        return function(*args, **(kwargs or {}))


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, as long as the context lasts."""
    with _Literals(), _Mode():
        yield ELSEWHERE


def _do(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    # As on a GPU, numbers may stay on the CPU, and indices are brought over.
    odd = [t for t in tensors if not isinstance(t, _There) and t.dim() and t.dtype != torch.int64]
    if there and odd and not moves:
        raise RuntimeError(f"{function} of tensors on two devices")
    device = kwargs.get("device")
    stays = bool(there) if device is None else torch.device(device) == ELSEWHERE
    plain_args, plain_kwargs = tree_map_only(_There, lambda t: t.here, (args, {**kwargs}))
    if device is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = function(*plain_args, **plain_kwargs)
    if function._schema.is_mutable and tensors and result is plain_args[0]:
        return args[0]
    return tree_map_only(Tensor, _There, result) if stays else result
