"""What several runs say together: per setting, every method's mean over seeds, with intervals over users.

A setting is a configuration without its seed. Its runs measure the same users, so a user's gain is averaged
over seeds first, and the paired bootstrap then draws groups of users. The interval therefore covers other
users; how much seeds differ is shown beside it (`seed_gains`), never mixed into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from federation.config import FREE_SETTINGS
from federation.errors import RunError
from simulations.statistics import Floats, Groups, Interval, bootstrap, clustered_error
from simulations.tables import (
    DENSE,
    NOTHING,
    REFERENCE,
    SHARED,
    Headroom,
    Record,
    Row,
    Table,
    best_of,
    explain,
    kept_bytes,
    percent,
    unit_of,
)

_NOT_A_SETTING = (
    "seed",
    "name",
    "kind",
    "evaluate.methods",
    *(f"{section}.{key}" for section, keys in FREE_SETTINGS.items() for key in keys),
)


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run with its evaluation: the record, and each measured user's losses (`users_table`)."""

    record: Record
    users: Mapping[str, Any]


@dataclass(frozen=True)
class MethodSummary:
    """A method over the S seeds of one setting.

    gain: over the base. over_dense: over `dense_lora`; None for itself, and where it was not measured.
    seed_gains: (S,) mean gain of each run. harmed: share of users and seeds with a negative gain.
    """

    name: str
    gain: Interval
    over_dense: Interval | None
    seed_gains: tuple[float, ...]
    harmed: float
    bytes_per_user: float


@dataclass(frozen=True)
class Setting:
    """One configuration, run with several seeds. label: what tells it from others, "" for the only one."""

    label: str
    seeds: tuple[int, ...]
    users: int
    methods: tuple[MethodSummary, ...]
    headroom: Headroom | None


def compare(runs: Sequence[MeasuredRun]) -> list[Setting]:
    """Groups runs by setting, in the order given, and summarises the methods that a setting's runs share.

    Raises RunError when runs count in different units, repeat a setting's seed, or measured other users.
    """
    if len({unit_of(run.record) for run in runs}) > 1:
        raise RunError("runs are compared in one unit, these mix populations with and without text; give one kind")
    flat = [dict(_flatten(run.record["config"])) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config if key not in _NOT_A_SETTING))
    varied = [key for key in keys if len({repr(config.get(key)) for config in flat}) > 1]
    settings: dict[str, list[MeasuredRun]] = {}
    for run, config in zip(runs, flat, strict=True):
        label = ", ".join(f"{key} = {config.get(key)}" for key in varied)
        settings.setdefault(label, []).append(run)
    return [_summarise(label, members) for label, members in settings.items()]


def differences_of(record: Record, name: str) -> dict[str, Interval]:
    """By how much one method of one run is better than each other one, paired, with 95% intervals."""
    found = {}
    for entry in record.get("comparisons", ()):
        mean, low, high = entry["difference"], entry["low"], entry["high"]
        if entry["a"] == name:
            found[entry["b"]] = Interval(mean, low, high)
        elif entry["b"] == name:
            found[entry["a"]] = Interval(-mean, -high, -low)
    return found


def comparison_table(setting: Setting, unit: str) -> Table:
    """The table of one setting: mean over seeds, 95% interval over users, and range of the seeds' means."""
    columns = ("gain over base", "single seeds", f"over {DENSE}", "users harmed", "bytes per user")
    best = best_of({method.name: method.gain.mean for method in setting.methods})
    rows = (Row(m.name, explain(m.name), _cells(m), m.name == best) for m in setting.methods)
    seeds = ", ".join(map(str, setting.seeds))
    caption = (
        f"Gain: {unit} saved against the frozen model, higher is better; mean over {setting.users} new users "
        f"and seeds {seeds}, with a 95% interval from a paired bootstrap over groups of users. Single seeds: "
        "smallest and largest mean of one run."
    )
    return Table(columns, tuple(rows), caption)


def _summarise(label: str, runs: Sequence[MeasuredRun]) -> Setting:
    seeds = tuple(run.record["seed"] for run in runs)
    place = f"setting {label!r}" if label else "these runs"
    if len(set(seeds)) < len(seeds):
        raise RunError(f"a seed counts once per setting, {place} have the seeds {list(seeds)}; leave repeated runs out")
    first = runs[0].users
    if any(run.users[key] != first[key] for run in runs for key in ("ids", "groups")):
        raise RunError(
            f"runs of one setting measure the same users, {place} (seeds {list(seeds)}) do not: their data "
            "differ; run them again on one machine"
        )
    groups_u = np.asarray(first["groups"], dtype=np.int64)
    shared = [name for name in first["loss"] if name != REFERENCE and all(name in run.users["loss"] for run in runs)]
    gain_su = {name: np.stack([_gain(run, name) for run in runs]) for name in shared}
    methods = tuple(_method(name, gain_su, groups_u, runs) for name in shared)
    return Setting(label, seeds, len(groups_u), methods, _headroom(gain_su, groups_u))


def _method(name: str, gain_su: Mapping[str, Floats], groups_u: Groups, runs: Sequence[MeasuredRun]) -> MethodSummary:
    gain_u = gain_su[name].mean(0)
    over_dense = None
    if DENSE in gain_su and name != DENSE:
        over_dense = bootstrap(gain_u - gain_su[DENSE].mean(0), groups_u)
    return MethodSummary(
        name=name,
        gain=bootstrap(gain_u, groups_u),
        over_dense=over_dense,
        seed_gains=tuple(gain_su[name].mean(1).tolist()),
        harmed=float((gain_su[name] < 0).mean()),
        bytes_per_user=float(np.mean([run.record["methods"][name]["bytes_per_user"] for run in runs])),
    )


def _headroom(gain_su: Mapping[str, Floats], groups_u: Groups) -> Headroom | None:
    if not {DENSE, SHARED} <= gain_su.keys():
        return None
    difference_u = (gain_su[DENSE] - gain_su[SHARED]).mean(0)
    return Headroom(float(difference_u.mean()), clustered_error(difference_u, groups_u))


def _gain(run: MeasuredRun, name: str) -> Floats:
    loss = run.users["loss"]
    return np.asarray(loss[REFERENCE], dtype=np.float64) - np.asarray(loss[name], dtype=np.float64)


def _cells(method: MethodSummary) -> tuple[str, ...]:
    """In the order of `comparison_table`'s columns."""
    gain, over_dense = method.gain, method.over_dense
    return (
        f"{gain.mean:.3f} {_range(gain.low, gain.high)}",
        f"{min(method.seed_gains):.3f} to {max(method.seed_gains):.3f}",
        f"{over_dense.mean:+.3f} {_range(over_dense.low, over_dense.high)}" if over_dense else NOTHING,
        percent(method.harmed),
        kept_bytes(method.bytes_per_user),
    )


def _range(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
