"""A Ray cluster to work on: one of our own, which ends with us, or one that runs already, which we leave as it was."""

from __future__ import annotations

import logging
import os
import platform
import socket
import warnings
from types import TracebackType
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else ray.init warns of a future change
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # else the errors of merges that are done again are printed

os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")  # read where they lie, not copied

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from federation.config import ComputeConfig
from federation.errors import RunError
from simulations.compute.placement import check_room, described, resources_of

for harmless in ("Zero-copy tensor serialization", "The given NumPy array is not writable"):
    warnings.filterwarnings("ignore", message=harmless, category=UserWarning)  # nobody changes what was given

PATIENCE_SECONDS = 60.0
"""How long we wait for what others on the cluster take up. What it could never hold is refused at once."""


class Cluster:
    """A connection to the cluster that `compute` names. A process has one at a time.

    Raises RunError when there is no cluster at the address, or this process is connected already.
    """

    def __init__(self, compute: ComputeConfig) -> None:
        if ray.is_initialized():
            raise RunError(
                "workers connect to Ray themselves, this process is connected already; call ray.shutdown() first "
                "(to work on that cluster, give its address as compute.ray_address)"
            )
        self._compute = compute
        self._groups: list[PlacementGroup] = []
        own = {
            "num_cpus": compute.workers,
            "include_dashboard": False,
            "_system_config": {"worker_niceness": 0},  # 15 by default: then any other process slows a run
        }
        if compute.ray_address is not None:
            _check_answers(compute.ray_address)
        try:
            ray.init(
                address=compute.ray_address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **({} if compute.ray_address else own),
            )
        except (OSError, RuntimeError, ValueError) as error:
            ray.shutdown()
            raise RunError(_no_cluster(compute.ray_address, error)) from error

    @property
    def gpus(self) -> int:
        """GPUs of all nodes, in use or not."""
        return int(ray.cluster_resources().get("GPU", 0))

    @property
    def nodes(self) -> set[str]:
        """The ids of all nodes that are alive."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def object_store_mib(self) -> float:
        """What lies in shared memory."""
        name = "object_store_memory"
        used_bytes = ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0)
        return float(round(used_bytes / 2**20, 1))

    def reserve(self) -> PlacementGroup:
        """A bundle of resources for each worker, spread over the nodes.

        Raises RunError when the cluster can never hold them, or others keep it busy.
        """
        compute = self._compute
        check_room(compute, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        needed = resources_of(compute)
        group = placement_group([needed] * compute.workers, strategy="SPREAD")
        self._groups.append(group)
        if not group.wait(PATIENCE_SECONDS):
            raise RunError(
                f"{compute.workers} workers need {described(needed)} each, the cluster had {_free(needed)} left for "
                f"{PATIENCE_SECONDS:g} s; wait for other work on it, or lower compute.workers"
            )
        return group

    def close(self) -> None:
        """Gives back what was reserved, and ends the cluster if it is ours."""
        if self._compute.ray_address is not None:  # else all ends with the cluster
            for group in self._groups:
                remove_placement_group(group)
        ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cluster_gpus(compute: ComputeConfig) -> int:
    """The GPUs of the cluster that `compute` names."""
    with Cluster(compute) as cluster:
        return cluster.gpus


def nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle."""
    by_bundle: dict[int, Any] = placement_group_table(group)["bundles_to_node_id"]
    return [str(by_bundle[number]) for number in range(len(by_bundle))]


def _check_answers(address: str) -> None:
    """Raises RunError when nobody listens: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS / 6).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"compute.ray_address is HOST:PORT of a running Ray cluster, {address!r} does not answer ({error}); "
            "start one with `ray start --head`, or leave the address out"
        ) from error


def _no_cluster(address: str | None, error: Exception) -> str:
    if address is None:
        return (
            f"workers are processes of Ray, Ray {ray.__version__} does not start on this machine ({error}); see that "
            "there is room in memory, /dev/shm and /tmp, or set compute.workers to 0 to work in this process"
        )
    return (
        f"Ray {ray.__version__} on Python {platform.python_version()} cannot join the cluster at {address} ({error}); "
        f"see `ray status --address {address}`, and install the cluster's versions of both"
    )


def _free(needed: dict[str, float]) -> str:
    available = ray.available_resources()
    return described({name: available.get(name, 0.0) for name in needed})
