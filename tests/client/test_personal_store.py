"""The store of personal values against a plain dict, and against kills, damage, threads and a full disk."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from client.environment import DATA_NAME, RECORDS
from client.personal_store import Kept, PersonalStore
from federation.errors import StoreError

USERS = st.sampled_from([0, 1, 7, 2**40, 2**63 - 1, -5])
KEPT = st.builds(Kept, st.sampled_from(["r1-00ff", "r20-aa", ""]), st.binary(max_size=9000), st.binary(max_size=9000))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PersonalStore]:
    with PersonalStore(tmp_path / "personal") as opened:
        yield opened


class Against(RuleBasedStateMachine):
    """Every history of calls leaves what a dict would hold; None stands for a forgotten user."""

    @initialize()
    def begin(self) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.folder, self.held = Path(self.temporary.name) / "personal", {}
        self.store = PersonalStore(self.folder)

    @rule(user=USERS, kept=KEPT)
    def put(self, user: int, kept: Kept) -> None:
        if user in self.held and self.held[user] is None:
            with pytest.raises(StoreError, match=rf"user {user} was forgotten, .*; give its data another name"):
                self.store.put(user, kept)
        else:
            self.store.put(user, kept)
            self.held[user] = kept

    @rule(user=USERS)
    def forget(self, user: int) -> None:
        assert self.store.forget(user) == (self.held.get(user) is not None)
        self.held[user] = None

    @rule()
    def reopen(self) -> None:
        self.store.close()

    @invariant()
    def equal(self) -> None:
        for user in [0, 1, 7, 2**40, 2**63 - 1, -5, 9]:
            assert self.store.get(user) == self.held.get(user)
        with_values = {user for user, kept in self.held.items() if kept is not None}
        assert set(self.store.users().tolist()) == with_values
        assert set(self.store.forgotten().tolist()) == set(self.held) - with_values
        assert self.store.versions() == {kept.version for kept in self.held.values() if kept is not None}

    def teardown(self) -> None:
        self.store.close()
        self.temporary.cleanup()


TestAgainstADict = Against.TestCase
TestAgainstADict.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


def raw(folder: Path, edit) -> None:
    """Edits the environment behind the store's back."""
    with lmdb.open(str(folder), map_size=1 << 24, max_dbs=1) as environment:
        records = environment.open_db(RECORDS, create=False)
        with environment.begin(db=records, write=True) as handle:
            edit(handle)


def test_the_bytes_are_those_of_the_table(store: PersonalStore, tmp_path: Path) -> None:
    store.put(258, Kept("r7-ab", b"payload", b"memory"))
    store.forget(1)
    store.close()
    found = {}
    raw(tmp_path / "personal", lambda handle: found.update(handle.cursor()))
    key, body = b"\0\0\0\0\0\0\1\2", b"\2\5r7-ab\6\0\0\0memorypayload"
    assert found == {key: body + crc32(key + body).to_bytes(4, "little"), b"\0\0\0\0\0\0\0\1": b""}


KEY = (5).to_bytes(8, "big")


@settings(max_examples=30)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_changed_or_cut_value_is_refused_and_personalising_again_mends_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damage") / "personal"
    with PersonalStore(folder) as store:
        store.put(5, Kept("r1-aa", b"some payload", b"and memory"))
        store.put(6, Kept("r2-bb", b"other"))

    def damage(handle) -> None:
        value = bytearray(handle.get(KEY))
        at_byte = at % len(value)
        if cut and at_byte:
            del value[at_byte:]
        else:
            value[at_byte] ^= 1 << bit
        handle.put(KEY, bytes(value))

    raw(folder, damage)
    with PersonalStore(folder) as store:
        with pytest.raises(StoreError, match=r"values of user 5 \(\d+ bytes\) fail their checksum; personalise it"):
            store.get(5)
        assert store.get(6) == Kept("r2-bb", b"other")
        assert store.users().tolist() == [5, 6]
        store.put(5, Kept("r3-cc", b"new"))
        assert store.get(5) == Kept("r3-cc", b"new")


