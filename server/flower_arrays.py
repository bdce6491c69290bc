"""What a Flower app's arrays and metrics are to our strategies: rows, differences of rows, and means of numbers.

Bytes are a client's, so they are read without trust: nothing is allocated for what they merely declare.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from federation.errors import ExchangeError
from federation.update import Section, SectionSpec

FLOATS = ("float16", "float32", "float64")
"""The types of arrays that are aggregated."""

_MOST_HEADER_BYTES = 1024
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

Array = npt.NDArray[Any]
Metrics = Mapping[str, float]


def read_npy(data: bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """The array that a .npy file holds, when it is of this shape and type; a view of `data`, read-only.

    Raises ExchangeError for anything else, archives and pickles among it.
    """
    file = io.BytesIO(data)
    try:
        read_header = _HEADER_READERS[np.lib.format.read_magic(file)]
        declared, fortran, found = read_header(file, max_header_size=_MOST_HEADER_BYTES)
    except Exception as error:  # numpy evaluates the header: what a hostile one raises is not limited to ValueError
        raise ExchangeError(f"an array's bytes cannot be read: no .npy file ({type(error).__name__})") from error
    if (declared, str(found)) != (shape, dtype):
        raise ExchangeError(f"an array's bytes must hold the shape {shape} of {dtype}, they hold another array")
    size, left = math.prod(shape) * found.itemsize, len(data) - file.tell()
    if left != size:
        raise ExchangeError(f"an array's bytes cannot be read: {size} bytes must follow the header, got {left}")
    return np.frombuffer(data, found, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def rows_of(values: Array) -> torch.Tensor:
    """(rows, width) float32: the first axis are the rows, all others the width. An array of no axis is one row."""
    return torch.tensor(values, dtype=torch.float32).reshape(values.shape[0] if values.ndim else 1, -1)


def moved(old: Array, rows: torch.Tensor) -> Array:
    """The array with these rows, (rows, width) float32, in its own shape and type.

    Entries that are as they were keep every bit, in float64 too, where a way through float32 would round them.
    """
    same = (rows_of(old) == rows).reshape(old.shape).numpy()
    return np.where(same, old, rows.reshape(old.shape).numpy().astype(old.dtype))


def spec_of(rows: torch.Tensor) -> SectionSpec:
    """A section of which a client may send all rows."""
    return SectionSpec(len(rows), {"values": rows.shape[1]}, len(rows))


def difference(sent: torch.Tensor, rows: torch.Tensor) -> Section:
    """What a client has changed, as a section of one user: rows it has left alone are padding."""
    changed = sent - rows
    return Section(torch.arange(len(rows), dtype=torch.int32)[None], (changed != 0).any(1)[None], changed[None])


def numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """The single numbers among a client's metrics: lists are left out.

    Raises ExchangeError for one that is not finite.
    """
    found = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    if not all(map(math.isfinite, found.values())):
        raise ExchangeError("a metric must be finite, one is not; see what that client divides by")
    return found


def weighted_means(metrics: Sequence[Metrics], weights: Sequence[float]) -> dict[str, float]:
    """The mean of each metric that all clients have; none when all weights are 0."""
    total = sum(weights)
    if not total:
        return {}
    shared = [name for name in metrics[0] if all(name in others for others in metrics)]
    shares = [weight / total for weight in weights]
    return {name: sum(own[name] * share for own, share in zip(metrics, shares, strict=True)) for name in shared}
