"""Serving against a simulation, transformers' own generation and plain formulas; releases and forgetting."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import client.serving
from client.node import Node, NodeConfig
from client.personal_store import Kept
from client.pools import NEWEST
from client.serving import CANNOT_UNDO, Forgotten, Rebased, Serving, ServingStatus
from federation.config import PopulationConfig, RunConfig, TaskConfig, parse
from federation.errors import ConfigError, FedquiltWarning, NodeError, StoreError
from federation.exchange import Instructions
from federation.pool.file import PoolFile
from federation.state import initial_values
from federation.streams import Streams
from server.round import from_checkpoint
from simulations.compute.worker import Worker
from simulations.federate import last_checkpoint
from simulations.methods import known_methods
from simulations.personal import personal_rows
from simulations.runs import MAIN, run
from simulations.serve import Trained, propose_masks, start_of
from tests.bases import UNICODE_TEXT, save_base

SYNTHETIC = {
    "name": "synthetic",
    "options": {"train_users": 9, "new_users": 4, "widths": [8, 12, 4], "rank": 8, "budget": 2, "types": 3},
}
TASK = {
    "pool": {"rank": 8, "scale": 1.0},
    "gate": {"budget": 2, "warmup": 1, "hidden": 6, "factors": 4, "embedding": 3, "samples": 3},
    "local": {"steps": 2, "learning_rate": 0.05},
    "personal": {"steps": 4, "learning_rate": 0.05, "examples": 4, "gain_examples": 8, "rows": {"rows": "int8"}},
}


def task_config(**changes: object) -> TaskConfig:
    return parse(TaskConfig, TASK | changes)


def pool_of(node: Node, config: TaskConfig, round_index: int, noise: float = 0.2) -> PoolFile:
    """A pool as if it had been trained: every row is at work, and the gate is not the saliency rule."""
    task = node.task(config)
    first = initial_values(task.model.spec, task.gate, task.schema, Streams(1))
    generator = torch.Generator().manual_seed(round_index)
    values = {name: rows + noise * torch.randn(rows.shape, generator=generator) for name, rows in first.items()}
    return PoolFile(round_index, values, config)


def released(node: Node, round_index: int = 3, config: TaskConfig | None = None, noise: float = 0.2) -> str:
    """The version of a pool that the node now serves."""
    version = node.keep(pool_of(node, config or task_config(), round_index, noise).to_bytes())
    node.adopt(version)
    return version


def opened(folder: Path, population: dict[str, object] = SYNTHETIC) -> Node:
    return Node(NodeConfig(population=parse(PopulationConfig, population), state=folder))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = opened(tmp_path / "state")
    yield made
    made.close()


def rows_of(serving: Serving, user: str) -> dict[str, Tensor]:
    rows = serving.model_of(user).rows
    assert rows is not None
    return dict(rows)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
        _, packed = propose_masks(worker, Trained(config, {"pool": values}, {}), np.array([user_id]))
        trained = Trained(config, {"pool": values}, {"pool": config})
        untuned = start_of(worker, trained, known_methods(config)["dsa_t0"], np.array([user_id]), packed)
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
    _, packed = propose_masks(worker, trained, np.array([3]))
    method = replace(known_methods(run_config)["dsa_t0"], mask=policy)
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


def instructions(version: str, positions: tuple[int, ...], federation: str = "one", at: int = 1) -> Instructions:
    task = task_config().model_dump_json()
    return Instructions(federation, at, 1, version, "train", positions, 0, task)


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
            with pytest.raises(NodeError, match=r"'2' is none of them; name another") as error:
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
    serving, tune = Serving(node), client.serving.personal_values
    released(node)

    def forgotten_meanwhile(*args: object) -> object:
        serving.forget("2")
        return tune(*args)

    monkeypatch.setattr(client.serving, "personal_values", forgotten_meanwhile)
    with pytest.raises(StoreError, match="user 2 was forgotten, and nothing is kept of it"):
        serving.personalize("2")
    assert node.personal.forgotten().tolist() == [2]
    assert node.personal.users().tolist() == []


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


# -------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Two users with texts, over a base of 16 tokens of context."""
    folder = tmp_path_factory.mktemp("texts")
    base = save_base(folder / "base")
    for name in ("ann", "bob"):
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "notes.txt").write_text(f"{name} " + UNICODE_TEXT * 12)
    options = {"base": str(base), "data": str(folder / "data"), "window": 8, "target_modules": ["c_attn", "c_fc"]}
    return {"name": "texts", "options": options}


@pytest.fixture
def writer(tmp_path: Path, texts: dict[str, object]) -> Iterator[Node]:
    made = opened(tmp_path / "texts", texts)
    yield made
    made.close()


