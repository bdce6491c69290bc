"""What a ServerApp makes of its run-config."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.errors import ConfigError
from server import app

SETTINGS = {"experiment": "deployed", "set": "", "state": "", "ray-address": ""}


def test_settings_are_set_and_quotes_keep_spaces_together() -> None:
    config = app.configuration(SETTINGS | {"set": 'federation.rounds=7 name="two words" deployment.nodes=3'})
    assert (config.federation.rounds, config.name, config.deployment.nodes) == (7, "two words", 3)


def test_the_address_of_a_ray_cluster_is_a_setting() -> None:
    assert app.configuration(SETTINGS | {"ray-address": "127.0.0.1:6379"}).compute.ray_address == "127.0.0.1:6379"


@pytest.mark.parametrize("changes", ['name="two words', "name='"])
def test_an_open_quote_is_refused(changes: str) -> None:
    with pytest.raises(ConfigError) as error:
        app.configuration(SETTINGS | {"set": changes})
    assert "set is a list of section.key=value" in str(error.value)
    assert repr(changes) in str(error.value)
    assert "close every quote" in str(error.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDQUILT_STATE", str(tmp_path / "own"))
    return tmp_path


def test_the_state_is_where_the_run_config_says(home: Path) -> None:
    assert app.state_folder("", "trial") == home / "own" / "servers" / "trial"
    assert app.state_folder("/srv/states/a", "trial") == Path("/srv/states/a")
    assert app.state_folder("~/states/a", "trial") == home / "states" / "a"


@pytest.mark.parametrize("state", ["state", "./state", "../state", "~nobody-of-this-name/state"])
def test_a_state_folder_that_depends_on_where_flower_was_started_is_refused(home: Path, state: str) -> None:
    with pytest.raises(ConfigError) as error:
        app.state_folder(state, "trial")
    assert "state is an absolute path" in str(error.value)
    assert repr(state) in str(error.value)
    assert "write it in full" in str(error.value)


@pytest.fixture
def quiet() -> Iterator[logging.Logger]:
    """Our log as a new process has it."""
    log = logging.getLogger("fedquilt")
    before = list(log.handlers), log.level, log.propagate
    log.handlers.clear()
    yield log
    log.handlers[:], log.level, log.propagate = before


def test_a_line_is_told_once_however_often_main_runs(quiet: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        app._log_to_stderr()
    logging.getLogger("fedquilt").info("round 1")
    assert capsys.readouterr().err == "fedquilt: round 1\n"
