"""What commands of several files share: arguments, and how they say where something lies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Experiment = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A .toml file, or one of ours by name, such as code.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as federation.rounds=20; may be repeated.",
        default_factory=list,
        show_default=False,
    ),
]


def say_where(console: Console, what: str, path: Path) -> None:
    """One line; paths are never broken."""
    console.print(f"{what + ':':<12}{path}", soft_wrap=True, markup=False, highlight=False)
