"""The commands of who runs a federation on real devices: releases, and keys for trials.

Heavy modules are imported inside the commands, as in `simulations/cli.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from server.promotion import Evaluation
    from server.releases import Releases

deployment = typer.Typer()
PANEL = "On real devices"

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, deployed or simulated.")]
ReleaseName = Annotated[str, typer.Argument(metavar="NAME", help="As 'fedquilt releases' lists it.")]


@deployment.command(rich_help_panel=PANEL)
def release(
    run_folder: RunFolder,
    *,
    name: Annotated[str | None, typer.Option(help="Lower-case letters, digits and '-'; r<round> by default.")] = None,
    metric: Annotated[
        str, typer.Option(help="Loss that decides: tuned_loss, mask_loss, or another of the evaluation's.")
    ] = "tuned_loss",
    margin: Annotated[float, typer.Option(help="How much worse than the current release's it may be.")] = 0.0,
    users: Annotated[int, typer.Option(min=1, help="Least number of users that both are measured on.")] = 8,
) -> None:
    """Keep the newest evaluated pool of a run as a release, and promote it unless it is worse than the current one.

    A release never changes. One that is not promoted is kept; the command says why, and ends with 1.
    """
    from server.promotion import PromotionRule
    from server.releases import Releases
    from simulations.candidates import candidate_of

    releases, candidate = Releases(run_folder), candidate_of(run_folder)
    current = releases.current()
    verdict = PromotionRule(metric, margin, users).judge(candidate.evaluation, current.evaluation if current else None)
    made = releases.add(candidate, name or f"r{candidate.pool.round_index}")
    _say(f"release {made.name}: {made.version}, {_measured(made.evaluation)}")
    if not verdict.promoted:
        _say(f"not promoted: {verdict.why}; promote it all the same with `fedquilt promote {run_folder} {made.name}`")
        raise typer.Exit(1)
    releases.promote(made.name, "rule", verdict.why)
    _say(f"promoted: {verdict.why}")


@deployment.command(name="releases", rich_help_panel=PANEL)
def list_releases(run_folder: RunFolder) -> None:
    """List the releases of a run, the current one marked with *."""
    from server.releases import Releases

    releases = Releases(run_folder)
    if releases.names():
        Console().print(_table(releases))
    else:
        _say(f"{run_folder} has no releases yet; make one with `fedquilt release {run_folder}`")


@deployment.command(rich_help_panel=PANEL)
def promote(run_folder: RunFolder, name: ReleaseName) -> None:
    """Make a release current, whatever its evaluation. The history says that it was by hand."""
    from server.releases import Releases

    Releases(run_folder).promote(name, "hand")
    _say(f"current: {name}")


@deployment.command(rich_help_panel=PANEL)
def rollback(
    run_folder: RunFolder,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One that was current before; the last such by default.")
    ] = None,
) -> None:
    """Make current again what was before."""
    from server.releases import Releases

    _say(f"current: {Releases(run_folder).roll_back(name)}")


def _trial_days() -> int:
    from federation.keys import TRIAL_DAYS

    return TRIAL_DAYS


@deployment.command(rich_help_panel=PANEL)
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.")],
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that get a key.")],
    hosts: Annotated[
        list[str],
        typer.Option(
            "--host",
            metavar="NAME",
            help="DNS name or address that nodes reach the server by; may be repeated. Without, this machine alone.",
            default_factory=list,
            show_default=False,
        ),
    ],
    agents: Annotated[
        list[str],
        typer.Option(
            "--agent",
            metavar="NAME",
            help="DNS name or address of an agent on another machine than its node; may be repeated.",
            default_factory=list,
            show_default=False,
        ),
    ],
    days: Annotated[
        int,
        typer.Option(
            help="Days that the certificates last; three months by default.",
            default_factory=_trial_days,
            show_default=False,
        ),
    ],
) -> None:
    """Make certificates and node keys for a trial with TLS, and print the commands that use them.

    They are for trials: nothing can be revoked. In production, use an authority of your own.
    """
    from federation.keys import make_keys
    from simulations.trial_commands import trial_commands

    make_keys(folder, nodes, hosts, agents, days)
    typer.echo(f"# Keys for a trial of {nodes} nodes, {days} days. Do not use them in production.\n")
    typer.echo(trial_commands(folder, nodes, hosts, bool(agents)))


def _table(releases: Releases) -> Table:
    history = releases.history()
    when = {promotion.name: f"{promotion.when:%Y-%m-%d %H:%M} ({promotion.how})" for promotion in history}
    current = history[-1].name if history else None
    table = Table("", "name", "round", "version", "evaluation", "promoted", box=None, padding=(0, 2, 0, 0))
    for found in sorted(map(releases.read, releases.names()), key=lambda release: (release.created, release.name)):
        mark = "*" if found.name == current else ""
        measured = _measured(found.evaluation)
        table.add_row(mark, found.name, str(found.round), found.version, measured, when.get(found.name, ""))
    return table


def _measured(evaluation: Evaluation) -> str:
    losses = ", ".join(f"{metric} {loss:.4f}" for metric, loss in sorted(evaluation.metrics.items()))
    return f"{losses} ({evaluation.users} {evaluation.split} users)"


def _say(words: str) -> None:
    Console().print(words, soft_wrap=True, markup=False, highlight=False)
