"""Optimizers against torch.optim on the entries that move, and to the bit on those that do not."""

from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.update import Schema, SectionSpec
from strategies import Adam, Momentum, Optimizer, Sgd, Step, StepSection

ROWS, DOWN, UP = 5, 3, 2
SCHEMA = Schema({"pool/a": SectionSpec(ROWS, {"down": DOWN, "up": UP}, ROWS)})
OPTIMIZERS = [Sgd(0.1), Momentum(0.1), Adam(0.1)]
REFERENCES: list[tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = [
    (Sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Momentum(0.1, beta=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (Adam(0.01, beta1=0.5, beta2=0.9, epsilon=1e-3), lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.9), 1e-3)),
]


def random_values(seed: int = 0) -> dict[str, Tensor]:
    return {"pool/a": torch.randn(ROWS, DOWN + UP, generator=torch.Generator().manual_seed(seed))}


def step_of(seed: int, trained: Tensor | None = None, factor: float = 1.0) -> Step:
    mean = random_values(1000 + seed)["pool/a"]
    contributors = torch.ones(ROWS) if trained is None else trained.float()
    return Step({"pool/a": StepSection(mean, contributors, torch.full((ROWS,), factor))})


def run(optimizer: Optimizer, steps: list[Step]) -> Tensor:
    values = random_values()
    state = optimizer.init(values)
    for step in steps:
        values, state = optimizer.step(values, step, state)
    return values["pool/a"]


@pytest.mark.parametrize(("ours", "theirs"), REFERENCES)
def test_equals_torch_when_every_row_is_trained(ours: Optimizer, theirs) -> None:  # type: ignore[no-untyped-def]
    steps = [step_of(seed) for seed in range(20)]
    parameter = random_values()["pool/a"].requires_grad_()
    reference = theirs([parameter])
    for step in steps:
        parameter.grad = -step.sections["pool/a"].mean
        reference.step()
    torch.testing.assert_close(run(ours, steps), parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), REFERENCES)
def test_each_row_and_factor_lives_in_its_own_time(ours: Optimizer, theirs) -> None:  # type: ignore[no-untyped-def]
    """Twin: one torch optimizer for each row and factor, stepped only in the rounds that trained it."""
    generator = torch.Generator().manual_seed(7)
    start = random_values()["pool/a"]
    parts = {}
    for row in range(ROWS):
        for factor, columns in (("down", slice(0, DOWN)), ("up", slice(DOWN, None))):
            parameter = start[row, columns].clone().requires_grad_()
            parts[row, factor] = (columns, parameter, theirs([parameter]))
    steps = []
    for seed in range(30):
        trained = torch.rand(ROWS, generator=generator) < 0.4
        frozen = ("down", "up")[seed % 2]
        steps.append(step_of(seed, trained).freeze(SCHEMA, [frozen]))
        for (row, factor), (columns, parameter, reference) in parts.items():
            if trained[row] and factor != frozen:
                parameter.grad = -steps[-1].sections["pool/a"].mean[row, columns]
                reference.step()
    result = run(ours, steps)
    for (row, _), (columns, parameter, _) in parts.items():
        torch.testing.assert_close(result[row, columns], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_untrained_entries_and_their_state_keep_every_bit(optimizer: Optimizer) -> None:
    values = random_values()
    values, state = optimizer.step(values, step_of(0), optimizer.init(values))
    trained = torch.tensor([True, False, True, False, False])
    step = step_of(1, trained).freeze(SCHEMA, ["up"])
    after, state_after = optimizer.step(values, step, state)
    moved = step.moved("pool/a")
    assert after["pool/a"][~moved].equal(values["pool/a"][~moved])
    assert (after["pool/a"][moved] != values["pool/a"][moved]).all()
    for key in set(state) - {"round"}:
        assert state_after[key][~moved].equal(state[key][~moved]), key
        assert (state_after[key][moved] != state[key][moved]).all(), key


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_given_is_changed(optimizer: Optimizer) -> None:
    values, step = random_values(), step_of(0)
    state = optimizer.init(values)
    kept = {key: tensor.clone() for key, tensor in state.items()}
    optimizer.step(values, step, state)
    assert values["pool/a"].equal(random_values()["pool/a"])
    assert step.sections["pool/a"].mean.equal(step_of(0).sections["pool/a"].mean)
    assert all(state[key].equal(kept[key]) for key in kept)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_factor_shrinks_the_move_of_a_row(optimizer: Optimizer) -> None:
    """In a first round all moves are linear in the factor, Adam's too, since it multiplies Adam's output."""
    start = random_values()["pool/a"]
    whole, quarter = (run(optimizer, [step_of(0, factor=factor)]) - start for factor in (1.0, 0.25))
    torch.testing.assert_close(quarter, 0.25 * whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_survives_a_checkpoint(optimizer: Optimizer) -> None:
    values = random_values()
    values, state = optimizer.step(values, step_of(0), optimizer.init(values))
    restored = safetensors.torch.load(safetensors.torch.save(dict(state)))
    straight, _ = optimizer.step(values, step_of(1), state)
    resumed, _ = optimizer.step(values, step_of(1), restored)
    assert resumed["pool/a"].equal(straight["pool/a"])


def test_cosine_decay_ends_at_zero_and_stays_there() -> None:
    optimizer = Sgd(0.4, decay_rounds=4)
    assert [optimizer.rate(t) for t in (0, 2, 4, 9)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    assert sum(optimizer.rate(t) + optimizer.rate(4 - t) for t in range(5)) == pytest.approx(5 * 0.4)


def test_the_rate_follows_the_rounds_not_the_rows() -> None:
    """A row trained for the first time in round 2 of 4 gets round 2's rate."""
    idle, late = torch.zeros(ROWS), torch.ones(ROWS)
    result = run(Sgd(0.4, decay_rounds=4), [step_of(0, idle), step_of(1, idle), step_of(2, late)])
    expected = random_values()["pool/a"] + 0.2 * step_of(2).sections["pool/a"].mean
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: Sgd(-0.1), "learning_rate must be finite and at least 0, got -0.1"),
        (lambda: Adam(float("nan")), "learning_rate must be finite"),
        (lambda: Sgd(0.1, decay_rounds=0), "decay_rounds must be at least 1, got 0"),
        (lambda: Momentum(0.1, beta=1.0), r"beta must lie in \[0, 1\), got 1.0"),
        (lambda: Adam(0.1, beta2=-0.5), r"beta2 must lie in \[0, 1\), got -0.5"),
        (lambda: Adam(0.1, epsilon=0.0), "epsilon must be positive, got 0.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(build: Callable[[], Optimizer], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        build()
