"""A node against a simulation's worker, which computes the same for the same users, and against what it must refuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.evaluate import user_losses
from client.limits import TaskLimits
from client.node import Node, NodeConfig, software_version
from client.personal_store import Kept, PersonalStore
from client.round import RoundState
from client.state import UserBlock
from client.store import UserStore
from client.stores import STORE_SHARDS
from federation.codec import decode
from federation.config import PopulationConfig, RunConfig
from federation.errors import ConfigError, FedquiltWarning, NodeError, StoreError
from federation.exchange import Contribution, Description, Instructions, Letter, Measures, Refusal
from federation.frames import split
from federation.pool.file import PoolFile
from federation.streams import Streams, UserIds
from federation.update import Section, UpdateBlock
from server.round import lift
from simulations.compute.worker import Broadcast, Worker, perform, run_chunk
from simulations.methods import known_methods
from simulations.serve import Plan, Trained, propose_masks, serve_block
from simulations.setup import Setup
from tests import models
from tests.simulations.tiny import tiny_config

INT8 = "codec={rows='int8'}"
PERSONAL = "personal={steps=3, learning_rate=0.05, examples=4, gain_examples=8}"


def config_of(*overrides: str) -> RunConfig:
    """The tiny federation, all of it in one shard, since a node's users are cut into blocks once."""
    return tiny_config("federation.shards=1", PERSONAL, *overrides)


def node_config(config: RunConfig, folder: Path, **changes: Any) -> NodeConfig:
    compute = config.compute
    return NodeConfig(
        population=config.population, state=folder, block=compute.block, precision=compute.precision, **changes
    )


def pool_of(config: RunConfig, round_index: int = 0) -> PoolFile:
    """Values that a few rounds might have left: every part differs from zero."""
    worker = Worker(config)
    begun = worker.setup(config).begin()
    generator = torch.Generator().manual_seed(round_index)
    values = {name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in begun.values.items()}
    worker.close()
    return PoolFile(round_index, values, config.task)


def ask(pool: PoolFile, positions: Sequence[int], round_index: int = 2, **changes: Any) -> Instructions:
    """Instructions for a round; changed by keywords."""
    task, chosen = pool.task.model_dump_json(), tuple(map(int, positions))
    return replace(Instructions("tiny", round_index, 1, pool.version, "train", chosen, 0, task), **changes)


@contextmanager
def opened(config: RunConfig, folder: Path, *pools: PoolFile, **changes: Any) -> Iterator[Node]:
    node = Node(node_config(config, folder, **changes))
    for pool in pools:
        node.keep(pool.to_bytes())
    try:
        yield node
    finally:
        node.close()


def stacked(updates: Sequence[UpdateBlock]) -> UpdateBlock:
    """Users' updates as one block, padded where they differ in their number of rows."""

    def padded(tensor: Tensor, most: int) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(1, most - tensor.shape[1], *tensor.shape[2:])), 1)

    sections = {}
    for name in updates[0].sections:
        parts = [update.sections[name] for update in updates]
        most = max(part.ids_uk.shape[1] for part in parts)
        fields = ((p.ids_uk, p.valid_uk, p.rows_ukw) for p in parts)
        sections[name] = Section(*(torch.cat([padded(t, most) for t in column]) for column in zip(*fields)))
    metrics = {name: torch.cat([u.metrics[name] for u in updates]) for name in updates[0].metrics}
    return replace(updates[0], sections=sections, weight_u=torch.cat([u.weight_u for u in updates]), metrics=metrics)


def updates_of(answer: Contribution, setup: Setup, users: int) -> list[UpdateBlock]:
    payloads = split(answer.payload, users, 1 << 20)
    assert len(payloads) == users
    return [decode(payload, setup.schema, answer.work.version) for payload in payloads]


