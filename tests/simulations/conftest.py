"""What tests of several files compare with."""

from __future__ import annotations

import pytest

from tests.simulations.tiny import simulate, tiny_config


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last checkpoint's checksum of the tiny federation when nothing happens to it."""
    return simulate(tiny_config(), tmp_path_factory.mktemp("undisturbed"))
