"""Means against a loop over users in float64, and against the rules' own properties."""

import pickle
import warnings

import numpy as np
import pytest
import torch

from federation.errors import ConfigError, PoolError
from federation.streams import Streams
from federation.update import Section, UpdateBlock
from strategies import FedAvg, MaskedMean, Step, Sums, weighted_sums
from strategies.conformance import EXAMPLE_SCHEMA, random_block


def block_of(users: int, seed: int = 0) -> UpdateBlock:
    return random_block(EXAMPLE_SCHEMA, users, Streams(seed))


def loop_sums(block: UpdateBlock, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """sum w D and sum w m, user by user and row by row, in float64."""
    spec, section = EXAMPLE_SCHEMA.sections[name], block.sections[name]
    rows = torch.zeros(spec.rows, spec.width, dtype=torch.float64)
    weights = torch.zeros(spec.rows, dtype=torch.float64)
    for user, weight in enumerate(block.weight_u.double()):
        for slot in range(section.ids_uk.shape[1]):
            if section.valid_uk[user, slot]:
                row = int(section.ids_uk[user, slot])
                rows[row] += weight * section.rows_ukw[user, slot].double()
                weights[row] += weight
    return rows, weights


def finish(strategy: FedAvg | MaskedMean, *blocks: UpdateBlock) -> Step:
    state = strategy.init(EXAMPLE_SCHEMA)
    partial = strategy.lift(blocks[0], state)
    for block in blocks[1:]:
        partial = strategy.merge(partial, strategy.lift(block, state))
    return strategy.finish(partial, state)[0]


@pytest.mark.parametrize("name", EXAMPLE_SCHEMA.sections)
@pytest.mark.parametrize("users", [1, 2, 37])
def test_weighted_sums_equal_a_loop(users: int, name: str) -> None:
    block = block_of(users)
    rows, weights = weighted_sums(block.sections[name], block.weight_u, EXAMPLE_SCHEMA.sections[name].rows)
    loop_rows, loop_weights = loop_sums(block, name)
    torch.testing.assert_close(rows.double(), loop_rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, loop_weights)


def test_sums_of_users_who_send_no_slot() -> None:
    """k = 0: everybody's Bernoulli mask came out empty."""
    section = Section(torch.zeros(3, 0).int(), torch.zeros(3, 0).bool(), torch.zeros(3, 0, 4))
    rows, weights = weighted_sums(section, torch.ones(3), rows=5)
    assert rows.equal(torch.zeros(5, 4))
    assert weights.equal(torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", EXAMPLE_SCHEMA.sections)
def test_rules_equal_their_formulas(name: str) -> None:
    block, kappa = block_of(9), 2.5
    rows, n = loop_sums(block, name)
    total = block.weight_u.double().sum()
    dilute, count, shrunk = (
        finish(s, block).sections[name] for s in (FedAvg(), MaskedMean(kappa=0.0), MaskedMean(kappa=kappa))
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(dilute.mean.double(), rows / total, **close)
    torch.testing.assert_close(count.mean.double(), (rows / n[:, None]).nan_to_num(0.0), **close)
    assert shrunk.mean.equal(count.mean)
    assert count.factor.equal((n > 0).float())
    torch.testing.assert_close(shrunk.factor.double(), n / (n + kappa * total / 9), **close)
    for section in (dilute, count, shrunk):
        torch.testing.assert_close(section.contributors.double(), n, **close)


def test_dilute_is_the_dense_mean_of_zero_filled_updates() -> None:
    block, name = block_of(11), "pool/a"
    section, spec = block.sections[name], EXAMPLE_SCHEMA.sections[name]
    dense = torch.zeros(11, spec.rows, spec.width)
    user, slot = section.valid_uk.nonzero(as_tuple=True)
    dense[user, section.ids_uk[user, slot].long()] = section.rows_ukw[user, slot]
    mean = (block.weight_u[:, None, None] * dense).sum(0) / block.weight_u.sum()
    torch.testing.assert_close(finish(FedAvg(), block).sections[name].mean, mean)


def test_the_count_rule_returns_what_all_users_agree_on() -> None:
    """If every user wants row j to move by c_j, the mean is c_j, however rarely j was chosen."""
    block, name = block_of(20), "pool/b"
    section, spec = block.sections[name], EXAMPLE_SCHEMA.sections[name]
    wanted = torch.randn(spec.rows, spec.width, generator=torch.Generator().manual_seed(1))
    agreed = Section(section.ids_uk, section.valid_uk, wanted[section.ids_uk.long()])
    block = UpdateBlock({**block.sections, name: agreed}, block.weight_u, {}, 0, "")
    torch.testing.assert_close(finish(MaskedMean(), block).sections[name].mean, wanted)


def test_the_unit_of_weight_does_not_matter() -> None:
    block = block_of(8)
    scaled = UpdateBlock(block.sections, 64.0 * block.weight_u, {}, 0, "")
    for strategy in (FedAvg(), MaskedMean()):
        for name, section in finish(strategy, block).sections.items():
            other = finish(strategy, scaled).sections[name]
            torch.testing.assert_close(other.mean, section.mean)
            torch.testing.assert_close(other.factor, section.factor)


def test_users_of_weight_zero_change_nothing() -> None:
    block, extra = block_of(8), block_of(5, seed=1)
    silent = UpdateBlock(extra.sections, torch.zeros(5), {}, 0, "")
    for strategy in (FedAvg(), MaskedMean()):
        for name, section in finish(strategy, block).sections.items():
            assert finish(strategy, block, silent).sections[name].mean.equal(section.mean)
            assert finish(strategy, block, silent).sections[name].factor.equal(section.factor)


def test_a_partial_is_as_small_as_the_pool() -> None:
    def size(users: int) -> int:
        strategy = MaskedMean()
        partial: Sums = strategy.lift(block_of(users), strategy.init(EXAMPLE_SCHEMA))
        return len(pickle.dumps(partial))

    assert size(1) == size(500)


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over memory that Python may not write to, as Ray gives out what others made."""
    array = np.frombuffer(tensor.numpy().tobytes(), tensor.numpy().dtype).reshape(tensor.shape)
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch knows no read-only tensors and says so
        return torch.from_numpy(array)


def in_shared_memory(partial: Sums) -> Sums:
    return Sums(
        {name: read_only(rows) for name, rows in partial.rows.items()},
        {name: read_only(weights) for name, weights in partial.weights.items()},
        read_only(partial.weight),
        read_only(partial.users),
    )


@pytest.mark.parametrize("strategy", [FedAvg(), MaskedMean()])
def test_merging_and_finishing_leave_partials_as_they_were(strategy: FedAvg | MaskedMean) -> None:
    state = strategy.init(EXAMPLE_SCHEMA)
    partials = [in_shared_memory(strategy.lift(block_of(7, seed), state)) for seed in (0, 1)]
    before = pickle.dumps(partials)
    strategy.finish(strategy.merge(*partials), state)
    assert pickle.dumps(partials) == before


def test_the_order_of_slots_and_users_does_not_matter() -> None:
    """Rows arrive in any order; the sum is sorted by row inside."""
    block, name = block_of(40), "pool/a"
    section, rows = block.sections[name], EXAMPLE_SCHEMA.sections[name].rows
    users, slots = torch.randperm(40), torch.randperm(section.ids_uk.shape[1])
    shuffled = Section(*(part[users][:, slots] for part in (section.ids_uk, section.valid_uk, section.rows_ukw)))
    sums, weights = weighted_sums(section, block.weight_u, rows)
    other_sums, other_weights = weighted_sums(shuffled, block.weight_u[users], rows)
    torch.testing.assert_close(other_sums, sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_weights, weights)


@pytest.mark.parametrize("kappa", [-1.0, float("nan"), float("inf")])
def test_kappa_out_of_range_is_refused(kappa: float) -> None:
    with pytest.raises(ConfigError, match="kappa must be finite and at least 0"):
        MaskedMean(kappa=kappa)


def test_freezing_a_factor_stops_its_columns_alone() -> None:
    step = finish(FedAvg(), block_of(9)).freeze(EXAMPLE_SCHEMA, ["down"])
    trained = step.sections["pool/a"].contributors > 0
    assert not step.moved("pool/a")[:, :3].any()
    assert step.moved("pool/a")[:, 3:].equal(trained[:, None].expand(-1, 2))
    assert step.moved("gate").all()


def test_freezing_an_unknown_factor_is_refused() -> None:
    with pytest.raises(PoolError, match=r"got \['dwon'\]; it has \['down', 'up', 'weights'\]"):
        finish(FedAvg(), block_of(2)).freeze(EXAMPLE_SCHEMA, ["dwon"])
