"""The user store against a plain dict, and against kills, forks, full disks and damaged files."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from client.state import FORMAT_VERSION, MAX_ROUND, RecordLayout, UserBlock, join
from client.store import MANIFEST_NAME, UserStore, mended, shard_of
from federation.errors import DamagedShardError, StoreError
from tests.child import exit_code

LAYOUT = RecordLayout(embedding_width=3, mask_bytes=2)
IDS = np.arange(40, dtype=np.int64)


def block_of(ids: np.ndarray, stamp: int) -> UserBlock:
    """Users whose every field says (user, stamp)."""
    users = torch.from_numpy(np.asarray(ids))
    return UserBlock(
        np.asarray(ids, dtype=np.int64),
        torch.stack((users, users + stamp, users * stamp), 1).float(),
        torch.stack((users % 256, torch.full_like(users, stamp % 256)), 1).to(torch.uint8),
        torch.full((len(ids),), stamp, dtype=torch.int32),
    )


def assert_equal(a: UserBlock, b: UserBlock) -> None:
    assert a.ids.tolist() == b.ids.tolist()
    assert torch.equal(a.embedding_ue, b.embedding_ue)
    assert torch.equal(a.mask_ub, b.mask_ub)
    assert torch.equal(a.visits_u, b.visits_u)


def records_held(store: UserStore) -> int:
    """Records of all users and rounds."""
    held = 0
    for shard in store._existing():
        with shard.transaction(write=False) as transaction:
            held += sum(len(histories.rows) for _, histories in transaction.batches())
    return held


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UserStore]:
    with UserStore(tmp_path, 3, LAYOUT) as opened:
        yield opened


# -------------------------------------------------------------------------------- shards


def test_shards_are_those_of_splitmix64_in_plain_integers() -> None:
    def slow(user: int) -> int:
        z = user % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) % 7

    ids = [0, 1, 2, -1, 12345678901234567, 2**63 - 1, -(2**63)]
    assert shard_of(np.array(ids), 7).tolist() == [slow(user) for user in ids]


@pytest.mark.parametrize("stride", [1, 8, 1000])
@pytest.mark.parametrize("shards", [2, 8, 13])
def test_shards_of_regular_ids_are_balanced(shards: int, stride: int) -> None:
    counts = np.bincount(shard_of(np.arange(100_000) * stride, shards), minlength=shards)
    expected = 100_000 / shards
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


# -------------------------------------------------------------------------------- contract


class StoreMachine(RuleBasedStateMachine):
    """Rounds go on, are redone, become durable and are resumed from; the model keeps every record."""

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = UserStore(Path(self.folder.name), 2, LAYOUT)
        self.model: dict[tuple[int, int], int] = {}
        self.durable_round, self.last_round = -1, -1

    @rule(users=st.sets(st.integers(-3, 4), min_size=1), ahead=st.integers(0, 2), data=st.data())
    def write(self, users: set[int], ahead: int, data: st.DataObject) -> None:
        round_index = max(self.last_round + ahead, self.durable_round + 1)
        order = data.draw(st.permutations(sorted(users)))
        stamp = data.draw(st.integers(0, 1000))
        self.store.write(block_of(np.array(order), stamp), round_index)
        self.model.update({(user, round_index): stamp for user in users})
        self.last_round = round_index

    @rule(behind=st.integers(0, 3))
    def compact(self, behind: int) -> None:
        if self.last_round - behind >= 0:
            self.store.compact(self.last_round - behind)
            self.durable_round = max(self.durable_round, self.last_round - behind)

    @rule(behind=st.integers(0, 3))
    def rewind(self, behind: int) -> None:
        self.last_round = max(self.last_round - behind, self.durable_round)
        self.store.rewind(self.last_round)
        self.model = {at: stamp for at, stamp in self.model.items() if at[1] <= self.last_round}

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = UserStore(Path(self.folder.name), 2, LAYOUT)

    @invariant()
    def reads_the_newest_before_every_round(self) -> None:
        ids = np.array([4, -3, 0, 2, -1, 3])
        for before_round in range(self.durable_round + 1, self.last_round + 2):
            block = self.store.read(ids, before_round)
            for position, user in enumerate(ids.tolist()):
                earlier = [r for u, r in self.model if u == user and r < before_round]
                one = np.array([user])
                expected = block_of(one, self.model[user, max(earlier)]) if earlier else LAYOUT.fresh(one)
                assert_equal(block.take(slice(position, position + 1)), expected)

    @invariant()
    def no_record_is_newer_than_the_newest_round(self) -> None:
        written = max((r for _, r in self.model), default=-1)
        assert written <= self.store.newest_round() <= self.last_round

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=20), data=st.data())
def test_any_two_rounds_of_any_users_stand_apart(ids: list[int], data: st.DataObject) -> None:
    far = st.integers(0, MAX_ROUND)
    early, late = sorted(data.draw(st.lists(far, min_size=2, max_size=2, unique=True)))
    with tempfile.TemporaryDirectory() as folder, UserStore(Path(folder), 2, LAYOUT) as opened:
        users = np.array(ids, dtype=np.int64)
        opened.write(LAYOUT.fresh(users), late)
        opened.write(block_of(users, 5), early)
        assert_equal(opened.read(users, late), block_of(users, 5))
        assert_equal(opened.read(users, late + 1), LAYOUT.fresh(users))
        assert_equal(opened.read(users, early), LAYOUT.fresh(users))


def test_a_redone_round_changes_nothing(store: UserStore) -> None:
    store.write(block_of(IDS, 1), 1)
    store.compact(1)
    for _ in range(3):
        before = store.read(IDS, 2)
        store.write(block_of(IDS, 2), 2)
        assert_equal(before, block_of(IDS, 1))
        assert records_held(store) == 2 * len(IDS)
        assert store.count() == len(IDS)


def test_a_written_user_keeps_one_durable_record_and_those_after_it(store: UserStore) -> None:
    for round_index in range(6):
        store.write(block_of(IDS, round_index), round_index)
    store.compact(3)
    store.compact(2)  # an older round changes nothing
    store.write(block_of(IDS[:10], 6), 6)
    assert records_held(store) == 10 * len((3, 4, 5, 6)) + 30 * len(range(6))
    assert_equal(store.read(IDS, 4), block_of(IDS, 3))


def test_what_was_compacted_is_refused_rather_than_fresh(store: UserStore) -> None:
    store.write(block_of(IDS, 1), 1)
    store.compact(4)
    for call in (
        lambda: store.read(IDS, 4),
        lambda: store.write(block_of(IDS, 4), 4),
        lambda: store.rewind(3),
    ):
        with pytest.raises(StoreError, match=r"compacted to round 4; resume"):
            call()
    assert_equal(store.read(IDS, 5), block_of(IDS, 1))


def test_a_user_twice_is_refused(store: UserStore) -> None:
    twice = np.array([3, 7, 7])
    for call in (lambda: store.write(block_of(twice, 1), 1), lambda: store.read(twice, 1)):
        with pytest.raises(StoreError, match="2 rows of user 7"):
            call()
    assert store.count() == 0


def test_no_users_are_no_work(store: UserStore) -> None:
    store.write(block_of(IDS[:0], 1), 1)
    assert len(store.read(IDS[:0], 1)) == 0


def test_a_history_of_many_rounds_is_kept_whole(tmp_path: Path) -> None:
    """Longer than a page of the file, as of wide users between rare checkpoints."""
    layout, generator = RecordLayout(embedding_width=200, mask_bytes=2), torch.Generator().manual_seed(0)
    blocks = [replace(layout.fresh(IDS[:2]), embedding_ue=torch.randn(2, 200, generator=generator)) for _ in range(12)]
    for round_index, block in enumerate(blocks):
        with UserStore(tmp_path, 1, layout) as opened:
            opened.write(block, round_index)
    with UserStore(tmp_path, 1, layout) as opened:
        for round_index, block in enumerate(blocks):
            assert_equal(opened.read(IDS[:2], round_index + 1), block)


def test_rewinding_drops_the_rounds_given_up_and_users_seen_in_them_alone(store: UserStore) -> None:
    store.write(block_of(IDS[:30], 1), 1)
    store.write(block_of(IDS[20:], 2), 2)
    store.rewind(2)
    assert (store.count(), records_held(store)) == (40, 50)
    store.rewind(1)
    assert (store.count(), records_held(store)) == (30, 30)
    assert_equal(store.read(IDS, 9), join([block_of(IDS[:30], 1), LAYOUT.fresh(IDS[30:])]))


def test_the_newest_round_is_that_of_the_shard_that_is_furthest(store: UserStore) -> None:
    assert store.newest_round() == -1
    store.write(block_of(IDS, 4), 4)
    store.write(block_of(IDS[:1], 7), 7)
    assert store.newest_round() == 7
    store.rewind(5)
    assert store.newest_round() == 5


def test_bytes_per_user_are_the_blocks_of_the_files(store: UserStore) -> None:
    assert store.bytes_per_user() == 0
    many = np.arange(20_000)
    store.write(block_of(many, 1), 1)
    blocks = sum(file.stat().st_blocks for file in store.folder.glob("shard-*/data.mdb"))
    assert store.bytes_per_user() == blocks * 512 / len(many)
    assert 8 + LAYOUT.record_bytes < store.bytes_per_user() < 4 * (8 + LAYOUT.record_bytes)


# -------------------------------------------------------------------------------- processes


def test_a_fork_opens_the_shards_anew(store: UserStore) -> None:
    store.write(block_of(IDS, 1), 1)

    def child() -> None:
        assert_equal(store.read(IDS, 2), block_of(IDS, 1))
        assert store._process == os.getpid()
        store.write(block_of(IDS, 2), 2)
        store.close()

    assert exit_code(child) == 0
    assert_equal(store.read(IDS, 3), block_of(IDS, 2))
    store.write(block_of(IDS, 3), 3)
    assert_equal(store.read(IDS, 4), block_of(IDS, 3))


def test_two_processes_write_to_one_shard(tmp_path: Path) -> None:
    def write_all(ids: np.ndarray) -> None:
        with UserStore(tmp_path, 1, LAYOUT) as opened:
            for round_index in range(20):
                opened.write(block_of(ids, round_index), round_index)

    child = os.fork()
    if child == 0:
        write_all(IDS[::2])
        os._exit(0)
    write_all(IDS[1::2])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert opened.count() == len(IDS)
        assert records_held(opened) == 20 * len(IDS)
        for round_index in (0, 11, 19):
            assert_equal(opened.read(IDS, round_index + 1), block_of(IDS, round_index))


def test_a_killed_writer_leaves_whole_rounds(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with UserStore(tmp_path, 1, LAYOUT) as opened:
            for round_index in range(10**6):
                opened.write(block_of(IDS, round_index), round_index)
        os._exit(0)
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        while records_held(opened) < 20 * len(IDS):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = records_held(opened) // len(IDS) - 1
        assert records_held(opened) == (last + 1) * len(IDS)
        for round_index in (0, last):
            assert_equal(opened.read(IDS, round_index + 1), block_of(IDS, round_index))
        opened.write(block_of(IDS, last), last + 1)


# -------------------------------------------------------------------------------- faults


def test_a_full_map_keeps_what_was_there_and_says_what_to_do(tmp_path: Path) -> None:
    many = np.arange(5000)
    with UserStore(tmp_path, 1, LAYOUT, map_bytes=1 << 17) as opened:
        opened.write(block_of(IDS, 1), 1)
        with pytest.raises(StoreError, match=r"shard 0 .* 131072 bytes .* larger map_bytes"):
            opened.write(block_of(many, 2), 2)
        assert_equal(opened.read(IDS, 3), block_of(IDS, 1))
    with UserStore(tmp_path, 1, LAYOUT, map_bytes=1 << 24) as opened:
        opened.write(block_of(many, 2), 2)
        assert_equal(opened.read(many, 3), block_of(many, 2))


def test_a_disk_that_takes_no_more_keeps_what_was_there(tmp_path: Path) -> None:
    many = np.arange(5000)

    def child() -> None:
        with UserStore(tmp_path, 1, LAYOUT) as opened:
            opened.write(block_of(IDS, 1), 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
            with pytest.raises(StoreError, match=r"shard 0 .*free space"):
                opened.write(block_of(many, 2), 2)

    assert exit_code(child) == 0
    with UserStore(tmp_path, 1, LAYOUT) as opened:
        assert_equal(opened.read(IDS, 3), block_of(IDS, 1))
        opened.write(block_of(many, 2), 2)


def damage(store: UserStore, shard: int) -> None:
    """Zeros in place of the first pages of a shard's file."""
    store.close()
    with (store.folder / f"shard-{shard:04d}" / "data.mdb").open("r+b") as file:
        file.write(bytes(2 * 4096))


