"""The commands that measure this machine for an experiment's settings: the size of blocks, and what units cost.

Heavy modules are imported inside the commands, as in `simulations/cli.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from federation.errors import ConfigError
from federation.experiments import experiment_path
from simulations.commands import Experiment, Overrides, say_where

measure = typer.Typer()


@measure.command()
def calibrate(
    experiment: Experiment = "code",
    *,
    overrides: Overrides,
    out: Annotated[Path | None, typer.Option(help="New file: the experiment with this block size.")] = None,
) -> None:
    """Find how many users this machine trains fastest in one stacked computation, and write it.

    Runs on one core; let nothing else run meanwhile. Overrides are used for the measurement, not written.
    """
    from federation.config import load_config
    from federation.files import write_file
    from simulations.calibrate import calibrate, with_block
    from simulations.progress import Terminal
    from simulations.runs import prepare_base

    path = experiment_path(experiment)
    config = load_config(path, overrides)
    if out is not None and out.exists():
        raise ConfigError(f"--out names a new file, {out} exists; give another")
    console = Console()
    with Terminal(console) as progress:
        prepare_base(config, progress)
    best = calibrate(config, lambda r: console.print(f"{r.block:>6} users a block: {r.users_per_second:,.0f} users/s"))
    console.print(f"compute.block = {best.block}")
    if out is not None:
        write_file(out, with_block(path.read_text(), best.block).encode())
        say_where(console, "experiment", out)


@measure.command()
def unit_costs(experiment: Experiment = "code", *, overrides: Overrides) -> None:
    """Measure what an active unit of each module costs in time, as a setting that prices units by it.

    Runs on one core; let nothing else run meanwhile. The line is for the [gate] section of an experiment.
    """
    from federation.config import load_config
    from simulations.latency import cost_setting, unit_seconds
    from simulations.progress import Terminal
    from simulations.runs import prepare_base

    config = load_config(experiment_path(experiment), overrides)
    with Terminal(Console()) as progress:
        prepare_base(config, progress)
    typer.echo(f"# for the [gate] section, with a price\n{cost_setting(unit_seconds(config))}")
