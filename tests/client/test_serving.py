"""Serving against a simulation and plain formulas; releases, rebasing and forgetting."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import client.one_user
from client.continual.kept import course_from
from client.node import Node, NodeConfig
from client.personal_store import Kept
from client.pools import NEWEST
from client.serving import CANNOT_UNDO, BegunAnew, Forgotten, Rebased, Serving, ServingStatus
from federation.config import PopulationConfig, RunConfig
from federation.data import texts
from federation.errors import NodeError, StoreError
from federation.pool.file import PoolFile
from federation.settings import parse
from federation.streams import Streams
from server.round import from_checkpoint
from simulations.compute.worker import Worker
from simulations.federate import last_checkpoint
from simulations.methods import known_methods
from simulations.personal import personal_rows
from simulations.runs import MAIN, run
from simulations.serve import Trained, propose_masks, start_of
from tests.client.served import (
    SYNTHETIC,
    TASK,
    equal,
    instructions,
    opened,
    pool_of,
    released,
    rows_of,
    task_config,
    users_with_texts,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = opened(tmp_path / "state")
    yield made
    made.close()


def query_loss(node: Node, user_id: int, rows: dict[str, Tensor]) -> float:
    """By the plain formula of a low-rank layer, for the perceptron of two layers."""
    batch = node.population.batch(np.array([user_id]), "query", None, Streams(5))
    base = node.population.base_model().module
    x = batch.inputs[0]
    for layer in ("fc1", "fc2"):
        weight = base.get_submodule(layer).weight
        row = rows[f"pool/{layer}"][0]
        down, up = row[:, : weight.shape[1]], row[:, weight.shape[1] :]
        x = x @ weight.T + (x @ down.T) @ up
        x = torch.relu(x) if layer == "fc1" else x
    return float(0.5 * F.mse_loss(x, batch.targets[0]))


# -------------------------------------------------------------------------------- as in a simulation

RUN = {
    "population": SYNTHETIC,
    "federation": {"rounds": 3, "cohort": 6},
    "compute": {"block": 4, "workers": 0},
    "evaluate": {
        "methods": ["dsa_t2"], "users": 4, "tuning_users": 2, "steps": [5], "learning_rates": [0.03], "examples": 6,
        "gain_examples": 12, "personal": {"rows": "ternary", "top": 0.4},
    },
}  # fmt: skip


@pytest.mark.parametrize("distribution", ["budget", "bernoulli"])
def test_a_device_serves_what_a_simulation_serves(tmp_path: Path, distribution: str) -> None:
    gate = TASK["gate"] | {"distribution": distribution}
    config = parse(RunConfig, TASK | RUN | {"gate": gate})
    run(config, tmp_path / "run")
    found = last_checkpoint(tmp_path / "run" / MAIN)
    worker = Worker(config)
    values = from_checkpoint(found, worker.setup(config).rules).values
    personal = {
        "steps": 5, "learning_rate": 0.03, "examples": 6, "gain_examples": 12, "rows": {"rows": "ternary", "top": 0.4},
    }  # fmt: skip
    node = opened(tmp_path / "state")
    version = node.keep(PoolFile(3, values, task_config(gate=gate, personal=personal)).to_bytes())
    node.adopt(version)
    serving = Serving(node)
    for user_id in (0, 9, 12):
        trained, method = Trained(config, {"pool": values}, {"pool": config}), known_methods(config)["dsa_t0"]
        assert method.choice is not None
        _, packed = propose_masks(worker, trained, np.array([user_id]), [method.choice])
        untuned = start_of(worker, trained, method, np.array([user_id]), packed)
        assert equal(rows_of(serving, str(user_id)), dict(untuned.rows))
        figures = serving.personalize(str(user_id))
        rows = rows_of(serving, str(user_id))
        _, expected = personal_rows(tmp_path / "run", user_id)
        assert equal({name: row[0] for name, row in rows.items()}, expected)
        assert (figures.version, figures.steps) == (version, 5)
        assert figures.loss_before == pytest.approx(query_loss(node, user_id, dict(untuned.rows)), rel=1e-4)
        assert figures.loss_after == pytest.approx(query_loss(node, user_id, rows), rel=1e-4)
        assert figures.loss_before != figures.loss_after
        kept = node.personal.get(user_id)
        assert kept is not None
        assert figures.personal_bytes == len(kept.payload)
    node.close()


@pytest.mark.parametrize("policy", ["saliency", "random", "all"])
def test_a_release_without_a_gate_serves_by_its_policy(node: Node, policy: str) -> None:
    config = task_config(gate=TASK["gate"] | {"policy": policy})
    version = released(node, config=config)
    values = node.pool(version).values
    rows = rows_of(Serving(node), "3")
    if policy == "all":
        assert equal({name: row[0] for name, row in rows.items()}, dict(values))
        return
    worker = Worker(parse(RunConfig, TASK | {"population": SYNTHETIC, "gate": TASK["gate"] | {"policy": policy}}))
    run_config = parse(RunConfig, TASK | {"population": SYNTHETIC, "evaluate": {"gain_examples": 8}})
    trained = Trained(run_config, {"pool": values}, {"pool": run_config})
    method = replace(known_methods(run_config)["dsa_t0"], mask=policy)
    assert method.choice is not None
    _, packed = propose_masks(worker, trained, np.array([3]), [method.choice])
    assert equal(rows, dict(start_of(worker, trained, method, np.array([3]), packed).rows))


# -------------------------------------------------------------------------------- releases


def test_before_a_release_everyone_has_the_base(node: Node) -> None:
    serving = Serving(node)
    personal = serving.model_of("2")
    assert personal.rows is None
    assert personal.model.base is node.base_model()
    with pytest.raises(NodeError, match=r"this node serves none yet; make one on the server with `fedquilt release`"):
        serving.personalize("2")
    config = task_config(pool={"rank": 4, "scale": 2.5, "target_modules": ["fc2"]})
    assert node.task(config).model.base.module is personal.model.base.module


def test_users_keep_the_release_that_they_were_tuned_on(node: Node, tmp_path: Path) -> None:
    serving = Serving(node)
    first = released(node)
    serving.personalize("2")
    rows, untuned = rows_of(serving, "2"), rows_of(serving, "3")
    for round_index in range(4, 6 + NEWEST):
        newest = released(node, round_index)
    assert first in node.describe().versions
    assert equal(rows_of(serving, "2"), rows)
    assert not equal(rows_of(serving, "3"), untuned)
    node.close()
    again = opened(tmp_path / "state")
    assert equal(rows_of(Serving(again), "2"), rows)
    assert Serving(again).personalize("2").version == newest
    for round_index in range(9, 11 + NEWEST):
        released(again, round_index)
    assert first not in again.describe().versions
    assert newest in again.describe().versions
    again.close()


def test_masks_are_proposed_anew_for_another_release(node: Node) -> None:
    serving = Serving(node)
    for round_index in (3, 4):
        released(node, round_index, noise=1.0)
        found = [rows_of(serving, str(user)) for user in range(9)]
        again = [rows_of(serving, str(user)) for user in range(9)]
        anew = [rows_of(Serving(node), str(user)) for user in range(9)]
        assert all(map(equal, found, again))
        assert all(map(equal, found, anew))


def test_a_kill_between_pool_and_values_leaves_no_values_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever values are stored, their pool is pinned already."""
    version, put = released(node), node.personal.put

    def put_when_pinned(user_id: int, kept: Kept) -> None:
        notes = json.loads((node.config.state / "release.json").read_text())
        assert version in notes["pinned"]
        put(user_id, kept)

    monkeypatch.setattr(node.personal, "put", put_when_pinned)
    Serving(node).personalize("2")
    assert node.personal.versions() == {version}


