"""Experiments by name: ours, which come with the code, and anyone's TOML files."""

from __future__ import annotations

from pathlib import Path

from federation.errors import ConfigError
from federation.plugins import suggest

EXPERIMENTS = Path(__file__).parent.parent / "simulations" / "experiments"


def our_experiments() -> dict[str, Path]:
    """The files of ours, by name."""
    return {path.stem: path for path in EXPERIMENTS.glob("*.toml")}


def experiment_path(name: str) -> Path:
    """The file of an experiment: one of ours by name, or a path. Raises ConfigError for neither."""
    ours = our_experiments()
    if name in ours:
        return ours[name]
    if not name.endswith(".toml"):
        raise ConfigError(f"an experiment is a .toml file or one of ours, not {name!r}; {suggest(name, ours)}")
    return Path(name)
