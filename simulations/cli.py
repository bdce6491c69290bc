"""The command line: `fedquilt --help`. Commands parse, call the library and print; they decide nothing else.

Heavy modules are imported inside the commands, so that help and mistyped arguments answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from click import Context
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from federation.errors import ConfigError, FedquiltError, FedquiltWarning
from federation.experiments import experiment_path
from federation.house import check_house
from simulations.agent_commands import agent, ask
from simulations.benchmarks.commands import bench
from simulations.commands import Experiment, Overrides, say_where
from simulations.deployment_commands import PANEL, deployment
from simulations.measure_commands import measure

RUNS = Path("runs")
CONTINUE = {"simulate": "; continue with --resume", "sweep": "; continue with the same command"}
"""What Ctrl-C says of the commands that go on where they were stopped; others begin anew."""


class Commands(TyperGroup):
    """Ends every command with words and an exit code: 2 for what the user can put right, 130 for Ctrl-C."""

    def invoke(self, ctx: Context) -> Any:
        try:
            with saying_warnings():
                return super().invoke(ctx)
        except (FedquiltError, OSError) as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            typer.echo(f"fedquilt: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(f"stopped{CONTINUE.get(ctx.invoked_subcommand or '', '')}", err=True)
            raise typer.Exit(130) from None


@contextmanager
def saying_warnings() -> Iterator[None]:
    """Our own warnings are one line each; all others are shown as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, FedquiltWarning):
                print(f"fedquilt: {message}", file=sys.stderr)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = say
        warnings.simplefilter("always", FedquiltWarning)
        yield


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench, name="bench", help="Measure speed on this machine.")
app.command(rich_help_panel=PANEL)(agent)
app.add_typer(ask, name="ask", help="Ask the agent on a device.", rich_help_panel=PANEL)
app.add_typer(deployment)
app.add_typer(measure)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


@app.callback()
def fedquilt(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")] = False,
) -> None:
    """A personal model for everyone, quilted from shared pieces.

    Each user's data stays where it is; what is personal is a small choice
    from a pool of adapter units that all users sew together.

    Start with "fedquilt simulate", then open the report that it names.
    """
    check_house()


@app.command()
def simulate(
    experiment: Experiment = "code",
    *,
    overrides: Overrides,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/<name> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running Ray cluster to work on; one of our own by default."),
    ] = None,
) -> None:
    """Train a shared pool with simulated users, then serve new users and compare with the alternatives.

    Leaves record.json (all figures, and how they came to be), report.html, TensorBoard logs and checkpoints.
    """
    from federation.config import load_config
    from simulations.progress import Terminal
    from simulations.runs import run

    cluster = [f'compute.ray_address="{ray_address}"'] if ray_address else []
    config = load_config(experiment_path(experiment), [*overrides, *cluster])
    console = Console()
    with Terminal(console) as progress:
        finished = run(config, out or RUNS / config.name, resume, progress)
    _show_run(console, finished.folder, finished.record)


@app.command()
def pretrain(experiment: Experiment = "code", *, overrides: Overrides) -> None:
    """Train the small base model of a text population and keep it, so that later runs begin at once.

    "simulate" does the same by itself when it has to.
    """
    from federation.config import load_config
    from federation.data.registry import make_population
    from simulations.pretrain import pretraining_report
    from simulations.progress import Terminal
    from simulations.runs import prepare_base

    config = load_config(experiment_path(experiment), overrides)
    console = Console()
    with Terminal(console) as progress:
        prepare_base(config, progress)
    base = make_population(config.population).base_model()
    if not Path(base.name).is_dir():
        raise ConfigError(
            f"only populations of text have a base to pre-train, {config.population.name!r} brings its own "
            f"({base.name!r}); simulate with it as it is"
        )
    report = pretraining_report(Path(base.name))
    console.print(
        f"{report['parameters']:,} parameters, {report['bits_per_char']:.3f} bits per character on projects "
        f"it never saw, {report['seconds']:.0f} s of training"
    )
    console.print(base.name, soft_wrap=True, highlight=False)


@app.command()
def evaluate(run_folder: RunFolder, *, overrides: Overrides) -> None:
    """Serve new users again by the pool of a finished run, with other settings. No pool is trained.

    For example --set evaluate.users=200. The run's record and report are replaced.
    """
    from simulations.progress import Terminal
    from simulations.runs import reevaluate

    console = Console()
    with Terminal(console) as progress:
        finished = reevaluate(run_folder, overrides, progress)
    _show_run(console, finished.folder, finished.record)


@app.command()
def report(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN..", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Page that compares several runs.")] = Path("comparison.html"),
) -> None:
    """Draw the report of a run again, or one page that compares several runs."""
    from simulations.record import read_record
    from simulations.report import write_comparison

    console = Console()
    if len(run_folders) == 1:
        _show_run(console, run_folders[0], read_record(run_folders[0]))
    else:
        say_where(console, "comparison", write_comparison(run_folders, out))


