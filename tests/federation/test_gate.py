"""The gate against its definition, written as a loop over users and units."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from federation import gate
from federation.errors import ConfigError, PoolError
from federation.gate import GateSpec, GateState, standardise
from federation.gate_config import GateConfig, GateInput
from federation.mask_distribution import Bernoulli, FixedBudget
from federation.state import first_threshold

SPEC = GateSpec(
    modules=3,
    rank=4,
    feature_width=5,
    embedding_width=2,
    hidden=6,
    factor_width=7,
    initial_alpha=4.0,
    interactions=True,
    groups=3,
)
USERS = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(dtype: torch.dtype = torch.float32) -> Tensor:
    """Parameters away from their start, so that every part matters: (1, |phi|)."""
    return (SPEC.init(generator(0), 0.25) + 0.5 * torch.randn(1, SPEC.size, generator=generator(1))).to(dtype)


def state(dtype: torch.dtype = torch.float32) -> GateState:
    values = torch.randn(USERS, 5 + 2 + 12, generator=generator(2)).to(dtype)
    features, embedding, gain = torch.split(values, [5, 2, 12], 1)
    examples = torch.tensor([0, 1, 2, 4, 8, 16, 64, 256]).to(dtype)
    return GateState(features, embedding, 1e-3 * gain, examples, budget_share=0.25)


def only(user: int, of: GateState) -> GateState:
    here = slice(user, user + 1)
    return GateState(
        of.features_uf[here], of.embedding_ue[here], of.gain_ug[here], of.examples_u[here], of.budget_share
    )


def normal_gains(spec: GateSpec, users: int) -> GateState:
    gains = torch.randn(users, spec.modules * spec.rank, generator=generator(7))
    features, embedding = torch.zeros(users, spec.feature_width), torch.zeros(users, spec.embedding_width)
    return GateState(features, embedding, gains, torch.full((users,), 8.0), budget_share=0.25)


def logits_by_definition(phi: Tensor, of: GateState) -> Tensor:
    """(U, G), one user, module and rank at a time."""
    p = SPEC.parts(phi)
    rows = []
    for features, embedding, gain, examples in zip(of.features_uf, of.embedding_ue, of.gain_ug, of.examples_u):
        normed = (features - features.mean()) / (features.var(correction=0) + 1e-5).sqrt()
        said = features.new_tensor([of.budget_share, math.log2(1 + examples) / 8])
        inputs = torch.cat((normed, said, embedding))
        hidden = gelu(p["input_weight"] @ inputs + p["input_bias"])
        h = p["output_weight"] @ hidden + p["output_bias"]
        alpha = (p["log_alpha"][0] + 2 * torch.tanh(p["alpha_weight"] @ hidden / 2)).exp()
        row = []
        for j in range(SPEC.modules):
            gains = gain[j * SPEC.rank : (j + 1) * SPEC.rank]
            normed_gains = (gains - gains.mean()) / gains.std(correction=0)
            meant = gain.new_zeros(SPEC.rank)
            for r in range(SPEC.rank):
                for s in range(SPEC.rank):
                    meant[r] = meant[r] + normed_gains[s] * p["interaction"][j, s, r]
            for r in range(SPEC.rank):
                e = p["module_factor"][j] * p["rank_factor"][r]
                row.append(e @ h + alpha * (normed_gains[r] + meant[r] - p["threshold"][0]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_logits_equal_their_definition() -> None:
    phi, of = trained(torch.float64), state(torch.float64)
    torch.testing.assert_close(SPEC.logits(phi, of), logits_by_definition(phi, of))


def test_derivatives_equal_finite_differences() -> None:
    phi, of = trained(torch.float64).requires_grad_(), state(torch.float64)
    embedding = of.embedding_ue.clone().requires_grad_()

    def logits(phi: Tensor, embedding_ue: Tensor) -> Tensor:
        return SPEC.logits(phi, replace(of, embedding_ue=embedding_ue))

    assert torch.autograd.gradcheck(logits, (phi, embedding))


def test_a_fresh_gate_is_the_saliency_rule() -> None:
    of = state()
    phi = SPEC.init(generator(0), 0.25)
    logits = SPEC.logits(phi, of)
    above = standardise(of.gain_ug, SPEC.modules) - SPEC.parts(phi)["threshold"]
    torch.testing.assert_close(logits, 4.0 * above, rtol=1e-6, atol=0)
    for budget in (1, 2, 3):
        best = of.gain_ug.view(USERS, 3, 4).topk(budget).indices
        saliency = torch.zeros(USERS, 3, 4, dtype=torch.bool).scatter_(2, best, True).flatten(1)
        assert FixedBudget(logits, SPEC.modules, budget).mode().equal(saliency)


def test_with_one_budget_for_all_modules_a_fresh_gate_takes_the_largest_gains_of_all() -> None:
    of = state()
    scaled = replace(of, gain_ug=of.gain_ug * torch.tensor([1.0, 5.0, 0.2]).repeat_interleave(4))
    spec = replace(SPEC, groups=1)
    mode = FixedBudget(spec.logits(spec.init(generator(0), 0.0), scaled), 1, 5).mode()
    assert mode.equal(torch.zeros(USERS, 12, dtype=torch.bool).scatter_(1, scaled.gain_ug.topk(5).indices, True))


@pytest.mark.parametrize("inputs", [("gains",), ("context",)])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9, 1.0])
def test_a_fresh_bernoulli_gate_begins_near_its_share(share: float, inputs: tuple[GateInput, ...]) -> None:
    """The share of the likeliest mask with gains, the probability of every unit without."""
    spec = replace(SPEC, modules=8, rank=64, groups=8)
    phi = spec.init(generator(0), first_threshold(share, GateConfig(inputs=inputs, initial_alpha=4.0)))
    of = normal_gains(spec, 200)
    if inputs == ("gains",):
        active = Bernoulli(spec.logits(phi, of)).mode()
    else:
        active = Bernoulli(spec.logits(phi, replace(of, gain_ug=torch.zeros_like(of.gain_ug)))).inclusion()
    assert abs(active.double().mean().item() - share) < 0.01


@pytest.mark.parametrize("share", [1e-20, 0.025, 0.25, 0.5, 0.99])
def test_threshold_leaves_the_share_of_a_normal_above_it(share: float) -> None:
    assert math.erfc(first_threshold(share, GateConfig()) / math.sqrt(2)) / 2 == pytest.approx(share, rel=1e-4)


def test_a_fresh_gate_can_learn_from_its_first_gradient() -> None:
    gamma = torch.randn(USERS, 12, generator=generator(4))
    gradients, _ = SPEC.vjp(SPEC.init(generator(0), 0.25), state(), gamma)
    first = SPEC.parts(gradients.mean(0))
    learns = ("output_weight", "output_bias", "log_alpha", "alpha_weight", "threshold")
    assert all(first[name].norm() > 0 for name in learns)


def test_trust_in_gains_depends_on_how_many_examples_they_come_from() -> None:
    few = replace(normal_gains(SPEC, 1), examples_u=torch.tensor([1.0]))
    many = replace(few, examples_u=torch.tensor([255.0]))
    phi = SPEC.init(generator(0), 0.5)
    parts = SPEC.parts(phi)
    parts["alpha_weight"].fill_(1.0)
    _, weight_of_budget, weight_of_examples, _ = torch.split(parts["input_weight"], [5, 1, 1, 2], 1)
    trust_few, trust_many = (
        (2 * torch.tanh(gelu(0.25 * weight_of_budget + examples * weight_of_examples).sum() / 2)).exp()
        for examples in (1 / 8, 1.0)
    )
    ratio = SPEC.logits(phi, many) / SPEC.logits(phi, few)
    torch.testing.assert_close(ratio, (trust_many / trust_few).expand(1, 12))


def test_a_state_that_says_nothing_gives_finite_logits() -> None:
    nothing = GateState(torch.zeros(2, 5), torch.zeros(2, 2), torch.zeros(2, 12), torch.zeros(2), budget_share=0.25)
    logits = SPEC.logits(trained(), nothing)
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in SPEC.vjp(trained(), nothing, torch.ones(2, 12)))
    equal_features = replace(nothing, features_uf=torch.full((2, 5), 3.0))
    torch.testing.assert_close(SPEC.logits(trained(), equal_features), logits)


def test_examples_may_be_counted_in_whole_numbers() -> None:
    of = state()
    assert SPEC.logits(trained(), replace(of, examples_u=of.examples_u.long())).equal(SPEC.logits(trained(), of))


def test_a_fixed_budget_does_not_see_the_threshold() -> None:
    phi, of = trained(torch.float64), state(torch.float64)
    moved = phi.clone()
    SPEC.parts(moved)["threshold"].add_(1.0)
    before, after = (FixedBudget(SPEC.logits(p, of), 3, 2).inclusion() for p in (phi, moved))
    torch.testing.assert_close(after, before)
    assert (SPEC.logits(moved, of) < SPEC.logits(phi, of)).all()


@pytest.mark.parametrize("flat", [True, False])
def test_vjp_equals_autograd_user_by_user(flat: bool) -> None:
    phi, of = trained(torch.float64), state(torch.float64)
    phi = phi[0] if flat else phi
    gamma = torch.randn(USERS, 12, generator=generator(3)).double()
    phi_gradient, embedding_gradient = SPEC.vjp(phi, of, gamma)
    assert phi_gradient.shape == (USERS, SPEC.size)
    for u in range(USERS):
        leaf, embedding = phi.clone().requires_grad_(), of.embedding_ue[u : u + 1].clone().requires_grad_()
        logits = logits_by_definition(leaf, replace(only(u, of), embedding_ue=embedding))
        truth = torch.autograd.grad((logits * gamma[u]).sum(), (leaf, embedding))
        torch.testing.assert_close(phi_gradient[u], truth[0].flatten())
        torch.testing.assert_close(embedding_gradient[u], truth[1][0])


def test_a_block_of_users_equals_single_users() -> None:
    phi, of, gamma = trained(), state(), torch.randn(USERS, 12, generator=generator(3))
    logits = SPEC.logits(phi, of)
    gradients = SPEC.vjp(phi, of, gamma)
    for u in range(USERS):
        torch.testing.assert_close(SPEC.logits(phi, only(u, of))[0], logits[u], rtol=1e-6, atol=1e-6)
        singles = SPEC.vjp(phi, only(u, of), gamma[u : u + 1])
        for single, block in zip(singles, gradients):
            torch.testing.assert_close(single[0], block[u], rtol=1e-5, atol=1e-5)


def test_vjp_needs_no_gradient_mode() -> None:
    phi, of, gamma = trained(), state(), torch.ones(USERS, 12)
    with torch.no_grad():
        quiet = SPEC.vjp(phi, of, gamma)[0]
    assert quiet.equal(SPEC.vjp(phi, of, gamma)[0])
    assert not quiet.requires_grad


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_standardised_gains_have_mean_zero_and_deviation_one_at_any_scale(size: float) -> None:
    gain = size * torch.randn(5, 12, generator=generator(6))
    gain_ujr = standardise(gain, groups=3).view(5, 3, 4)
    torch.testing.assert_close(gain_ujr.mean(2), torch.zeros(5, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(gain_ujr.std(2, correction=0), torch.ones(5, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-7, 3e20])
def test_equal_gains_say_nothing(value: float) -> None:
    assert standardise(torch.full((2, 96), value), groups=3).abs().max() == 0


def test_the_docstring_says_where_everything_lies() -> None:
    rows = re.findall(r"^    \S+ +(\w+) +\((.+)\)$", gate.__doc__ or "", flags=re.MULTILINE)
    widths = {"F": 5, "2": 2, "E": 2, "H": 6, "D": 7, "J": 3, "R": 4, "1": 1}
    shapes = [
        (part, tuple(sum(widths[term] for term in width.split("+")) for width in shape.rstrip(",").split(",")))
        for part, shape in ((part, shape.replace(" ", "")) for part, shape in rows)
    ]
    assert shapes == list(SPEC.shapes.items())


def test_size_counts_every_parameter_and_does_not_grow_with_units() -> None:
    assert SPEC.size == 6 * 9 + 6 + 7 * 6 + 7 + (3 + 4) * 7 + 1 + 6 + 1 + 3 * 4 * 4
    plain = replace(SPEC, interactions=False)
    assert plain.size == SPEC.size - 3 * 4 * 4
    wide = replace(plain, modules=30, rank=40)
    assert wide.size - plain.size == (27 + 36) * 7


def test_parameters_of_another_gate_are_refused() -> None:
    with pytest.raises(PoolError, match=f"{SPEC.size} parameters, got 9"):
        SPEC.logits(torch.zeros(1, 9), state())


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", 0), ("rank", 0), ("embedding_width", -1), ("initial_alpha", 0.0)]
)
def test_a_gate_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SPEC, **{field: value})  # type: ignore[arg-type]
