"""Users' records against bytes packed by hand, and against every single flipped bit."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.state import MAX_ROUND, Histories, RecordFault, RecordLayout, UserBlock, join, user_keys
from federation.errors import StoreError

LAYOUT = RecordLayout(embedding_width=3, mask_bytes=2)
ONE = UserBlock(
    np.array([-5]),
    torch.tensor([[1.5, -2.0, float("inf")]]),
    torch.tensor([[0x81, 0x40]], dtype=torch.uint8),
    torch.tensor([7], dtype=torch.int32),
)


def block_of(ids: list[int], seed: int = 0) -> UserBlock:
    generator = torch.Generator().manual_seed(seed)
    users = len(ids)
    return UserBlock(
        np.array(ids, dtype=np.int64),
        torch.randn(users, 3, generator=generator),
        torch.randint(0, 256, (users, 2), generator=generator, dtype=torch.uint8),
        torch.randint(0, 2**31 - 1, (users,), generator=generator, dtype=torch.int32),
    )


def assert_equal(a: UserBlock, b: UserBlock) -> None:
    assert a.ids.tolist() == b.ids.tolist()
    for left, right in ((a.embedding_ue, b.embedding_ue), (a.mask_ub, b.mask_ub), (a.visits_u, b.visits_u)):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def by_hand(version: int = 2, round_index: int = 258) -> bytes:
    """The record of ONE, from the byte table."""
    record = struct.pack("<BIi2B3f", version, round_index, 7, 0x81, 0x40, 1.5, -2.0, float("inf"))
    return record + struct.pack("<I", zlib.crc32(struct.pack(">q", -5) + record))


def unpacked(ids: np.ndarray, values: list[bytes]) -> Histories:
    """The histories of users who all have one."""
    return LAYOUT.unpack(ids, np.arange(len(ids)), values)


# -------------------------------------------------------------------------------- one record


def test_the_bytes_are_those_of_the_table() -> None:
    rows = LAYOUT.encode(ONE, 258)
    assert rows.tobytes() == by_hand()
    assert len(by_hand()) == LAYOUT.record_bytes
    assert user_keys(np.array([-5, 258])) == [struct.pack(">q", -5), struct.pack(">q", 258)]
    assert_equal(LAYOUT.decode(ONE.ids, unpacked(ONE.ids, [by_hand()]).newest(259)), ONE)


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8), round_index=st.integers(0, MAX_ROUND))
def test_decode_undoes_encode(ids: list[int], round_index: int) -> None:
    block = block_of(ids)
    size, packed = LAYOUT.record_bytes, LAYOUT.encode(block, round_index).tobytes()
    histories = unpacked(block.ids, [packed[at : at + size] for at in range(0, len(packed), size)])
    assert_equal(LAYOUT.decode(block.ids, histories.newest(round_index + 1)), block)


def test_users_without_a_record_are_fresh() -> None:
    block = block_of([4, 9])
    mixed = LAYOUT.decode(np.array([4, 8, 9]), (np.array([0, 2]), LAYOUT.encode(block, 0)))
    assert_equal(mixed.take(np.array([0, 2])), block)
    assert_equal(mixed.take(slice(1, 2)), LAYOUT.fresh(np.array([8])))
    fresh = LAYOUT.fresh(np.array([8]))
    assert not fresh.embedding_ue.any()
    assert not fresh.mask_ub.any()
    assert not fresh.visits_u.any()


def test_join_and_take_are_inverse() -> None:
    block = block_of([4, 9, 1, 7, 3])
    assert_equal(join([block.take(slice(0, 2)), block.take(slice(2, 2)), block.take(slice(2, 5))]), block)


def test_every_flipped_bit_is_refused() -> None:
    for bit in range(8 * LAYOUT.record_bytes):
        record = bytearray(by_hand())
        record[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordFault, match=r"user -5 fails its crc32"):
            unpacked(ONE.ids, [bytes(record)])


def test_a_record_under_another_key_is_refused() -> None:
    for bit in range(63):
        with pytest.raises(RecordFault, match=r"fails its crc32"):
            unpacked(ONE.ids ^ (1 << bit), [by_hand()])


@pytest.mark.parametrize("value", [b"", by_hand()[:-1], by_hand() + b"\0", by_hand() + by_hand()[:5]])
def test_no_number_of_whole_records_is_refused(value: bytes) -> None:
    with pytest.raises(RecordFault, match=f"user -5 has {len(value)} bytes, its records have {len(by_hand())} each"):
        unpacked(ONE.ids, [value])


def test_another_version_is_refused_though_its_crc_is_right() -> None:
    with pytest.raises(RecordFault, match=r"user -5 has a format version other than 2"):
        unpacked(ONE.ids, [by_hand(version=1)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_ue", torch.zeros(1, 4)),
        ("embedding_ue", torch.zeros(1, 3, dtype=torch.float64)),
        ("mask_ub", torch.zeros(1, 1, dtype=torch.uint8)),
        ("visits_u", torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_a_block_of_another_layout_is_refused(field: str, value: Any) -> None:
    with pytest.raises(StoreError, match=f"{field}.*another gate or pool"):
        LAYOUT.encode(replace(ONE, **{field: value}), 0)


@pytest.mark.parametrize("round_index", [-1, MAX_ROUND + 1])
def test_a_round_that_no_record_holds_is_refused(round_index: int) -> None:
    with pytest.raises(StoreError, match="round must lie in"):
        LAYOUT.encode(ONE, round_index)


# -------------------------------------------------------------------------------- histories

Model = list[set[int]]
"""The rounds that each user has a record of."""

models = st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=5)


def histories_of(model: Model) -> Histories:
    """Histories with those rounds, whose records say (user, round)."""
    values = []
    for user, rounds in enumerate(model):
        blocks = [replace(ONE, ids=np.array([user]), visits_u=torch.tensor([r], dtype=torch.int32)) for r in rounds]
        values.append(
            b"".join(LAYOUT.encode(block, r).tobytes() for block, r in sorted(zip(blocks, rounds), key=by_round))
        )
    present = np.array([user for user, rounds in enumerate(model) if rounds], dtype=np.int64)
    return LAYOUT.unpack(np.arange(len(model)), present, [value for value in values if value])


def by_round(pair: tuple[UserBlock, int]) -> int:
    return pair[1]


def model_of(histories: Histories, users: int) -> Model:
    """What is packed is what is unpacked again, so this asks both."""
    packed = histories.packed(users)
    present = np.array([user for user, value in enumerate(packed) if value], dtype=np.int64)
    again = LAYOUT.unpack(np.arange(users), present, [value for value in packed if value])
    assert (again.rows["visits"] == again.rows["round"]).all()
    return [set(again.rows["round"][again.user_r == user].tolist()) for user in range(users)]


@given(model=models, durable=st.integers(-1, 10))
def test_superseded_records_are_those_before_the_newest_durable_one(model: Model, durable: int) -> None:
    newest = [max((r for r in rounds if r <= durable), default=-1) for rounds in model]
    expected = [{r for r in rounds if r >= newest[user]} for user, rounds in enumerate(model)]
    assert model_of(histories_of(model).without_superseded(durable), len(model)) == expected


@given(model=models, round_index=st.integers(-1, 10))
def test_histories_end_where_they_are_told_to(model: Model, round_index: int) -> None:
    expected = [{r for r in rounds if r <= round_index} for rounds in model]
    assert model_of(histories_of(model).until(round_index), len(model)) == expected


@given(model=models, round_index=st.integers(0, 10))
def test_a_round_is_added_once(model: Model, round_index: int) -> None:
    users = len(model)
    block = replace(LAYOUT.fresh(np.arange(users)), visits_u=torch.full((users,), round_index, dtype=torch.int32))
    histories = histories_of(model).with_round(LAYOUT.encode(block, round_index))
    assert model_of(histories, users) == [rounds | {round_index} for rounds in model]


@given(model=models, before_round=st.integers(0, 11))
def test_the_newest_record_is_the_last_one_before_a_round(model: Model, before_round: int) -> None:
    expected = [
        (user, max(early)) for user, rounds in enumerate(model) if (early := {r for r in rounds if r < before_round})
    ]
    positions, rows = histories_of(model).newest(before_round)
    assert list(zip(positions.tolist(), rows["round"].tolist())) == expected


@given(model=models, data=st.data())
def test_some_users_of_all(model: Model, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, len(model) - 1), min_size=1)))
    some = histories_of(model).of(np.array(chosen))
    assert [set(some.rows["round"][some.user_r == place].tolist()) for place in range(len(chosen))] == [
        model[user] for user in chosen
    ]
