"""Lifting on a Ray cluster on this machine: the same bits as in process, in order, and never without end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as Machines

import server.admission.ray_lifting
from federation.config import ComputeConfig
from federation.errors import PoolError, RunError
from federation.update import UpdateBlock
from server.admission.intake import Outcome
from server.admission.lifting import InProcessLifter, Lifter, make_lifter
from server.admission.ray_lifting import RayLifter
from server.round import rules_of
from strategies.means import MaskedMean, Sums
from strategies.protocol import State
from tests.server.admission.replies import SCHEMA, bits, config_of, honest, office, once, plan_of, served


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    try:
        found = one_machine()
    except RuntimeError:  # Ray gives its own server 30 s to start, which a busy machine may miss
        found = one_machine()
    yield found
    found.shutdown()


def one_machine() -> Machines:
    return Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})


@pytest.fixture
def lifter(machines: Machines) -> Iterator[Lifter]:
    made = make_lifter(ComputeConfig(ray_address=machines.address))
    yield made
    made.close()
    assert not ray.is_initialized()


class Failing(MaskedMean):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        raise PoolError("not of this pool")


class Slow(MaskedMean):
    def lift(self, block: UpdateBlock, state: State) -> Sums:
        time.sleep(1.0)
        return super().lift(block, state)


@dataclass(frozen=True)
class Dying(MaskedMean):
    """Kills its process, the first time."""

    marker: Path = Path()

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        with suppress(FileExistsError):
            self.marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().lift(block, state)


def round_on(lifter: Lifter, folder: Path, strategy: MaskedMean) -> Outcome:
    """A round with more blocks than may be under way, and the nodes in any order."""
    place = office(folder, rules=replace(rules_of(config_of(), SCHEMA), strategy=strategy))
    place.lifter = lifter
    plan = plan_of([3] * 12)
    return served(place.intake(plan), once(honest(plan)), random.Random(4))


def test_a_round_has_the_bits_of_one_in_process_though_a_worker_dies(lifter: Lifter, tmp_path: Path) -> None:
    there = round_on(lifter, tmp_path, Dying(marker=tmp_path / "died"))
    here = round_on(InProcessLifter(), tmp_path, MaskedMean())
    assert (tmp_path / "died").exists()
    assert bits(there) == bits(here)
    assert replace(there, partial=None) == replace(here, partial=None)
    assert there.admitted == 36


def test_what_goes_wrong_is_said_and_leaves_nothing_to_the_next_round(
    lifter: Lifter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PoolError, match=r"^not of this pool$"):
        round_on(lifter, tmp_path, Failing())
    there = round_on(lifter, tmp_path, MaskedMean())
    assert bits(there) == bits(round_on(InProcessLifter(), tmp_path, MaskedMean()))
    monkeypatch.setattr(server.admission.ray_lifting, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(RunError, match=r"from the Ray cluster within 0\.05 s, .*GetTimeoutError.*run again"):
        round_on(lifter, tmp_path, Slow())
    with pytest.raises(RunError, match="this process is connected already"):
        RayLifter("127.0.0.1:1")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_where_no_cluster_is_none_is_started(address: str) -> None:
    with pytest.raises(RunError, match=rf"HOST:PORT of a running .*Ray {ray.__version__}.*'{address}' is not"):
        RayLifter(address)
    assert not ray.is_initialized()
