"""Packed masks against Python sets and the bits of Python integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federation import masks
from federation.errors import MaskError

stacks = st.integers(1, 40).flatmap(
    lambda units: st.lists(st.lists(st.booleans(), min_size=units, max_size=units), min_size=1, max_size=4)
)


@given(stacks)
def test_bytes_are_those_of_the_integer_with_these_bits(rows: list[list[bool]]) -> None:
    packed = masks.pack(torch.tensor(rows))
    for row, found in zip(rows, packed):
        number = sum(1 << unit for unit, active in enumerate(row) if active)
        assert bytes(found.tolist()) == number.to_bytes(-(-len(row) // 8), "little")


@given(stacks)
def test_unpack_and_count_invert_pack(rows: list[list[bool]]) -> None:
    mask_ug = torch.tensor(rows)
    packed = masks.pack(mask_ug)
    assert torch.equal(masks.unpack(packed, mask_ug.shape[1]), mask_ug)
    assert masks.count(packed).tolist() == [sum(row) for row in rows]
    assert masks.count(packed).dtype == torch.int64


def test_every_byte_is_counted() -> None:
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert masks.count(every).tolist() == [value.bit_count() for value in range(256)]


def test_bitwise_operators_are_set_operations() -> None:
    a, b = {0, 3, 9, 17}, {3, 9, 10}
    mask = {True: torch.zeros(18, dtype=torch.bool), False: torch.zeros(18, dtype=torch.bool)}
    mask[True][list(a)], mask[False][list(b)] = True, True
    packed_a, packed_b = masks.pack(mask[True]), masks.pack(mask[False])
    assert set(masks.unpack(packed_a & packed_b, 18).nonzero().flatten().tolist()) == a & b
    assert set(masks.unpack(packed_a | packed_b, 18).nonzero().flatten().tolist()) == a | b


def test_leading_axes_are_kept() -> None:
    mask = torch.rand(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = masks.pack(mask)
    assert packed.shape == (2, 3, 5, 2)
    assert masks.count(packed).shape == (2, 3, 5)
    assert torch.equal(masks.unpack(packed, 12), mask)


def test_a_mask_of_another_pool_is_refused() -> None:
    packed = masks.pack(torch.ones(3, 12, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"17 units needs 3 bytes .* got \(3, 2\)"):
        masks.unpack(packed, 17)
    with pytest.raises(MaskError, match="5 padding bits after a mask of 11 units"):
        masks.unpack(packed, 11)
    with pytest.raises(MaskError, match="int64"):
        masks.unpack(packed.long(), 12)


def test_only_booleans_are_packed() -> None:
    with pytest.raises(MaskError, match=r"boolean, got torch\.float32"):
        masks.pack(torch.rand(4))
