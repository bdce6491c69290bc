"""Records of made-up runs, with every figure counted from the users' losses by plain numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

GROUPS = [0, 0, 0, 1, 1, 2, 3, 4]
BASE = [2.0, 2.1, 1.9, 2.4, 2.2, 1.8, 2.0, 2.3]
# name: gain of each user over the base, bytes, steps
METHODS: dict[str, tuple[list[float], float, int]] = {
    "base": ([0.0] * 8, 0, 0),
    "shared": ([0.1, 0.0, -0.1, 0.1, 0.1, 0.0, 0.1, 0.1], 0, 0),
    "dense_lora": ([0.3, 0.4, 0.5, 0.3, 0.4, 0.3, 0.4, 0.2], 73_728, 40),
    "dsa_t0": ([0.1, 0.1, 0.0, 0.1, 0.1, -0.1, 0.1, 0.2], 25, 0),
    "dsa_t2": ([0.4, 0.4, 0.5, 0.3, 0.4, 0.4, 0.4, -0.32], 7_064, 40),
    "dsa_t2@ternary:0.2": ([0.2, 0.2, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1], 4_400.5, 40),
    "ngram_cache": ([0.6] * 8, 0, 0),
}


def made_up_record(seed: int = 0) -> dict[str, Any]:
    """A record as `fedquilt simulate` leaves it: three rounds, the methods above."""
    gains = {name: np.array(gain_u) for name, (gain_u, _, _) in METHODS.items()}
    return {
        "kind": "simulation",
        "name": "made up",
        "command": "fedquilt simulate code",
        "commit": "0123abcd",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "flwr": None},
        "machine": {"system": "Linux", "processor": "one", "cores": 2, "memory_gib": 8.0},
        "seed": seed,
        "config": {
            "name": "made up",
            "seed": seed,
            "pool": {"rank": 4},
            "gate": {"policy": "gate", "budget": 2, "warmup": 1},
        },
        "population": {"name": "code", "characters": {"test": 900}},
        "users": 40,
        "splits": {"train": 40, "new": 9, "measured": 8, "groups": 5},
        "rounds": 3,
        "seconds": 12.5,
        "users_per_second": 31.0,
        "rejected": 0,
        "checksum": "feed",
        "history": [
            {"round": 1, "support_loss": 3.0, "active_share": 0.5},
            {"round": 2, "support_loss": 2.5, "active_share": 0.5, "reward": -2.9},
            {"round": 3, "support_loss": 2.2, "active_share": 0.5, "reward": -2.7},
        ],
        "base_bits_per_char": float(np.mean(BASE)),
        "methods": {name: _entry(name, gain_u) for name, gain_u in gains.items()},
        "comparisons": [_pair(a, b, gains[a] - gains[b]) for a, b in combinations(gains, 2)],
    }


def made_up_users(gains: Mapping[str, Sequence[float]] | None = None) -> dict[str, Any]:
    """Their evaluation.json. gains: of each user over the base, by method; those above when left out."""
    given = gains or {name: gain_u for name, (gain_u, _, _) in METHODS.items()}
    return {
        "ids": list(range(100, 108)),
        "groups": list(GROUPS),
        "loss": {name: (np.array(BASE) - np.array(gain_u)).tolist() for name, gain_u in given.items()},
        "modules": ["h.0", "h.1"],
        "units_in_use": [0.0, 0.25, 0.75, 1.0, 0.5, 0.5, 1.0, 0.0],
    }


def _entry(name: str, gain_u: np.ndarray[Any, Any]) -> dict[str, float]:
    _, kept, steps = METHODS[name]
    return {
        "mean": float(gain_u.mean()),
        "p10": float(np.quantile(gain_u, 0.1)),
        "p90": float(np.quantile(gain_u, 0.9)),
        "harmed": float((gain_u < 0).mean()),
        "se": 0.012,
        "loss": float((np.array(BASE) - gain_u).mean()),
        "bytes_per_user": float(kept),
        "active_share": 0.5 if kept else 1.0,
        "seconds_per_user": 0.0123,
        "steps": steps,
    }


def _pair(a: str, b: str, difference_u: np.ndarray[Any, Any]) -> dict[str, Any]:
    mean = float(difference_u.mean())
    return {"a": a, "b": b, "difference": mean, "se": 0.05, "low": mean - 0.1, "high": mean + 0.1}
