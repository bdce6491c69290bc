"""A version of the pool as a file: it comes back as it was, and a damaged one is never taken for another."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from federation.config import TaskConfig
from federation.errors import PoolError
from federation.pool.file import PoolFile, pool_file
from federation.state import version_of
from federation.update import Values

VALUES = {"pool/a": torch.arange(6.0).view(2, 3), "gate": torch.randn(1, 5).t().contiguous().t()}
FILE = PoolFile(3, VALUES, TaskConfig.model_validate({"seed": 7, "pool": {"rank": 9}}))
PAYLOAD = FILE.to_bytes()


def test_it_comes_back_as_it_was() -> None:
    found = pool_file(PAYLOAD)
    assert (found.round_index, found.task, found.version) == (3, FILE.task, version_of(VALUES, 3))
    assert found.values.keys() == VALUES.keys()
    assert all(torch.equal(found.values[name], VALUES[name]) for name in VALUES)


def test_equal_values_give_equal_bytes() -> None:
    other_way = PoolFile(3, dict(reversed(VALUES.items())), FILE.task)
    assert {PoolFile(3, VALUES, FILE.task).to_bytes() for _ in range(20)} == {other_way.to_bytes()}


@given(position=st.integers(0, len(PAYLOAD) - 1), change=st.integers(1, 255))
def test_a_changed_byte_is_found_or_says_the_same(position: int, change: int) -> None:
    """JSON has bytes that mean nothing, such as the task's spelling; tensors and version have none."""
    damaged = bytearray(PAYLOAD)
    damaged[position] ^= change
    try:
        found = pool_file(bytes(damaged))
    except PoolError:
        return
    assert found.version == FILE.version
    assert all(torch.equal(found.values[name], VALUES[name]) for name in VALUES)


@given(length=st.integers(0, len(PAYLOAD) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(PoolError, match="fetch it again"):
        pool_file(PAYLOAD[:length])


def test_values_of_another_version_are_refused() -> None:
    said = {"format": "fedquilt pool 1", "version": "r3-0000000000000000", "round": 3, "task": {}}
    with pytest.raises(PoolError, match="the values are those of r3-"):
        pool_file(save(dict(VALUES), {"fedquilt": json.dumps(said)}))


def test_another_format_is_refused() -> None:
    said = {"format": "fedquilt pool 2", "version": FILE.version, "round": 3, "task": {}}
    with pytest.raises(PoolError, match="'fedquilt pool 2'"):
        pool_file(save(dict(VALUES), {"fedquilt": json.dumps(said)}))


@pytest.mark.parametrize("payload", [b"", b"junk", struct.pack("<Q", 2**63), save({"a": torch.zeros(1)})])
def test_what_is_no_pool_file_is_refused(payload: bytes) -> None:
    with pytest.raises(PoolError, match="no pool file"):
        pool_file(payload)


def saying(values: Values, **said: object) -> bytes:
    """A file with other words than `to_bytes` writes."""
    words = {"format": "fedquilt pool 1", "version": FILE.version, "round": 3, "task": {}, **said}
    return save(dict(values), {"fedquilt": json.dumps(words)})


def behind_a_header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "payload",
    [
        saying({"a": torch.zeros(2, 2, dtype=torch.bfloat16)}),
        saying(VALUES, round=float("inf")),
        saying(VALUES, round=float("nan")),
        saying(VALUES, round=[3]),
        saying(VALUES, task=[]),
        saying(VALUES, task={"pool": {"rank": 0}}),
        behind_a_header("[" * 100_000),
        behind_a_header("3"),
        behind_a_header('{"__metadata__": {"fedquilt": "[]"}}'),
    ],
    ids=["bf16", "infinity", "nan", "list", "task list", "task", "nested", "number", "words"],
)
def test_whatever_is_wrong_with_a_file_it_is_the_same_error(payload: bytes) -> None:
    with pytest.raises(PoolError, match=r"bytes are no pool file .*fetch it again"):
        pool_file(payload)