@app.command()
def sweep(
    experiments: Annotated[
        str, typer.Argument(metavar="EXPERIMENT|DIR", help="An experiment, or a folder of .toml files.")
    ],
    *,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, with the seeds 0, 1, ..")] = 5,
    overrides: Overrides,
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=V1,V2",
            help="Try several values of a setting; repeated, all combinations.",
            default_factory=list,
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of all runs; runs/sweep-<name> by default.")] = None,
) -> None:
    """Run experiments with several seeds and settings, and compare them.

    Finished runs are left as they are, so the same command continues a sweep that was stopped.
    """
    from simulations.progress import Terminal
    from simulations.sweep import is_finished, plan, run_trial

    trials = plan(_experiment_paths(experiments), seeds, overrides, grid)
    out = out or RUNS / f"sweep-{Path(experiments).stem}"
    console = Console()
    for number, trial in enumerate(trials, 1):
        finished = is_finished(trial, out)
        state = ": finished before" if finished else ""
        console.print(f"[{number}/{len(trials)}] {trial.name}{state}", markup=False, highlight=False)
        if not finished:
            with Terminal(console) as progress:
                run_trial(trial, out, progress)
    _show_sweep(console, trials, out)


@app.command()
def export(
    run_folder: RunFolder,
    *,
    user: Annotated[int, typer.Option(help="The user's id.")],
    layout: Annotated[
        str, typer.Option(help="universal: for any serving engine. pattern: for PEFT alone, smaller.")
    ] = "universal",
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")],
) -> None:
    """Write one user's personal model as a standard PEFT LoRA adapter."""
    from client.export import export_lora
    from simulations.personal import personal_rows

    model, rows = personal_rows(run_folder, user)
    adapter = export_lora(model, rows, out, layout, model.base.name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    console = Console()
    console.print(f"rank {adapter.config.r}, {size:,} bytes, for peft.PeftModel.from_pretrained(base, folder)")
    say_where(console, "adapter", out)


@app.command()
def plugins() -> None:
    """List strategies, optimizers and populations, ours and those of installed packages."""
    from federation.data.registry import POPULATIONS
    from strategies import OPTIMIZERS, STRATEGIES

    table = Table("kind", "name", "comes from", box=None, padding=(0, 2, 0, 0))
    for kind in (STRATEGIES, OPTIMIZERS, POPULATIONS):
        for name, origin in sorted(kind.known().items()):
            table.add_row(kind.kind, name, origin)
    Console().print(table)


@app.command()
def check_strategy(
    name: Annotated[str, typer.Argument(help="As 'fedquilt plugins' lists it.")],
    *,
    options: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="OPTION=VALUE",
            help="An option of the strategy.",
            default_factory=list,
            show_default=False,
        ),
    ],
) -> None:
    """Check an aggregation strategy against the laws that all of them keep. Ends with 1 if it breaks one."""
    from federation.settings import overridden
    from strategies import make_strategy
    from strategies.conformance import LAWS, check

    findings = check(make_strategy(name, **overridden({}, options)))
    for finding in findings:
        typer.echo(f"{name} breaks a law: {finding}")
    if findings:
        raise typer.Exit(1)
    typer.echo(f"{name} keeps all {len(LAWS)} laws: {', '.join(LAWS)}")


def _experiment_paths(name: str) -> list[Path]:
    """The experiments that a sweep runs: all of a folder, by name, or one."""
    if not Path(name).is_dir():
        return [experiment_path(name)]
    found = sorted(Path(name).glob("*.toml"))
    if not found:
        raise ConfigError(f"a sweep runs the .toml files of a folder, {name!r} has none; give another folder")
    return found


def _show_run(console: Console, folder: Path, record: Any) -> None:
    """The result table of a run, and where its files lie."""
    from simulations.record import RECORD_NAME
    from simulations.report import write_report
    from simulations.tables import result_table, terminal

    if "methods" in record:
        console.print(terminal(result_table(record)))
    say_where(console, "record", folder / RECORD_NAME)
    say_where(console, "report", write_report(folder))


def _show_sweep(console: Console, trials: Sequence[Any], out: Path) -> None:
    """A table for each variant over its seeds, a page for each experiment, and where they lie."""
    from simulations.comparison import comparison_table
    from simulations.report import write_comparison
    from simulations.sweep import SWEEP_NAME, by_variant, over_seeds, results, summarise
    from simulations.tables import terminal, unit_of

    summarise(trials, out)
    for variant, members in by_variant(trials).items():
        console.print(variant, style="bold", markup=False, highlight=False)
        unit = unit_of(results(members[:1], out)[0].record)
        console.print(terminal(comparison_table(over_seeds(members, out), unit)))
    say_where(console, "record", out / SWEEP_NAME)
    for experiment in sorted({trial.experiment for trial in trials}):
        folders = [out / trial.name for trial in trials if trial.experiment == experiment]
        say_where(console, experiment, write_comparison(folders, out / f"{experiment}.html"))


def main() -> None:
    """The console script."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would tear ours apart
    app()


if __name__ == "__main__":
    main()