def lifted(setup: Setup, updates: Sequence[UpdateBlock], broadcast: Broadcast) -> tuple[Any, dict[str, float]]:
    """The partial of users in blocks, one after the other, and the sums of their metrics."""
    size, partial = setup.config.compute.block, None
    sums: dict[str, float] = {}
    for start in range(0, len(updates), size):
        block = stacked(updates[start : start + size])
        part, rejections = lift(block, broadcast.strategy, setup.rules)
        assert not rejections.reasons
        partial = part if partial is None else setup.rules.strategy.merge(partial, part)
        for name, values in block.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return partial, sums


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, in mappings and dataclasses too."""
    assert type(a) is type(b)
    if is_dataclass(a):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    elif isinstance(a, Tensor | np.ndarray):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    else:
        assert a == b


def states(folder: Path, config: RunConfig, users: UserIds) -> UserBlock:
    """What a node that is closed has kept of the users."""
    layout = Worker(config).setup(config).record_layout
    with UserStore(folder / "federations" / "tiny" / "users", STORE_SHARDS, layout) as store:
        return store.read(users, 99)


def visits(folder: Path, *users: int) -> list[int]:
    """How often a node that is closed has trained the users."""
    found: list[int] = states(folder, config_of(), np.array(users)).visits_u.tolist()
    return found


# -------------------------------------------------------------------------------- which users


def test_nodes_in_the_order_of_their_partitions_hold_the_whole_split(tmp_path: Path) -> None:
    config, ids = config_of(), []
    for partition in range(3):
        with opened(config, tmp_path / str(partition), partition=partition, partitions=3) as node:
            said = node.describe()
            assert said.order == partition
            assert said.users == {"train": 20, "new": [7, 7, 6][partition]}
            ids += [user for user in range(80) if node.holds(user)]
    assert ids == [*range(20), *range(60, 67), *range(20, 40), *range(67, 74), *range(40, 60), *range(74, 80)]


def test_names_of_others_are_unknown_users(tmp_path: Path) -> None:
    with opened(config_of(), tmp_path, partition=0, partitions=2) as node:
        assert node.user_id("29") == 29
        with pytest.raises(NodeError, match=r"one of this node's \{'train': 30, 'new': 10\}, '30' is none"):
            node.user_id("30")


# -------------------------------------------------------------------------------- training


@pytest.mark.parametrize("overrides", [(), (INT8,), ("gate.distribution='bernoulli'",), ("compute.precision='bf16'",)])
def test_two_rounds_are_those_of_a_simulated_worker(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    worker = Worker(config)
    setup = worker.setup(config)
    strategy = setup.begin().strategy
    users = np.array([0, 3, 4, 10, 11, 25, 59])
    with opened(config, tmp_path / "node", *(pool_of(config, r) for r in (0, 1))) as node:
        for round_index in (2, 3):  # after the warm-up
            pool = pool_of(config, round_index - 2)
            answer = node.train(ask(pool, users.tolist(), round_index))
            broadcast = Broadcast(RoundState(pool.values, round_index, pool.version), strategy)
            expected, report = perform(worker, run_chunk, broadcast, config, tmp_path / "sim", users)
            partial, sums = lifted(setup, updates_of(answer, setup, len(users)), broadcast)
            assert_same(partial, expected)
            assert sums == report.metric_sums
    simulated = worker.store(setup, tmp_path / "sim").read(users, 99)
    assert_same(states(tmp_path / "node", config, users), simulated)
    worker.close()


def test_an_answer_says_which_work_it_is_of_and_how_many_users_there_are(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool, partition=1, partitions=2) as node:
        asked = ask(pool, [1, 29])
        answer = node.train(asked)
    assert (answer.work, answer.users) == (asked.work, {"train": 30, "new": 10})
    assert visits(tmp_path, 30, 31, 32, 59) == [0, 1, 0, 1]


def test_new_users_train_too(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, [2], split="new"))
    assert visits(tmp_path, 2, 62) == [0, 1]


def test_nobody_is_no_work(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        assert split(node.train(ask(pool, [])).payload, 0, 1) == []
        assert node.evaluate(ask(pool, [])).measured == 0


def test_the_same_instructions_twice_give_the_same_bytes(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, range(8), 2))
        once = node.train(ask(pool, range(6), 3))
    before = states(tmp_path, config, np.arange(8))
    with opened(config, tmp_path) as node:
        again = node.train(ask(pool, range(6), 3, attempt=2))
    assert once.payload == again.payload
    assert_same(states(tmp_path, config, np.arange(8)), before)


def test_work_that_nobody_waits_for_stops_between_blocks_and_may_be_asked_for_again(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    asked = ask(pool, range(6), 1)
    with opened(config, tmp_path / "calm", pool) as node:
        undisturbed = node.train(asked).payload
    with opened(config_of("compute.block=2"), tmp_path / "left", pool) as node:
        patience = iter([True, True, False])
        left = node.answer(Letter("train", asked), lambda: next(patience))
        assert left == Refusal("late", "nobody waits for this work any longer; ask again")
        assert isinstance(node.answer(Letter("evaluate", asked), lambda: False), Refusal)
    assert visits(tmp_path / "left", *range(6)) == [1, 1, 1, 1, 0, 0]
    with opened(config, tmp_path / "left") as node:
        assert node.train(asked).payload == undisturbed


def test_a_round_that_is_done_again_forgets_what_the_server_gave_up(tmp_path: Path) -> None:
    """Also of users who are not asked again: their later states rest on values that no checkpoint holds."""
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, [0, 1, 2], 1))
    kept = states(tmp_path, config, np.arange(4))
    with opened(config, tmp_path) as node:
        node.train(ask(pool, [0, 1, 2], 2))
        node.train(ask(pool, [1, 2, 3], 3))
        node.train(ask(pool, [4], 2))
    assert_same(states(tmp_path, config, np.arange(4)), kept)
    assert visits(tmp_path, 4) == [1]


def test_records_that_no_resume_needs_are_dropped(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        for round_index in range(1, 6):
            node.train(ask(pool, [0], round_index, durable_round=max(0, round_index - 2)))
        with pytest.raises(StoreError, match="compacted to round 3"):
            node.train(ask(pool, [0], 3))
        assert isinstance(node.answer(Letter("train", ask(pool, [0], 3))), Refusal)
        node.train(ask(pool, [0], 4, durable_round=3))


def test_federations_do_not_meet(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        first = node.train(ask(pool, [0, 1], 5))
        node.train(ask(pool, [0, 1], 2, federation="other"))
        again = node.train(ask(pool, [0, 1], 5, federation="third"))
        assert first.payload == again.payload
        node.train(ask(pool, [0, 1], 6))
    assert visits(tmp_path, 0, 1) == [2, 2]
    assert sorted(folder.name for folder in (tmp_path / "federations").iterdir()) == ["other", "third", "tiny"]


def test_a_damaged_shard_is_set_aside_with_a_warning_and_its_users_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has each warning, of which Python may show the first alone."""
    config, pool = config_of(), pool_of(config_of())
    data = tmp_path / "federations/tiny/users/shard-0000/data.mdb"
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, range(5), 1))
    for times in (1, 2):
        with data.open("r+b") as file:
            file.write(bytes(2 * 4096))
        with opened(config, tmp_path) as node, pytest.warns(FedquiltWarning, match=r"shard 0 of .*users .*begin anew"):
            node.train(ask(pool, range(5), 2))
        assert caplog.text.count("begin anew") == times
    assert visits(tmp_path, *range(5)) == [1] * 5


