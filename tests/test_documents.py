"""Documents against the records and files that they show."""

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from federation.base import BaseModel
from federation.config import QualityConfig, RunConfig
from federation.estimators.registry import ESTIMATORS
from federation.qualities import make_quality
from simulations import documents
from simulations.documents import DOCUMENTS, HOUSE, PLOTS, plots_of, rendered
from simulations.federate import read_history
from tests.federation.estimators.problems import PROBLEMS, Curved, replicas
from tests.simulations.meta_records import made_up_continual, with_curves
from tests.simulations.tiny import simulate, tiny_config

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
TOML = re.compile(r"```toml\n(.*?)```", re.DOTALL)
GATE = HOUSE / "docs" / "gate.md"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_figure_is_that_of_its_record(name: str) -> None:
    text = (HOUSE / name).read_text()
    assert rendered(text) == text, "run `python -m simulations.documents`"


def test_every_plot_is_that_of_its_record_and_none_is_left_over() -> None:
    plots = {path: svg for name in DOCUMENTS for path, svg in plots_of((HOUSE / name).read_text()).items()}
    assert {path: path.read_text() for path in PLOTS.glob("*")} == plots, "run `python -m simulations.documents`"


def test_a_documents_plots_are_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_curves() | {"continual": made_up_continual()}
    (tmp_path / "mine.json").write_text(json.dumps(run))
    kinds = ("shots", "shots_plot", "continual", "tasks_plot")
    (tmp_path / "page.md").write_text("\n".join(f"<!-- {kind}: mine.json -->\n<!-- end -->" for kind in kinds))
    for name, value in (("HOUSE", tmp_path), ("PLOTS", tmp_path / "plots"), ("DOCUMENTS", ("page.md",))):
        monkeypatch.setattr(documents, name, value)
    documents.main()
    text = (tmp_path / "page.md").read_text()
    links = re.findall(r"!\[.+\]\((.*)\)", text)
    assert links == ["plots/mine-shots.svg", "plots/mine-tasks.svg"]
    assert [(tmp_path / link).read_text()[:4] for link in links] == ["<svg", "<svg"]
    assert "| 5 examples | `shared_tuned` | 20.0% | 25.0% | 45.0% |" in text
    assert "| `none` | 53.3 ± 1.0 |" in text
    assert "Mean accuracy over new users; steps are spaced as logarithms. Dotted: the frozen model." in text
    assert "Read a column downwards" in text
    assert rendered(text) == text


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


@pytest.fixture
def guide_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's module, installed with the page's entry points."""
    text = GATE.read_text()
    (module,) = PYTHON.findall(text)
    (declared,) = (block for block in TOML.findall(text) if "entry-points" in block)
    groups = tomllib.loads(declared)["project"]["entry-points"]
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    (tmp_path / "mine.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("guide_installed")
@pytest.mark.parametrize("case", ["bernoulli", "2 of 4, twice"])
def test_the_guides_estimator_is_unbiased(case: str) -> None:
    problem, users = PROBLEMS[case], 40_000
    estimator = ESTIMATORS.make("against_frozen")
    gamma_ug = replicas(problem, estimator, 0.2, 1, users, Curved()).gamma_ug
    error_g = gamma_ug.std(0) / users**0.5
    exact_g = problem.gradient(Curved().value(problem.masks()))
    assert ((gamma_ug.mean(0) - exact_g).abs() < 4.5 * error_g).all()
    assert (exact_g.abs() > 4.5 * error_g).any()


@pytest.mark.usefixtures("guide_installed")
def test_the_guides_quality_caps_the_loss_of_an_example() -> None:
    base = BaseModel(torch.nn.Identity(), lambda m, x, y: (m(x) - y).abs(), lambda m, x: x, 1, (), "distance")
    quality = make_quality(QualityConfig(name="capped_loss", options={"most": 2.0}))
    found = quality.measure(base, torch.tensor([0.5, 5.0, -2.0]), torch.zeros(3))
    assert found.tolist() == [-0.5, -2.0, -2.0]


@pytest.mark.usefixtures("guide_installed")
def test_a_federation_learns_with_the_guides_plugins(tmp_path: Path) -> None:
    own = ("gate.estimator.name=against_frozen", "gate.reward.quality.name=capped_loss", "federation.rounds=2")
    simulate(tiny_config(*own, "gate.reward.quality.options={most=0.25}", "gate.warmup=0"), tmp_path / "run")
    metrics = read_history(tmp_path / "run")[0]["metrics"]
    assert metrics["support_loss"] > 0.25 >= -metrics["reward"] > 0


class _Counted(Curved):
    """A reward that counts what is asked of it, per user."""

    masks = gradients = 0

    def reward(self, masks_ukg: torch.Tensor) -> torch.Tensor:
        type(self).masks += masks_ukg.shape[1]
        return super().reward(masks_ukg)

    def reward_gradient(self, strength_ug: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        type(self).gradients += 1
        return super().reward_gradient(strength_ug)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.builtin))
def test_the_guides_table_of_estimators_is_true(name: str) -> None:
    line = re.findall(rf"^\| `{name}` \| (.*) \|$", GATE.read_text(), re.MULTILINE)[0]  # later ones show records
    masks, gradient, biased, cost = line.split(" | ")
    estimator = ESTIMATORS.make(name)
    assert masks == ", ".join(estimator.distributions)
    assert gradient == ("yes" if estimator.differentiable else "no")
    assert biased == ("no" if estimator.unbiased else "yes")
    counted = type("Counted", (_Counted,), {})()
    problem = PROBLEMS["bernoulli"]
    replicas(problem, estimator, 0.2, 4, 3, counted)
    words = {"K masks": 4, "K + 1 masks": 5, "K gradients": 4, "1 gradient": 1}
    said = {"masks": 0, "gradients": 0}
    for part in cost.split(", "):
        said["masks" if "mask" in part else "gradients"] += words[part]
    assert said == {"masks": counted.masks, "gradients": counted.gradients}


def test_every_setting_of_the_gate_is_shown_with_its_default() -> None:
    shown = dict(
        re.findall(r"^\| `([\w.]+)` \| (.*?) \| ", rendered("<!-- settings: gate -->\n<!-- end -->"), re.MULTILINE)
    )
    flat = dict(_flat(RunConfig().gate.model_dump()))
    assert set(shown) == set(flat)
    for name, value in flat.items():
        if isinstance(value, float | int) and not isinstance(value, bool):
            assert float(shown[name]) == value
        elif isinstance(value, str):
            assert shown[name] == value
    assert (shown["interactions"], shown["reward.target"], shown["inputs"]) == (
        "false",
        "none",
        "gains, context, embedding",
    )


def _flat(settings: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if isinstance(value, dict) and name != "options":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
