"""What the gate's sections besides its parameters do in a round: the load of the units and the steered price."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from client.gate_round import off_target
from federation.config import load_config
from federation.errors import CheckpointError
from federation.state import LOAD_SECTION, PRICE_SECTION
from federation.update import Schema, UpdateBlock
from server.checkpoint import Checkpoint
from server.round import begin, from_checkpoint, frozen_factors, rules_of, to_parts
from server.tracked import TrackedByMean
from strategies.conformance import check
from strategies.means import FedAvg, MaskedMean, Sums
from strategies.protocol import State, Step
from tests.server.rounds import STEERED, TRACKED, first_state, one_round, rules, updates


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
    late = {prefix: {**own, "round": torch.tensor(round_index - 1)} for prefix, own in state.optimizers.items()}
    state = replace(state, optimizers=late)
    after = one_round(state, setup, [block])
    for name, rate, bound in ((LOAD_SECTION, 0.1, math.sqrt(10)), (PRICE_SECTION, 0.5, 1.0)):
        sent = block.sections[name]
        mean = torch.zeros_like(state.values[name])
        for u in range(5):
            row = sent.rows_ukw[u, 0] * float(sent.valid_uk[u, 0])
            mean += row * min(1.0, bound / max(float(row.norm()), 1e-30)) / 5
        if name == PRICE_SECTION:
            mean = (mean / max(float(mean) + 0.2, 0.2)).clamp(-1.0, 1.0)
        moved = state.values[name] + rate * mean
        assert name != LOAD_SECTION or (moved.min() > 0 and moved.max() < 1)
        torch.testing.assert_close(after.values[name], moved, rtol=1e-5, atol=1e-6)


def sending(name: str, rows_uw: torch.Tensor) -> UpdateBlock:
    """Users who send these rows, (U, width), of one section, and nothing else."""
    users = len(rows_uw)
    block = only(updates(users, 3, TRACKED), name)
    valid_u1 = torch.ones(users, 1, dtype=torch.bool)
    section = replace(block.sections[name], valid_uk=valid_u1, rows_ukw=rows_uw[:, None])
    return replace(block, sections={**block.sections, name: section})


@pytest.mark.parametrize(
    ("share_u", "relative"),
    [
        ([0.02, 0.18], 0.0),
        ([0.1, 0.1, 0.1], 0.0),
        ([0.0, 0.2, 0.25], 1 / 3),
        ([0.0, 0.0], -1.0),
        ([0.02, 0.08], -0.5),
        ([1.0, 1.0], 0.9),
        ([-0.9, -0.9], -1.0),
    ],
)
def test_a_price_rises_and_falls_with_the_mean_share_and_stays_where_that_is_on_target(
    share_u: list[float], relative: float
) -> None:
    setup = rules(*STEERED, "gate.reward.target=0.1", schema=TRACKED)
    state = first_state(setup)
    after = one_round(state, setup, [sending(PRICE_SECTION, torch.tensor(share_u)[:, None] - 0.1)])
    moved = after.values[PRICE_SECTION] - state.values[PRICE_SECTION]
    assert float(moved) == pytest.approx(0.5 * relative, abs=1e-6)


@dataclass(frozen=True)
class Signs(FedAvg):
    """Users vote with signs; the state counts the rounds."""

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        sections = {name: replace(own, rows_ukw=own.rows_ukw.sign()) for name, own in block.sections.items()}
        return super().lift(replace(block, sections=sections), state)

    def finish(self, partial: Sums, state: State) -> tuple[Step, State]:
        step, _ = super().finish(partial, state)
        return step, replace(state, tensors={"rounds": state.tensors.get("rounds", torch.tensor(0)) + 1})


def test_load_and_price_are_means_whatever_the_strategy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rules("strategy.name=fedavg", *STEERED, schema=TRACKED)
    monkeypatch.setattr("server.round.make_strategy", lambda *_, **__: Signs())
    setup = rules(*STEERED, schema=TRACKED)
    blocks = [updates(users, users, TRACKED) for users in (3, 4, 5)]
    state = first_state(setup)
    after, mean = one_round(state, setup, blocks), one_round(first_state(plain), plain, blocks)
    for name in (LOAD_SECTION, PRICE_SECTION):
        assert torch.equal(after.values[name], mean.values[name])
    own = {name: spec for name, spec in TRACKED.sections.items() if name not in (LOAD_SECTION, PRICE_SECTION)}
    signs = replace(setup, schema=Schema(own), strategy=Signs(), optimizers=rules(schema=Schema(own)).optimizers)
    alone = [replace(block, sections={name: block.sections[name] for name in own}) for block in blocks]
    wanted = one_round(begin(signs, {name: state.values[name] for name in own}), signs, alone)
    for name in own:
        assert torch.equal(after.values[name], wanted.values[name])
    again = from_checkpoint(Checkpoint(1, to_parts(after), {}), setup).strategy
    assert (again.schema, int(again.tensors["rounds"])) == (TRACKED, 1)


def test_a_strategy_beside_the_means_keeps_the_laws_of_a_strategy() -> None:
    for strategy in (FedAvg(), MaskedMean()):
        assert check(TrackedByMean(strategy), TRACKED) == []


def test_honest_users_are_never_clipped_and_others_are() -> None:
    limits = rules(*STEERED, schema=TRACKED).limits.max_norm
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 10)
    for shares in (torch.zeros(10), torch.full((10,), 0.2), torch.ones(10)):
        assert (masks - shares).norm(dim=1).max() <= limits[LOAD_SECTION] * (1 + 1e-6)
    for active in range(11):
        assert off_target(torch.arange(10)[None] < active, 0.2).abs() <= limits[PRICE_SECTION]
    setup = rules("strategy.name=fedavg", *STEERED, schema=TRACKED)
    state, block = first_state(setup), updates(1, 3, TRACKED)
    loud = {
        name: replace(own, valid_uk=torch.ones_like(own.valid_uk), rows_ukw=torch.full_like(own.rows_ukw, 100.0))
        for name, own in block.sections.items()
        if name in (LOAD_SECTION, PRICE_SECTION)
    }
    after = one_round(state, setup, [replace(block, sections={**block.sections, **loud})])
    moved = {name: float((after.values[name] - state.values[name]).norm()) for name in loud}
    # In each of the 10 units, a norm of sqrt(10) is a row of ones.
    wanted = (state.values[LOAD_SECTION] + 0.1).clamp(max=1.0) - state.values[LOAD_SECTION]
    assert moved[LOAD_SECTION] == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert moved[PRICE_SECTION] == pytest.approx(0.5 * 1 / 1.2, rel=1e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_share_stays_one_whatever_a_user_sends(sign: float) -> None:
    """A unit of negative load would have no logarithm, and every client of the next round none of its masks."""
    setup = rules("strategy.name=fedavg", *STEERED, schema=TRACKED)
    state, block = first_state(setup), updates(2, 3, TRACKED)
    one_unit = sign * 3.0 * torch.eye(1, 10).expand(2, 1, 10)
    hostile = replace(block.sections[LOAD_SECTION], valid_uk=torch.ones(2, 1, dtype=torch.bool), rows_ukw=one_unit)
    for _ in range(5):
        state = one_round(state, setup, [replace(block, sections={**block.sections, LOAD_SECTION: hostile})])
    assert float(state.values[LOAD_SECTION][0, 0]) == (0.0 if sign < 0 else 1.0)


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
    config = load_config(
        overrides=["gate.warmup=2", "gate.every=2", "gate.schedule=alternate", "local.train=up", *STEERED]
    )
    frozen = [frozen_factors(config, round_index) for round_index in range(1, 7)]
    assert frozen == [{"down"}, {"down"}, {"down", "up"}, {"down"}, {"down", "up"}, {"down"}]
    setup = rules_of(config, TRACKED)
    state = one_round(first_state(setup), setup, [updates(6, 3, TRACKED)])
    after = one_round(state, setup, [updates(6, 4, TRACKED)], frozen=sorted(frozen[2]))
    for name in TRACKED.sections:
        assert torch.equal(after.values[name], state.values[name]) == name.startswith("pool/"), name


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
