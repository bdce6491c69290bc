"""The server's round against closed forms, and against itself in pieces, resumed, and with bad users in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.config import RunConfig, load_config
from federation.errors import CheckpointError, ConfigError, PluginError
from federation.state import LOAD_SECTION, PRICE_SECTION
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from server.checkpoint import Checkpoint, load, save
from server.round import (
    Rules,
    ServerState,
    begin,
    close,
    from_checkpoint,
    frozen_factors,
    lift,
    rules_of,
    to_parts,
)
from strategies.protocol import State

SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 2, "up": 3}, max_rows=3),
        "pool/b": SectionSpec(rows=4, factors={"down": 3, "up": 1}, max_rows=3),
        "gate": SectionSpec(rows=1, factors={"phi": 7}, max_rows=1),
    }
)
TRACKED = Schema(
    {
        **SCHEMA.sections,
        LOAD_SECTION: SectionSpec(rows=1, factors={"units": 10}, max_rows=1),
        PRICE_SECTION: SectionSpec(rows=1, factors={"log": 1}, max_rows=1),
    }
)
"""Of a gate whose price is steered."""
STEERED = (
    "gate.distribution=bernoulli",
    "gate.reward.price=0.01",
    "gate.reward.target=0.2",
    "gate.reward.price_rate=0.5",
)
PLAIN_SGD = [
    "strategy.name=fedavg",
    *[f"{part}_optimizer.{key}" for part in ("pool", "gate") for key in ("name=sgd", "schedule=constant")],
    "pool_optimizer.learning_rate=1.0",
    "gate_optimizer.learning_rate=0.5",
]


def rules(*overrides: str, schema: Schema = SCHEMA) -> Rules:
    return rules_of(load_config(overrides=overrides), schema)


def first_state(rules: Rules) -> ServerState:
    generator = torch.Generator().manual_seed(1)
    sections = rules.schema.sections.items()
    return begin(rules, {name: torch.randn(spec.rows, spec.width, generator=generator) for name, spec in sections})


def updates(users: int, seed: int, schema: Schema = SCHEMA) -> UpdateBlock:
    generator = torch.Generator().manual_seed(seed)
    sections = {}
    for name, spec in schema.sections.items():
        ids = torch.stack([torch.randperm(spec.rows, generator=generator)[: spec.max_rows] for _ in range(users)])
        valid = torch.rand(ids.shape, generator=generator) < 0.7
        sections[name] = Section(ids.int(), valid, torch.randn(*ids.shape, spec.width, generator=generator))
    return UpdateBlock(sections, torch.ones(users), {}, 1, "v")


def one_round(
    state: ServerState, rules: Rules, blocks: Sequence[UpdateBlock], frozen: Sequence[str] = ()
) -> ServerState:
    partials = [lift(block, state.strategy, rules)[0] for block in blocks]
    return close(state, reduce(rules.strategy.merge, partials), rules, frozen)


def dense(block: UpdateBlock, name: str, u: int) -> Tensor:
    """One user's contribution to a section as a dense (rows, width)."""
    section, total = block.sections[name], torch.zeros(SCHEMA.sections[name].rows, SCHEMA.sections[name].width)
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


# -------------------------------------------------------------------------------- load and price


def only(block: UpdateBlock, *kept: str) -> UpdateBlock:
    """The block with padding in all sections but those of these prefixes."""
    sections = {
        name: section if name.split("/")[0] in kept else replace(section, valid_uk=torch.zeros_like(section.valid_uk))
        for name, section in block.sections.items()
    }
    return replace(block, sections=sections)


@pytest.mark.parametrize("round_index", [1, 100])
def test_load_and_price_move_by_their_mean_at_rates_of_their_own_in_every_round(round_index: int) -> None:
    setup = rules("strategy.name=fedavg", *STEERED, schema=TRACKED)
    state, block = first_state(setup), updates(5, 3, TRACKED)
    state = replace(
        state,
        optimizers={prefix: {**o, "round": torch.tensor(round_index - 1)} for prefix, o in state.optimizers.items()},
    )
    after = one_round(state, setup, [block])
    for name, rate, bound in ((LOAD_SECTION, 0.1, math.sqrt(10)), (PRICE_SECTION, 0.5, 1 / 0.2)):
        sent = block.sections[name]
        mean = torch.zeros_like(state.values[name])
        for u in range(5):
            row = sent.rows_ukw[u, 0] * float(sent.valid_uk[u, 0])
            mean += row * min(1.0, bound / max(float(row.norm()), 1e-30)) / 5
        torch.testing.assert_close(after.values[name], state.values[name] + rate * mean, rtol=1e-5, atol=1e-6)


