"""What is done where: pure functions, against counting by hand and enumeration."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.state import RecordLayout
from client.store import UserStore, shard_of
from federation.config import ComputeConfig
from federation.errors import RunError
from simulations.compute.placement import Backlog, check_room, deal, deal_again, resources_of, room, shards_in

GPU = ComputeConfig(workers=2, device="cuda", devices_per_worker=0.5)

# -------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("share", "nodes", "workers"),
    [
        (1.0, [(4, 2)], 2),
        (0.5, [(8, 2)], 4),
        (0.5, [(3, 2)], 3),  # for want of cores
        (0.4, [(8, 1)], 2),
        (0.7, [(8, 2)], 2),  # one on each GPU: 0.6 of a worker does not straddle them
        (0.1, [(20, 1)], 10),
        (1.0, [(4, 1), (4, 0), (4, 2)], 3),
    ],
)
def test_as_many_workers_fit_as_share_nodes_and_gpus(share: float, nodes: list[tuple[int, int]], workers: int) -> None:
    compute = GPU.model_copy(update={"devices_per_worker": share, "workers": workers})
    resources = [{"CPU": float(cores), "GPU": float(gpus)} for cores, gpus in nodes]
    assert room(resources_of(compute), resources) == workers
    check_room(compute, resources)
    with pytest.raises(RunError, match=rf"each of {workers + 1} workers needs .* has room for {workers} .*lower"):
        check_room(compute.model_copy(update={"workers": workers + 1}), resources)


def test_on_the_cpu_gpus_are_not_asked_for() -> None:
    assert resources_of(ComputeConfig(workers=3, devices_per_worker=0.5)) == {"CPU": 1.0}
    check_room(ComputeConfig(workers=3), [{"CPU": 1.0}, {"CPU": 2.0}])


# -------------------------------------------------------------------------------- who owns what

HERE, THERE = (7, 100), (8, 100)


def test_shards_of_nobody_are_dealt_out_by_number_of_workers() -> None:
    owners = deal(12, {"a": {}, "b": {}}, {"a": 1, "b": 3})
    assert sorted(owners) == list(range(12))
    assert Counter(owners.values()) == {"a": 3, "b": 9}


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=20))
def test_a_shard_belongs_to_the_node_that_has_it_and_the_others_level_the_loads(held: list[str | None]) -> None:
    found = {node: {s: HERE for s, holder in enumerate(held) if holder == node} for node in "abc"}
    owners = deal(len(held), found, dict.fromkeys("abc", 2))
    assert all(owners[shard] == holder for shard, holder in enumerate(held) if holder)
    given_loads, loads = Counter(filter(None, held)), Counter(owners.values())
    gained = [loads[node] for node in "abc" if loads[node] > given_loads[node]]
    assert not gained or max(gained) <= min(loads[node] for node in "abc") + 1


def test_nodes_that_see_the_same_files_share_them_out_and_different_files_are_refused() -> None:
    same = {"a": {0: HERE, 1: HERE}, "b": {0: HERE, 1: HERE}}
    assert Counter(deal(2, same, {"a": 1, "b": 1}).values()) == {"a": 1, "b": 1}
    with pytest.raises(RunError, match=r"shard 1 lies on 2 with different files \(a, b\)"):
        deal(2, same | {"b": {0: HERE, 1: THERE}}, {"a": 1, "b": 1})


def test_shards_of_a_node_that_is_gone_go_to_those_that_see_them_or_are_missed() -> None:
    owners = {0: "a", 1: "a", 2: "b", 3: "c"}
    left = {"b": {0: HERE, 1: HERE, 2: HERE}, "c": {0: HERE, 1: HERE, 3: HERE}}
    again = deal_again(owners, left, Path("users"))
    assert (again[2], again[3]) == ("b", "c")
    assert {again[0], again[1]} == {"b", "c"}
    with pytest.raises(RunError, match=r"shard 0 of users was on node a, which is gone.*start the node again"):
        deal_again(owners, {"b": {2: HERE}, "c": {3: HERE}}, Path("users"))


def test_a_nodes_shards_are_found_and_a_copy_is_not_the_same(tmp_path: Path) -> None:
    folder, layout = tmp_path / "users", RecordLayout(embedding_width=2, mask_bytes=1)
    ids = np.array([3, 9, 12])
    assert shards_in(folder) == {}
    with UserStore(folder, 1000, layout) as store:
        store.write(layout.fresh(ids), 1)
    found = shards_in(folder)
    assert set(found) == set(shard_of(ids, 1000).tolist())
    shutil.copytree(folder, tmp_path / "copy")
    os.symlink(folder, tmp_path / "same")
    assert shards_in(tmp_path / "same") == found
    assert all(shards_in(tmp_path / "copy")[shard] != seen for shard, seen in found.items())


# -------------------------------------------------------------------------------- what waits


@given(st.lists(st.sampled_from(["a", "b", None]), max_size=12))
def test_every_position_is_taken_once_in_order_by_its_home(homes: list[str | None]) -> None:
    backlog, taken = Backlog(homes), []
    nodes = ["a", "b"]
    while len(backlog):
        node = nodes[len(taken) % 2]
        allowed = [p for p, home in enumerate(homes) if home in (node, None) and p not in taken]
        position = backlog.take(node)
        assert position == (min(allowed) if allowed else None)
        if position is None:
            nodes.remove(node)
            nodes = nodes * 2
        else:
            taken.append(position)
    assert sorted(taken) == list(range(len(homes)))


def test_what_is_put_back_comes_first_and_may_move() -> None:
    backlog = Backlog(["a", "a", "b"])
    assert (backlog.take("a"), backlog.take("a"), backlog.take("a")) == (0, 1, None)
    backlog.put_back(0)
    assert len(backlog) == 2
    backlog.rehome(["b", "b", "b"])
    assert (backlog.take("a"), backlog.take("b"), backlog.take("b"), backlog.take("b")) == (None, 0, 2, None)
