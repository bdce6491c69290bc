"""Workers on a cluster of two nodes, both on this machine, that may die: what is done where, and that it is done once.

The tests of one cluster stand in the order in which they wear it out.
"""

from __future__ import annotations

import operator
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.internal_api import free
from ray.cluster_utils import Cluster as Machines
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group

import simulations.compute.cluster
import simulations.compute.ray_workers
import simulations.federate
from client.store import UserStore
from federation.config import RunConfig
from federation.errors import FedquiltWarning, RunError, StoreError
from server.checkpoint import checksum
from simulations.compute.cluster import Cluster
from simulations.compute.placement import Place, Shard
from simulations.compute.ray_workers import RayWorkers
from simulations.compute.worker import ChunkReport, Worker, run_chunk
from simulations.compute.workers import on_device
from simulations.federate import RoundReport, federate, last_checkpoint, read_history
from tests.simulations.tiny import simulate, tiny_config, tiny_setup

MEGABYTE = 1_000_000
PATIENCE_SECONDS = 60


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """Two nodes, of two cores and of one, each with a GPU as far as Ray knows."""
    found = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
    found.add_node(num_cpus=1, num_gpus=1)
    yield found
    found.shutdown()


def config_on(machines: Machines, *overrides: str) -> RunConfig:
    return tiny_config("compute.workers=2", f"compute.ray_address={machines.address}", *overrides)


# -------------------------------------------------------------------------------- resources


def test_workers_share_gpus_on_two_nodes_and_leave_the_cluster_as_it_was(machines: Machines) -> None:
    shares = ("compute.workers=3", "compute.device=auto", "compute.devices_per_worker=0.5")
    config = on_device(config_on(machines, *shares))
    assert config.compute.device == "cuda"
    workers = RayWorkers(config)
    try:
        (other,) = machines.worker_nodes
        assert Counter(workers.places) == {
            Place(machines.head_node.node_id, ("0",)): 2,
            Place(other.node_id, ("0",)): 1,
        }
        assert ray.available_resources().get("GPU", 0.0) == 0.5
        with pytest.raises(RunError, match=r"'cuda' needs a torch that can use a GPU, .* finds none"):
            list(workers.run(place_of, [()]))
    finally:
        workers.close()
    assert not ray.is_initialized()
    with Cluster(config.compute):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while ray.available_resources().get("GPU", 0.0) < 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_the_cluster_cannot_hold_is_refused(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="each of 4 workers needs 1 CPU on one node, the cluster has room for 3"):
        RayWorkers(config_on(machines, "compute.workers=4"))
    with Cluster(config_on(machines).compute) as cluster:
        cluster.reserve()
        monkeypatch.setattr(simulations.compute.cluster, "PATIENCE_SECONDS", 0.5)
        with pytest.raises(RunError, match=r"2 workers need 1 CPU each, the cluster had 1 CPU left for 0\.5 s"):
            cluster.reserve()
        with pytest.raises(RunError, match="this process is connected already"):
            RayWorkers(config_on(machines))
    with pytest.raises(RunError, match=r"HOST:PORT of a running Ray cluster, '127\.0\.0\.1:1' does not answer"):
        RayWorkers(config_on(machines, "compute.ray_address=127.0.0.1:1"))


@pytest.mark.parametrize("error", [ConnectionError("no answer"), RuntimeError("version mismatch"), ValueError("odd")])
def test_what_keeps_ray_from_starting_is_said(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        RunError, match=rf"Ray {ray.__version__} .* cluster at {machines.address} \({error}\); see `ray"
    ):
        RayWorkers(config_on(machines))
    with pytest.raises(RunError, match=rf"Ray {ray.__version__} does not start .*\({error}\).*compute\.workers to 0"):
        RayWorkers(tiny_config("compute.workers=2"))


# -------------------------------------------------------------------------------- who does what


@pytest.fixture(scope="module")
def workers(machines: Machines) -> Iterator[RayWorkers]:
    """One worker on each node."""
    started = RayWorkers(config_on(machines))
    yield started
    started.close()


def place_of(worker: Worker, *_: Any) -> tuple[None, tuple[str, int]]:
    return None, (ray.get_runtime_context().get_node_id(), os.getpid())


def part(worker: Worker, number: int) -> tuple[bytes, int]:
    """A result too large to travel with its report."""
    return bytes([number]) * MEGABYTE, os.getpid()


def parts(workers: RayWorkers, shards: list[Shard]) -> list[Any]:
    made = {position: result for position, result, _ in workers.run(part, [(n,) for n in range(len(shards))], shards)}
    return [made[position] for position in range(len(shards))]


def dying_once(marker: Path, moment: str) -> Callable[..., tuple[Any, ChunkReport]]:
    """`run_chunk` that kills its process before or after its users are written."""

    def chunk(worker: Worker, *arguments: Any) -> tuple[Any, ChunkReport]:
        real = UserStore.write

        def write(*to_write: Any) -> None:
            if moment == "after":
                real(*to_write)
            os.kill(os.getpid(), signal.SIGKILL)

        with suppress(FileExistsError):
            marker.touch(exist_ok=False)
            UserStore.write = write  # type: ignore[method-assign]  # of this process, which ends with it
        return run_chunk(worker, *arguments)

    return chunk


def test_a_shards_chunks_are_done_on_the_node_that_owns_it(workers: RayWorkers, tmp_path: Path) -> None:
    shards = [Shard(tmp_path, number % 4, 4) for number in range(24)]
    found = {position: node for position, _, (node, _) in workers.run(place_of, [()] * 24, shards)}
    by_shard = {shard: {found[position] for position in range(shard, 24, 4)} for shard in range(4)}
    assert all(len(nodes) == 1 for nodes in by_shard.values())
    assert len({place.node for place in workers.places}) == 2
    assert sorted(node for nodes in by_shard.values() for node in nodes) == sorted(
        [place.node for place in workers.places] * 2
    )


