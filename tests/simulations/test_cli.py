"""The command line, end to end on a tiny synthetic population: words, exit codes, and what is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from federation.experiments import EXPERIMENTS, experiment_path
from simulations.cli import app

TINY = Path(__file__).parent / "tiny.toml"
REPOSITORY = Path(__file__).parents[2]
INSTALLED = REPOSITORY / "tests" / "plugins" / "installed"


def fedquilt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def record_of(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it make a run of their own."""
    out = tmp_path_factory.mktemp("cli") / "tiny"
    result = fedquilt("simulate", TINY, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "quilted from shared pieces"),
        (["simulate"], "Train a shared pool"),
        (["pretrain"], "Train the small base model"),
        (["calibrate"], "trains fastest"),
        (["unit-costs"], "costs in time"),
        (["evaluate"], "Serve new users again"),
        (["report"], "Draw the report"),
        (["sweep"], "several seeds"),
        (["export"], "standard PEFT LoRA"),
        (["plugins"], "List strategies"),
        (["check-strategy"], "against the laws"),
        (["bench"], "Measure speed"),
        (["agent"], "Serve this device"),
        (["ask", "generate"], "as it is written"),
        (["release"], "promote it"),
        (["releases"], "List the releases"),
        (["promote"], "Make a release current"),
        (["rollback"], "what was before"),
        (["keys"], "node keys for a trial"),
        (["bench", "throughput"], "Users trained per second"),
    ],
)
def test_every_command_explains_itself(command: list[str], words: str) -> None:
    result = fedquilt(*command, "--help")
    assert result.exit_code == 0
    assert words in result.output


