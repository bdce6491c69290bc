"""The experiments that we ship: each can be run, and those that are compared differ only where they should."""

from pathlib import Path

import pytest

from federation.config import load_config
from simulations.methods import methods_of

EXPERIMENTS = Path(__file__).parents[2] / "simulations" / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_run(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert len(methods_of(config)) == len(config.evaluate.methods) + 1


def test_the_evidence_is_the_demos_federation_with_more_methods() -> None:
    code, evidence = (load_config(EXPERIMENTS / f"{name}.toml").model_dump() for name in ("code", "evidence"))
    for config in (code, evidence):
        del config["name"], config["kind"]
        del config["evaluate"]["claims"]
    assert set(code["evaluate"].pop("methods")) <= set(evidence["evaluate"].pop("methods"))
    assert code == evidence