@pytest.mark.parametrize("moment", ["before", "after"])
def test_with_a_worker_killed_in_mid_round_the_bits_are_the_same(
    workers: RayWorkers, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(simulations.federate, "run_chunk", dying_once(tmp_path / "died", moment))
    before = workers.places
    with pytest.warns(FedquiltWarning, match=r"worker \d died in job \d of 3 .*another takes its place"):
        federate(tiny_setup(tiny_config()), workers, range(60), tmp_path / "out", False, lambda report: None)
    assert checksum(last_checkpoint(tmp_path / "out")) == undisturbed
    assert [line["replaced_workers"] for line in read_history(tmp_path / "out")] == [1, 0, 0, 0, 0, 0]
    assert workers.places == before


@pytest.mark.filterwarnings("ignore:.*died in job:federation.errors.FedquiltWarning")
@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_report_is_made_again_up_to_three_times(
    workers: RayWorkers, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    real, losses = simulations.compute.ray_workers._value, iter(range(times))
    replaced = workers.replaced

    def value(reference: Any) -> Any:
        for _ in losses if reference not in workers._starting else ():
            raise ObjectLostError(reference.hex(), None, "")
        return real(reference)

    monkeypatch.setattr(simulations.compute.ray_workers, "_value", value)
    if times < 3:
        assert [position for position, _, _ in workers.run(place_of, [()])] == [0]
    else:
        with pytest.raises(RunError, match=r"the report of job 0 of 1 was lost 3 times .*--resume"):
            list(workers.run(place_of, [()]))
    assert workers.replaced == replaced


def fail(worker: Worker) -> None:
    raise StoreError("shard 3 is full")


def kill_oneself(worker: Worker, *_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_that_fails_or_kills_its_workers_ends_the_run_with_words_and_resume_goes_on(
    workers: RayWorkers, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError) as raised:
        list(workers.run(fail, [()]))
    assert (type(raised.value), str(raised.value)) == (StoreError, "shard 3 is full")

    def from_now_on_kill(report: RoundReport) -> None:
        if report.round_index == 3:
            monkeypatch.setattr(simulations.federate, "run_chunk", kill_oneself)

    monkeypatch.setattr(simulations.compute.ray_workers, "ATTEMPTS", 1)
    with pytest.raises(RunError, match=r"worker \d died in job \d of 3, as 0 before it .*compute\.block.*--resume"):
        federate(tiny_setup(tiny_config()), workers, range(60), tmp_path, False, from_now_on_kill)
    monkeypatch.undo()
    assert [line["round_index"] for line in read_history(tmp_path)] == [1, 2, 3]
    assert simulate(tiny_config(), tmp_path, resume=True) == undisturbed


@pytest.mark.parametrize("error", [OutOfMemoryError("worker was killed"), RayActorError(error_msg="due to node OOM")])
def test_a_worker_that_memory_may_have_ended_is_said_to(error: Exception) -> None:
    assert "lower compute.workers, or compute.block in a new run" in str(
        simulations.compute.ray_workers._given_up("worker 1 died", error)
    )
    assert "memory" not in str(
        simulations.compute.ray_workers._given_up("worker 1 died", RayActorError(error_msg="its node was removed"))
    )


@pytest.mark.filterwarnings("ignore:.*died in job:federation.errors.FedquiltWarning")  # of the job before
def test_partials_are_merged_though_workers_die_and_partials_are_lost(workers: RayWorkers, tmp_path: Path) -> None:
    shards = [Shard(tmp_path, number, 5) for number in range(5)]
    made = parts(workers, shards)
    whole = b"".join(bytes([number]) * MEGABYTE for number in range(5))
    ((_, _, (_, pid)),) = workers.run(place_of, [()])
    os.kill(pid, signal.SIGKILL)
    with pytest.warns(FedquiltWarning, match="died merging partials"):
        assert workers.fold(made, operator.add) == whole
    free([made[1].reference, made[4].reference])
    redone: dict[int, int] = {}
    assert workers.fold(made, operator.add, redone.__setitem__) == whole
    assert set(redone) == {1, 4}


def test_when_a_node_goes_its_shards_move_to_one_that_sees_their_files_though_it_has_no_room_for_its_worker(
    machines: Machines, workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulations.compute.ray_workers, "PATIENCE_SECONDS", 1.0)
    for number in range(4):
        (tmp_path / "seen" / f"shard-{number:04d}").mkdir(parents=True)
        (tmp_path / "seen" / f"shard-{number:04d}" / "data.mdb").touch()
    seen = [Shard(tmp_path / "seen", number, 4) for number in range(4)]
    unseen = [Shard(tmp_path / "unseen", number, 4) for number in range(4)]
    made = parts(workers, seen)
    list(workers.run(place_of, [()] * 4, unseen))
    (other,) = machines.worker_nodes
    spare = placement_group([{"CPU": 1}])  # the one core that no worker has, which is the head's
    assert spare.wait(PATIENCE_SECONDS)
    machines.remove_node(other)
    with pytest.warns(FedquiltWarning):
        assert workers.fold(made, operator.add) == b"".join(bytes([number]) * MEGABYTE for number in range(4))
    assert {node for _, _, (node, _) in workers.run(place_of, [()] * 4, seen)} == {machines.head_node.node_id}
    with pytest.raises(RunError, match=r"shard \d of .*unseen was on node .*, which is gone.*start the node again"):
        list(workers.run(place_of, [()] * 4, unseen))
    remove_placement_group(spare)
    assert [place.node for place in workers.places] == [machines.head_node.node_id] * 2
