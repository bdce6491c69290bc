"""Third parties' packages, as the import system sees installed ones: found by name, checked, or refused."""

from pathlib import Path

import pytest

from federation.errors import ConfigError, PluginError
from federation.plugins import Plugins
from strategies import STRATEGIES, Strategy, make_optimizer, make_strategy
from strategies.conformance import check

INSTALLED = Path(__file__).parent / "installed"


@pytest.fixture
def sign_mean_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(INSTALLED)


def install(
    monkeypatch: pytest.MonkeyPatch, site: Path, package: str, source: str, entry_points: dict[str, str]
) -> None:
    """A package with one module, whose entry points for strategies are {name: "module:object"}."""
    info = site / f"{package}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
    lines = [f"{name} = {value}\n" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("[fedquilt.strategies]\n" + "".join(lines))
    (site / f"{package}.py").write_text(source)
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("sign_mean_installed")
def test_an_installed_strategy_is_found_by_name_and_keeps_every_law() -> None:
    strategy = make_strategy("sign_mean", kappa=1.0)
    assert type(strategy).__module__ == "sign_mean"
    assert check(strategy) == []
    assert STRATEGIES.known()["sign_mean"] == "sign-mean 1.0"


def test_the_example_strategy_fits_in_15_lines() -> None:
    source = (INSTALLED / "sign_mean.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 15


def test_what_is_ours_is_said_to_be_ours() -> None:
    ours = {name for name, origin in STRATEGIES.known().items() if origin == "fedquilt"}
    assert ours == {"fedavg", "masked_mean"}


def test_knowing_a_plugin_does_not_import_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "quilt_broken", "raise RuntimeError('old')", {"broken": "quilt_broken:X"})
    assert STRATEGIES.known()["broken"] == "quilt_broken 2.0"
    assert check(make_strategy("fedavg")) == []
    with pytest.raises(PluginError, match=r"quilt_broken:X \(from quilt_broken 2.0\) raised RuntimeError\('old'\)"):
        make_strategy("broken")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"did you mean 'masked_mean'\? known: .*fedavg, masked_mean"):
        make_strategy("mask_mean")


def test_a_name_taken_twice_is_refused_with_both_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "quilt_twin", "class Mine: ...", {"fedavg": "quilt_twin:Mine"})
    with pytest.raises(PluginError, match=r"'fedavg' is both strategies.means:FedAvg .* and quilt_twin:Mine .*2.0"):
        make_strategy("fedavg")


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("linear_memory = True; merge = None", "merge must be a method that takes"),
        (
            "linear_memory = True; merge = lambda self, a: a",
            r"takes \(a, b\), it takes \(a\): too many positional",
        ),
        ("linear_memory = True; merge = lambda self, b, a: a", "use these names, in this order"),
        ("linear_memory = True; merge = lambda self, a, b, c: a", "missing a required argument: 'c'"),
        ("linear_memory = True", "must have 'merge'"),
        ("merge = lambda self, a, b: a", "must have 'linear_memory'"),
    ],
)
def test_a_strategy_that_breaks_the_contract_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, rule: str
) -> None:
    package = f"quilt_{tmp_path.name}"
    source = f"""
class Ill:
    {body}
    def init(self, schema): ...
    def lift(self, block, state, extra=1): ...
    def finish(self, partial, state): ...
"""
    install(monkeypatch, tmp_path, package, source, {"ill": f"{package}:Ill"})
    with pytest.raises(PluginError, match=rule):
        make_strategy("ill")


def test_a_plugin_must_be_callable() -> None:
    plugins: Plugins[Strategy[int]] = Plugins("strategy", "none", Strategy, {"text": "strategies.registry:__doc__"})
    with pytest.raises(PluginError, match=r"must be a class or a function, strategies.registry:__doc__ .* is a str"):
        plugins.make("text")


def test_options_are_checked_by_name_presence_and_type() -> None:
    with pytest.raises(ConfigError, match=r"strategy 'masked_mean' has no option 'kapa'; did you mean 'kappa'"):
        make_strategy("masked_mean", kapa=2.0)
    with pytest.raises(ConfigError, match=r"optimizer 'adam' needs the option\(s\) learning_rate"):
        make_optimizer("adam")
    with pytest.raises(ConfigError, match=r"cannot take {'kappa': 'three'}"):
        make_strategy("masked_mean", kappa="three")
