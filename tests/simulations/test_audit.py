"""The audit of a user store against what a loop over its users counts, and against stores that were tampered with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client.state import UserBlock
from client.store import UserStore, shard_of
from federation.cohorts import draw_cohort
from federation.streams import UserIds
from simulations.audit import Audit, audit
from simulations.compute.workers import start_workers
from tests.simulations.tiny import simulate, tiny_config, tiny_setup

CONFIG = tiny_config()
USERS = range(60)
ROUNDS = CONFIG.federation.rounds


def audited(folder: Path, users: range | UserIds = USERS) -> Audit:
    workers = start_workers(CONFIG)
    try:
        return audit(tiny_setup(CONFIG), workers, users, folder)
    finally:
        workers.close()


def drawn() -> UserIds:
    """Everyone's cohorts: (60,) counts."""
    cohorts = [draw_cohort(USERS, CONFIG.federation, tiny_setup(CONFIG).streams, r + 1) for r in range(ROUNDS)]
    return np.bincount(np.concatenate(cohorts), minlength=60)


def change(folder: Path, user: int, **columns: torch.Tensor) -> None:
    """Replaces columns of one user's newest state, as if another program had written it."""
    with UserStore(folder / "users", CONFIG.federation.shards, tiny_setup(CONFIG).record_layout) as store:
        found = store.read(np.array([user]), ROUNDS + 1)
        kept = {"embedding_ue": found.embedding_ue, "mask_ub": found.mask_ub, "visits_u": found.visits_u}
        store.write(UserBlock(found.ids, **{**kept, **columns}), ROUNDS)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    simulate(CONFIG, tmp_path)
    return tmp_path


def test_every_visit_is_there_once(finished: Path) -> None:
    visits = audited(finished).visits
    assert (visits.users, visits.visits, visits.rebuilt) == ((drawn() > 0).sum(), 12 * ROUNDS, {})


def test_a_user_who_began_anew_is_counted_by_shard_though_the_sum_is_right(finished: Path) -> None:
    twice = np.flatnonzero(drawn() >= 1)[:2].tolist()
    change(finished, twice[0], visits_u=torch.tensor([int(drawn()[twice[0]]) - 1], dtype=torch.int32))
    change(finished, twice[1], visits_u=torch.tensor([int(drawn()[twice[1]]) + 1], dtype=torch.int32))
    visits = audited(finished).visits
    shard = int(shard_of(np.array(twice[:1]), CONFIG.federation.shards)[0])
    assert (visits.visits, visits.rebuilt) == (12 * ROUNDS, {shard: 1})


def test_equal_stores_have_equal_checksums_and_one_number_makes_another(finished: Path, tmp_path: Path) -> None:
    simulate(CONFIG, tmp_path / "again")
    before = audited(finished).visits.checksum
    assert audited(tmp_path / "again").visits.checksum == before
    user = int(np.flatnonzero(drawn())[-1])
    embedding_ue = torch.full((1, CONFIG.gate.embedding), 1e-30)
    change(finished, user, embedding_ue=embedding_ue)
    changed = audited(finished).visits
    assert changed.checksum != before
    assert not changed.rebuilt


def test_users_who_never_took_part_are_not_asked_for(finished: Path) -> None:
    """Else an audit would cost as much as the population, not as the cohorts."""
    never = int(np.flatnonzero(drawn() == 0)[0])
    before = audited(finished)
    change(finished, never, visits_u=torch.tensor([9], dtype=torch.int32))
    assert audited(finished).visits == before.visits


def test_bytes_per_user_are_those_of_the_files(finished: Path) -> None:
    taken = sum(path.stat().st_blocks * 512 for path in (finished / "users").rglob("data.mdb"))
    found = audited(finished)
    assert found.bytes_per_user == pytest.approx(taken / found.visits.users)
