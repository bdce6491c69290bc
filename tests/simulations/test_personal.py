"""A user taken out of a finished run must be served as the run's own evaluation served it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from federation.config import RunConfig
from federation.data.registry import make_population
from federation.errors import PopulationError, RunError
from federation.settings import parse
from federation.streams import Streams
from simulations.personal import personal_rows
from simulations.runs import run

SETTINGS = {
    "population": {"name": "synthetic", "options": {"train_users": 40, "new_users": 12, "rank": 8}},
    "pool": {"rank": 8},
    "gate": {"budget": 3, "warmup": 1},
    "local": {"learning_rate": 0.05},
    "federation": {"rounds": 3, "cohort": 8},
    "compute": {"block": 8, "workers": 0},
    "evaluate": {
        "methods": ["dsa_t0", "dsa_t2"], "users": 6, "tuning_users": 2, "steps": [5, 9], "examples": 8,
        "block": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    run(parse(RunConfig, SETTINGS), out)
    return out


def test_a_user_is_served_as_in_the_evaluation(folder):
    table = json.loads((folder / "evaluation.json").read_text())
    population = make_population(parse(RunConfig, SETTINGS).population)
    for user_id, recorded, untuned in zip(table["ids"], table["loss"]["dsa_t2"], table["loss"]["dsa_t0"], strict=True):
        model, rows = personal_rows(folder, user_id)
        assert {len(row) for row in rows.values()} == {3}
        test = population.batch(np.array([user_id]), "test", None, Streams(0))
        with torch.no_grad(), model.bound({section: row[None] for section, row in rows.items()}):
            loss = float(model.loss(test)) / math.log(2)
        assert loss == pytest.approx(recorded, abs=1e-5)
        assert abs(loss - untuned) > 1e-3


def test_rows_that_only_pad_are_left_out(tmp_path):
    """Bernoulli masks differ in size from module to module."""
    gate = SETTINGS["gate"] | {"distribution": "bernoulli"}
    run(parse(RunConfig, SETTINGS | {"gate": gate}), tmp_path / "run")
    users = [list(personal_rows(tmp_path / "run", user_id)[1].values()) for user_id in range(40, 44)]
    assert any(len(fc1) != len(fc2) for fc1, fc2 in users)
    assert all(row.any(1).all() for rows in users for row in rows)


def test_training_users_can_be_exported_too(folder):
    _, rows = personal_rows(folder, 0)
    assert rows.keys() == {"pool/fc1", "pool/fc2"}


@pytest.mark.parametrize("user_id", [-1, 52])
def test_an_unknown_user_is_named(folder, user_id):
    with pytest.raises(PopulationError, match=rf"train 0\.\.39, new 40\.\.51\), got {user_id}"):
        personal_rows(folder, user_id)


def test_a_run_without_what_is_needed_is_refused(folder, tmp_path):
    with pytest.raises(RunError, match=r"record\.json"):
        personal_rows(tmp_path, 40)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    record = json.loads((folder / "record.json").read_text())

    def refused(match, **edits):
        (changed / "record.json").write_text(json.dumps(record | edits))
        with pytest.raises(RunError, match=match):
            personal_rows(changed, 40)

    refused(r"measured \['dsa_t0'\]; run it with 'dsa_t2'", methods={"dsa_t0": record["methods"]["dsa_t0"]})
    refused(r"measured \[\]", methods={})
    old = record["config"] | {"gate": record["config"]["gate"] | {"price": 0.1}}
    refused(r"changed is of an older version .*unknown key 'gate\.price'.*or run it again", config=old)
    refused("'synthetic' has changed", population=record["population"] | {"types": 3})
    shutil.rmtree(changed / "pool/checkpoints/round-000003")
    refused(r"round 2\) is another one; finish the run")
