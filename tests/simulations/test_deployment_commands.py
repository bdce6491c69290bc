"""`fedquilt release`, `releases`, `promote`, `rollback` and `keys`: words, exit codes, and what is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cryptography import x509
from typer.testing import CliRunner, Result

from federation.config import load_config
from federation.keys import TRIAL_DAYS
from server.releases import Releases, released
from simulations.cli import app
from simulations.federate import last_checkpoint

TINY = Path(__file__).parent / "tiny.toml"


def fedquilt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("releases") / "tiny"
    result = fedquilt("simulate", TINY, "--out", out, "--set", 'evaluate.methods=["dsa_t0", "dsa_t2"]')
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def measured(run: Path, loss: float) -> float:
    """Writes another loss of dsa_t2 into the run's record; returns the one that was there."""
    path = run / "record.json"
    record = json.loads(path.read_text())
    before = record["methods"]["dsa_t2"]["loss"]
    record["methods"]["dsa_t2"]["loss"] = loss
    path.write_text(json.dumps(record))
    return before


def test_a_simulations_pool_is_released_with_its_evaluation(run: Path) -> None:
    result = fedquilt("release", run)
    assert result.exit_code == 0, result.output
    release, pool = Releases(run).current(), released(run)
    assert release is not None
    assert pool is not None
    record = json.loads((run / "record.json").read_text())
    assert release.evaluation.metrics == {
        metric: record["methods"][method]["loss"]
        for metric, method in (("base_loss", "base"), ("mask_loss", "dsa_t0"), ("tuned_loss", "dsa_t2"))
    }
    assert (release.name, release.evaluation.users, release.evaluation.split) == ("r2", 8, "new")
    trained = last_checkpoint(run / "pool").tensors["values"]
    assert pool.values.keys() == trained.keys()
    assert all(torch.equal(pool.values[name], trained[name]) for name in trained)
    assert pool.task == load_config(TINY).task
    assert result.stdout.startswith(f"release r2: {pool.version}, base_loss ")
    assert result.stdout.endswith("(8 new users)\npromoted: it is the first\n")


def test_a_worse_one_is_kept_but_not_promoted(run: Path) -> None:
    before = measured(run, 2.0)
    assert before != 2.0
    assert fedquilt("release", run).exit_code == 0
    measured(run, 2.25)
    worse = fedquilt("release", run, "--name", "worse")
    assert worse.exit_code == 1
    assert "not promoted: its tuned_loss is 2.25, at most 2 is allowed" in worse.stdout
    assert f"`fedquilt promote {run} worse`" in worse.stdout
    assert Releases(run).names() == ("r2", "worse")
    assert fedquilt("release", run, "--name", "tolerated", "--margin", 0.25).exit_code == 0
    few = fedquilt("release", run, "--name", "few", "--users", 9)
    assert (few.exit_code, "8 users, the rule wants 9" in few.stdout) == (1, True)
    assert fedquilt("release", run, "--name", "masks", "--metric", "mask_loss").exit_code == 0
    assert [promotion.name for promotion in Releases(run).history()] == ["r2", "tolerated", "masks"]


def test_promoting_rolling_back_and_listing(run: Path) -> None:
    for name in ("a", "b"):
        fedquilt("release", run, "--name", name)
    measured(run, 99.0)
    fedquilt("release", run, "--name", "c")
    assert fedquilt("promote", run, "c").stdout == "current: c\n"
    assert fedquilt("rollback", run).stdout == "current: b\n"
    listed = fedquilt("releases", run).stdout.splitlines()
    assert len(listed) == 4
    assert [bool(re.match(r" *\* ", row)) for row in listed] == [False, False, True, False]
    assert all(re.search(rf"\b{name} +2 +r2-\w{{16}} ", row) for name, row in zip("abc", listed[1:], strict=True))
    for row, how in zip(listed[1:], ("rule", "rollback", "hand"), strict=True):
        assert row.rstrip().endswith(f"({how})")
    assert "tuned_loss 99.0000" in listed[3]
    assert fedquilt("rollback", run, "a").stdout == "current: a\n"
    assert [promotion.how for promotion in Releases(run).history()] == ["rule", "rule", "hand", "rollback", "rollback"]