def test_help_waits_for_no_heavy_module() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'peft', 'pydantic', 'ray', 'plotly', 'tensorboard'}"
    code = f"import sys, simulations.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", TINY, "--set", "federation.round=3"], "did you mean 'rounds'?"),
        (["simulate", TINY, "--set", "federation.rounds"], "an override is key=value"),
        (["simulate", TINY, "--set", "strategy.name=masked_men"], "did you mean 'masked_mean'?"),
        (["simulate", TINY, "--set", "population.options.train_users=4"], "a cohort of 8 needs as many"),
        (["simulate", "cod"], "did you mean 'code'?"),
        (["simulate", "missing.toml"], "readable TOML file"),
        (["pretrain", TINY], "brings its own"),
        (["evaluate", "missing"], "the folder of a finished run"),
        (["report", "missing"], "the folder of a finished run"),
        (["report", "missing", "gone"], "the folder of a finished run"),
        (["export", "missing", "--user", 1, "--out", "adapter"], "the folder of a finished run"),
        (["check-strategy", "fedavgg"], "did you mean 'fedavg'?"),
        (["check-strategy", "masked_mean", "--set", "kapa=1"], "did you mean 'kappa'?"),
        (["bench", "throughput", "--workload", "w9"], "known: w1, w2"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(
    arguments: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fedquilt(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("fedquilt: ")
    assert result.stderr.count("\n") == 1
    debugged = fedquilt("--debug", *arguments)
    assert debugged.exit_code == 2
    assert debugged.stderr.startswith("Traceback")


def test_a_folder_that_cannot_be_written_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = fedquilt("simulate", TINY, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert result.stderr.startswith("fedquilt: ")
    assert "Traceback" not in result.stderr


def test_someone_elses_client_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.py").touch()
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", "from simulations.cli import main; main()", "plugins"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fedquilt: the package 'client' must be fedquilt's")
    assert str(tmp_path / "client.py") in done.stderr


@pytest.mark.parametrize(
    ("command", "stopped_in", "said"),
    [
        (("simulate", TINY), "simulations.runs.run", "stopped; continue with --resume\n"),
        (("sweep", TINY), "simulations.sweep.plan", "stopped; continue with the same command\n"),
        (("bench", "aggregation"), "simulations.benchmarks.aggregation.measure", "stopped\n"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    command: tuple[object, ...], stopped_in: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped_in, stopped)
    result = fedquilt(*command, "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, said)


def test_our_experiments_are_found_by_name_and_can_be_read() -> None:
    from federation.config import load_config

    names = sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))
    assert "code" in names
    for name in names:
        assert load_config(experiment_path(name)).name == name


def test_simulate_ends_with_the_table_and_its_files(finished: Path) -> None:
    result = fedquilt("simulate", TINY, "--out", finished, "--resume")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    shown: dict[str, str] = {}
    for name, figure, *_ in (line.split() for line in lines if len(line.split()) > 1):
        shown.setdefault(name, figure)
    gains = {name: f"{entry['mean']:.3f}" for name, entry in record_of(finished)["methods"].items()}
    assert len(gains) == 3
    assert {name: shown[name] for name in gains} == gains | {"base": "0"}
    assert f"record:     {finished / 'record.json'}" in lines
    assert (finished / "report.html").exists()


def test_a_run_is_not_overwritten(finished: Path) -> None:
    before = (finished / "record.json").read_bytes()
    result = fedquilt("simulate", TINY, "--out", finished)
    assert result.exit_code == 2
    assert "holds a run already" in result.stderr
    assert (finished / "record.json").read_bytes() == before


def test_results_lie_under_runs_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--set", "federation.rounds=1", "--set", "evaluate.methods=[]", "--set", "name=quick"]
    result = fedquilt("simulate", TINY, *quick)
    assert result.exit_code == 0, result.output
    assert record_of(tmp_path / "runs" / "quick")["rounds"] == 1


def test_evaluate_gives_what_simulate_would_have_given(tmp_path: Path) -> None:
    more = ["--set", "evaluate.users=10", "--set", "evaluate.methods=['dsa_t0', 'dsa_t2@int8']"]
    assert fedquilt("simulate", TINY, *more, "--out", tmp_path / "at once").exit_code == 0
    assert fedquilt("simulate", TINY, "--out", tmp_path / "later").exit_code == 0
    result = fedquilt("evaluate", tmp_path / "later", *more)
    assert result.exit_code == 0, result.output
    at_once, later = record_of(tmp_path / "at once"), record_of(tmp_path / "later")
    assert list(later["methods"]) == ["base", "dsa_t0", "dsa_t2@int8"]
    for record in (at_once, later):
        for entry in record["methods"].values():
            del entry["seconds_per_user"]
    for key in ("methods", "comparisons", "users", "checksum", "history", "config"):
        assert later[key] == at_once[key], key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gate.budget=1", "only evaluate.* can change"),
        ("evaluate.methods=['shared']", "of the federation 'shared'"),
        ("evaluate.methods=['dsa']", "unknown method 'dsa'"),
        ("evaluate.user=3", "did you mean 'users'?"),
    ],
)
def test_evaluate_refuses_what_needs_training(finished: Path, override: str, words: str) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    result = fedquilt("evaluate", finished, "--set", override)
    assert result.exit_code == 2
    assert words in result.stderr
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def test_report_draws_one_run_or_compares_several(finished: Path, tmp_path: Path) -> None:
    (finished / "report.html").unlink(missing_ok=True)
    assert fedquilt("report", finished).exit_code == 0
    assert (finished / "report.html").exists()
    seed = tmp_path / "seed1"
    assert fedquilt("simulate", TINY, "--set", "seed=1", "--out", seed).exit_code == 0
    result = fedquilt("report", finished, seed, "--out", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    assert "dsa_t2" in (tmp_path / "both.html").read_text()


def test_export_writes_an_adapter_of_the_layout(finished: Path, tmp_path: Path) -> None:
    for layout, rank in (("universal", 8), ("pattern", 2)):
        out = tmp_path / layout
        result = fedquilt("export", finished, "--user", 41, "--layout", layout, "--out", out)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "adapter_config.json").read_text())["r"] == rank
        tensors = load_file(out / "adapter_model.safetensors")
        assert tensors["base_model.model.fc1.lora_A.weight"].shape == (rank, 8)
    again = fedquilt("export", finished, "--user", 41, "--out", tmp_path / "universal")
    assert again.exit_code == 2
    unknown = fedquilt("export", finished, "--user", 9999, "--out", tmp_path / "nobody")
    assert (unknown.exit_code, "got 9999" in unknown.stderr) == (2, True)


def test_plugins_are_listed_with_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(INSTALLED)
    rows = [tuple(line.split(maxsplit=2)) for line in fedquilt("plugins").output.splitlines()]
    listed = {(kind, name): origin.strip() for kind, name, origin in rows[1:]}
    assert listed["strategy", "masked_mean"] == "fedquilt"
    assert listed["strategy", "sign_mean"] == "sign-mean 1.0"
    assert listed["optimizer", "adam"] == listed["population", "code"] == "fedquilt"


def test_check_strategy_passes_ours_and_an_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(INSTALLED)
    for name, options in (("fedavg", []), ("masked_mean", ["--set", "kappa=2.5"]), ("sign_mean", [])):
        result = fedquilt("check-strategy", name, *options)
        assert (result.exit_code, f"{name} keeps all" in result.output) == (0, True)


def test_check_strategy_names_the_broken_law(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "last_wins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: last_wins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedquilt.strategies]\nlast_wins = last_wins:LastWins\n")
    (tmp_path / "last_wins.py").write_text(
        "from strategies import MaskedMean\nclass LastWins(MaskedMean):\n    def merge(self, a, b):\n        return b\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = fedquilt("check-strategy", "last_wins")
    assert result.exit_code == 1
    assert "last_wins breaks a law: merge commutes" in result.output
    assert "padding is ignored" not in result.output
