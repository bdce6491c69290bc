"""Fixtures that tests of several packages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("house", deadline=None)  # a busy machine is no failure
settings.load_profile("house")
torch.set_num_threads(1)  # as workers have; and a forked child would wait for ever for its parent's other threads


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors, and models with them, are float64: for finite differences and oracles with more digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