def test_personalising_again_gives_the_same_and_mends_damaged_values(node: Node) -> None:
    serving = Serving(node)
    released(node)
    first = serving.personalize("2")
    rows = rows_of(serving, "2")
    kept = node.personal.get(2)
    assert kept is not None
    node.personal.put(2, replace(kept, payload=kept.payload[:-1] + bytes([kept.payload[-1] ^ 1])))
    with pytest.raises(StoreError, match=r"values of user '2' cannot be read .*checksum.*; personalise it again"):
        serving.model_of("2")
    assert serving.personalize("2") == first
    assert equal(rows_of(serving, "2"), rows)


def test_a_lost_pool_is_named_with_the_user(node: Node) -> None:
    serving = Serving(node)
    version = released(node)
    serving.personalize("2")
    released(node, 4)
    released(node, 5)
    (node.config.state / "pools" / f"{version}.safetensors").unlink()
    with pytest.raises(NodeError, match=rf"user '2' has values that refer to the pool {version}: .*or personalise it"):
        serving.model_of("2")
    serving.personalize("2")
    assert serving.model_of("2").rows is not None


def test_tuning_that_diverges_keeps_what_there_was(node: Node) -> None:
    serving = Serving(node)
    released(node)
    serving.personalize("2")
    rows = rows_of(serving, "2")
    wild = task_config(personal=TASK["personal"] | {"learning_rate": 1e30, "rows": {"rows": "fp32"}})
    released(node, 4, wild)
    with pytest.raises(NodeError, match=r"user '2' got (nan|inf); the federation's personal.learning_rate \(1e\+30\)"):
        serving.personalize("2")
    assert equal(rows_of(serving, "2"), rows)


