"""Federations by several numbers of workers: users per second, and whether the results are the same to the last bit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from federation.config import RunConfig
from simulations.benchmarks.federations import Laps, settings, started, synthetic

WARMUP = 1
"""Rounds that are not counted: in the first, workers make the parts of the federation."""


@dataclass(frozen=True)
class Scaling:
    """The same federation by each number of workers, several times in turns.

    round_seconds: of all counted rounds of all repetitions, by number of workers. checksums: of what every run ended
    with, by number of workers.
    """

    config: RunConfig
    round_seconds: Mapping[int, tuple[float, ...]]
    checksums: Mapping[int, tuple[str, ...]]

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints. speed_up: of the last number of workers over the first."""
        rates = [self.config.federation.cohort / median(seconds) for seconds in self.round_seconds.values()]
        return {
            "workers": list(self.round_seconds),
            "users_per_second": [round(rate, 1) for rate in rates],
            "speed_up": round(rates[-1] / rates[0], 2),
            "equal": len({checksum for found in self.checksums.values() for checksum in found}) == 1,
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            **settings(self.config),
            "round_seconds": list(map(list, self.round_seconds.values())),
            "checksums": list(map(list, self.checksums.values())),
        }


def measure(counts: Sequence[int], registered: int, cohort: int, rounds: int, repetitions: int) -> Scaling:
    """Runs of `rounds` counted rounds, each with a Ray cluster of its own, by these numbers of workers in turns."""
    configs = {count: synthetic(registered, cohort, WARMUP + rounds, count) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    checksums: dict[int, list[str]] = {count: [] for count in counts}
    for _ in range(repetitions):
        for count, config in configs.items():
            laps = Laps()
            with tempfile.TemporaryDirectory() as folder, started(config) as federation:
                checksums[count].append(federation.run(Path(folder), laps))
            seconds[count] += laps.seconds[WARMUP:]
    return Scaling(
        configs[counts[0]],
        {count: tuple(taken) for count, taken in seconds.items()},
        {count: tuple(found) for count, found in checksums.items()},
    )
