"""Experiments over seeds and a grid of settings: one run per trial, and one record that summarises them.

Every trial has a folder of its own, so a sweep that was stopped goes on where it was, trial by trial.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from federation.config import FREE_SETTINGS, RunConfig, load_config
from federation.errors import ConfigError, RunError
from federation.plugins import suggest
from simulations.comparison import (
    MeasuredRun,
    Setting,
    claims_over_seeds,
    compare,
    gates_over_seeds,
    masks_over_seeds,
)
from simulations.compute.workers import on_device
from simulations.methods import methods_of, parsed_name, points_alone
from simulations.progress import Progress
from simulations.record import RECORD_NAME, USERS_NAME, paired, provenance, read_record, recorded_config, write_json
from simulations.runs import CONFIG_NAME, run
from simulations.sequence_comparison import PREFIX, continual_claims_of, continual_over_seeds

SWEEP_NAME = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    variant: the experiment and its place in the grid, as in `code-gate.budget=4`. Both are fit for file names.
    """

    experiment: str
    variant: str
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.variant}-seed{self.config.seed}"


def plan(experiments: Sequence[Path], seeds: int, overrides: Sequence[str], grid: Sequence[str]) -> list[Trial]:
    """Every experiment at every point of the grid with the seeds 0..seeds - 1, in this order.

    overrides: `key=value`, for all trials. grid: `key=v1,v2`; several such axes make every combination.
    Raises ConfigError for an override of the seed, a trial that cannot be run or measures nothing, and two
    trials of one name.
    """
    axes = [_axis(text) for text in grid]
    for key in (override.partition("=")[0].strip() for override in [*overrides, *[axis[0] for axis in axes]]):
        if key == "seed":
            raise ConfigError("a sweep sets the seed of each run itself; say how many with --seeds")
    trials = []
    for path, point in product(experiments, product(*axes)):
        for seed in range(seeds):
            config = load_config(path, [*overrides, *point, f"seed={seed}"])
            variant = _file_name("-".join((config.name, *point)))
            if not config.evaluate.methods:
                raise ConfigError(f"a sweep compares methods, {variant!r} has none; set evaluate.methods")
            claims_of(config)  # refuses what cannot be run, or compared
            trials.append(Trial(_file_name(config.name), variant, config))
    names = [trial.name for trial in trials]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"each run of a sweep has its own name, {twice} come twice; rename experiments")
    return trials


def claims_of(config: RunConfig) -> list[tuple[str, str]]:
    """The pairs of methods that documents compare, (better, worse), by the names that tables have.

    Raises ConfigError for a method that is not among the run's, for a method and itself, and as `methods_of` and
    `continual_claims_of` do.
    """
    continual_claims_of(config)
    measured = [method.name for method in methods_of(config)]
    written = [pair for pair in config.evaluate.claims if not any(name.startswith(PREFIX) for name in pair)]
    claims = [(str(parsed_name(better)), str(parsed_name(worse))) for better, worse in written]
    for claim in claims:
        for name in claim:
            if name not in measured:
                raise ConfigError(
                    f"a claim compares two methods of the run, {name!r} in evaluate.claims is not in "
                    f"evaluate.methods; {suggest(name, measured)}"
                )
        if claim[0] == claim[1]:
            raise ConfigError(f"a claim compares two methods, {claim[0]!r} in evaluate.claims with itself; drop it")
    return claims


def run_trial(trial: Trial, out: Path, progress: Progress) -> None:
    """Runs a trial in its folder below `out`, or what is left of it."""
    folder = out / trial.name
    run(trial.config, folder, resume=(folder / CONFIG_NAME).exists(), progress=progress)


def is_finished(trial: Trial, out: Path) -> bool:
    """Whether a trial's folder holds its results. Raises RunError when they are another configuration's."""
    folder = out / trial.name
    if not ((folder / RECORD_NAME).exists() and (folder / USERS_NAME).exists()):
        return False
    if _deciding(recorded_config(read_record(folder), folder)) != _deciding(on_device(trial.config)):
        raise RunError(f"{folder} holds a run of another configuration; give another --out, or remove it")
    return True


def by_variant(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials that differ in their seed alone, in the order given."""
    variants: dict[str, list[Trial]] = {}
    for trial in trials:
        variants.setdefault(trial.variant, []).append(trial)
    return variants


def results(trials: Sequence[Trial], out: Path) -> list[MeasuredRun]:
    """What finished trials measured."""
    folders = [out / trial.name for trial in trials]
    return [MeasuredRun(read_record(folder), json.loads((folder / USERS_NAME).read_text())) for folder in folders]


def over_seeds(trials: Sequence[Trial], out: Path) -> Setting:
    """The methods of one variant's finished trials: means over seeds, intervals over users."""
    (setting,) = compare(results(trials, out))
    return setting


def summarise(trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    """Writes and returns `sweep.json`: each variant's runs, its methods over seeds, all pairs of methods, the pairs
    that are claims, the quality of masks and the health of gates.

    A user's loss is averaged over seeds before users are compared, and groups of users are drawn for the
    intervals; what every seed gave is beside it (`seed_gains`).
    """
    record = {
        "kind": "sweep",
        **provenance(),
        "experiments": sorted({trial.experiment for trial in trials}),
        "variants": {name: _summary(members, out) for name, members in by_variant(trials).items()},
    }
    write_json(out / SWEEP_NAME, record)
    return record


def _summary(trials: Sequence[Trial], out: Path) -> dict[str, Any]:
    runs, setting = results(trials, out), over_seeds(trials, out)
    groups_u = np.asarray(runs[0].users["groups"], dtype=np.int64)
    evaluated = trials[0].config.evaluate
    curves = points_alone(evaluated)
    compared = [name for name in runs[0].users["loss"] if name not in curves]
    losses = {name: np.mean([run.users["loss"][name] for run in runs], axis=0) for name in compared}
    return {
        "runs": [trial.name for trial in trials],
        "seeds": list(setting.seeds),
        "users": setting.users,
        "groups": len(np.unique(groups_u)),
        "quality": trials[0].config.gate.reward.quality.name,
        "methods": {method.name: _rounded(asdict(method)) for method in setting.methods},
        "curves": curves,
        "comparisons": paired(losses, groups_u),
        "claims": claims_over_seeds(runs, claims_of(trials[0].config)),
        **continual_over_seeds(runs, continual_claims_of(trials[0].config)),
        "masks": masks_over_seeds(runs),
        "gate": gates_over_seeds(runs),
    }


def _rounded(value: Any) -> Any:
    """Every number with a fraction to 6 digits after the point."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value


def _axis(text: str) -> list[str]:
    """`key=v1,v2` as its overrides; a comma inside brackets or quotes is part of a value."""
    key, equals, values = text.partition("=")
    if not equals:
        raise ConfigError(f"an axis of the grid is key=v1,v2, got {text!r}; for example gate.budget=4,8")
    return [f"{key.strip()}={value.strip()}" for value in _split(values)]


def _split(text: str) -> list[str]:
    """The parts between commas that are within no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return parts


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)


def _deciding(config: RunConfig) -> dict[str, Any]:
    """What decides a record. Claims are made of it afterwards."""
    return config.model_dump(mode="json", exclude={**FREE_SETTINGS, "evaluate": {"claims"}})