@pytest.mark.parametrize(
    ("meta", "blamed"),
    [
        ({"signal": "reptile"}, r"personal\.learning_rate \(1e\+31\)"),
        ({"signal": "maml"}, r"local\.learning_rate \(1e\+30\)"),
        ({"signal": "fomaml", "rule": {"learning_rate": 1e29}}, r"meta\.rule\.learning_rate \(1e\+29\)"),
        (
            {"signal": "maml", "rule": {"name": "rates"}},
            r"local\.learning_rate \(1e\+30\) or meta\.rule\.bound \(16\.0\)",
        ),
        (
            {"signal": "fomaml", "rule": {"name": "learned", "learning_rate": 1e30}},
            r"meta\.rule\.learning_rate \(1e\+30\) or meta\.rule\.bound \(16\.0\)",
        ),
    ],
)
@pytest.mark.parametrize("continual", ["none", "online_ewc"])
def test_what_is_too_high_is_what_the_steps_go_by(
    node: Node, meta: dict[str, object], blamed: str, continual: str
) -> None:
    personal = TASK["personal"] | {"learning_rate": 1e31, "continual": {"rule": continual}, "rows": {"rows": "fp32"}}
    released(node, config=task_config(meta=meta, personal=personal, local={"steps": 4, "learning_rate": 1e30}))
    with pytest.raises(NodeError, match=rf"user '2' got (nan|inf); the federation's {blamed} is too high: lower it\."):
        Serving(node).personalize("2")
    assert node.personal.get(2) is None


def pass_on(node: Node) -> str:
    """Three heads and a release more: nothing before them is kept for being new. Returns the release's version."""
    for round_index in range(20, 20 + NEWEST):
        node.keep(pool_of(node, task_config(), round_index).to_bytes())
    return released(node, 30)


