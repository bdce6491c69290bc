"""The pools that a node keeps, against a plain account of which came, which are referred to and which are damaged."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from client.pools import NEWEST, Pools
from federation.config import TaskConfig
from federation.errors import FedquiltWarning, NodeError, PoolError, PoolFormatError
from federation.pool.file import PoolFile


def pool(round_index: int, fill: float = 0.0) -> PoolFile:
    return PoolFile(round_index, {"pool/a": torch.full((2, 3), fill + round_index)}, TaskConfig())


def keep(pools: Pools, *rounds: int) -> list[str]:
    return [pools.keep(pool(round_index).to_bytes()) for round_index in rounds]


def file_of(folder: Path, version: str) -> Path:
    return folder / "pools" / f"{version}.safetensors"


def test_what_is_kept_is_read_back_by_another_process(tmp_path: Path) -> None:
    (version,) = keep(Pools(tmp_path), 3)
    assert version == pool(3).version
    found = Pools(tmp_path).read(version)
    assert torch.equal(found.values["pool/a"], torch.full((2, 3), 3.0))
    assert (found.round_index, found.task) == (3, TaskConfig())


def test_a_version_is_decoded_once(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    (version,) = keep(pools, 1)
    file_of(tmp_path, version).unlink()
    assert pools.read(version) is pools.read(version)


def test_the_newest_are_kept_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    """A server that begins anew, or goes back, sends lower rounds: what came last counts, not the round."""
    pools = Pools(tmp_path)
    rounds = [9, 40, 41, 2, 10, 3]
    versions = []
    for at, round_index in enumerate(rounds):
        versions += keep(pools, round_index)
        os.utime(file_of(tmp_path, versions[-1]), ns=(at, at))
    assert pools.versions == tuple(versions[-NEWEST:])
    for version in versions[:-NEWEST]:
        assert not file_of(tmp_path, version).exists()


def test_a_pool_that_just_came_is_kept_though_the_clock_went_back(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    for version in keep(pools, 1, 2, 3):
        os.utime(file_of(tmp_path, version), ns=(2**62, 2**62))
    (late,) = keep(pools, 4)
    assert late in pools.versions


def test_the_release_and_what_is_pinned_outlive_the_head(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    served, personal, other = keep(pools, 1, 2, 3)
    pools.pin([personal])
    pools.adopt(served)
    pools = Pools(tmp_path)  # as after a restart
    assert pools.release == served
    head = keep(pools, *range(4, 10))
    assert set(pools.versions) == {served, personal, *head[-NEWEST:]}
    with pytest.raises(NodeError):
        pools.read(other)
    pools.pin([])
    pools.adopt(head[-1])
    assert set(pools.versions) >= {served, personal}
    newest = keep(pools, 10, 11, 12, 13)
    assert set(pools.versions) == {head[-1], *newest[-NEWEST:]}


def test_what_is_not_kept_is_lacking(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    lacking = pool(5).version
    for call in (pools.read, pools.adopt):
        with pytest.raises(NodeError, match=rf"does not keep the pool {lacking}; send it") as raised:
            call(lacking)
        assert raised.value.fault == "lacks version"
    assert pools.release == ""


@pytest.mark.parametrize("how", ["cut", "flipped", "another", "emptied"])
def test_a_damaged_file_is_set_aside_loudly_and_lacking(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    version, other = keep(Pools(tmp_path), 1, 2)
    path = file_of(tmp_path, version)
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-1],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "another": file_of(tmp_path, other).read_bytes(),
        "emptied": b"",
    }
    path.write_bytes(damaged[how])
    pools = Pools(tmp_path)
    with (
        pytest.warns(FedquiltWarning, match=rf"{version}.safetensors is damaged .*set aside as {path.name}.damaged-1"),
        pytest.raises(NodeError) as raised,
    ):
        pools.read(version)
    assert raised.value.fault == "lacks version"
    assert pools.versions == (other,)
    assert "is damaged" in caplog.text
    pools.keep(whole)
    assert pools.read(version).round_index == 1
    path.write_bytes(damaged[how])
    with pytest.warns(FedquiltWarning, match=rf"{path.name}.damaged-2"), pytest.raises(NodeError):
        Pools(tmp_path).read(version)
    assert [path.with_name(f"{path.name}.damaged-{number}").read_bytes() for number in (1, 2)] == [damaged[how]] * 2


@pytest.mark.parametrize("change", [(b"fedquilt pool 1", b"fedquilt pool 2"), (b"seed", b"sead")])
def test_a_file_of_another_release_stays_and_is_refused(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    """After an upgrade or its undoing; users' values may refer to it."""
    pools = Pools(tmp_path)
    (version,) = keep(pools, 1)
    pools.pin([version])
    path = file_of(tmp_path, version)
    whole = path.read_bytes()
    path.write_bytes(other := whole.replace(*change))
    assert other != whole
    pools = Pools(tmp_path)
    for call in (pools.read, pools.adopt):
        with pytest.raises(PoolFormatError, match=rf"{path.name} stays as it is: .*use (its|the) release"):
            call(version)
    assert path.read_bytes() == other
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with pytest.raises(PoolFormatError):
        pools.keep(other)
    assert pools.keep(whole) == version  # the same values from a server of this release
    assert pools.read(version).round_index == 1


