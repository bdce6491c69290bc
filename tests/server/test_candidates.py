"""What a deployed run's folder offers for release: the newest checkpoint whose very values were evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from federation.config import RunConfig, identity
from federation.errors import FedquiltWarning, RunError
from federation.pool.file import PoolFile
from server import checkpoint
from server.candidates import deployed_candidate, is_deployed
from server.history import History
from server.live.lines import EvaluationLine

CONFIG = RunConfig(seed=5)


def pool(round_index: int, seed: int = 0) -> PoolFile:
    torch.manual_seed(100 * round_index + seed)
    return PoolFile(round_index, {"pool/h.0": torch.randn(2, 3)}, CONFIG.task)


def line(evaluated: PoolFile, loss: float | None, users: int = 12) -> EvaluationLine:
    metrics = None if loss is None else {"tuned_loss": loss}
    return EvaluationLine(
        round_index=evaluated.round_index,
        version=evaluated.version,
        split="new",
        users_asked=users + 1,
        users=users,
        nodes=2,
        rejected={"late": 1},
        metrics=metrics,
        suppressed="" if metrics else "fewer than 3 users",
    )


def run_of(folder: Path, pools: list[PoolFile], lines: list[EvaluationLine], config: RunConfig = CONFIG) -> Path:
    for saved in pools:
        parts = {"values": saved.values, "strategy": {}}
        checkpoint.save(folder / "checkpoints", saved.round_index, parts, {"config": identity(CONFIG)})
    (folder / "config.json").write_text(config.model_dump_json())
    history = History(folder / "evaluations.jsonl", 0)
    for entry in lines:
        history.add(entry)
    return folder


def test_the_newest_evaluated_checkpoint_is_offered(tmp_path: Path) -> None:
    pools = [pool(1), pool(2), pool(3)]
    run = run_of(tmp_path, pools, [line(pools[0], 2.0), line(pools[1], 1.5, users=7)])
    found = deployed_candidate(run)
    assert (found.pool.version, found.pool.round_index, found.pool.task) == (pools[1].version, 2, CONFIG.task)
    assert torch.equal(found.pool.values["pool/h.0"], pools[1].values["pool/h.0"])
    assert found.evaluation.model_dump() == {"split": "new", "users": 7, "nodes": 2, "metrics": {"tuned_loss": 1.5}}
    assert found.config == identity(CONFIG)
    assert is_deployed(run)
    assert not is_deployed(tmp_path / "checkpoints")


def test_an_evaluation_of_other_values_of_the_same_round_does_not_count(tmp_path: Path) -> None:
    pools = [pool(1), pool(2)]
    run = run_of(tmp_path, pools, [line(pools[0], 2.0), line(pool(2, seed=1), 1.0)])
    assert deployed_candidate(run).pool.version == pools[0].version


def test_the_last_evaluation_of_the_same_values_counts(tmp_path: Path) -> None:
    run = run_of(tmp_path, [pool(1)], [line(pool(1), 2.0), line(pool(1), 1.0)])
    assert deployed_candidate(run).evaluation.metrics == {"tuned_loss": 1.0}


@pytest.mark.parametrize("lines", [[], [line(pool(9), 1.0)], [line(pool(2), None)]], ids=["none", "gone", "suppressed"])
def test_without_an_evaluated_checkpoint_the_remedy_is_named(tmp_path: Path, lines: list[EvaluationLine]) -> None:
    run = run_of(tmp_path, [pool(1), pool(2)], lines)
    with pytest.raises(RunError, match=r"still kept.* keeps those of the rounds 1, 2 and .*evaluate_every") as caught:
        deployed_candidate(run)
    assert str(run) in str(caught.value)


def test_a_configuration_of_another_run_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, [pool(1)], [line(pool(1), 1.0)], CONFIG.model_copy(update={"seed": 6}))
    with pytest.raises(
        RunError, match=r"checkpoints and config.json beside it are of other configurations, .*older version.*; restore"
    ):
        deployed_candidate(run)


@pytest.mark.parametrize("text", ["{", json.dumps({"rounds": 1})])
def test_an_unreadable_configuration_is_named(tmp_path: Path, text: str) -> None:
    run = run_of(tmp_path, [pool(1)], [line(pool(1), 1.0)])
    (run / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config.json cannot be read .*restore the file; a run of an older version"):
        deployed_candidate(run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path: Path) -> None:
    run = run_of(tmp_path, [pool(1), pool(2)], [line(pool(1), 1.0), line(pool(2), 1.0)])
    (run / "checkpoints" / "round-000002" / "manifest.json").write_text("{")
    with pytest.warns(FedquiltWarning, match=r"round-000002 is damaged.*; looking for an evaluated one before it"):
        assert deployed_candidate(run).pool.version == pool(1).version
    (run / "checkpoints" / "round-000001" / "values.safetensors").write_bytes(b"")
    with (
        pytest.warns(FedquiltWarning, match="round-00000[12] is damaged"),
        pytest.raises(RunError, match="kept, usable and evaluated"),
    ):
        deployed_candidate(run)


def test_a_damaged_checkpoint_that_was_not_evaluated_is_not_looked_at(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = run_of(tmp_path, [pool(1), pool(2)], [line(pool(1), 1.0)])
    (run / "checkpoints" / "round-000002" / "manifest.json").write_text("{")
    assert deployed_candidate(run).pool.version == pool(1).version
    assert not recwarn.list
