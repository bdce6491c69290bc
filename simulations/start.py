"""The console script: says what to install where only the light parts are."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from simulations.cli import main as command_line
    except ModuleNotFoundError as error:
        sys.exit(f"fedquilt: the command line needs {error.name!r}; pip install 'fedquilt[simulation]' brings it")
    command_line()
