"""One user of a finished run, personalised as its record says: the rows that `fedquilt export` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from client.personal import personalised
from federation.data.population import Population
from federation.errors import PopulationError, RunError
from federation.pool.model import PooledModel
from server.round import from_checkpoint
from simulations.candidates import recorded_checkpoint
from simulations.compute.worker import Worker
from simulations.methods import known_methods
from simulations.record import read_record, recorded_config
from simulations.serve import Plan, Trained, payload, propose_masks, start_of, tune
from simulations.variants import MAIN

METHOD = "dsa_t2"


def personal_rows(run: Path, user_id: int) -> tuple[PooledModel, dict[str, Tensor]]:
    """The run's model and the user's active rows, {section: (k, d_in + d_out)}; k is what the mask holds.

    The gate chooses the mask, and Adam tunes its rows at the rate and for the steps of `dsa_t2` in the
    record. The rows are those that the user's stored bytes decode to.

    Raises RunError when the folder holds no finished run that measured `dsa_t2`, or when its population or
    pool is no longer the record's; PopulationError for a user that the population does not have.
    """
    record = read_record(run)
    chosen = record.get("methods", {}).get(METHOD)
    if chosen is None:
        raise RunError(
            f"a user is personalised as {METHOD} was in a run's evaluation, {str(run)!r} measured "
            f"{sorted(record.get('methods', {}))}; run it with {METHOD!r} in evaluate.methods"
        )
    config = recorded_config(record, run)
    worker = Worker(config)
    _check_population(worker.population, record, user_id)
    setup = worker.setup(config)
    trained = Trained(config, {MAIN: from_checkpoint(recorded_checkpoint(run, record), setup.rules).values}, {})
    plan = Plan(known_methods(config)[METHOD], chosen["learning_rate"], chosen["steps"])
    return setup.model, _tuned(worker, trained, plan, user_id)


def _tuned(worker: Worker, trained: Trained, plan: Plan, user_id: int) -> dict[str, Tensor]:
    ids = np.array([user_id], dtype=np.int64)
    choice = plan.method.choice
    _, packed = propose_masks(worker, trained, ids, [choice] if choice else [])
    start = start_of(worker, trained, plan.method, ids, packed)
    kept, _ = payload(start, tune(worker, trained, start, plan, ids), plan.method)
    rows = personalised(start.spec, start.rows, kept, plan.method.tuned)
    return {m.section: rows[m.section][0, start.units.valid_ujk[0, j]] for j, m in enumerate(start.spec.modules)}


def _check_population(population: Population, record: Mapping[str, Any], user_id: int) -> None:
    described = {"name": population.name, **population.describe()}
    if json.loads(json.dumps(described)) != record["population"]:
        raise RunError(
            f"a user id means the same user only in the record's population, {population.name!r} has changed "
            "since (other packages, other files?); restore it, or run again"
        )
    splits = {split: population.users(split) for split in ("train", "new")}
    if not any(user_id in users for users in splits.values()):
        has = ", ".join(f"{split} {users[0]}..{users[-1]}" for split, users in splits.items() if len(users))
        raise PopulationError(f"a user must be one of {population.name!r} ({has}), got {user_id}; give another --user")
