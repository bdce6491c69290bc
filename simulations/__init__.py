"""Simulation: workers, the run, evaluation, reports, the command line. For notebooks: `from simulations import run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from federation.config import RunConfig


def run(config: RunConfig, out: Path | None = None, resume: bool = False) -> Mapping[str, Any]:
    """Runs a configuration and returns its record. The run's folder is `out`, by default runs/<name>.

    >>> record = run(load_config(Path("simulations/experiments/synthetic.toml")))
    >>> record["methods"]["dsa_t0"]["mean"]

    Raises FedquiltError: a configuration that cannot be run, or a folder that holds a run when `resume` is off.
    """
    from simulations.runs import run as run_in  # torch and Ray are loaded when something runs, not for --help

    return run_in(config, out or Path("runs") / config.name, resume).record