def test_what_was_dropped_is_not_adopted_from_memory(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    first, _, _ = keep(pools, 1, 2, 3)
    pools.read(first)
    keep(pools, 4)
    with pytest.raises(NodeError, match=f"does not keep the pool {first}"):
        pools.adopt(first)
    assert pools.release == ""


def test_what_a_node_keeps_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    pools = Pools(tmp_path / "node")
    pools.adopt(*keep(pools, 1))
    for path in (tmp_path / "node").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_read_is_an_error_and_stays(tmp_path: Path) -> None:
    (version,) = keep(Pools(tmp_path), 1)
    path = file_of(tmp_path, version)
    path.unlink()
    path.mkdir()
    with pytest.raises(PoolError, match=rf"{version}.* cannot be read or written .*free space"):
        Pools(tmp_path).read(version)
    assert path.is_dir()


@pytest.mark.parametrize("payload", [b"", b"no pool", pool(1).to_bytes()[:-4], pool(1).to_bytes() + b"x"])
def test_bytes_that_are_no_pool_leave_no_file(tmp_path: Path, payload: bytes) -> None:
    pools = Pools(tmp_path)
    with pytest.raises(PoolError):
        pools.keep(payload)
    assert not list((tmp_path / "pools").iterdir())


@pytest.mark.parametrize(
    "name",
    ["", "r1", "r-1-0123456789abcdef", "r1-0123456789abcdeF", "r1-0123456789abcdef0", "../r1-0123456789abcdef",
     "r1-0123456789abcdef/../x", "r1-0123456789abcdef\n", "/etc/passwd", "r11111111111-0123456789abcdef"],
)  # fmt: skip
def test_only_versions_become_paths(tmp_path: Path, name: str) -> None:
    for call in (Pools(tmp_path).read, Pools(tmp_path).adopt):
        with pytest.raises(PoolError, match="a pool's version matches"):
            call(name)


def test_other_files_are_no_versions(tmp_path: Path) -> None:
    (version,) = keep(Pools(tmp_path), 1)
    for name in ("notes.safetensors", f".partial-{version}.safetensors-0", f"{version}.json"):
        (tmp_path / "pools" / name).write_bytes(b"")
    pools = Pools(tmp_path)
    assert pools.versions == (version,)
    assert not list((tmp_path / "pools").glob(".partial-*"))


@pytest.mark.parametrize(
    "notes", ["", "[", "[]", "{}", '{"release": "r1-0123456789abcdef"}', '{"release": 1, "pinned": 2}']
)
def test_damaged_notes_are_refused_since_pools_would_be_lost(tmp_path: Path, notes: str) -> None:
    (tmp_path / "release.json").write_text(notes)
    with pytest.raises(PoolError, match=r"release\.json says which pools .* restore it, or remove it"):
        Pools(tmp_path)


def test_notes_are_json_that_names_versions(tmp_path: Path) -> None:
    pools = Pools(tmp_path)
    first, second = keep(pools, 1, 2)
    pools.adopt(first)
    pools.pin([second, first])
    assert json.loads((tmp_path / "release.json").read_text()) == {"release": first, "pinned": sorted([first, second])}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PoolError, match=r"file/pools cannot be read or written"):
        Pools(tmp_path / "file")


def test_threads_read_while_others_keep(tmp_path: Path) -> None:
    """Whatever comes and goes meanwhile, a reader gets the pool that it named."""
    pools = Pools(tmp_path)
    (served,) = keep(pools, 0)
    pools.adopt(served)

    def serve() -> None:
        for _ in range(50):
            assert pools.read(served).round_index == 0
            assert served in pools.versions

    with ThreadPoolExecutor(3) as threads:
        work = [threads.submit(serve), *(threads.submit(keep, pools, *range(at, at + 10)) for at in (1, 100))]
        for done in work:
            done.result(60)
    assert len(pools.versions) <= NEWEST + 2  # the release, and what came just when another was dropped