def by_transformers(node: Node, rows: dict[str, Tensor] | None, tokens: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy search, with the rows bound all the while."""
    task = node.task(task_config())
    module = task.model.base.module
    inputs = torch.tensor([tokens])
    options = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if rows is None:
        return module.generate(inputs, **options)[0, len(tokens) :].tolist()
    with task.model.bound(rows):
        return module.generate(inputs, **options)[0, len(tokens) :].tolist()


def test_text_is_what_transformers_generates_with_the_users_rows(writer: Node) -> None:
    serving, tokenizer = Serving(writer), writer.population.tokenizer
    prompt, told = "hello é", []
    tokens = tokenizer.encode(prompt).tolist()

    def check(user: str, rows: dict[str, Tensor] | None) -> None:
        pieces = list(serving.generate(user, prompt, 6))
        found = by_transformers(writer, rows, tokens, 6)
        whole = tokenizer.decode(tokens + found)
        assert prompt + "".join(pieces) == whole
        told.append(whole)

    check("ann", None)
    released(writer)
    check("ann", rows_of(serving, "ann"))
    for user in ("ann", "bob"):
        serving.personalize(user)
        check(user, rows_of(serving, user))
    assert len(set(told)) > 1


def test_draws_are_those_of_the_seed(writer: Node) -> None:
    serving = Serving(writer)
    released(writer)
    texts = ["".join(serving.generate("ann", "hello", 8, 1.0, seed)) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_a_text_ends_where_the_base_ends_it(writer: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, tokenizer = Serving(writer), writer.population.tokenizer
    tokens = tokenizer.encode("hello").tolist()
    found = by_transformers(writer, None, tokens, 8)
    monkeypatch.setattr(tokenizer, "eos", found[3])
    expected = tokenizer.decode(tokens + found[: found.index(found[3])])
    assert "hello" + "".join(serving.generate("ann", "hello", 8)) == expected


def test_of_a_long_prompt_the_end_is_used_and_that_is_said(writer: Node) -> None:
    serving, tokenizer = Serving(writer), writer.population.tokenizer
    prompt = UNICODE_TEXT
    tokens = tokenizer.encode(prompt).tolist()
    assert len(tokens) > 16
    with pytest.warns(FedquiltWarning, match=rf"a prompt of {len(tokens)} tokens is too long: its last 13 are used"):
        pieces = serving.generate("ann", prompt, 4)
    used = tokens[-13:]
    expected = tokenizer.decode(used + by_transformers(writer, None, used, 4))
    assert tokenizer.decode(used) + "".join(pieces) == expected


def test_a_generation_beside_a_training_and_a_personalisation_is_the_same(writer: Node) -> None:
    serving = Serving(writer)
    version = released(writer)
    serving.personalize("ann")
    alone = list(serving.generate("ann", "hello", 10, 0.5, 3))
    done, failures = threading.Event(), []

    def work() -> None:
        try:
            for round_index in range(1, 6):
                writer.train(instructions(version, (0, 1), at=round_index))
                serving.personalize("bob")
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    generations = 0
    while not done.is_set() or not generations:
        assert list(serving.generate("ann", "hello", 10, 0.5, 3)) == alone
        generations += 1
    thread.join(60)
    assert not failures


def test_scores_are_those_of_the_plain_loss(writer: Node) -> None:
    serving, tokenizer = Serving(writer), writer.population.tokenizer
    released(writer)
    serving.personalize("ann")
    short, long = "straße 😀 naïve", UNICODE_TEXT * 2
    model, rows = serving.model_of("ann").model, rows_of(serving, "ann")

    def nats(tokens: list[int]) -> float:
        with torch.no_grad(), model.bound(rows):
            logits = model.base.module(input_ids=torch.tensor([tokens[:-1]])).logits[0]
        return float(F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))

    tokens = tokenizer.encode(short).tolist()
    assert len(tokens) <= 17
    scored = serving.score("ann", short)
    assert scored.tokens == len(tokens) - 1
    assert scored.nats_per_token == pytest.approx(nats(tokens) / (len(tokens) - 1), rel=1e-5)
    characters = len(short) - len(tokenizer.decode(tokens[:1]))
    assert scored.bits_per_char == pytest.approx(nats(tokens) / math.log(2) / characters, rel=1e-5)
    assert scored != serving.score("bob", short)

    tokens = tokenizer.encode(long).tolist()
    windows = [tokens[start : start + 17] for start in range(0, len(tokens) - 1, 16)]
    assert len(windows) > 2
    total = sum(map(nats, windows))
    assert serving.score("ann", long).nats_per_token == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def test_what_is_no_text_is_refused(node: Node, writer: Node) -> None:
    for call in (lambda: Serving(node).generate("2", "hello", 3), lambda: Serving(node).score("2", "hello")):
        with pytest.raises(NodeError, match=r"users of text, those of population 'synthetic' have none; use .*Python"):
            call()
    serving = Serving(writer)
    with pytest.raises(NodeError, match=r"from its second token on, it has 0; give more"):
        serving.score("ann", "")
    with pytest.raises(ConfigError, match="at least one token, got none"):
        serving.generate("ann", "", 3)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        serving.generate("ann", "hello", 0)
    with pytest.raises(NodeError, match="is none of them; name another"):
        serving.generate("eve", "hello", 3)
