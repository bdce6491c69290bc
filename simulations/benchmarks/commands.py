"""The commands under `fedquilt bench`: each prints one JSON line, and leaves a record when asked to.

Heavy modules are imported inside the commands, as in `simulations/cli.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

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
    conclude(result, out, "throughput", workload)


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
    conclude(result, out, "aggregation")


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
    cohort: Annotated[int, typer.Option(min=1, help="Users in a round, none of them twice.")] = 500,
    rounds: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 15,
    memory_rounds: Annotated[int, typer.Option(min=4, help="Rounds over which memory is watched.")] = 200,
    out: Out = None,
) -> None:
    """Rounds over populations of several sizes: seconds and memory. Prints one JSON line."""
    from simulations.benchmarks.population import measure

    result = measure(registered, cohort, rounds, memory_rounds)
    conclude(result, out, "population")


@bench.command()
def workers(
    registered: Annotated[int, typer.Option(min=1, help="Registered users.")] = 100_000,
    cohort: Annotated[int, typer.Option(min=1, help="Users in a round.")] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each number of workers.")] = 3,
    out: Out = None,
) -> None:
    """One worker against two: users per second, and equal results. Prints one JSON line."""
    from simulations.benchmarks.scaling import measure

    result = measure((1, 2), registered, cohort, rounds, repetitions)
    conclude(result, out, "workers")


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
    from federation.experiments import experiment_path
    from simulations.benchmarks.pipeline import measure

    config = load_config(experiment_path(experiment), ["compute.workers=2", *overrides])
    result = measure(config, rounds)
    conclude(result, out, "pipeline")


@bench.command()
def deployment(
    *,
    nodes: Annotated[
        list[int],
        typer.Option(min=2, help="SuperNodes; repeated, several federations.", default_factory=lambda: [2, 8]),
    ],
    rounds: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 5,
    repetitions: Annotated[int, typer.Option(min=3, help="Of the intake, of which the median counts.")] = 5,
    out: Out = None,
) -> None:
    """Rounds over real SuperNodes, with agents and without; bytes, memory, admission. Prints one JSON line."""
    from simulations.benchmarks.deployment import measure

    conclude(measure(nodes, rounds, repetitions), out, "deployment")


@bench.command()
def endurance(
    rounds: Annotated[int, typer.Option(min=15, help="Rounds of each of both runs.")] = 20, out: Out = None
) -> None:
    """A federation over TLS while a node and the server are killed, beside one undisturbed. Prints one JSON line."""
    from simulations.benchmarks.endurance import measure

    conclude(measure(rounds), out, "endurance")


@bench.command()
def gate(
    run: Annotated[
        Path | None, typer.Option(help="A finished run: estimators are compared on its pool and gate too.")
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="In the block that is timed, and in each situation.")] = 32,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed rounds, of which the median counts.")] = 5,
    draws: Annotated[int, typer.Option(min=2, help="Estimates of the same gradient.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Synthetic teachers of each kind.")] = 3,
    out: Out = None,
) -> None:
    """The gate's share of a round, and the variance of its estimators. Prints one JSON line."""
    from simulations.benchmarks.gate import measure
    from simulations.benchmarks.situations import finished, synthetic_ones

    situations = [*synthetic_ones(users, seeds), *([finished(run, users)] if run else [])]
    conclude(measure(users, repetitions, situations, draws), out, "gate")


@bench.command()
def meta(
    users: Annotated[int, typer.Option(min=1, help="In the block that is timed.")] = 256,
    repetitions: Annotated[int, typer.Option(min=3, help="Of which the median counts.")] = 5,
    out: Out = None,
) -> None:
    """Exact MAML against a plain loop, and what outer signals cost in time and memory. Prints one JSON line."""
    from simulations.benchmarks.meta import measure

    conclude(measure(users, repetitions), out, "meta")


class Result(Protocol):
    """What was measured. line: what the command prints. details: what else its record holds."""

    @property
    def line(self) -> dict[str, Any]: ...

    @property
    def details(self) -> dict[str, Any]: ...


def conclude(result: Result, out: Path | None, kind: str, variant: str = "") -> None:
    """Prints the line, and writes the record to `out`, if there is one, as `<kind>.json` or `<kind>-<variant>.json`."""
    from simulations.record import write_json

    typer.echo(json.dumps(result.line))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"{kind}-{variant}" if variant else kind
        write_json(out / f"{name}.json", record_of(result, kind, variant or kind))


def record_of(result: Result, kind: str, name: str) -> dict[str, Any]:
    """The record of a measurement."""
    from simulations.record import provenance

    return {"kind": kind, "name": name, **provenance(), **result.line, **result.details}
