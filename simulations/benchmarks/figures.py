"""The figures of a benchmark's record in words, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

Record = Mapping[str, Any]

FIGURES: Mapping[str, Mapping[str, str]] = {
    "meta": {
        "users": "users in the block",
        "steps": "inner steps, K",
        "maml_users_per_second": "exact MAML, users per second",
        "loop_users_per_second": "a plain loop over users",
        "vmap_users_per_second": "stacked by `torch.func.vmap`",
        "speedup": "over the loop",
        "over_vmap": "over vmap",
        "peak_mib": "MiB held at most for the block",
        "recomputed_users_per_second": "with recomputation, users per second",
        "recomputed_peak_mib": "MiB held at most for the block, with recomputation",
        "max_relative_difference": "largest relative difference to the loop",
        "by_steps.steps": "by inner steps, K",
        "by_steps.users_per_second": "users per second",
        "by_steps.peak_mib": "MiB held at most for the block",
        "by_steps.delta_rounds": "time of a round of plain delta, times",
        "by_steps.gradients": "the same counted in gradients",
    },
    "throughput": {
        "workload": "workload",
        "engine_fp32": "this engine in fp32, users per second",
        "engine_bf16": "this engine in bf16",
        "naive": "a plain loop over users",
        "flower": "Flower's simulation",
        "pfl": "pfl-research",
        "engine_fp32_over_pfl": "fp32 over pfl-research",
        "engine_fp32_over_flower": "fp32 over Flower",
        "engine_bf16_over_pfl": "bf16 over pfl-research",
        "engine_bf16_over_flower": "bf16 over Flower",
        "gemm_share": "share of the machine's fp32 GEMM peak",
        "max_relative_difference": "relative difference of fp32 to the loop",
        "differences.engine_bf16": "relative difference of bf16 to fp32",
    },
    "aggregation": {
        "sparse_updates_per_second": "sparse masked mean, updates per second",
        "admitted_updates_per_second": "the same, each update admitted first",
        "flower_dense_updates_per_second": "Flower's dense mean",
        "numpy_dense_updates_per_second": "the same sums by numpy, arrays ready",
        "ratio": "sparse over Flower's",
        "share_of_memcpy": "bytes combined over bytes copied, per second",
        "max_relative_difference": "largest relative difference to Flower's mean",
    },
    "population": {
        "registered": "registered users",
        "round_seconds": "seconds per round",
        "driver_mib": "private memory, MiB",
        "mib_per_100_rounds": "MiB more per 100 rounds",
    },
    "workers": {
        "workers": "workers",
        "users_per_second": "users per second",
        "speed_up": "speed-up",
        "equal": "results equal to the last bit",
    },
    "pipeline": {
        "engine": "the bare engine, users per second",
        "simulate": "the whole of `simulate`",
        "share_of_engine": "share of the bare engine",
        "microseconds_per_user": "µs per user and process",
    },
    "deployment": {
        "nodes": "SuperNodes",
        "round_seconds_agent": "seconds per round, an agent on each node",
        "round_seconds_embedded": "without agents",
        "round_seconds_empty_app": "an app that does nothing",
        "our_share_seconds": "our share, with agents",
        "update_bytes": "bytes up per user and round",
        "dense_lora_bytes": "the same for a dense LoRA of rank k in fp32",
        "download_bytes": "bytes down per node and version of the pool",
        "server_mib_0": "server's private memory without replies, MiB at most",
        "server_mib_10": "for 10 replies of 0.9 MB",
        "server_mib_500": "for 500 replies",
        "admitted_per_second.fp32": "updates of 128 KiB admitted per second",
        "admitted_per_second.int8": "the same rows as int8",
        "taken_in_per_second.fp32": "lifted and merged too, as fp32",
        "taken_in_per_second.int8": "as int8",
    },
    "endurance": {
        "rounds": "rounds",
        "users_admitted": "users admitted",
        "gain": "gain over the frozen model, nats per token",
        "difference": "loss beyond the undisturbed run's: mean, standard error",
    },
    "gate": {
        "estimator": "default estimator",
        "samples": "masks per user",
        "every": "the gate learns in each n-th round, n",
        "gain_examples": "windows of 64 tokens that gains and context are taken from",
        "query_examples": "windows that rewards are taken from",
        "gate_share": "the gate's share of a round, mean over n rounds",
        "choice_share": "of it: to choose masks",
        "estimate_share": "of it: to learn",
        "gate_share_by_estimator": "the gate's share in a round in which it learns, with",
        "variance_ratio": "variance over that of two-sample leave-one-out, at equal evaluations, worst situation",
        "variance_ratio_by_situation": "in the situation",
    },
    "run": {
        "users": "users with a stored state",
        "seconds": "seconds",
        "peak_mib": "private memory of driver and workers, MiB at most",
        "object_store_mib": "Ray's object store beside it, MiB",
        "bytes_per_user": "bytes on disk per user",
    },
}
"""What is shown of each kind of record, by key; a dot leads into an object."""


def figures(record: Record, kind: str) -> list[tuple[str, ...]]:
    """Rows of one table: what it is, then its value, or its values side by side. All rows are as long as the longest.

    What this run did not measure (None) has no row. Raises KeyError when the record is of another kind.
    """
    rows = [row for key, words in FIGURES[kind].items() for row in _rows(words, _at(record, key))]
    width = max(map(len, rows))
    return [row + ("",) * (width - len(row)) for row in rows]


def _rows(words: str, value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _rows(f"{words}: {name}", part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield words, *map(_text, value)
    elif value is not None:
        yield words, _text(value)


def _at(record: Record, key: str) -> Any:
    return reduce(lambda inner, name: inner[name], key.split("."), record)


def _text(value: Any) -> str:
    """A number to four digits, whole ones in full.

    >>> [_text(value) for value in (1_000_000, 8921.43, 0.0031, True, "w1")]
    ['1,000,000', '8,921', '0.0031', 'yes', 'w1']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
