"""Sweeps: which trials there are, that finished ones stay, and what the summary says of them."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from federation.errors import ConfigError
from simulations.cli import app
from simulations.sweep import claims_of, plan

TINY = Path(__file__).parent / "tiny.toml"
ASKED = (
    "--set",
    "evaluate.methods=['dense_lora', 'dsa_t2', 'dsa_t0']",
    "--set",
    "evaluate.claims=[['dsa_t2', 'base']]",
    "--set",
    "pool.start=teacher",
)


def sweep(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *[str(argument) for argument in arguments]])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    result = sweep(TINY, *ASKED, "--seeds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_claims_have_the_names_of_the_tables() -> None:
    written = "evaluate.methods=['dsa_t0', 'random_mask[pool=random, budget=2]']"
    (trial,) = plan([TINY], 1, [written, "evaluate.claims=[['dsa_t0', 'random_mask[ pool=random,budget=2 ]']]"], [])
    assert claims_of(trial.config) == [("dsa_t0", "random_mask[pool=random,budget=2]")]


def test_a_grid_makes_every_combination_with_every_seed() -> None:
    trials = plan([TINY], 2, ["local.steps=1"], ["gate.budget=1,2", "evaluate.steps=[2],[3, 4]"])
    points = [(t.config.gate.budget, t.config.evaluate.steps, t.config.seed) for t in trials]
    assert points == [(k, steps, seed) for k in (1, 2) for steps in ((2,), (3, 4)) for seed in (0, 1)]
    assert {trial.config.local.steps for trial in trials} == {1}
    assert trials[0].name == "tiny-gate.budget=1-evaluate.steps=_2_-seed0"
    assert len({trial.name for trial in trials}) == len(trials)


def test_bare_words_of_a_grid_are_text() -> None:
    trials = plan([TINY], 1, ["evaluate.methods=['saliency_mask']"], ["gate.policy=saliency,random"])
    assert [trial.config.gate.policy for trial in trials] == ["saliency", "random"]


def test_commas_in_brackets_and_quotes_are_part_of_a_value() -> None:
    methods = [["dsa_t0[windows=4,budget=2]", "random_mask[pool=random]"], ["shared"]]
    trials = plan(
        [TINY], 1, [], [f"evaluate.methods={methods[0]}, {methods[1]}", "local={steps=1, examples=2},{steps=2}"]
    )
    assert [list(trial.config.evaluate.methods) for trial in trials] == [methods[0]] * 2 + [methods[1]] * 2
    assert [trial.config.local.steps for trial in trials] == [1, 2] * 2


@pytest.mark.parametrize(
    ("overrides", "grid", "rule"),
    [
        (["seed=3"], [], "sets the seed of each run itself"),
        ([], ["seed=3,4"], "sets the seed of each run itself"),
        ([], ["gate.budget"], "an axis of the grid is key=v1,v2"),
        ([], ["gate.budgte=1,2"], "did you mean 'budget'"),
        ([], ["gate.budget=2,99"], "cannot exceed pool.rank"),
        ([], ["gate.budget=2,2"], "has its own name"),
        (["evaluate.methods=[]"], [], "set evaluate.methods"),
        (["variants.v.gate.smaples=2"], [], "in the variant 'v'.*did you mean 'samples'"),
        (["evaluate.methods=['dsa_t0[pool=v]']"], [], "no federation is called 'v'"),
        (["evaluate.claims=[['dsa_t2', 'dense_loar']]"], [], "'dense_loar' in evaluate.claims.*mean 'dense_lora'"),
        (["evaluate.claims=[['dsa_t2', 'dsa_t2']]"], [], "'dsa_t2' in evaluate.claims with itself"),
        (["evaluate.claims=[['dsa_t2']]"], [], "evaluate.claims.0"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_it_begins(overrides: list[str], grid: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        plan([TINY], 2, overrides, grid)


def test_a_folder_gives_all_its_experiments(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text(TINY.read_text().replace('"tiny"', f'"{name}"'))
    out = tmp_path / "out"
    quick = ["--seeds", 1, "--set", "federation.rounds=1", "--set", "evaluate.methods=['dsa_t0']"]
    result = sweep(tmp_path, *quick, "--out", out)
    assert result.exit_code == 0, result.output
    assert [name for name in ("a-seed0", "b-seed0") if (out / name / "record.json").exists()] == [
        "a-seed0",
        "b-seed0",
    ]
    assert json.loads((out / "sweep.json").read_text())["experiments"] == ["a", "b"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has none" in sweep(empty).stderr


def test_the_summary_is_what_the_runs_say(swept: Path) -> None:
    """Against each run's own record and evaluation; every user is a group here, so errors have a closed form."""
    summary = json.loads((swept / "sweep.json").read_text())["variants"]["tiny"]
    runs = [swept / name for name in summary["runs"]]
    assert [run.name for run in runs] == ["tiny-seed0", "tiny-seed1"]
    records = [json.loads((run / "record.json").read_text()) for run in runs]
    for name, method in summary["methods"].items():
        seeds = [record["methods"][name]["mean"] for record in records]
        assert method["seed_gains"] == pytest.approx(seeds, abs=1e-5)
        assert method["gain"]["mean"] == pytest.approx(np.mean(seeds), abs=1e-5)
        assert method["gain"]["low"] < method["gain"]["mean"] < method["gain"]["high"]
    losses = [json.loads((run / "evaluation.json").read_text())["loss"] for run in runs]
    pairs = {(entry["a"], entry["b"]): entry for entry in summary["comparisons"]}
    (claim,) = summary["claims"]
    pair = pairs["base", "dsa_t2"]
    assert (claim["better"], claim["worse"], claim["difference"]) == ("dsa_t2", "base", -pair["difference"])
    assert claim["se"] == pair["se"]
    assert claim["seed_differences"] == pytest.approx(summary["methods"]["dsa_t2"]["seed_gains"], abs=2e-6)
    ended = [record["history"][-1]["gate_entropy"] for record in records]
    assert summary["gate"]["pool"]["gate_entropy"] == pytest.approx(np.mean(ended), abs=1e-6)
    masks = [record["masks"]["dsa_t0"] for record in records]
    found = summary["masks"]["dsa_t0"]
    assert found["seeds"]["reward_share"] == [mask["reward_share"] for mask in masks]
    assert found["f1"] == pytest.approx(np.mean([mask["f1"] for mask in masks]), abs=1e-6)
    assert set(pairs) == set(combinations(("base", "dense_lora", "dsa_t2", "dsa_t0"), 2))
    for (a, b), entry in pairs.items():
        difference_u = np.mean([np.subtract(loss[b], loss[a]) for loss in losses], axis=0)
        assert entry["difference"] == pytest.approx(difference_u.mean(), abs=1e-6)
        assert entry["se"] == pytest.approx(difference_u.std(ddof=1) / np.sqrt(len(difference_u)), abs=1e-6)
        assert entry["low"] < entry["difference"] < entry["high"]


