"""The experiments that we ship: each can be run, and those that are compared differ only where they should."""

from pathlib import Path

import pytest

from federation.config import load_config
from federation.estimators.registry import estimator_of
from federation.qualities import make_quality
from simulations.methods import curve_names, methods_of
from simulations.sweep import claims_of
from simulations.variants import begins_as_the_teachers, federations_of

EXPERIMENTS = Path(__file__).parents[2] / "simulations" / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_run(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    asked = {"base", *config.evaluate.methods, *curve_names(config.evaluate.curves)}
    assert len(methods_of(config)) == len(asked) > len(config.evaluate.methods)
    claims_of(config)
    for federation in federations_of(config).values():
        estimator_of(federation.gate, make_quality(federation.gate.reward.quality).differentiable)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_best_masks_are_asked_for_where_units_are_the_teachers(path: Path) -> None:
    config = load_config(path)
    federations = federations_of(config)
    asked = {method.source for method in methods_of(config) if method.mask in ("best", "type", "informed")}
    assert all(begins_as_the_teachers(federations, name) for name in asked)


def test_the_evidence_is_the_demos_federation_with_more_methods() -> None:
    code, evidence = (load_config(EXPERIMENTS / f"{name}.toml").model_dump() for name in ("code", "evidence"))
    for config in (code, evidence):
        del config["name"], config["kind"]
        del config["evaluate"]["claims"]
    assert set(code["evaluate"].pop("methods")) <= set(evidence["evaluate"].pop("methods"))
    assert code == evidence
