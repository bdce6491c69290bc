"""The commands under `fedquilt bench`: each prints one JSON line, and leaves a record when asked to.

Heavy modules are imported inside the commands, as in `simulations/cli.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

bench = typer.Typer(no_args_is_help=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the record.")]


@bench.command()
def throughput(
    workload: Annotated[str, typer.Option(help="w1: a small perceptron. w2: a small GPT-2.")],
    only: Annotated[Literal["engine"] | None, typer.Option(help="engine: without Flower and pfl-research.")] = None,
    users: Annotated[int | None, typer.Option(min=2, help="Users per repetition.")] = None,
    block: Annotated[int | None, typer.Option(min=1, help="Users in one stacked computation.")] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 3,
    out: Out = None,
) -> None:
    """Users trained per second: the engine, a plain loop, Flower and pfl-research, two processes each."""
    from simulations.benchmarks.peers.turns import PEERS
    from simulations.benchmarks.throughput import measure, sized
    from simulations.benchmarks.workloads import workload as workload_named

    chosen = sized(workload_named(workload), users, block)
    result = measure(chosen, repetitions, () if only else PEERS)
    conclude(result.line, result.record(), out, f"throughput-{workload}")


@bench.command()
def aggregation(
    users: Annotated[int, typer.Option(min=1, help="Users whose sparse updates are combined.")] = 512,
    block: Annotated[int, typer.Option(min=1, help="Users in one block.")] = 128,
    clients: Annotated[int, typer.Option(min=1, help="Of the first block, whose dense updates are combined.")] = 16,
    repetitions: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 9,
    out: Out = None,
) -> None:
    """Updates combined per second: sparse, against Flower's dense mean and memcpy. Prints one JSON line."""
    from simulations.benchmarks.aggregation import measure

    result = measure(users, block, clients, repetitions)
    conclude(result.line, result.record(), out, "aggregation")


@bench.command()
def population(
    *,
    registered: Annotated[
        list[int],
        typer.Option(
            min=1,
            help="Registered users; repeated, several populations.",
            default_factory=lambda: [10**4, 10**5, 10**6],
        ),
    ],
    cohort: Annotated[int, typer.Option(min=1, help="Users in a round.")] = 1000,
    rounds: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 15,
    memory_rounds: Annotated[int, typer.Option(min=4, help="Rounds over which memory is watched.")] = 200,
    out: Out = None,
) -> None:
    """Rounds over populations of several sizes: seconds and memory. Prints one JSON line."""
    from simulations.benchmarks.population import measure

    result = measure(registered, cohort, rounds, memory_rounds)
    conclude(result.line, result.record(), out, "population")


@bench.command()
def workers(
    registered: Annotated[int, typer.Option(min=1, help="Registered users.")] = 100_000,
    cohort: Annotated[int, typer.Option(min=1, help="Users in a round.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each number of workers.")] = 3,
    out: Out = None,
) -> None:
    """One worker against two: users per second, and equal results. Prints one JSON line."""
    from simulations.benchmarks.workers import measure

    result = measure((1, 2), registered, cohort, rounds, repetitions)
    conclude(result.line, result.record(), out, "workers")


@bench.command()
def pipeline(
    *,
    experiment: Annotated[str, typer.Option(help="A .toml file, or one of ours by name.")] = "million",
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting of it.", default_factory=list, show_default=False
        ),
    ],
    rounds: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 9,
    out: Out = None,
) -> None:
    """The whole of "simulate" against training alone: users per second. Prints one JSON line."""
    from federation.config import load_config
    from simulations.benchmarks.pipeline import measure
    from simulations.cli import experiment_path

    config = load_config(experiment_path(experiment), ["compute.workers=2", *overrides])
    result = measure(config, rounds)
    conclude(result.line, result.record(), out, "pipeline")


def conclude(line: Mapping[str, Any], record: Mapping[str, Any], out: Path | None, name: str) -> None:
    """Prints the line, and writes the record to `<out>/<name>.json` if there is an `out`."""
    from simulations.record import write_json

    typer.echo(json.dumps(line))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", record)