def test_mending_sets_damaged_shards_aside_and_does_the_action_again(store: UserStore) -> None:
    store.write(block_of(IDS, 1), 1)
    damage(store, 0)
    damage(store, 2)
    found, aside = mended(store, lambda: store.read(IDS, 2))
    assert sorted(aside) == [0, 2]
    lost = np.isin(shard_of(IDS, 3), [0, 2])
    assert found.visits_u.tolist() == np.where(lost, 0, 1).tolist()
    assert mended(store, lambda: store.count()) == ((~lost).sum(), ())
    assert len(list(store.folder.glob("*.damaged-*"))) == 2


def test_a_shard_that_is_damaged_again_at_once_is_an_error(store: UserStore) -> None:
    store.write(block_of(IDS, 1), 1)
    calls = 0

    def refuse() -> None:
        nonlocal calls
        calls += 1
        store.read(IDS, 2)
        raise DamagedShardError("shard 1 is damaged", 1)

    with pytest.raises(DamagedShardError):
        mended(store, refuse)
    assert calls == 2


@pytest.mark.parametrize(("shards", "layout"), [(4, LAYOUT), (3, RecordLayout(3, 3)), (3, RecordLayout(4, 2))])
def test_a_store_of_another_shape_is_refused(store: UserStore, shards: int, layout: RecordLayout) -> None:
    with pytest.raises(StoreError, match="asked for"):
        UserStore(store.folder, shards, layout)