def test_a_run_without_releases_says_how_to_make_one(run: Path) -> None:
    result = fedquilt("releases", run)
    assert (result.exit_code, result.stdout) == (
        0,
        f"{run} has no releases yet; make one with `fedquilt release {run}`\n",
    )


def test_a_record_of_another_pool_is_refused(run: Path) -> None:
    path = run / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "checksum": "feed"}))
    result = fedquilt("release", run)
    assert result.exit_code == 2
    assert "a record and its pool belong together" in result.stderr
    assert not (run / "releases").exists()


def test_a_run_that_was_not_evaluated_is_refused(run: Path) -> None:
    path = run / "record.json"
    record = json.loads(path.read_text())
    del record["methods"]
    path.write_text(json.dumps(record))
    result = fedquilt("release", run)
    assert result.exit_code == 2
    assert "'dsa_t2' in evaluate.methods" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["release", "{run}", "--metric", "tuned"], "did you mean 'tuned_loss'?"),
        (["release", "{run}", "--name", "R 2"], "choose another --name"),
        (["release", "missing"], "the folder of a finished run"),
        (["promote", "{run}", "r7"], "known: none"),
        (["rollback", "{run}"], "nothing was"),
        (["keys", "{run}", "--nodes", 2], "never overwritten"),
        (["keys", "{run}/new", "--nodes", 2, "--host", "a:8000"], "without scheme and port"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(
    run: Path, arguments: list[object], words: str
) -> None:
    result = fedquilt(*(str(argument).replace("{run}", str(run)) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("fedquilt: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (run / "releases").exists()


def test_keys_prints_commands_for_the_files_it_made(tmp_path: Path) -> None:
    folder = tmp_path / "my keys"
    result = fedquilt("keys", folder, "--nodes", 2, "--host", "10.0.0.5", "--agent", "device-1")
    assert result.exit_code == 0, result.output
    named = set(re.findall(rf"{re.escape(str(folder))}/([\w.-]+)", result.stdout))
    assert named == {path.name for path in folder.iterdir()}
    assert "10.0.0.5:8000" in result.stdout
    assert "--host 0.0.0.0" in result.stdout
    assert "insecure" not in result.stdout


def test_without_a_host_the_server_listens_to_this_machine_alone(tmp_path: Path) -> None:
    words = fedquilt("keys", tmp_path / "keys", "--nodes", 1).stdout
    assert "flower-superlink --host 127.0.0.1" in words
    assert "--superlink localhost:8000" in words
    assert "FEDQUILT_AGENT" not in words


def test_an_ipv6_address_is_bracketed(tmp_path: Path) -> None:
    words = fedquilt("keys", tmp_path / "keys", "--nodes", 1, "--host", "2001:db8::7").stdout
    assert "--superlink '[2001:db8::7]:8000'" in words
    assert 'address = "[2001:db8::7]:8000"' in words
    assert "flower-superlink --host :: " in words


def test_keys_last_as_long_as_a_trial(tmp_path: Path) -> None:
    words = fedquilt("keys", tmp_path / "keys", "--nodes", 1).stdout
    assert f"{TRIAL_DAYS} days" in words
    certificate = x509.load_pem_x509_certificate((tmp_path / "keys" / "server.pem").read_bytes())
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lasts.days == TRIAL_DAYS
    assert "7 days" in fedquilt("keys", tmp_path / "week", "--nodes", 1, "--days", 7).stdout


def test_a_loss_that_is_not_finite_is_no_evaluation(run: Path) -> None:
    measured(run, float("nan"))
    result = fedquilt("release", run)
    assert result.exit_code == 2
    assert "metrics.tuned_loss" in result.stderr
    assert not (run / "releases").exists()