def test_seeds_are_different_federations(swept: Path) -> None:
    records = [json.loads((swept / f"tiny-seed{seed}" / "record.json").read_text()) for seed in (0, 1)]
    assert [record["seed"] for record in records] == [0, 1]
    assert records[0]["checksum"] != records[1]["checksum"]


def test_finished_runs_stay_and_a_missing_one_is_made_again(swept: Path) -> None:
    first, second = swept / "tiny-seed0" / "record.json", swept / "tiny-seed1" / "record.json"
    kept, checksum = first.read_bytes(), json.loads(second.read_text())["checksum"]
    second.unlink()
    result = sweep(TINY, *ASKED, "--seeds", 2, "--out", swept)
    assert result.exit_code == 0, result.output
    assert result.output.count("finished before") == 1
    assert first.read_bytes() == kept
    assert json.loads(second.read_text())["checksum"] == checksum


def test_other_claims_are_made_of_finished_runs(swept: Path) -> None:
    kept = (swept / "tiny-seed0" / "record.json").read_bytes()
    other = ["--set", "evaluate.claims=[['dsa_t0', 'base'], ['dsa_t2', 'dsa_t0']]"]
    result = sweep(TINY, *ASKED, *other, "--seeds", 2, "--out", swept)
    assert result.output.count("finished before") == 2, result.output
    claims = json.loads((swept / "sweep.json").read_text())["variants"]["tiny"]["claims"]
    assert [(claim["better"], claim["worse"]) for claim in claims] == [("dsa_t0", "base"), ("dsa_t2", "dsa_t0")]
    assert (swept / "tiny-seed0" / "record.json").read_bytes() == kept


def test_a_run_of_an_older_version_is_not_taken_for_finished(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "old")
    path = tmp_path / "old" / "tiny-seed0" / "record.json"
    record = json.loads(path.read_text())
    record["config"]["gate"]["price"] = 0.1
    path.write_text(json.dumps(record))
    result = sweep(TINY, *ASKED, "--seeds", 2, "--out", tmp_path / "old")
    assert result.exit_code == 2
    assert "tiny-seed0 is of an older version of fedquilt" in result.stderr


def test_a_folder_with_another_configuration_is_not_taken_for_finished(swept: Path) -> None:
    result = sweep(TINY, *ASKED, "--seeds", 2, "--set", "local.learning_rate=0.01", "--out", swept)
    assert result.exit_code == 2
    assert "a run of another configuration" in result.stderr


def test_the_points_of_curves_are_summarised_claimed_but_not_compared(tmp_path: Path) -> None:
    asked = {
        "evaluate.methods": "['dsa_t2', 'shared_tuned[shots=2,steps=1]']",
        "evaluate.curves": "{methods=['dsa_t2', 'shared_tuned'], shots=[2], steps=[0, 1]}",
        "evaluate.claims": "[['dsa_t2[shots=2,steps=1]', 'dsa_t2[ shots=2, steps=0 ]']]",
        "gate.reward.quality.name": "accuracy",
        "population.options.hit": "1.0",
        "federation.rounds": "1",
    }
    sets = [text for key, value in asked.items() for text in ("--set", f"{key}={value}")]
    result = sweep(TINY, *sets, "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "sweep.json").read_text())["variants"]["tiny"]
    points = ["dsa_t2[shots=2,steps=0]", "dsa_t2[shots=2,steps=1]", "shared_tuned[shots=2,steps=0]"]
    rows = ["base", "dsa_t2", "shared_tuned[shots=2,steps=1]"]
    assert set(summary["methods"]) == {*rows[1:], *points}
    assert (summary["curves"], summary["quality"]) == (points, "accuracy")
    assert [(pair["a"], pair["b"]) for pair in summary["comparisons"]] == list(combinations(rows, 2))
    (claim,) = summary["claims"]
    assert (claim["better"], claim["worse"]) == (points[1], points[0])
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in summary["runs"]]
    for place, figure, sign in ((claim, "loss", -1), (claim["quality"], "quality", 1)):
        values = [[record["methods"][name][figure] for name in points[1::-1]] for record in records]
        assert place["seed_differences"] == pytest.approx([sign * (a - b) for a, b in values], abs=1e-5)
    assert all({pair["a"], pair["b"]} <= set(rows) for record in records for pair in record["comparisons"])
