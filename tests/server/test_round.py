"""The server's round against closed forms, and against itself in pieces, resumed, and with bad users in it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.config import RunConfig
from federation.errors import CheckpointError, ConfigError, PluginError
from federation.learner import RATES_OF_UNITS, SHARED_RATES, START_SECTION
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from server.checkpoint import load, save
from server.round import ServerState, from_checkpoint, lift, rules_of, to_parts
from strategies.protocol import State
from tests.server.rounds import SCHEMA, first_state, one_round, rules, updates

PLAIN_SGD = [
    "strategy.name=fedavg",
    *[f"{part}_optimizer.{key}" for part in ("pool", "gate") for key in ("name=sgd", "schedule=constant")],
    "pool_optimizer.learning_rate=1.0",
    "gate_optimizer.learning_rate=0.5",
]
LEARNED = Schema(
    {
        **SCHEMA.sections,
        RATES_OF_UNITS: SectionSpec(rows=10, factors={"rates": 3}, max_rows=6),
        SHARED_RATES: SectionSpec(rows=1, factors={"rates": 4}, max_rows=1),
        START_SECTION: SectionSpec(rows=1, factors={"weights": 9}, max_rows=1),
    }
)
"""Where an update rule and a start are learned besides."""


def dense(block: UpdateBlock, name: str, u: int) -> Tensor:
    """One user's contribution to a section as a dense (rows, width)."""
    spec = LEARNED.sections[name]
    section, total = block.sections[name], torch.zeros(spec.rows, spec.width)
    for k in range(section.ids_uk.shape[1]):
        if section.valid_uk[u, k]:
            total[int(section.ids_uk[u, k])] += section.rows_ukw[u, k]
    return total


def everything(state: ServerState) -> dict[str, Tensor]:
    return {f"{part}/{name}": t for part, tensors in to_parts(state).items() for name, t in tensors.items()}


def assert_equal(a: ServerState, b: ServerState) -> None:
    """Equal, bit for bit."""
    assert a.round_index == b.round_index
    left, right = everything(a), everything(b)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# -------------------------------------------------------------------------------- closed forms


def test_fedavg_and_sgd_move_each_part_by_the_clipped_mean_at_its_own_rate() -> None:
    setup = rules(*PLAIN_SGD, "limits.pool_norm=2.0", "limits.gate_norm=1.0")
    state, block = first_state(setup), updates(5, seed=2)
    after = one_round(state, setup, [block])
    assert after.round_index == 1
    for name in SCHEMA.sections:
        prefix = name.split("/")[0]
        together = [other for other in SCHEMA.sections if other.split("/")[0] == prefix]
        mean = torch.zeros_like(state.values[name])
        for u in range(5):
            norm = math.sqrt(sum(float(dense(block, other, u).square().sum()) for other in together))
            bound, rate = (2.0, 1.0) if prefix == "pool" else (1.0, 0.5)
            mean += rate * dense(block, name, u) * min(1.0, bound / max(norm, 1e-30)) / 5
        torch.testing.assert_close(after.values[name], state.values[name] + mean, rtol=1e-5, atol=1e-6)


def test_what_is_learned_besides_moves_by_its_own_optimizer_within_its_own_limit() -> None:
    """The rates of units and those of all together are one part: clipped together, at one rate."""
    rate = {"pool": 1.0, "gate": 0.5, "rates": 0.25, "start": 2.0}
    bound = {"pool": 100.0, "gate": 100.0, "rates": 1.5, "start": 0.75}
    own = [f"{part}_optimizer={{name='sgd', schedule='constant', learning_rate={rate[part]}}}" for part in rate]
    limits = [f"limits.{part}_norm={bound[part]}" for part in bound]
    setup = rules("strategy.name=fedavg", *own, *limits, schema=LEARNED)
    assert set(setup.optimizers) == set(rate)
    assert setup.limits.max_norm == bound
    state, block = first_state(setup), updates(5, 2, LEARNED)
    after = one_round(state, setup, [block])
    for part, prefix in ((name, name.split("/")[0]) for name in LEARNED.sections):
        together = [other for other in LEARNED.sections if other.split("/")[0] == prefix]
        mean = torch.zeros_like(state.values[part])
        for u in range(5):
            norm = math.sqrt(sum(float(dense(block, other, u).square().sum()) for other in together))
            mean += rate[prefix] * dense(block, part, u) * min(1.0, bound[prefix] / max(norm, 1e-30)) / 5
        assert mean.any()
        torch.testing.assert_close(after.values[part], state.values[part] + mean, rtol=1e-5, atol=1e-6)


