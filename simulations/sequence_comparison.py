"""What runs of several seeds say of rules that are to keep what users learned.

In `evaluate.claims` a rule is written `continual:name`, as in `["continual:meta", "continual:ewc"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from federation.config import RunConfig
from federation.errors import ConfigError, RunError
from federation.plugins import suggest
from simulations.comparison import MeasuredRun, claims_over_seeds
from simulations.record import rounded
from simulations.sequence_rules import rules_of
from simulations.statistics import clustered_error
from simulations.tables import REFERENCE

PREFIX = "continual:"
CLAIMED = ("acc", "bwt")
"""The figures that two rules are compared by."""


def continual_claims_of(config: RunConfig) -> list[tuple[str, str]]:
    """The pairs of rules that documents compare, (better, worse), without the prefix.

    Raises ConfigError for a rule that is not among the run's, for a rule and itself or a method, and as `rules_of`.
    """
    pairs = [pair for pair in config.evaluate.claims if any(name.startswith(PREFIX) for name in pair)]
    measured = [rule.name for rule in rules_of(config)]
    claims = []
    for pair in pairs:
        better, worse = (name.removeprefix(PREFIX).strip() for name in pair)
        for name, written in zip((better, worse), pair, strict=True):
            if name not in measured or not written.startswith(PREFIX):
                known = [PREFIX + rule for rule in measured]
                raise ConfigError(
                    f"a claim compares two rules of the run, {written!r} in evaluate.claims is not in "
                    f"evaluate.sequence.rules; {suggest(written, known)}"
                )
        if better == worse:
            raise ConfigError(f"a claim compares two rules, {pair[0]!r} in evaluate.claims with itself; drop it")
        claims.append((better, worse))
    return claims


def continual_over_seeds(runs: Sequence[MeasuredRun], claims: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`continual`: what was measured, each rule's and reference's figures, mean over seeds with those of each seed, and
    the claims by each of `CLAIMED`, paired over users. Nothing where sequences were not measured.

    A user's ACC and BWT are averaged over seeds before their error is taken, as methods' gains are.
    """
    records = [run.record.get("continual") for run in runs]
    found = [record for record in records if record is not None]
    if len(found) < len(runs):
        return {}
    first = found[0]
    _check_users(runs)
    rules = [name for name in first["rules"] if all(name in record["rules"] for record in found)]
    summary = {
        **{key: first[key] for key in ("quality", "tasks", "steps", "users", "groups")},
        "rules": {name: _rule_summary(name, runs) for name in rules},
        "references": {
            name: _figures([record["references"][name] for record in found], "quality") for name in first["references"]
        },
        "claims": {figure: claims_over_seeds([_as_losses(run, figure) for run in runs], claims) for figure in CLAIMED},
    }
    return {"continual": summary}


def _check_users(runs: Sequence[MeasuredRun]) -> None:
    first = runs[0].users["continual"]
    if any(run.users["continual"][key] != first[key] for run in runs for key in ("ids", "groups")):
        raise RunError("runs of one setting walk with the same users, these do not: their data differ; run them again")


def _rule_summary(name: str, runs: Sequence[MeasuredRun]) -> dict[str, Any]:
    """As of one seed: r, before and metrics; se of ACC and BWT over users whose figures are means over seeds."""
    entries = [run.record["continual"]["rules"][name] for run in runs]
    figures = _figures(entries, "r")
    groups_u = np.asarray(runs[0].users["continual"]["groups"], dtype=np.int64)
    for figure in CLAIMED:
        value_u = np.mean([run.users["continual"][figure][name] for run in runs], axis=0)
        figures["metrics"][figure]["se"] = round(clustered_error(value_u, groups_u), 6)
    means = {key: float(np.mean([entry[key] for entry in entries])) for key in ("reached", "bytes_per_user")}
    return {**figures, **rounded(means)}


def _figures(entries: Sequence[Mapping[str, Any]], matrix: str) -> dict[str, Any]:
    """Means over seeds of a matrix, of the start, and of every metric; `seeds` has what each seed gave."""
    seeds = {name: [entry["metrics"][name]["mean"] for entry in entries] for name in entries[0]["metrics"]}
    return {
        **{key: np.round(np.mean([entry[key] for entry in entries], 0), 6).tolist() for key in (matrix, "before")},
        "metrics": {
            name: {"mean": round(float(np.mean(by_seed)), 6), "seeds": by_seed} for name, by_seed in seeds.items()
        },
        "learning_rates": [entry["learning_rate"] for entry in entries],
        "strengths": [entry["strength"] for entry in entries],
        "diverged": sum(entry["diverged"] for entry in entries),
    }


def _as_losses(run: MeasuredRun, figure: str) -> MeasuredRun:
    """The figure as a gain over nothing, so that claims about it are made as all others."""
    continual = run.users["continual"]
    nothing = {REFERENCE: np.zeros(len(continual["ids"]))}
    losses = {name: -np.asarray(value_u) for name, value_u in continual[figure].items()}
    return MeasuredRun(run.record, {"groups": continual["groups"], "loss": {**nothing, **losses}})
