"""The benchmarks of deployments, without the deployments: the server's intake in small, figures from made-up times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.admission.lifting import Lifted, Terms, lift_payloads
from simulations.benchmarks import deployment, endurance, intake
from simulations.benchmarks.commands import record_of
from simulations.benchmarks.figures import FIGURES, figures
from strategies.means import Sums

# -------------------------------------------------------------------------------- the intake


@pytest.fixture
def lifted(monkeypatch: pytest.MonkeyPatch) -> list[Lifted]:
    """What comes of each block that is lifted."""
    found = []

    def watched(terms: Terms, *block: Any) -> Lifted:
        found.append(lift_payloads(terms, *block))
        return found[-1]

    monkeypatch.setattr("server.admission.lifting.lift_payloads", watched)
    return found


def test_each_side_takes_in_all_replies_of_each_kind(lifted: list[Lifted]) -> None:
    seconds = intake.in_turns_here(2, replies=3)
    assert {side: [*of] for side, of in seconds.items()} == {
        "admitted": ["fp32", "int8"],
        "taken_in": ["fp32", "int8"],
    }
    assert all(len(taken) == 2 and min(taken) > 0 for of in seconds.values() for taken in of.values())
    assert [block.admitted for block in lifted] == [3] * 4 * 3
    assert all(not block.malformed and not block.refused for block in lifted)
    assert sum(isinstance(block.partial, Sums) for block in lifted) == len(lifted) / 2
    assert sum(block.partial is None for block in lifted) == len(lifted) / 2


def test_replies_are_of_the_size_that_is_said() -> None:
    sizes = {kind: len(intake._reply(intake._schema(), kind, seed=0)) for kind in intake.KINDS}
    assert sizes["fp32"] == pytest.approx(128 * 1024, rel=0.01)
    assert sizes["int8"] == pytest.approx(38 * 1024, rel=0.01)


@pytest.mark.slow
def test_speeds_are_taken_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "REPLIES", 2)
    seconds = intake.speeds(3)
    assert {kind: len(taken) for kind, taken in seconds["admitted"].items()} == {"fp32": 3, "int8": 3}


def test_memory_is_taken_while_replies_are_served(lifted: list[Lifted]) -> None:
    assert 10 < intake.take_in(2) < 8192
    assert [block.admitted for block in lifted] == [2]


def test_a_peak_that_is_over_when_work_ends_is_seen() -> None:
    idle = intake._peak_mib(lambda: None)
    assert idle is not None
    assert intake._peak_mib(lambda: np.ones(64 << 17).sum()) - idle == pytest.approx(64, abs=8)
    assert intake._peak_mib(lambda: None) - idle == pytest.approx(0, abs=8)


def test_where_the_system_does_not_tell_there_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(intake, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert intake.take_in(1) is None


# -------------------------------------------------------------------------------- lines, records, figures


MEASURED = deployment.Measured(
    rounds={
        "empty_app": {2: (3.0, 1.0, 2.0), 8: (2.0, 2.5, 9.0)},
        "agent": {2: (2.5, 2.75, 9.0), 8: (3.0, 3.25, 3.5)},
        "embedded": {2: (9.0, 10.0, 11.0), 8: (20.0, 21.0, 22.0)},
    },
    sizes={"update_bytes": 1500, "dense_lora_bytes": 90_000, "download_bytes": 2_000_000},
    memory={0: 300.0, 10: 340.0, 500: None},
    intake={
        "admitted": {"fp32": (9.0, 0.1, 0.05), "int8": (0.064,)},
        "taken_in": {"fp32": (0.128,), "int8": (0.256, 0.512, 0.128)},
    },
)


def test_a_deployment_states_medians_and_our_share() -> None:
    assert MEASURED.line == {
        "nodes": [2, 8],
        "round_seconds_empty_app": [2.0, 2.5],
        "round_seconds_agent": [2.75, 3.25],
        "round_seconds_embedded": [10.0, 21.0],
        "our_share_seconds": [0.75, 0.75],
        "update_bytes": 1500,
        "dense_lora_bytes": 90_000,
        "download_bytes": 2_000_000,
        "server_mib_0": 300.0,
        "server_mib_10": 340.0,
        "server_mib_500": None,
        "admitted_per_second": {"fp32": 5120, "int8": 8000},
        "taken_in_per_second": {"fp32": 4000, "int8": 2000},
    }


def test_a_deployments_record_is_json_and_shows_its_figures() -> None:
    record = record_of(MEASURED, "deployment", "deployment")
    assert json.loads(json.dumps(record)) == record
    assert record["rounds"]["agent"]["8"] == [3.0, 3.25, 3.5]
    assert record["intake_seconds"]["taken_in"]["int8"] == [0.256, 0.512, 0.128]
    assert record["users_per_node"] == deployment.USERS_PER_NODE
    rows = figures(record, "deployment")
    assert rows[0] == ("SuperNodes", "2", "8")
    assert ("our share, with agents", "0.75", "0.75") in rows
    assert ("updates of 128 KiB admitted per second", "5,120", "") in rows
    assert ("lifted and merged too, as fp32", "4,000", "") in rows
    assert len(rows) == len(FIGURES["deployment"]) - 1  # no memory for 500 replies


def test_bytes_are_those_of_one_user_and_one_node() -> None:
    line = {"bytes_up": 6003, "users": 4, "bytes_down": 100, "nodes": 2}
    values = {"pool/a": torch.zeros(8, 30), "pool/b": torch.zeros(8, 12), "gate": torch.zeros(1, 99)}
    assert deployment._sizes(line, values, budget=2) == {
        "update_bytes": 1501,
        "dense_lora_bytes": 4 * 2 * 42,
        "download_bytes": 50,
    }


def test_the_demo_asks_every_node_for_as_many_users() -> None:
    config = deployment.demo(nodes=3, rounds=7)
    assert config.federation.cohort == 3 * deployment.USERS_PER_NODE
    assert (config.federation.rounds, config.deployment.nodes, config.gate.warmup) == (7, 3, 0)


def made_up_endurance() -> endurance.Endurance:
    """Four new users in two groups, whom the disturbed pool serves worse by 0.25, 0.5, 0 and 0.25 when tuned."""
    undisturbed = {"base_loss": np.full(4, 2.0), "mask_loss": np.full(4, 1.75), "tuned_loss": np.full(4, 1.5)}
    worse = np.array([0.25, 0.5, 0.0, 0.25])
    disturbed = {**undisturbed, "tuned_loss": undisturbed["tuned_loss"] + worse}
    rounds = {
        run: [{"round_index": index, "admitted": admitted} for index in (1, 2)]
        for run, admitted in (("undisturbed", 16), ("disturbed", 9))
    }
    return endurance.Endurance(
        rounds=rounds,
        evaluations={run: {"round_index": 2, "metrics": {"tuned_loss": 1.5}} for run in rounds},
        loss_u={"undisturbed": undisturbed, "disturbed": disturbed},
        groups_u=np.array([0, 0, 1, 1]),
    )


def test_endurance_states_paired_differences_and_their_error() -> None:
    line = made_up_endurance().line
    assert (line["rounds"], line["users_admitted"]) == (
        {"undisturbed": 2, "disturbed": 2},
        {"undisturbed": 32, "disturbed": 18},
    )
    error = np.sqrt(2 * (0.25**2 + 0.25**2)) / 4  # by hand: both groups' deviations sum to 0.25 and -0.25
    assert line["difference"] == {"disturbed": {"mask_loss": (0.0, 0.0), "tuned_loss": pytest.approx((0.25, error))}}
    assert line["gain"]["undisturbed"] == {"mask_loss": 0.25, "tuned_loss": 0.5}
    assert line["gain"]["disturbed"] == {"mask_loss": 0.25, "tuned_loss": 0.25}


def test_endurances_record_is_json() -> None:
    measured = made_up_endurance()
    record = json.loads(json.dumps(record_of(measured, "endurance", "endurance"), allow_nan=False))
    assert {key: record[key] for key in measured.line} == json.loads(json.dumps(measured.line))
    assert (record["new_users"], record["killed_after"]["server"]) == (4, endurance.KILL_SERVER)
    assert record["history"]["disturbed"][1]["admitted"] == 9