def test_where_nothing_is_learned_besides_there_is_nothing_that_moves_it() -> None:
    setup = rules()
    assert set(setup.optimizers) == set(setup.limits.max_norm) == {"pool", "gate"}


def test_a_factor_that_rests_leaves_what_is_learned_besides_alone() -> None:
    setup = rules(schema=LEARNED)
    state, block = first_state(setup), updates(4, 6, LEARNED)
    after, whole = one_round(state, setup, [block], frozen=["down", "up"]), one_round(state, setup, [block])
    for name in LEARNED.sections:
        still = name.startswith("pool")
        assert torch.equal(after.values[name], (state if still else whole).values[name])
        assert not torch.equal(whole.values[name], state.values[name])


def test_a_checkpoint_without_what_is_learned_is_refused(tmp_path: Path) -> None:
    older, newer = rules(), rules(schema=LEARNED)
    saved = load(save(tmp_path, 1, to_parts(one_round(first_state(older), older, [updates(4, seed=1)])), {}))
    missing = r"lacks values/rates/units, values/rates/shared, values/start, optimizer-rates, optimizer-start, or"
    with pytest.raises(CheckpointError, match=missing):
        from_checkpoint(saved, newer)
    other = {**LEARNED.sections, SHARED_RATES: SectionSpec(rows=1, factors={"rates": 5}, max_rows=1)}
    state = one_round(first_state(newer), newer, [updates(4, 1, LEARNED)])
    saved = load(save(tmp_path / "more", 1, to_parts(state), {}))
    assert from_checkpoint(saved, newer).version == state.version
    with pytest.raises(CheckpointError, match=r"values/rates/shared, or has it in another shape.*begin a new run"):
        from_checkpoint(saved, rules(schema=Schema(other)))


def test_the_rate_falls_as_a_cosine_over_the_configured_rounds() -> None:
    cosine = [o for o in PLAIN_SGD if o != "pool_optimizer.schedule=constant"]
    setup = rules(*cosine, "federation.rounds=4", "limits.pool_norm=100.0")
    state, block = first_state(setup), updates(1, seed=2)
    for round_index in range(4):
        after = one_round(state, setup, [block])
        rate = (1 + math.cos(math.pi * round_index / 4)) / 2
        expected = state.values["pool/a"] + rate * dense(block, "pool/a", 0)
        torch.testing.assert_close(after.values["pool/a"], expected, rtol=1e-5, atol=1e-6)
        state = after


# -------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("strategy", ["fedavg", "masked_mean"])
def test_a_round_of_blocks_equals_a_round_of_single_users(strategy: str) -> None:
    setup = rules(f"strategy.name={strategy}")
    state, block = first_state(setup), updates(6, seed=3)
    singles = [block.take(slice(u, u + 1)) for u in range(6)]  # type: ignore[arg-type]
    together, apart = one_round(state, setup, [block]), one_round(state, setup, singles)
    for name in SCHEMA.sections:
        torch.testing.assert_close(together.values[name], apart.values[name], rtol=1e-5, atol=1e-6)


def spoiled(block: UpdateBlock, position: int) -> UpdateBlock:
    """The block with a NaN in what the user at `position` sends of the gate."""
    section = block.sections["gate"]
    rows, valid = section.rows_ukw.clone(), section.valid_uk.clone()
    rows[position, 0, 0], valid[position, 0] = math.nan, True
    return replace(block, sections={**block.sections, "gate": replace(section, rows_ukw=rows, valid_uk=valid)})


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_bad_user_leaves_the_round_of_the_others_bit_for_bit(position: int) -> None:
    setup = rules()
    state, block = first_state(setup), updates(5, seed=4)
    others = block.take(torch.tensor([u for u in range(5) if u != position]))
    _, rejections = lift(spoiled(block, position), state.strategy, setup)
    assert list(rejections.reasons) == [position]
    assert_equal(one_round(state, setup, [spoiled(block, position)]), one_round(state, setup, [others]))


def test_a_client_of_the_wrong_form_leaves_the_round_of_the_others_bit_for_bit() -> None:
    setup = rules()
    state, good = first_state(setup), updates(3, seed=4)
    broken = replace(updates(2, seed=5), sections={"pool/a": updates(2, seed=5).sections["pool/a"]})
    for blocks in ([broken, good], [good, broken]):
        assert_equal(one_round(state, setup, blocks), one_round(state, setup, [good]))