# -------------------------------------------------------------------------------- evaluation


def evaluated(config: RunConfig, folder: Path, positions: Sequence[int]) -> Measures:
    pool = pool_of(config)
    with opened(config, folder, pool) as node:
        before = sorted(folder.rglob("*"))
        measures = node.evaluate(ask(pool, positions, split="new"))
        assert sorted(folder.rglob("*")) == before  # nothing is kept
    return measures


def test_measures_are_those_of_a_simulated_evaluation(tmp_path: Path) -> None:
    """The methods base, dsa_t0 and dsa_t2, which report bits: losses of numbers count one character per target."""
    config = config_of("evaluate.gain_examples=8", "evaluate.examples=4", "personal.rows={rows='ternary', top=0.5}")
    measures = evaluated(config, tmp_path, range(7))
    worker, pool, known = Worker(config), pool_of(config), known_methods(config)
    trained = Trained(config, {"pool": pool.values}, {})
    plans = {
        "base_loss": Plan(known["base"], 0.0, 0),
        "mask_loss": Plan(known["dsa_t0"], 0.0, 0),
        "tuned_loss": Plan(known["dsa_t2"], 0.05, 3),
    }
    expected = dict.fromkeys(plans, 0.0)
    for ids in (np.arange(60, 64), np.arange(64, 67)):
        choice = known["dsa_t0"].choice
        assert choice is not None
        _, packed = propose_masks(worker, trained, ids, [choice])
        _, served = serve_block(worker, trained, ids, packed, list(plans.values()))
        for name, plan in plans.items():
            expected[name] += float(served[plan].loss_u.sum()) * np.log(2.0)
    assert measures.measured == 7
    assert dict(measures.sums) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("policy", ["saliency", "random", "all"])
def test_every_policy_is_measured_with_its_own_masks(tmp_path: Path, policy: str) -> None:
    config = config_of(f"gate.policy={policy!r}", "personal.rows={rows='fp32'}")
    sums = evaluated(config, tmp_path, range(4)).sums
    base = evaluated(config_of(), tmp_path, range(4)).sums["base_loss"]
    assert sums["base_loss"] == base
    assert len(set(sums.values())) == 3