@given(value=st.binary(min_size=1, max_size=8))
@settings(max_examples=30)
def test_versions_can_be_asked_for_whatever_values_have_become(
    tmp_path_factory: pytest.TempPathFactory, value: bytes
) -> None:
    folder = tmp_path_factory.mktemp("damage") / "personal"
    with PersonalStore(folder) as store:
        store.put(6, Kept("r2-bb", b"other"))
    raw(folder, lambda handle: handle.put(KEY, value))
    with PersonalStore(folder) as store:
        assert "r2-bb" in store.versions()


def test_values_under_another_users_key_are_refused(store: PersonalStore, tmp_path: Path) -> None:
    store.put(5, Kept("r1-aa", b"payload"))
    store.close()
    raw(tmp_path / "personal", lambda handle: handle.put((6).to_bytes(8, "big"), handle.get(KEY)))
    with PersonalStore(tmp_path / "personal") as reopened:
        assert reopened.get(5) is not None
        with pytest.raises(StoreError, match="user 6"):
            reopened.get(6)


def stored(folder: Path, body: bytes) -> None:
    """Has user 5 own this value, under its checksum."""
    raw(folder, lambda handle: handle.put(KEY, body + crc32(KEY + body).to_bytes(4, "little")))


def test_a_value_of_the_first_format_has_no_memory_until_it_is_written_again(
    store: PersonalStore, tmp_path: Path
) -> None:
    store.forget(1)
    store.close()
    stored(tmp_path / "personal", b"\1\5r7-abpayload")
    with PersonalStore(tmp_path / "personal") as reopened:
        assert reopened.versions() == {"r7-ab"}
        found = reopened.get(5)
        assert found == Kept("r7-ab", b"payload", b"")
        reopened.put(5, Kept("r7-ab", b"payload", b"memory"))
        assert reopened.get(5) == Kept("r7-ab", b"payload", b"memory")


def test_another_format_is_named(store: PersonalStore, tmp_path: Path) -> None:
    store.put(5, Kept("r1-aa", b"payload"))
    store.close()
    stored(tmp_path / "personal", b"\3\0later")
    with (
        PersonalStore(tmp_path / "personal") as reopened,
        pytest.raises(StoreError, match=r"user 5 are of format 3, this fedquilt reads up to 2; upgrade it"),
    ):
        reopened.get(5)


@pytest.mark.parametrize("content", [b"", b"\0" * 8192, None])
def test_a_damaged_file_is_named(store: PersonalStore, tmp_path: Path, content: bytes | None) -> None:
    store.put(1, Kept("r1-aa", b"payload"))
    store.close()
    data = tmp_path / "personal" / DATA_NAME
    data.unlink() if content is None else data.write_bytes(content)
    with pytest.raises(StoreError, match=r"personal' is damaged .*; restore it from a copy, or rename it"):
        PersonalStore(tmp_path / "personal").users()


def test_a_full_store_keeps_what_it_had(tmp_path: Path) -> None:
    with PersonalStore(tmp_path / "personal", map_bytes=1 << 16) as store:
        store.put(1, Kept("r1-aa", b"x" * 9000))
        with pytest.raises(StoreError, match=r"may take 65536 bytes and is full; forget users"):
            store.put(2, Kept("r1-aa", b"x" * 70000))
        assert store.get(1) == Kept("r1-aa", b"x" * 9000)
        assert store.get(2) is None


def test_a_process_opens_it_once(store: PersonalStore, tmp_path: Path) -> None:
    store.users()
    with pytest.raises(StoreError, match="this process opens it once"):
        PersonalStore(tmp_path / "personal").users()


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/personal' cannot be used"):
        PersonalStore(tmp_path / "file" / "personal").users()


def test_threads_may_use_it_at_the_same_time(store: PersonalStore) -> None:
    def write(first: int) -> None:
        for step in range(20):
            store.put(first + step, Kept(f"r{first}-aa", bytes([first]) * 100))
            assert store.get(first + step) == Kept(f"r{first}-aa", bytes([first]) * 100)

    threads = [threading.Thread(target=write, args=(100 * number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(store.users()) == 60
    assert store.versions() == {"r0-aa", "r100-aa", "r200-aa"}


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        PersonalStore(tmp_path / "personal").put(3, Kept("r1-aa", b"payload"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with PersonalStore(tmp_path / "personal") as store:
        assert store.get(3) == Kept("r1-aa", b"payload")
