"""A federation over the deployed experiment's users, and what a simulation makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from federation.config import RunConfig, load_config
from federation.experiments import experiment_path
from server.checkpoint import load_latest
from tests.simulations.tiny import simulate

CHANGES = ("federation.cohort=64", "limits.pool_norm=0.05", "evaluate.users=12")
"""All users take part, so that each node trains whole blocks; and many updates are clipped."""


def configuration() -> RunConfig:
    return load_config(experiment_path("deployed"), CHANGES)


def final_values(folder: Path) -> Mapping[str, Tensor]:
    """The pool and the gate after the last round."""
    found = load_latest(folder / "checkpoints")
    assert found.round_index == configuration().federation.rounds
    return found.tensors["values"]


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """The pool and the gate as `fedquilt simulate` makes them."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate(configuration(), folder)
    return final_values(folder)


def differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The sections that are not equal to the bit."""
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]
