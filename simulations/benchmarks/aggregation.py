"""Updates combined per second: ours, which are sparse, against Flower's own dense mean and against memcpy.

The pool is that of four blocks of GPT-2: 8 modules (c_attn, c_fc) of R = 64 units, 7 MB. Each user trained k = 8
units of each module and sends these rows alone, 0.9 MB. Three ways lead to the same mean, and it is checked:

| side   | what one user sends | what is timed |
|--------|---------------------|---------------|
| sparse | rows and their ids  | `MaskedMean`: lift of every block of users, merge, finish |
| flower | the whole pool      | Flower's `aggregate_arrayrecords`, which reads arrays from bytes as it adds |
| dense  | the whole pool      | the same sums by numpy over arrays that are ready: what sparsity alone gains |

Beside them: the sparse side with `admit` before each lift, as a server runs it; and a copy of the sparse rows from
one place in memory to another. All on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from federation.errors import ConfigError
from federation.pool.spec import ModuleSpec, PoolSpec
from federation.update import Limits, Schema, Section, UpdateBlock, admit
from simulations.benchmarks.clock import in_turns, one_thread
from strategies.means import MaskedMean
from strategies.protocol import Step

POOL = PoolSpec(
    modules=tuple(
        ModuleSpec(f"h.{layer}.{name}", 768, d_out)
        for layer in range(4)
        for name, d_out in (("attn.c_attn", 2304), ("mlp.c_fc", 3072))
    ),
    rank=64,
    scale=2.0,
)
SCHEMA = Schema(POOL.sections(max_rows=8))
LIMITS = Limits({"pool": 20.0}, max_weight=1.0)
SEED = 0
_WEIGHT = "num-examples"

Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Aggregation:
    """Seconds by side and repetition: "sparse", "admitted", "copy" of all `users`, "flower", "dense" of `clients`.

    max_relative_difference: between the sparse and Flower's mean of the same clients, as a share of the largest entry.
    """

    users: int
    block: int
    clients: int
    update_bytes: int
    seconds: Mapping[str, tuple[float, ...]]
    max_relative_difference: float

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints, from medians.

        share_of_memcpy: bytes of rows combined per second, over bytes copied per second.
        """
        taken = {side: median(times) for side, times in self.seconds.items()}
        sparse, flower = self.users / taken["sparse"], self.clients / taken["flower"]
        return {
            "sparse_updates_per_second": round(sparse, 1),
            "admitted_updates_per_second": round(self.users / taken["admitted"], 1),
            "flower_dense_updates_per_second": round(flower, 1),
            "numpy_dense_updates_per_second": round(self.clients / taken["dense"], 1),
            "ratio": round(sparse / flower, 2),
            "share_of_memcpy": round(taken["copy"] / taken["sparse"], 3),
            "max_relative_difference": self.max_relative_difference,
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            "seed": SEED,
            "users": self.users,
            "block": self.block,
            "clients": self.clients,
            "update_bytes": self.update_bytes,
            "dense_bytes": sum(rows.nbytes for rows in SCHEMA.zeros().values()),
            "threads": 1,
            "seconds": {side: list(times) for side, times in self.seconds.items()},
        }


def measure(users: int, block: int, clients: int, repetitions: int) -> Aggregation:
    """All sides in turns. `clients` of the first block's users send the whole pool to the dense sides.

    Raises ConfigError when the first block has fewer users.
    """
    if clients > min(users, block):
        raise ConfigError(
            f"clients are users of the first block, which has {min(users, block)}, not {clients}; "
            "lower --clients, or raise --users and --block"
        )
    generator = torch.Generator().manual_seed(SEED)
    blocks = [updates(min(block, users - start), generator) for start in range(0, users, block)]
    pools = dense(blocks[0].take(torch.arange(clients)))
    records = [as_records(pool) for pool in pools]
    buffers = {name: torch.empty_like(section.rows_ukw) for name, section in blocks[0].sections.items()}
    with one_thread():
        seconds = in_turns(
            {
                "sparse": lambda: sparse_mean(blocks),
                "admitted": lambda: sparse_mean(admit(each, SCHEMA, LIMITS)[0] for each in blocks),
                "copy": lambda: copy(blocks, buffers),
                "flower": lambda: flower_mean(records),
                "dense": lambda: dense_mean(pools),
            },
            repetitions,
        )
        step, flower = sparse_mean([blocks[0].take(torch.arange(clients))]), flower_mean(records)
    rows_bytes = sum(section.rows_ukw[0].nbytes for section in blocks[0].sections.values())
    return Aggregation(users, block, clients, rows_bytes, seconds, max_relative_difference(step, flower, clients))


def updates(users: int, generator: torch.Generator) -> UpdateBlock:
    """U users' admissible updates, of k different rows per module in any order."""
    sections = {}
    for name, spec in SCHEMA.sections.items():
        ids_uk = torch.rand(users, spec.rows, generator=generator).argsort(1)[:, : spec.max_rows].int()
        rows_ukw = torch.empty(*ids_uk.shape, spec.width).normal_(std=0.01, generator=generator)
        sections[name] = Section(ids_uk, torch.ones_like(ids_uk, dtype=torch.bool), rows_ukw)
    return UpdateBlock(sections, torch.ones(users), {}, 1, "benchmark")


def sparse_mean(blocks: Iterable[UpdateBlock]) -> Step:
    """The product's mean: each row's over those who trained it."""
    strategy = MaskedMean()
    state = strategy.init(SCHEMA)
    partial = reduce(strategy.merge, (strategy.lift(block, state) for block in blocks))
    return strategy.finish(partial, state)[0]


def copy(blocks: Iterable[UpdateBlock], buffers: Mapping[str, Tensor]) -> None:
    """Every row of the blocks, copied to buffers as large as the first block."""
    for block in blocks:
        for name, section in block.sections.items():
            buffers[name][: len(section.rows_ukw)].copy_(section.rows_ukw)


def dense(block: UpdateBlock) -> list[Arrays]:
    """Each user's update as the whole pool, zero where it trained nothing: (R, d_in + d_out) by section."""
    pools: list[Arrays] = []
    for user in range(len(block.weight_u)):
        pool = SCHEMA.zeros()
        for name, section in block.sections.items():
            pool[name][section.ids_uk[user].long()] = section.rows_ukw[user]
        pools.append({name: rows.numpy() for name, rows in pool.items()})
    return pools


def as_records(pool: Arrays) -> RecordDict:
    """A client's reply as Flower's strategies want it."""
    arrays = ArrayRecord({name: Array(rows) for name, rows in pool.items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({_WEIGHT: 1})})


def flower_mean(records: list[RecordDict]) -> ArrayRecord:
    """What the `aggregate_train` of Flower's strategies does with valid replies."""
    return aggregate_arrayrecords(records, _WEIGHT)


def dense_mean(pools: Sequence[Arrays]) -> Arrays:
    """The mean over all clients of arrays that are ready."""
    sums = {name: np.zeros_like(rows) for name, rows in pools[0].items()}
    for pool in pools:
        for name, rows in pool.items():
            sums[name] += rows
    return {name: rows / np.float32(len(pools)) for name, rows in sums.items()}


def max_relative_difference(step: Step, flower: ArrayRecord, clients: int) -> float:
    """The largest difference of the means over all clients, each section's as a share of its largest entry.

    Ours is a mean over those who trained a row, so it is brought to all clients first.
    """
    differences = []
    for name, section in step.sections.items():
        theirs = torch.from_numpy(flower[name].numpy())
        ours = section.mean * section.contributors[:, None] / clients
        differences.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    return max(differences)