def test_the_release_of_a_user_that_is_tuned_is_kept_whatever_arrives(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, tune = Serving(node), client.one_user.personal_values
    first = released(node)

    def tuned_slowly(*args: object) -> object:
        pass_on(node)
        return tune(*args)

    monkeypatch.setattr(client.one_user, "personal_values", tuned_slowly)
    assert serving.personalize("2").version == first
    rows = rows_of(serving, "2")
    node.close()
    again = opened(tmp_path / "state")
    assert equal(rows_of(Serving(again), "2"), rows)
    again.close()


def test_a_pool_that_is_lost_while_a_user_is_tuned_changes_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, tune = Serving(node), client.one_user.personal_values
    released(node)
    serving.personalize("2")
    had = node.personal.get(2)
    lost = released(node, 4)

    def losing(*args: object) -> object:
        (node.config.state / "pools" / f"{lost}.safetensors").unlink()
        return tune(*args)

    monkeypatch.setattr(client.one_user, "personal_values", losing)
    with pytest.raises(NodeError, match=f"{lost} is not kept any longer; nothing was changed, ask again") as error:
        serving.personalize("2")
    assert error.value.fault == "lacks version"
    assert node.personal.get(2) == had
    assert json.loads((node.config.state / "release.json").read_text())["pinned"] == sorted(node.personal.versions())


# -------------------------------------------------------------------------------- several at a time

IN_COURSE = {"personal": TASK["personal"] | {"continual": {"rule": "replay", "examples": 5}}}


class SlowTask:
    """Lets the first task that is learned from now on wait for the other's end, which a lost update needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.other = threading.Event(), threading.Event()
        learn = client.one_user.next_task

        def slowly(*args: object) -> object:
            found = learn(*args)
            if not self.begun.is_set():
                self.begun.set()
                self.other.wait(0.3)
            return found

        monkeypatch.setattr(client.one_user, "next_task", slowly)

    def beside(self, serving: Serving, other: Callable[[], object]) -> None:
        """User 2 is personalised, and meanwhile `other` is called."""
        with ThreadPoolExecutor(1) as aside:
            first = aside.submit(serving.personalize, "2")
            assert self.begun.wait(30)
            other()
            self.other.set()
            first.result(30)


def tasks_of(node: Node, user_id: int) -> int:
    kept = node.personal.get(user_id)
    assert kept is not None
    names = [m.section for m in node.loaded(kept.version)[0].model.spec.modules]
    return course_from(kept.memory, names).standing.tasks


def test_two_personalisations_at_a_time_are_two_tasks(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(node)
    released(node, config=task_config(**IN_COURSE))
    SlowTask(monkeypatch).beside(serving, lambda: serving.personalize("2"))
    assert tasks_of(node, 2) == 2


def test_who_begins_anew_while_it_is_personalised_is_in_no_course(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(node)
    released(node, config=task_config(**IN_COURSE))
    serving.personalize("2")
    answers: list[BegunAnew] = []
    SlowTask(monkeypatch).beside(serving, lambda: answers.append(serving.begin_anew("2")))
    kept = node.personal.get(2)
    assert kept is not None
    assert (answers, kept.memory) == ([BegunAnew(True)], b"")
    assert serving.begin_anew("2") == serving.begin_anew("3") == BegunAnew(False)


def test_who_is_moved_while_it_is_personalised_has_moved(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(node)
    released(node, config=task_config(**IN_COURSE))
    serving.personalize("2")
    newer = node.keep(pool_of(node, task_config(**IN_COURSE), 5).to_bytes())
    SlowTask(monkeypatch).beside(serving, lambda: serving.rebase(newer, margin=1e9))
    assert (node.personal.versions(), tasks_of(node, 2)) == ({newer}, 2)


def test_users_do_not_wait_for_one_another(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(node)
    released(node, config=task_config(**IN_COURSE))

    def other() -> None:
        serving.personalize("3")
        assert node.personal.users().tolist() == [3]

    slow = SlowTask(monkeypatch)
    monkeypatch.setattr(slow.other, "wait", lambda seconds: threading.Event.wait(slow.other, 30))
    slow.beside(serving, other)
    assert (tasks_of(node, 2), tasks_of(node, 3)) == (1, 1)


# -------------------------------------------------------------------------------- rebasing


def test_values_move_to_a_release_that_serves_as_well(node: Node) -> None:
    serving = Serving(node)
    first = released(node)
    for user in ("2", "3", "9"):
        serving.personalize(user)
    before = {user: rows_of(serving, user) for user in ("2", "3", "9")}
    base = node.pool(first)
    nearly = PoolFile(4, {name: rows * (1 + 1e-7) + 1e-7 for name, rows in base.values.items()}, base.task)
    near = node.keep(nearly.to_bytes())
    far = node.keep(pool_of(node, task_config(), 5, noise=3.0).to_bytes())

    assert serving.rebase(far) == Rebased(0, 3)
    assert serving.rebase(first) == Rebased(0, 3)
    assert all(equal(rows_of(serving, user), before[user]) for user in before)
    assert serving.rebase(near, "2", margin=1e-4) == Rebased(1, 0)
    assert node.personal.versions() == {first, near}
    assert serving.rebase(near, margin=1e-4) == Rebased(2, 1)
    assert node.personal.versions() == {near}
    for user, rows in before.items():
        for name, row in rows_of(serving, user).items():
            torch.testing.assert_close(row, rows[name], rtol=0.02, atol=0.02)
    assert serving.rebase(far, margin=1e9) == Rebased(3, 0)
    assert all(not equal(rows_of(serving, user), before[user]) for user in before)


def test_the_margin_is_of_the_loss_on_the_query_part(node: Node) -> None:
    serving = Serving(node)
    released(node)
    serving.personalize("2")
    rows = rows_of(serving, "2")
    other = node.keep(pool_of(node, task_config(), 5, noise=0.5).to_bytes())
    assert serving.rebase(other, margin=1e9) == Rebased(1, 0)
    worse = query_loss(node, 2, rows_of(serving, "2")) - query_loss(node, 2, rows)
    assert worse > 0
    serving.personalize("2")
    assert serving.rebase(other, margin=0.99 * worse) == Rebased(0, 1)
    assert serving.rebase(other, margin=1.01 * worse) == Rebased(1, 0)


def test_the_release_that_users_move_to_is_kept_whatever_arrives(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, batch = Serving(node), node.batch
    released(node)
    for user in ("2", "3"):
        serving.personalize(user)
    second = released(node, 4)
    monkeypatch.setattr(node, "batch", lambda *args: (pass_on(node), batch(*args))[1])
    assert serving.rebase(second, margin=1e9) == Rebased(2, 0)
    rows = rows_of(serving, "2")
    node.close()
    again = opened(tmp_path / "state")
    assert again.personal.versions() == {second}
    assert equal(rows_of(Serving(again), "2"), rows)
    again.close()


def test_values_of_another_shape_stay(node: Node) -> None:
    serving = Serving(node)
    first = released(node)
    serving.personalize("2")
    wider = released(node, 4, task_config(pool={"rank": 12, "scale": 1.0}))
    assert serving.rebase(wider, margin=1e9) == Rebased(0, 1)
    assert node.personal.versions() == {first}


def test_users_of_other_nodes_are_not_rebased(node: Node, tmp_path: Path) -> None:
    version = released(node)
    for user in ("1", "7"):
        Serving(node).personalize(user)
    other = node.keep(pool_of(node, task_config(), 5).to_bytes())
    node.close()
    population = parse(PopulationConfig, SYNTHETIC)
    half = Node(NodeConfig(population=population, state=tmp_path / "state", partition=1, partitions=2))
    assert Serving(half).rebase(other, margin=1e9) == Rebased(1, 0)
    assert half.personal.versions() == {version, other}
    half.close()


def test_what_cannot_be_rebased_is_named(node: Node) -> None:
    serving = Serving(node)
    version = released(node)
    assert serving.rebase(version) == Rebased(0, 0)
    with pytest.raises(NodeError, match=r"user '2' has no personal values to rebase; personalise it first"):
        serving.rebase(version, "2")
    with pytest.raises(NodeError, match=r"does not keep the pool r9-0123456789abcdef") as error:
        serving.rebase("r9-0123456789abcdef")
    assert error.value.fault == "lacks version"


# -------------------------------------------------------------------------------- forgetting


def visits(node: Node, federation: str, version: str) -> list[int]:
    """How often each training user of the population took part in a federation, whatever the node says of them."""
    store = node._store(federation, node.loaded(version)[0])
    return store.read(np.arange(9), 100).visits_u.tolist()


def test_a_forgotten_user_is_gone_for_good(node: Node, tmp_path: Path) -> None:
    serving = Serving(node)
    version = released(node)
    for federation in ("one", "two"):
        node.train(instructions(version, (1, 2, 3), federation))
    for user in ("2", "3"):
        serving.personalize(user)
    rows = rows_of(serving, "3")
    assert visits(node, "one", version) == [0, 1, 1, 1, 0, 0, 0, 0, 0]

    assert serving.forget("2") == Forgotten(True, 2, CANNOT_UNDO)
    for again in (False, True):
        if again:
            node.close()
            node = opened(tmp_path / "state")
            serving = Serving(node)
        assert node.describe().users == {"train": 8, "new": 4}
        assert equal(rows_of(serving, "3"), rows)
        for call in (serving.personalize, serving.model_of, serving.forget):
            with pytest.raises(NodeError, match=r"'?2'? is (none of them; name another|neither; see how)") as error:
                call("2")
            assert error.value.fault == "unknown users"
        for federation in ("one", "two"):
            assert visits(node, federation, version) == [0, 1, 0, 1, 0, 0, 0, 0, 0]
    with pytest.raises(NodeError, match="ask it to describe itself") as error:
        node.train(instructions(version, (8,), at=2))
    assert error.value.fault == "unknown users"
    node.train(instructions(version, tuple(range(8)), at=2))
    assert visits(node, "one", version) == [1, 2, 0, 2, 1, 1, 1, 1, 1]
    node.close()


def test_the_pool_of_a_forgotten_user_is_kept_no_longer(node: Node) -> None:
    serving = Serving(node)
    version = released(node)
    serving.personalize("2")
    serving.forget("2")
    for round_index in range(4, 6 + NEWEST):
        released(node, round_index)
    assert version not in node.describe().versions


def test_a_user_of_whom_nothing_is_kept_can_be_forgotten_too(node: Node) -> None:
    assert Serving(node).forget("10") == Forgotten(False, 0)
    assert node.describe().users == {"train": 9, "new": 3}
    assert Serving(node).status().forgotten == 1


def test_values_that_are_made_while_the_user_is_forgotten_are_not_kept(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, tune = Serving(node), client.one_user.personal_values
    released(node)

    def forgotten_meanwhile(*args: object) -> object:
        serving.forget("2")
        return tune(*args)

    monkeypatch.setattr(client.one_user, "personal_values", forgotten_meanwhile)
    with pytest.raises(StoreError, match="user 2 was forgotten, and nothing is kept of it"):
        serving.personalize("2")
    assert node.personal.forgotten().tolist() == [2]
    assert node.personal.users().tolist() == []


def test_a_mask_that_is_proposed_while_the_user_is_forgotten_is_not_remembered(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, propose = Serving(node), client.one_user.task_mask
    version = released(node)
    serving.model_of("3")

    def forgotten_meanwhile(*args: object) -> object:
        serving.forget("2")
        return propose(*args)

    monkeypatch.setattr(client.one_user, "task_mask", forgotten_meanwhile)
    serving.model_of("2")
    assert serving._masks.keys() == {(3, version)}


def test_a_user_whose_data_is_gone_is_forgotten_all_the_same(tmp_path: Path) -> None:
    population = users_with_texts(tmp_path, "ann", "bob")
    node = opened(tmp_path / "state", population)
    version = released(node)
    node.train(instructions(version, (0, 1)))
    before = Serving(node).personalize("ann")
    assert before.personal_bytes > 0
    node.close()
    shutil.rmtree(tmp_path / "data" / "ann")

    node = opened(tmp_path / "state", population)
    serving = Serving(node)
    for call in (serving.personalize, serving.model_of):
        with pytest.raises(NodeError, match="'ann' is none of them"):
            call("ann")
    assert serving.forget("ann") == Forgotten(True, 1, CANNOT_UNDO)
    assert node.personal.users().tolist() == []
    assert node.personal.forgotten().tolist() == [texts.user_id("ann")]
    store = node._store("one", node.loaded(version)[0])
    ids = np.array([texts.user_id("ann"), texts.user_id("bob")], dtype=np.int64)
    assert store.read(ids, 100).visits_u.tolist() == [0, 1]
    for name in ("ann", "eve"):
        with pytest.raises(NodeError) as error:
            serving.forget(name)
        assert error.value.fault == "unknown users"
    assert node.personal.forgotten().tolist() == [texts.user_id("ann")]
    node.close()


def test_a_node_at_work_forgets_later(node: Node) -> None:
    serving = Serving(node)
    with node._alone(), pytest.raises(NodeError, match="ask again later") as error:
        serving.forget("2")
    assert error.value.fault == "busy"
    assert node.personal.forgotten().tolist() == []
    serving.forget("2")


def test_what_forgetting_cannot_undo_is_said() -> None:
    said = " ".join(CANNOT_UNDO)
    assert all(word in said for word in ("pools", "own data", "copies", "freed pages"))


# -------------------------------------------------------------------------------- status


def test_a_status_is_counts_and_sizes(node: Node) -> None:
    serving = Serving(node)
    first = released(node)
    for user in ("2", "3"):
        serving.personalize(user)
    second = released(node, 4)
    serving.forget("3")
    status = serving.status()
    files = [path for path in node.config.state.rglob("*") if path.is_file()]
    assert status.disk_bytes >= sum(path.stat().st_blocks * 512 for path in files) > 0
    found = replace(status, disk_bytes=0)
    assert found == ServingStatus({"train": 8, "new": 4}, 1, 1, second, (first, second), 0)
    assert {field.name for field in fields(status)} == {
        "users", "personalised", "forgotten", "release", "versions", "disk_bytes",
    }  # fmt: skip