def test_honest_users_are_never_clipped_and_others_are() -> None:
    limits = rules(*STEERED, schema=TRACKED).limits.max_norm
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10)
    for shares in (torch.zeros(10), torch.full((10,), 0.2), torch.ones(10)):
        assert (masks - shares).norm(dim=1).max() <= limits[LOAD_SECTION] * (1 + 1e-6)
    for active in range(11):
        assert abs(active / 10 - 0.2) / 0.2 <= limits[PRICE_SECTION]
    setup = rules("strategy.name=fedavg", *STEERED, schema=TRACKED)
    state, block = first_state(setup), only(updates(1, 3, TRACKED), LOAD_SECTION, PRICE_SECTION)
    loud = {
        name: replace(
            section,
            valid_uk=section.valid_uk | (name in (LOAD_SECTION, PRICE_SECTION)),
            rows_ukw=torch.full_like(section.rows_ukw, 100.0),
        )
        for name, section in block.sections.items()
    }
    after = one_round(state, setup, [replace(block, sections=loud)])
    moved = {name: float((after.values[name] - state.values[name]).norm()) for name in TRACKED.sections}
    assert moved[LOAD_SECTION] == pytest.approx(0.1 * math.sqrt(10), rel=1e-5)
    assert moved[PRICE_SECTION] == pytest.approx(0.5 / 0.2, rel=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "masked_mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("kept", ["pool", "gate", LOAD_SECTION, PRICE_SECTION, "nothing"])
def test_a_section_of_padding_alone_does_not_move_though_it_has_momentum(
    strategy: str, optimizer: str, kept: str
) -> None:
    """As in a round in which the pool rests, the gate does not learn, or the price is left alone."""
    names = [f"{part}_optimizer.name={optimizer}" for part in ("pool", "gate")]
    setup = rules(f"strategy.name={strategy}", *names, *STEERED, schema=TRACKED)
    state = one_round(first_state(setup), setup, [updates(6, 3, TRACKED)])
    after = one_round(state, setup, [only(updates(6, 4, TRACKED), kept)])
    for name in TRACKED.sections:
        assert torch.equal(after.values[name], state.values[name]) == (name.split("/")[0] != kept), name
    for prefix, moments in state.optimizers.items():
        for name, tensor in moments.items():
            if prefix != kept and name != "round":
                assert torch.equal(after.optimizers[prefix][name], tensor), name


def test_sections_that_the_schema_lacks_have_no_rules() -> None:
    assert set(rules().optimizers) == set(rules().limits.max_norm) == {"pool", "gate"}
    without_price = Schema({name: spec for name, spec in TRACKED.sections.items() if name != PRICE_SECTION})
    assert set(rules(schema=without_price).optimizers) == {"pool", "gate", "load"}
    assert set(rules(schema=without_price).limits.max_norm) == {"pool", "gate", "load"}


def test_where_the_pool_rests_none_of_it_moves_whatever_is_sent() -> None:
    config = load_config(overrides=["gate.warmup=2", "gate.every=2", "gate.schedule=alternate", "local.train=up"])
    frozen = [frozen_factors(config, round_index) for round_index in range(1, 7)]
    assert frozen == [{"down"}, {"down"}, {"down", "up"}, {"down"}, {"down", "up"}, {"down"}]
    setup = rules_of(config, TRACKED)
    state = one_round(first_state(setup), setup, [updates(6, 3, TRACKED)])
    after = one_round(state, setup, [updates(6, 4, TRACKED)], frozen=sorted(frozen[2]))
    for name in TRACKED.sections:
        assert torch.equal(after.values[name], state.values[name]) == name.startswith("pool/"), name


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


@pytest.mark.parametrize("lacking", ["values/load", "values/price", "optimizer-load", "optimizer-price", "strategy"])
def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(lacking: str) -> None:
    setup = rules(*STEERED, schema=TRACKED)
    parts = {part: dict(tensors) for part, tensors in to_parts(first_state(setup)).items()}
    part, _, name = lacking.partition("/")
    if name:
        del parts[part][name]
    else:
        del parts[part]
    with pytest.raises(CheckpointError, match=rf"of round 3 lacks {lacking}, .* older version .*: begin a new run"):
        from_checkpoint(Checkpoint(3, parts, {}), setup)


def test_a_checkpoint_of_another_gate_is_refused() -> None:
    setup = rules()
    parts = to_parts(first_state(setup))
    other = {**parts, "values": {**parts["values"], "gate": torch.zeros(1, 6)}}
    with pytest.raises(CheckpointError, match=r"lacks values/gate, or has it in another shape"):
        from_checkpoint(Checkpoint(3, other, {}), setup)


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
