"""Documents against the records and files that they show."""

import ast
import json
import re
from pathlib import Path

import pytest

from simulations.documents import DOCUMENTS, HOUSE, rendered

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_figure_is_that_of_its_record(name: str) -> None:
    text = (HOUSE / name).read_text()
    assert rendered(text) == text, "run `python -m simulations.documents`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_exists(name: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (HOUSE / name).read_text())
    assert [link for link in links if not (HOUSE / name).parent.joinpath(link).exists()] == []


def test_the_readmes_python_imports_what_exists() -> None:
    blocks = PYTHON.findall((HOUSE / "README.md").read_text())
    assert len(blocks) == 3
    for block in blocks:
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_the_readmes_first_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(b for b in PYTHON.findall((HOUSE / "README.md").read_text()) if "simulations import run" in b)
    small = block.replace('["federation.rounds=20"]', '["federation.rounds=1", "compute.workers=0"]')
    assert small != block
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simulations").symlink_to(HOUSE / "simulations")
    exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "record.json").exists()


@pytest.mark.parametrize("path", sorted((HOUSE / "simulations" / "results").glob("*.json")), ids=lambda path: path.name)
def test_a_record_says_how_it_was_made_and_names_no_place_of_one_machine(path: Path) -> None:
    record = json.loads(path.read_text())
    assert {"kind", "command", "commit", "versions", "machine"} <= set(record)
    assert "+changes" not in record["commit"]
    assert not re.search(r"(^| )/|/(home|root|tmp|work)/", record["command"])