def test_all_units_are_those_of_the_plain_sum(tmp_path: Path) -> None:
    """With every unit on, the adapted layers are linear layers whose weights hold the whole pool."""
    config = config_of("gate.policy='all'")
    pool, ids = pool_of(config), np.array([60, 61])
    with opened(config, tmp_path, pool) as node:
        found = user_losses(node.task(config.task), pool.values, node, ids)["mask_loss"]
    worker = Worker(config)
    test = worker.population.batch(ids, "test", None, worker.setup(config).streams)
    module = worker.population.base_model().module
    for name, layer in list(module.named_children()):
        rows = pool.values[f"pool/{name}"]
        down, up = rows[:, : layer.in_features], rows[:, layer.in_features :]
        layer.weight += config.pool.scale * (down.T @ up).T
    expected = [
        worker.population.base_model().loss(module, test.inputs[u], test.targets[u]).mean().item() for u in range(2)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_measures_do_not_depend_on_the_cut_into_blocks(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    sums = []
    for block in (1, 5):
        with opened(config.model_copy(update={"compute": config.compute.model_copy(update={"block": block})}),
                    tmp_path, pool) as node:  # fmt: skip
            sums.append(node.evaluate(ask(pool, range(5))).sums)
    assert dict(sums[0]) == pytest.approx(dict(sums[1]), rel=1e-4)


# -------------------------------------------------------------------------------- forgetting


def test_a_forgotten_user_is_in_no_store_and_takes_part_in_nothing_more(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        for federation in ("tiny", "other"):
            node.train(ask(pool, range(6), federation=federation))
        node.personal.put(3, Kept(pool.version, b"values"))
    with opened(config, tmp_path) as node:  # which has not opened those stores yet
        assert node.forget(3) == (True, 2)
        assert node.personal.get(3) is None
        assert not node.holds(3)
        with pytest.raises(NodeError, match=r"'train': 59"):
            node.user_id("3")
        with pytest.raises(NodeError, match=r"one of whom it keeps something, 3 is neither; .*forgotten already"):
            node.forget(3)
        assert node.forget(50) == (False, 0)
    assert visits(tmp_path, *range(6)) == [1, 1, 1, 0, 1, 1]
    with opened(config, tmp_path) as node:
        assert node.describe().users == {"train": 58, "new": 20}
        assert node.train(ask(pool, [2, 3], 3)).users["train"] == 58
        with pytest.raises(NodeError, match="asked for the train user at 58"):
            node.train(ask(pool, [58], 3))
    assert visits(tmp_path, *range(6)) == [1, 1, 2, 0, 2, 1]


def test_forgetting_that_was_stopped_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, [3]))
        with monkeypatch.context() as patched:
            patched.setattr(PersonalStore, "forget", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                node.forget(3)
        assert node.forget(node.user_id("3")) == (False, 0)
        assert not node.holds(3)


def test_a_user_whose_data_is_gone_is_forgotten_by_what_is_kept(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    gone = {"train_users": 60, "new_users": 20} | config.population.options
    fewer = config.model_copy(
        update={"population": PopulationConfig(name="synthetic", options={**gone, "train_users": 3, "new_users": 0})}
    )
    with opened(config, tmp_path, pool) as node:
        node.train(ask(pool, [0, 4, 7]))
        for user in (4, 5):
            node.personal.put(user, Kept(pool.version, b"values"))
    with opened(fewer, tmp_path) as node:
        assert node.known_id("4") == 4
        with pytest.raises(NodeError, match="'ann' is none of them"):
            node.known_id("ann")
        assert node.forget(4) == (True, 1)
        assert node.forget(5) == (True, 0)
        assert node.forget(7) == (False, 1)
        with pytest.raises(NodeError, match="6 is neither") as raised:
            node.forget(6)
        assert raised.value.fault == "unknown users"
    assert visits(tmp_path, 0, 4, 7) == [1, 0, 0]
    with opened(config, tmp_path) as node:
        assert [node.holds(user) for user in (4, 5, 6, 7)] == [False, False, True, False]


# -------------------------------------------------------------------------------- the model


def test_a_base_of_tanh_gelus_has_the_same_bits_before_and_after_it_is_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are scaled up, so that one changed bit of an activation is seen in a loss."""
    config = config_of("pool.target_modules=['c_attn', 'c_fc']")
    base = models.gpt2()
    for parameter in base.module.parameters():
        if parameter.dim() == 2:
            parameter.data *= 20
    inputs, targets = models.batch_for(base, 30, 2).flat()
    with opened(config, tmp_path) as node:
        monkeypatch.setattr(type(node.population), "base_model", lambda _: base)
        node._model._load = node.population.base_model
        before = base.loss(node.base_model().module, inputs, targets)
        task = node.task(config.task)
        assert_same(base.loss(task.model.base.module, inputs, targets), before)


def test_the_base_is_the_same_before_and_after_it_is_wrapped(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        inputs, targets = node.batch(np.array([60, 61]), "test", None, Streams(0)).flat()
        base = node.base_model()
        before = base.loss(base.module, inputs, targets)
        task, values = node.loaded(pool.version)
        assert task.config == config.task
        assert_same(dict(values), dict(pool.values))
        assert node.base_model() is task.model.base is base
        assert_same(base.loss(base.module, inputs, targets), before)


# -------------------------------------------------------------------------------- letters


def test_a_letter_may_bring_the_pool(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path) as node:
        lacking = node.answer(Letter("train", ask(pool, [0])))
        assert isinstance(lacking, Refusal)
        assert lacking.fault == "lacks version"
        found = node.answer(Letter("train", ask(pool, [0]), pool.to_bytes()))
        assert found == node.train(ask(pool, [0]))
        measures = node.answer(Letter("evaluate", ask(pool, [0])))
        assert measures == node.evaluate(ask(pool, [0]))
        assert node.answer(Letter("describe")) == Description(
            {"train": 60, "new": 20}, 0, (pool.version,), "", metadata.version("fedquilt")
        )


def test_a_release_is_served_until_another_is_named_whatever_else_comes(tmp_path: Path) -> None:
    config = config_of()
    first, second = pool_of(config, 0), pool_of(config, 1)
    with opened(config, tmp_path) as node:
        assert node.release == ""
        said = node.answer(Letter("release", ask(first, []), first.to_bytes()))
        assert isinstance(said, Description)
        assert (said.release, node.release) == (first.version, first.version)
        refused = node.answer(Letter("release", ask(second, [])))
        assert isinstance(refused, Refusal)
        assert refused.fault == "lacks version"
    with opened(config, tmp_path, *(pool_of(config, r) for r in range(1, 8))) as node:
        assert node.release == first.version
        assert node.pool(first.version).version == first.version
        node.adopt(second_kept := node.describe().versions[-1])
        assert node.release == second_kept


def test_what_users_values_refer_to_is_kept(tmp_path: Path) -> None:
    config = config_of()
    first = pool_of(config, 0)
    with opened(config, tmp_path, first) as node:
        node.pin([first.version])
    with opened(config, tmp_path, *(pool_of(config, r) for r in range(1, 5))) as node:
        assert node.pool(first.version).version == first.version
        assert pool_of(config, 1).version not in node.describe().versions


def test_no_model_is_loaded_before_there_is_work_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path) as node:
        monkeypatch.setattr(node, "_model", None)
        assert isinstance(node.answer(Letter("describe", pool=pool.to_bytes())), Description)
        lacking = node.answer(Letter("train", ask(replace(pool, round_index=7), [0])))
        assert isinstance(lacking, Refusal)
        assert lacking.fault == "lacks version"


@pytest.mark.parametrize("kind", ["train", "evaluate", "release"])
def test_work_without_instructions_is_refused(tmp_path: Path, kind: Any) -> None:
    with opened(config_of(), tmp_path) as node:
        answer = node.answer(Letter(kind))
    assert answer == Refusal("failed", f"a letter to {kind} needs instructions, got none; send them")


def test_a_pool_that_is_none_is_refused(tmp_path: Path) -> None:
    with opened(config_of(), tmp_path) as node:
        answer = node.answer(Letter("describe", pool=b"no pool"))
    assert isinstance(answer, Refusal)
    assert (answer.fault, "no pool file" in answer.message) == ("failed", True)


def test_what_nobody_foresaw_is_raised_and_the_next_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        with monkeypatch.context() as patched:
            patched.setattr("client.node.train_block", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                node.answer(Letter("train", ask(pool, [0])))
        assert isinstance(node.answer(Letter("train", ask(pool, [0]))), Contribution)


# -------------------------------------------------------------------------------- refusals


def test_users_that_are_not_there_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool, partition=0, partitions=2) as node:
        for split, positions in (("train", (0, 30)), ("validation", (0,)), ("new", (10,))):
            for work in (node.train, node.evaluate):
                with pytest.raises(NodeError, match=r"'train': 30, 'new': 10.*ask it to describe itself") as raised:
                    work(ask(pool, positions, split=split))
                assert raised.value.fault == "unknown users"
    assert not (tmp_path / "federations").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("pool.scale=3.0", r"scale 3\.0 around 2 layers \(fc1, fc2\)"),
        ("pool.target_modules=['fc1']", r"1 layers \(fc1\)"),
    ],
)
def test_a_model_is_wrapped_once(tmp_path: Path, changed: str, said: str) -> None:
    config, pool = config_of(), pool_of(config_of())
    other = pool_of(config_of(changed), 1)
    with opened(config, tmp_path, pool, other) as node:
        node.train(ask(pool, [0]))
        for work in (lambda: node.train(ask(other, [0], 3)), lambda: node.adopt(other.version)):
            with pytest.raises(NodeError, match=rf"wrapped once, .*scale 1\.0 .*{said}; restart the node") as raised:
                work()
            assert raised.value.fault == "failed"
        assert node.release == ""
        node.train(ask(pool, [0], 3))


@pytest.mark.parametrize("modules", [["fc2", "fc1"], ["fc1", "fc2"], ["fc1", "fc2", "nothing"]])
def test_the_models_own_layers_may_be_named(tmp_path: Path, modules: list[str]) -> None:
    config, pool = config_of(), pool_of(config_of())
    named = config_of(f"pool.target_modules={modules!r}")
    with opened(config, tmp_path, pool) as node:
        once = node.train(ask(pool, [0]))
        assert node.train(ask(pool, [0], task=named.task.model_dump_json())).payload == once.payload


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("pool.target_modules=['fc1', 'norm']", "only nn.Linear"),
        ("pool.target_modules=['none']", "match no linear layer"),
        ("pool.target_modules=['fc1']", "section 'gate' should be ((1, 180)"),
        ("pool.scale=3.0", "a task has the pool.scale that its pool was trained with, 1.0 for"),
        ("local.steps=1001", "a task's local.steps is at most limits.steps of the node, 1000, it is 1001; lower it"),
    ],
)
def test_a_wrong_task_leaves_the_model_as_it_was(tmp_path: Path, changed: str, said: str) -> None:
    """The next task, which is the right one, is done."""
    config, pool = config_of(), pool_of(config_of())
    wrong = config_of(changed).task.model_dump_json()
    with opened(config, tmp_path / "calm", pool) as node:
        undisturbed = node.train(ask(pool, [0])).payload
    with opened(config, tmp_path / "wrong", pool) as node:
        module = node.base_model().module
        module.norm = nn.LayerNorm(2)
        refused = node.answer(Letter("train", ask(pool, [0], task=wrong)))
        assert isinstance(refused, Refusal)
        assert (refused.fault, said in refused.message) == ("failed", True), refused.message
        assert [type(child) for child in module.children()] == [nn.Linear, nn.Linear, nn.LayerNorm]
        assert node.train(ask(pool, [0])).payload == undisturbed


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ("personal.steps=11", "steps"),
        ("local.examples=41", "examples"),
        ("local.gain_examples=41", "examples"),
        ("local.query_examples=41", "examples"),
        ("personal.examples=41", "examples"),
        ("personal.gain_examples=41", "examples"),
        ("gate.samples=6", "samples"),
        ("gate.rebuild=11", "steps"),
        ("gate.reward.steps=11", "steps"),
        ("gate.hidden=31", "gate_width"),
        ("gate.factors=31", "gate_width"),
        ("gate.embedding=31", "gate_width"),
    ],
)
def test_the_owner_limits_what_a_server_asks_of_the_device(tmp_path: Path, changed: str, limit: str) -> None:
    config, greedy = config_of(), config_of(changed)
    pool, other = pool_of(config), pool_of(greedy, 1)
    name, _, value = changed.partition("=")
    limits = {"steps": 10, "examples": 40, "samples": 5, "gate_width": 30}
    with opened(config, tmp_path, pool, other, limits=limits) as node:
        said = f"a task's {name} is at most limits.{limit} of the node, {limits[limit]}, it is {value}; lower it"
        calls = (
            lambda: node.train(ask(other, [0])),
            lambda: node.adopt(other.version),
            lambda: node.loaded(other.version),
            lambda: node.task(greedy.task),
        )
        for call in calls:
            with pytest.raises(NodeError, match=said) as raised:
                call()
            assert raised.value.fault == "failed"
        node.adopt(pool.version)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("gate.windows=[41, 3]", r"gate\.windows is at most limits\.examples of the node, 40, it is 41; lower it"),
        (
            "gate.estimator={name='ppo', options={epochs=11}}",
            r"estimator\.options\.epochs is .*limits\.steps .*is 11;",
        ),
        (
            "gate.reward.quality.options={times=11}",
            r"quality\.options\.times is .*limits\.steps .*it is 11;",
        ),
        (
            "gate.rebuild=7",
            r"\(gate\.rebuild \+ 1\) \* .* at most limits\.evaluations of the node, 23, it is 24;",
        ),
        ("gate.reward.steps=7", r"\(gate\.reward\.steps \+ 1\) is at most limits\.evaluations .* 23, it is 24; lower"),
        (
            "gate.estimator.name=alien",
            r"one of limits\.estimators of the node, reinforce, .*, it is 'alien'; change",
        ),
        ("gate.reward.quality.name=alien", r"limits\.qualities of the node, loss, .*'alien'.*owner add the name"),
    ],
)
def test_the_owner_limits_what_is_computed_and_whose_code_is_run(changed: str, said: str) -> None:
    limits = TaskLimits(steps=10, examples=40, samples=5, evaluations=23)
    limits.check(config_of().task)
    limits.check(config_of("gate.windows=[40, 3]", "gate.estimator={name='ppo', options={epochs=10}}").task)
    limits.check(config_of("gate.rebuild=6").task)
    with pytest.raises(NodeError, match=said) as raised:
        limits.check(config_of(changed).task)
    assert raised.value.fault == "failed"


def test_a_plugin_that_the_owner_allows_may_be_named() -> None:
    limits = TaskLimits(estimators=("alien",), qualities=("alien",))
    limits.check(config_of("gate.estimator.name=alien", "gate.reward.quality.name=alien").task)
    with pytest.raises(NodeError, match=r"limits\.estimators of the node, alien, it is 'reinforce'"):
        limits.check(config_of().task)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pool_that_cannot_serve_is_not_adopted(tmp_path: Path, value: float) -> None:
    config, good = config_of(), pool_of(config_of())
    spoilt = dict(good.values) | {"pool/fc2": good.values["pool/fc2"].clone().fill_(value)}
    alien = PoolFile(9, {"pool/x": torch.zeros(2, 3)}, good.task)
    with opened(config, tmp_path, good) as node:
        node.adopt(good.version)
        for pool, said in ((PoolFile(8, spoilt, good.task), "values are finite, section 'pool/fc2'"),
                           (alien, "section 'gate' should be")):  # fmt: skip
            refused = node.answer(Letter("release", ask(pool, []), pool.to_bytes()))
            assert isinstance(refused, Refusal)
            assert (refused.fault, said in refused.message) == ("failed", True)
            assert node.release == good.version


def test_a_pool_of_another_rank_fits_the_same_model(tmp_path: Path) -> None:
    config, narrow = config_of(), config_of("pool.rank=3")
    with opened(config, tmp_path, pool_of(config), pool_of(narrow)) as node:
        for each, federation in ((config, "wide"), (narrow, "narrow")):
            pool, setup = pool_of(each), Worker(each).setup(each)
            answer = node.train(ask(pool, [0], federation=federation))
            (update,) = updates_of(answer, setup, 1)
            assert update.sections["pool/fc1"].ids_uk.max() < each.pool.rank
        with pytest.raises(StoreError, match=r"mask_bytes.*asked for.*use another folder"):
            node.train(ask(pool_of(narrow), [0], federation="wide"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: {k: x for k, x in v.items() if k != "gate"}, r"section 'gate' should be .*, pool r0-.* has none"),
        (lambda v: {**v, "pool/fc9": torch.zeros(8, 20)}, r"section 'pool/fc9' should be absent"),
        (lambda v: {**v, "pool/fc1": v["pool/fc1"][:1]}, r"section 'pool/fc1' should be \(\(8, 20\).* has \(\(1, 20\)"),
        (lambda v: {**v, "pool/fc1": v["pool/fc1"].double()}, r"section 'pool/fc1' .* has \(\(8, 20\), torch.float64"),
    ],
)
def test_a_pool_that_is_not_the_tasks_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    config, pool = config_of(), pool_of(config_of())
    odd = replace(pool, values=change(dict(pool.values)))
    with opened(config, tmp_path, odd) as node, pytest.raises(NodeError, match=said) as raised:
        node.train(ask(odd, [0]))
    assert raised.value.fault == "failed"


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{", "a task is JSON"),
        ("[" * 100_000, "a task is JSON"),
        ('{"pol": 1}', "unknown key 'pol'"),
        ("[]", "TaskConfig"),
    ],
)
def test_a_task_that_is_none_is_refused(tmp_path: Path, task: str, said: str) -> None:
    config, pool = config_of(), pool_of(config_of())
    with opened(config, tmp_path, pool) as node:
        answer = node.answer(Letter("train", ask(pool, [0], task=task)))
    assert isinstance(answer, Refusal)
    assert answer.fault == "failed"
    assert said in answer.message


def test_one_piece_of_work_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are refused at once, and what needs no model is answered meanwhile."""
    config, pool = config_of(), pool_of(config_of())
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> dict[str, Tensor]:
        begun.set()
        assert go_on.wait(60)
        return {"base_loss": torch.ones(1)}

    monkeypatch.setattr("client.node.user_losses", slow)
    with opened(config, tmp_path, pool) as node:
        measured: list[Measures] = []
        thread = threading.Thread(target=lambda: measured.append(node.evaluate(ask(pool, [0]))))
        thread.start()
        assert begun.wait(60)
        for kind in ("train", "evaluate"):
            answer = node.answer(Letter(kind, ask(pool, [0])))  # type: ignore[arg-type]
            assert answer == Refusal(
                "busy", "a node trains or evaluates one thing at a time, it is at work; ask again later"
            )
        with pytest.raises(NodeError, match="at work"):
            node.forget(3)
        assert node.holds(3)
        assert isinstance(node.answer(Letter("describe", pool=pool.to_bytes())), Description)
        go_on.set()
        thread.join(60)
        assert measured[0].sums["base_loss"] == 1
        node.train(ask(pool, [0]))


def test_what_is_computed_for_one_user_is_undisturbed_by_training_in_another_thread(tmp_path: Path) -> None:
    config, pool = config_of(), pool_of(config_of())
    ids = np.array([61])
    with opened(config, tmp_path, pool) as node:
        task = node.task(config.task)
        alone = user_losses(task, pool.values, node, ids)
        node.train(ask(pool, range(40), 1))
        quiet = node.train(ask(pool, range(40), 2))
        found: list[dict[str, Tensor]] = []
        thread = threading.Thread(
            target=lambda: found.extend(user_losses(task, pool.values, node, ids) for _ in range(5))
        )
        thread.start()
        answer = node.train(ask(pool, range(40), 2))
        thread.join(60)
    assert answer.payload == quiet.payload
    assert len(found) == 5
    for losses in found:
        assert_same(losses, alone)


# -------------------------------------------------------------------------------- configuration


def test_a_node_says_which_fedquilt_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software_version() == metadata.version("fedquilt")

    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    assert software_version() == "uninstalled"


def test_a_partition_is_one_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="counted from 0, so 2 is none of 2"):
        node_config(config_of(), tmp_path, partition=2, partitions=2)


def test_a_folder_that_a_node_makes_is_its_owners_alone(tmp_path: Path) -> None:
    with opened(config_of(), tmp_path / "above" / "state"):
        assert (tmp_path / "above" / "state").stat().st_mode & 0o777 == 0o700


def test_what_a_node_keeps_is_its_owners_alone(tmp_path: Path) -> None:
    pool = pool_of(config_of())
    with opened(config_of(), tmp_path / "state", pool) as node:
        node.train(ask(pool, [0]))
        node.personal.put(0, Kept(pool.version, b"values"))
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert {"data.mdb", "store.json"} < {path.name for path in files}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o755])
def test_a_state_folder_that_others_may_look_into_is_refused(tmp_path: Path, mode: int) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(mode)
    with pytest.raises(ConfigError, match=rf"its owner alone \(mode 700\), {state} .* mode {mode:o}; chmod 700 it"):
        Node(node_config(config_of(), state))
    assert list(state.iterdir()) == []


def test_what_writers_that_died_have_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-release.json-1").write_bytes(b"")
    (tmp_path / ".partial-personal-2").mkdir()
    with opened(config_of(), tmp_path):
        assert not list(tmp_path.glob(".partial-*"))


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"state names a node's folder, .*file/state cannot be used .*give another"):
        Node(node_config(config_of(), tmp_path / "file" / "state"))


def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device = 'cuda' needs .*set it to 'cpu', or to 'auto'"):
        Node(node_config(config_of(), tmp_path, device="cuda"))
    with opened(config_of(), tmp_path, device="auto") as node:
        assert node.device == torch.device("cpu")
