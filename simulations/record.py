"""The record of a run: what was run, where, and what came out. Every table and figure is rendered from records."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from federation.config import RunConfig
from federation.errors import ConfigError, RunError
from federation.files import write_file
from federation.settings import parse
from simulations.evaluate import Evaluation, MethodResult
from simulations.statistics import Floats, Groups, bootstrap, clustered_error

RECORD_NAME = "record.json"
USERS_NAME = "evaluation.json"
_PACKAGES = ("fedquilt", "torch", "transformers", "peft", "flwr", "ray", "pfl", "numpy", "lmdb", "safetensors")


def provenance() -> dict[str, Any]:
    """The command, commit, versions and machine of this process."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
    }


def method_table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """One entry per method. All of mean, p10, p90 and se are of the gain over `base`, in bits per character; `loss` is
    the mean loss, `quality` the mean of the run's quality, where that is another, and quality_se its error. Errors are
    clustered by group, se is paired; harmed is the share of users worse off than with `base`."""
    base_u = evaluation.results[0].loss_u
    return {r.method.name: _method_entry(r, base_u, evaluation.groups_u) for r in evaluation.results}


def comparisons(evaluation: Evaluation, left_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every two methods of one run, compared by `paired`; all but those left out, such as the points of curves."""
    losses = {r.method.name: r.loss_u for r in evaluation.results if r.method.name not in left_out}
    return paired(losses, evaluation.groups_u)


def paired(losses: Mapping[str, Floats], groups_u: Groups) -> list[dict[str, Any]]:
    """Paired difference of every two methods: positive where `a` is better; 95% interval over groups drawn anew.

    losses: (U,) by method, of the same users in the same order.
    """
    entries = []
    for a, b in combinations(losses, 2):
        difference_u = losses[b] - losses[a]
        interval = bootstrap(difference_u, groups_u)
        figures = {
            "difference": interval.mean,
            "se": clustered_error(difference_u, groups_u),
            "low": interval.low,
            "high": interval.high,
        }
        entries.append({"a": a, "b": b, **rounded(figures)})
    return entries


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """To 6 digits after the point: records hold thousands."""
    return {name: round(figure, 6) for name, figure in figures.items()}


def users_table(evaluation: Evaluation) -> dict[str, Any]:
    """Each simulated user's losses, for distributions: ids, groups, and bits per character by method; and the run's
    quality, where that is another."""
    return {
        "ids": evaluation.user_ids.tolist(),
        "groups": evaluation.groups_u.tolist(),
        "loss": {r.method.name: np.round(r.loss_u, 6).tolist() for r in evaluation.results},
        "quality": {
            r.method.name: np.round(r.quality_u, 6).tolist() for r in evaluation.results if r.quality_u is not None
        },
        "modules": list(evaluation.modules),
        "units_in_use": evaluation.masks[evaluation.usual].float().mean(0).tolist(),
    }


def write_json(path: Path, value: Any) -> None:
    """Written whole or not at all."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def read_record(run: Path) -> dict[str, Any]:
    """The record in a run's folder. Raises RunError when the folder is not that of a finished run."""
    path = run / RECORD_NAME if run.is_dir() else run
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"a run's folder holds {RECORD_NAME}, {str(run)!r} does not ({error}); give the folder of a finished run, "
            "or finish it with `fedquilt simulate --resume`"
        ) from error
    if not isinstance(record, dict) or "kind" not in record:
        raise RunError(f"{path} is not a record of a run: it has no 'kind'")
    return record


def recorded_config(record: Mapping[str, Any], place: Path | str) -> RunConfig:
    """The configuration in a record. Raises RunError where it is none of this version's."""
    try:
        return parse(RunConfig, record["config"])
    except ConfigError as error:
        raise RunError(
            f"a run is read by the version that wrote it, {place} is of an older version of fedquilt ({error}); "
            "go on with the version that wrote it, or run it again"
        ) from error


def _method_entry(result: MethodResult, base_u: Floats, groups_u: Groups) -> dict[str, float]:
    gain_u = base_u - result.loss_u
    p10, p90 = np.quantile(gain_u, (0.1, 0.9))
    return {
        "mean": float(gain_u.mean()),
        "p10": float(p10),
        "p90": float(p90),
        "harmed": float((gain_u < 0).mean()),
        "se": clustered_error(gain_u, groups_u),
        "loss": float(result.loss_u.mean()),
        "bytes_per_user": float(result.bytes_u.mean()),
        "active_share": result.active_share,
        "seconds_per_user": result.seconds_per_user,
        "learning_rate": result.learning_rate,
        "steps": result.steps,
        **({} if result.quality_u is None else _quality(result.quality_u, groups_u)),
    }


def _quality(quality_u: Floats, groups_u: Groups) -> dict[str, float]:
    return {"quality": float(quality_u.mean()), "quality_se": clustered_error(quality_u, groups_u)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, with "+changes" when it differs from it; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    return f"{commit}+changes" if commit and changes else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
