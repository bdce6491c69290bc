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

from federation.config import FREE_SETTINGS, GateConfig
from federation.errors import RunError
from simulations.record import recorded_config, rounded
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
from simulations.variants import MAIN, federations_of

_NOT_A_SETTING = (
    "seed",
    "name",
    "kind",
    "evaluate.methods",
    "evaluate.claims",
    *(f"{section}.{key}" for section, keys in FREE_SETTINGS.items() for key in keys),
)
_MASK_FIGURES = ("f1", "f1_of_type", "reward_share")


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
    active_share: of the units, mean over seeds and of each run. quality: likewise, None where it is the loss.
    """

    name: str
    gain: Interval
    over_dense: Interval | None
    seed_gains: tuple[float, ...]
    harmed: float
    bytes_per_user: float
    active_share: float
    seed_active_shares: tuple[float, ...]
    quality: float | None
    seed_qualities: tuple[float, ...]


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


def claims_over_seeds(runs: Sequence[MeasuredRun], claims: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """By how much the first of each two methods is better, paired: users' losses are averaged over seeds first.

    z: the difference in standard errors, clustered by group; None where there is no error to count in. quality: the
    same of the run's quality, where that is not the loss.
    """
    groups_u = np.asarray(runs[0].users["groups"], dtype=np.int64)
    entries = []
    for better, worse in claims:
        gain_su = np.stack([_gain(run, better) - _gain(run, worse) for run in runs])
        entry = {"better": better, "worse": worse, **_paired_over_seeds(gain_su, groups_u)}
        by_method = [run.users.get("quality", {}) for run in runs]
        if all(better in quality and worse in quality for quality in by_method):
            quality_su = np.stack([np.subtract(quality[better], quality[worse]) for quality in by_method])
            entry["quality"] = _paired_over_seeds(quality_su, groups_u)
        entries.append(entry)
    return entries


def _paired_over_seeds(difference_su: Floats, groups_u: Groups) -> dict[str, Any]:
    difference_u = difference_su.mean(0)
    interval, se = bootstrap(difference_u, groups_u), clustered_error(difference_u, groups_u)
    figures = {"difference": interval.mean, "se": se, "low": interval.low, "high": interval.high}
    return {
        **rounded(figures),
        "z": round(interval.mean / se, 6) if se > 0 else None,
        "seed_differences": [round(mean, 6) for mean in difference_su.mean(1).tolist()],
    }


def masks_over_seeds(runs: Sequence[MeasuredRun]) -> dict[str, dict[str, Any]]:
    """How near each method's masks come to the best ones (`mask_quality`): means over seeds, each seed's figures
    (`seeds`), and means by type. Nothing where the population knows no best masks."""
    masks_s = [run.record.get("masks", {}) for run in runs]
    shared = [name for name in masks_s[0] if all(name in masks for masks in masks_s)]
    return {name: _mask_summary([masks[name] for masks in masks_s]) for name in shared}


def gates_over_seeds(runs: Sequence[MeasuredRun]) -> dict[str, dict[str, Any]]:
    """Each federation whose gate was trained: what it was asked for, and how it ended, mean over seeds.

    gate_entropy, unused_share and reward are of the last round that has them; revived counts all rounds.
    """
    record = runs[0].record
    federations = federations_of(recorded_config(record, f"the run {record['name']!r}"))
    gates = {name: federations[name].gate for name in (MAIN, *record.get("federations", ()))}
    return {
        name: {**_asked(gate), **_ended([_history(run.record, name) for run in runs])}
        for name, gate in gates.items()
        if gate.policy == "gate"
    }


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
    active_s = tuple(run.record["methods"][name]["active_share"] for run in runs)
    quality_s = tuple(q for run in runs if (q := run.record["methods"][name].get("quality")) is not None)
    return MethodSummary(
        name=name,
        gain=bootstrap(gain_u, groups_u),
        over_dense=over_dense,
        seed_gains=tuple(gain_su[name].mean(1).tolist()),
        harmed=float((gain_su[name] < 0).mean()),
        bytes_per_user=float(np.mean([run.record["methods"][name]["bytes_per_user"] for run in runs])),
        active_share=float(np.mean(active_s)),
        seed_active_shares=active_s,
        quality=float(np.mean(quality_s)) if quality_s else None,
        seed_qualities=quality_s,
    )


def _mask_summary(entry_s: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    types = sorted({kind for entry in entry_s for kind in entry["by_type"]})
    by_type = {kind: [entry["by_type"][kind] for entry in entry_s if kind in entry["by_type"]] for kind in types}
    return {
        **_means(entry_s),
        "seeds": {figure: [entry[figure] for entry in entry_s] for figure in _MASK_FIGURES},
        "by_type": {kind: _means(entries) for kind, entries in by_type.items()},
    }


def _means(entry_s: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return rounded({figure: float(np.mean([entry[figure] for entry in entry_s])) for figure in _MASK_FIGURES})


def _asked(gate: GateConfig) -> dict[str, Any]:
    return {
        "estimator": gate.estimator.name,
        "samples": gate.samples,
        "inputs": list(gate.inputs),
        "distribution": gate.distribution,
        "budget": gate.budget,
        "steps": gate.reward.steps,
        "price": gate.reward.price,
        "target": gate.reward.target,
    }


def _ended(history_s: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """What no run has is left out."""
    found: dict[str, list[float]] = {}
    for metric in ("gate_entropy", "unused_share", "reward", "revived"):
        for history in history_s:
            values = [line[metric] for line in history if metric in line]
            if values:
                found.setdefault(metric, []).append(sum(values) if metric == "revived" else values[-1])
    return rounded({metric: float(np.mean(value_s)) for metric, value_s in found.items()})


def _history(record: Record, federation: str) -> Sequence[Mapping[str, float]]:
    lines = record if federation == MAIN else record["federations"][federation]
    history: Sequence[Mapping[str, float]] = lines.get("history", ())
    return history


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