def test_a_store_of_another_version_is_left_to_it(store: UserStore) -> None:
    manifest = store.folder / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": FORMAT_VERSION - 1}))
    with pytest.raises(StoreError, match=r"another version of fedquilt.* finish it with that one, or start in"):
        UserStore(store.folder, 3, LAYOUT)


@pytest.mark.parametrize("content", [None, b"", b"[", json.dumps({"format": "other"}).encode()])
def test_a_lost_or_damaged_manifest_is_refused(store: UserStore, content: bytes | None) -> None:
    store.write(block_of(IDS, 1), 1)
    (store.folder / MANIFEST_NAME).unlink()
    if content is not None:
        (store.folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(StoreError, match=MANIFEST_NAME if content != b'{"format": "other"}' else "asked for"):
        UserStore(store.folder, 3, LAYOUT)


def test_forgotten_users_are_fresh_ones_and_others_stay(store: UserStore) -> None:
    assert store.forget(IDS) == 0
    assert not list(store._existing())
    for stamp in (1, 2):
        store.write(block_of(IDS, stamp), stamp)
    gone = np.array([7, 900, 3, 30])
    assert store.forget(gone) == 3
    rest = np.setdiff1d(IDS, gone)
    for before, stamp in ((2, 1), (3, 2)):
        assert_equal(store.read(gone, before), LAYOUT.fresh(gone))
        assert_equal(store.read(rest, before), block_of(rest, stamp))
    assert (store.count(), records_held(store)) == (len(rest), 2 * len(rest))
    assert store.forget(gone) == 0
    store.write(block_of(gone, 3), 3)
    assert_equal(store.read(gone, 4), block_of(gone, 3))


def test_an_existing_store_is_opened_as_its_manifest_says(store: UserStore, tmp_path: Path) -> None:
    store.write(block_of(IDS, 1), 1)
    store.close()
    with UserStore.existing(tmp_path) as found:
        assert (found.shards, found.layout) == (3, LAYOUT)
        assert_equal(found.read(IDS, 2), block_of(IDS, 1))
    for content in (b"", b"[]", b'{"shards": 3}', b'{"shards": 3, "layout": {"width": 1}}', None):
        path = tmp_path / MANIFEST_NAME
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(StoreError, match=r"store\.json is no manifest of a user store .*; restore it"):
            UserStore.existing(tmp_path)
