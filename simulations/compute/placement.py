"""What is done where: what a worker needs, how many fit on a cluster, and which node owns which shard of the users.

Pure functions of what the cluster and its nodes say; `simulations/compute/ray_workers.py` asks them and acts.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from federation.config import ComputeConfig
from federation.errors import RunError

Resources = Mapping[str, float]
"""Amounts by Ray's name of a resource, such as {"CPU": 1, "GPU": 0.5}."""

FileIdentity = tuple[int, int]
"""What two nodes see alike when they see the same file: its inode and the time of its last change, in ns."""

_SHARD_FOLDER = re.compile(r"shard-(\d+)")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Shard:
    """A shard of a user store, one of so many. Its users' states lie on one node, so its work is done there."""

    store_folder: Path
    number: int
    of: int


@dataclass(frozen=True)
class Place:
    """Where a worker is: its node, and which of the node's GPUs it works on."""

    node: str
    gpus: tuple[str, ...]


def resources_of(compute: ComputeConfig) -> dict[str, float]:
    """What each worker needs of its node: a core, and the GPU that it works on or a share of it."""
    return {"CPU": 1.0} if compute.device == "cpu" else {"CPU": 1.0, "GPU": compute.devices_per_worker}


def room(needed: Resources, nodes: Sequence[Resources]) -> int:
    """How many workers the nodes can hold when nothing else runs on them. A share of a GPU is of one GPU."""
    return sum(min(_times(name, amount, node.get(name, 0.0)) for name, amount in needed.items()) for node in nodes)


def check_room(compute: ComputeConfig, nodes: Sequence[Resources]) -> None:
    """Raises RunError when the cluster can never hold the workers that are asked for."""
    needed = resources_of(compute)
    if (found := room(needed, nodes)) < compute.workers:
        raise RunError(
            f"each of {compute.workers} workers needs {described(needed)} on one node, the cluster has room for {found}"
            f" (nodes: {len(nodes)}); lower compute.workers{' or compute.devices_per_worker' * ('GPU' in needed)}, "
            "or start more nodes"
        )


def described(resources: Resources) -> str:
    """For messages: "1 CPU and 0.5 GPU"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def shards_in(store_folder: Path) -> dict[int, FileIdentity]:
    """The shards that this node has of a store, by number."""
    found = {}
    for data in store_folder.glob("shard-*/data.mdb"):
        if number := _SHARD_FOLDER.fullmatch(data.parent.name):
            status = data.stat()
            found[int(number[1])] = (status.st_ino, status.st_mtime_ns)
    return found


def deal(shards: int, found: Mapping[str, Mapping[int, FileIdentity]], workers: Mapping[str, int]) -> dict[int, str]:
    """The node that owns each shard: the one that has it; those that no node has are dealt out by number of workers.

    found: what each node has, by `shards_in`. workers: how many each node has. Nodes that see the same files, those of
    one machine, share those shards out.

    Raises RunError when several nodes have files of their own for one shard.
    """
    owners: dict[int, str] = {}
    load = dict.fromkeys(workers, 0)
    for shard in sorted(range(shards), key=lambda number: (len(_having(number, found)) != 1, number)):
        having = _having(shard, found)
        if len({found[node][shard] for node in having}) > 1:
            raise RunError(
                f"a shard of the users lies on one node, shard {shard} lies on {len(having)} with different files "
                f"({', '.join(having)}); keep the newest and move the others away"
            )
        owner = min(having or workers, key=lambda node: (load[node] + 1) / workers[node])
        owners[shard], load[owner] = owner, load[owner] + 1
    return owners


def deal_again(
    owners: Mapping[int, str], found: Mapping[str, Mapping[int, FileIdentity]], store_folder: Path
) -> dict[int, str]:
    """The owners when some nodes have gone: their shards go to nodes that see the same files.

    found: what each node that is left has. Raises RunError when a shard is gone with its node.
    """
    moved = dict(owners)
    for shard, owner in owners.items():
        if owner in found:
            continue
        if not (having := _having(shard, found)):
            raise RunError(
                f"shard {shard} of {store_folder} was on node {owner}, which is gone, and no other node has it; "
                "start the node again with its files and run the same command with --resume"
            )
        moved[shard] = min(having, key=list(moved.values()).count)
    return moved


class Backlog:
    """Positions of jobs that wait, in order, each for a worker of its home node (None: for any worker)."""

    def __init__(self, homes: Sequence[str | None]) -> None:
        self._homes = homes
        self._waiting = _queues(range(len(homes)), homes)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, node: str) -> int | None:
        """The first position that a worker of this node may take."""
        queues = [queue for home in (node, None) if (queue := self._waiting.get(home))]
        return min(queues, key=lambda queue: queue[0]).popleft() if queues else None

    def put_back(self, position: int) -> None:
        """A position that was taken waits again, before all others of its home."""
        self._waiting.setdefault(self._homes[position], deque()).appendleft(position)

    def rehome(self, homes: Sequence[str | None]) -> None:
        """Other homes for all positions that wait."""
        self._waiting = _queues(sorted(chain.from_iterable(self._waiting.values())), homes)
        self._homes = homes


def _queues(positions: Iterable[int], homes: Sequence[str | None]) -> dict[str | None, deque[int]]:
    queues: dict[str | None, deque[int]] = {}
    for position in positions:
        queues.setdefault(homes[position], deque()).append(position)
    return queues


def _having(shard: int, found: Mapping[str, Mapping[int, FileIdentity]]) -> list[str]:
    return [node for node, shards in found.items() if shard in shards]


def _times(name: str, amount: float, available: float) -> int:
    """How often an amount fits. A share of a GPU never straddles two."""
    if name == "GPU" and amount < 1:
        return int(available) * int(1 / amount + _ROUNDING)
    return int(available / amount + _ROUNDING)
