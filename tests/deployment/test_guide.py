"""docs/deploy.md, followed word by word."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from simulations.deployment import BIN, HOUSE
from tests.deployment.guide import blocks_of, options_of, reader

GUIDE = (HOUSE / "docs" / "deploy.md").read_text()


@pytest.mark.timeout(900)
def test_every_command_runs() -> None:
    install, *blocks = blocks_of(GUIDE)
    assert install.commands == "make venv\n"  # which has been done: the next test
    # Not pytest's folder: the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, reader(Path(folder)) as someone:
        printed = "\n".join(someone.do(block) for block in blocks)
        server = someone.house / "runs" / "trial" / "server"
        rounds = [json.loads(line) for line in (server / "rounds.jsonl").read_text().splitlines()]
    assert [(line["round_index"], line["admitted"]) for line in rounds] == [(1, 6), (2, 6), (3, 6)]
    assert printed.count("online") >= 2
    assert "promoted: " in printed
    assert re.search(r"forgotten|removed|forgets", printed)


def test_the_tests_themselves_need_what_it_installs() -> None:
    rules = dict(re.findall(r"^([\w-]+):(.*)$", (HOUSE / "Makefile").read_text(), re.MULTILINE))
    assert "check" in rules["test"]
    assert "venv" in rules["check"]


def test_units_start_what_there_is() -> None:
    starts = re.findall(r"^ExecStart=(.*)$", GUIDE, re.MULTILINE)
    assert len(starts) == 2
    for start in starts:
        name, options = options_of(start)
        words = [word for word in shlex.split(start)[1:2] if not word.startswith("-")]
        done = subprocess.run([BIN / name, *words, "--help"], capture_output=True, text=True, check=True, timeout=60)
        assert [option for option in options if option not in done.stdout] == []


def test_its_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "deploy.md", "exec"), names)
    assert callable(names["run"])
