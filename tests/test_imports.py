"""Who may import whom, what a device must not need, and whose packages Python finds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from federation.house import PACKAGES, check_house

HOUSE = Path(__file__).parent.parent
MAY_IMPORT = {
    "federation": set(),
    "strategies": {"federation"},
    "client": {"federation"},
    "server": {"federation", "strategies"},
    "simulations": {"federation", "strategies", "client", "server"},
}
ONLY_IN = {
    "ray": {"server/admission/ray_lifting.py", "simulations/compute/cluster.py", "simulations/compute/ray_workers.py"},
    "flwr": {
        "client/app.py",
        "server/app.py",
        "server/flower.py",
        "server/live/grid.py",
        "federation/records.py",
        "simulations/benchmarks/empty_app/empty_client.py",
        "simulations/benchmarks/empty_app/empty_server.py",
        "simulations/benchmarks/peers/flower.py",
        "simulations/benchmarks/aggregation.py",
    },
    "pfl": {"simulations/benchmarks/peers/pfl.py"},
    "grpc": {f"client/agent/{name}.py" for name in ("agent_pb2_grpc", "calls", "client", "server")},
}
NOT_ON_A_DEVICE = ("ray", "plotly", "tensorboard")


def files_of(package: str) -> list[Path]:
    return sorted((HOUSE / package).rglob("*.py"))


def imported_by(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands. Relative ones begin with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    return imported_by(ast.parse(path.read_text(), str(path)))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b, c\ndef f():\n    from d.e import g\n    from . import h\nif x:\n    from ..i import j\n"
    assert sorted(imported_by(ast.parse(source))) == [(1, "a.b"), (1, "c"), (3, "d.e"), (4, "."), (6, "..i")]


def test_the_packages_are_those_of_the_house() -> None:
    assert set(MAY_IMPORT) == set(PACKAGES)
    assert all(len(files_of(package)) > 1 for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(HOUSE)}:{line} imports {name}"
        for path in files_of(package)
        for line, name in imports_of(path)
        if name.split(".")[0] in {*PACKAGES, "tests"} - allowed
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_the_house_are_absolute(package: str) -> None:
    relative = [f"{p.relative_to(HOUSE)}:{line}" for p in files_of(package) for line, n in imports_of(p) if n[0] == "."]
    assert not relative


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_of_the_shell_stays_in_the_shell(library: str) -> None:
    users = {
        str(path.relative_to(HOUSE))
        for package in PACKAGES
        for path in files_of(package)
        if any(name.split(".")[0] == library for _, name in imports_of(path))
    }
    assert users <= ONLY_IN[library]


def python(code: str, *paths: Path, flags: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that looks in `paths` before anywhere else."""
    prelude = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    command = [sys.executable, *flags, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_a_device_needs_no_part_of_the_simulation() -> None:
    modules = [".".join(path.relative_to(HOUSE).with_suffix("").parts) for path in files_of("client")]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = f"""
import importlib, json
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = python(code, HOUSE)
    assert done.returncode == 0, done.stderr
    assert "client.round" in modules
    loaded = set(json.loads(done.stdout))
    assert {"client", "federation", "torch"} <= loaded
    assert not loaded & {*NOT_ON_A_DEVICE, "strategies", "server", "simulations"}


def test_what_passes_messages_to_an_agent_starts_without_torch() -> None:
    """Flower starts a process for every message: torch and the model would take most of a round."""
    code = """
import json, sys
import client.app, client.agent.client
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = python(code, HOUSE)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"client", "federation", "flwr", "grpc"} <= loaded
    assert not loaded & {"torch", "transformers", "lmdb", "pydantic_settings"}


# -------------------------------------------------------------------------------- whose packages


def test_our_own_packages_pass() -> None:
    check_house()


@pytest.mark.parametrize("name", ["client", "server", "strategies", "simulations"])
@pytest.mark.parametrize("form", ["package", "module", "folder"])
def test_someone_elses_package_is_named(tmp_path: Path, name: str, form: str) -> None:
    """A package or a module of that name, earlier on the path; a folder without __init__.py may come before
    packages that are found by an import hook, as in an editable install."""
    target = tmp_path / f"{name}.py" if form == "module" else tmp_path / name
    if form == "module":
        target.write_text("raise SystemExit('imported')\n")
    else:
        target.mkdir()
    if form == "package":
        (target / "__init__.py").write_text("raise SystemExit('imported')\n")
    only_federation = tmp_path / "ours"
    only_federation.mkdir()
    (only_federation / "federation").symlink_to(HOUSE / "federation")
    done = python("from federation.house import check_house; check_house()", tmp_path, only_federation)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert "ConfigError" in said
    assert f"the package {name!r} must be fedquilt's" in said
    assert f"Python finds {target} first" in said


def test_a_part_that_is_not_installed_is_not_missed(tmp_path: Path) -> None:
    for package in ("federation", "client"):
        (tmp_path / package).symlink_to(HOUSE / package)
    code = """
from importlib.util import find_spec
assert find_spec("client") is not None
assert find_spec("server") is None
from federation.house import check_house
check_house()
"""
    without_site_packages = ["-S"]
    done = python(code, tmp_path, flags=without_site_packages)
    assert done.returncode == 0, done.stderr