def test_a_round_of_nobody_counts_and_moves_nothing() -> None:
    setup = rules()
    state = one_round(first_state(setup), setup, [updates(4, seed=6)])
    nobody = spoiled(spoiled(updates(2, seed=7), 0), 1)
    after = one_round(state, setup, [nobody])
    assert after.round_index == state.round_index + 1
    for name in SCHEMA.sections:
        assert torch.equal(after.values[name], state.values[name])


def test_padding_moves_nothing_whatever_it_holds() -> None:
    setup = rules()
    state, block = first_state(setup), updates(4, seed=8)
    assert any(not section.valid_uk.all() for section in block.sections.values())
    filled = {
        name: Section(
            torch.where(section.valid_uk, section.ids_uk, 2**31 - 1),
            section.valid_uk,
            section.rows_ukw.masked_fill(~section.valid_uk[..., None], math.nan),
        )
        for name, section in block.sections.items()
    }
    assert_equal(one_round(state, setup, [replace(block, sections=filled)]), one_round(state, setup, [block]))


def test_closing_a_round_changes_nothing_that_it_was_given() -> None:
    setup = rules()
    state = one_round(first_state(setup), setup, [updates(4, seed=6)])
    before = {name: tensor.clone() for name, tensor in everything(state).items()}
    one_round(state, setup, [updates(4, seed=7)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything(state).items())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("factor", ["down", "up"])
def test_a_frozen_factor_keeps_every_bit_though_it_has_momentum(optimizer: str, factor: str) -> None:
    setup = rules(f"pool_optimizer.name={optimizer}")
    state = one_round(first_state(setup), setup, [updates(6, seed=9)])
    after = one_round(state, setup, [updates(6, seed=10)], frozen=[factor])
    for name in ("pool/a", "pool/b"):
        spec = SCHEMA.sections[name]
        for other in spec.factors:
            columns = spec.columns(other)
            same = torch.equal(after.values[name][:, columns], state.values[name][:, columns])
            assert same == (other == factor)
    assert not torch.equal(after.values["gate"], state.values["gate"])


# -------------------------------------------------------------------------------- state of record


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_state_that_went_through_a_checkpoint_goes_on_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    setup = rules(f"pool_optimizer.name={optimizer}", f"gate_optimizer.name={optimizer}")
    state = one_round(first_state(setup), setup, [updates(4, seed=1)])
    restored = from_checkpoint(load(save(tmp_path, state.round_index, to_parts(state), {})), setup)
    assert_equal(restored, state)
    assert restored.version == state.version
    for seed in (2, 3):
        state = one_round(state, setup, [updates(4, seed)])
        restored = one_round(restored, setup, [updates(4, seed)])
    assert_equal(restored, state)


class Remembering:
    """A strategy with a state of its own: the mean of all rounds so far."""

    linear_memory = False

    def init(self, schema: Schema) -> State:
        return State(schema, {"rounds": torch.zeros(())})

    def lift(self, block: UpdateBlock, state: State) -> Any:
        return INNER.strategy.lift(block, state)

    def merge(self, a: Any, b: Any) -> Any:
        return INNER.strategy.merge(a, b)

    def finish(self, partial: Any, state: State) -> Any:
        step, _ = INNER.strategy.finish(partial, state)
        return step, replace(state, tensors={"rounds": state.tensors["rounds"] + 1})


INNER = rules()


def test_a_strategys_own_state_is_carried_on_and_kept(tmp_path: Path) -> None:
    setup = replace(INNER, strategy=Remembering())
    state = first_state(setup)
    for seed in (1, 2):
        state = one_round(state, setup, [updates(2, seed)])
    restored = from_checkpoint(load(save(tmp_path, 2, to_parts(state), {})), setup)
    assert restored.strategy.tensors["rounds"] == 2


# -------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.name=masked_maen", r"no strategy is called 'masked_maen'; did you mean 'masked_mean'\?.*fedavg"),
        ("pool_optimizer.name=adan", r"no optimizer is called 'adan'; did you mean 'adam'\?.*momentum, sgd"),
    ],
)
def test_an_unknown_name_lists_what_is_known(override: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        rules(override)


def test_an_unknown_option_of_a_strategy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'masked_mean' has no option 'kapa'; did you mean 'kappa'\?"):
        rules("strategy.name=masked_mean", "strategy.options.kapa=2.0")


def test_without_rounds_there_is_nothing_to_decay() -> None:
    assert rules_of(RunConfig.model_validate({"federation": {"rounds": 0}}), SCHEMA).optimizers
