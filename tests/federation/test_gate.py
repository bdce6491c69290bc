"""The gate against its definition, written as a loop over users and units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError, PoolError
from federation.gate import GateSpec, GateState, standardise

SPEC = GateSpec(modules=3, rank=4, feature_width=5, embedding_width=2, hidden=6, factor_width=7, initial_alpha=4.0)
USERS = 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(dtype: torch.dtype = torch.float32) -> Tensor:
    """Parameters away from their start, so that every part matters: (1, |phi|)."""
    return (SPEC.init(generator(0)) + 0.5 * torch.randn(1, SPEC.size, generator=generator(1))).to(dtype)


def state(dtype: torch.dtype = torch.float32) -> GateState:
    values = torch.randn(USERS, 5 + 2 + 12, generator=generator(2)).to(dtype)
    features, embedding, gain = torch.split(values, [5, 2, 12], 1)
    return GateState(features, embedding, 1e-3 * gain, budget_share=0.25)


def only(user: int, of: GateState) -> GateState:
    here = slice(user, user + 1)
    return replace(of, features_uf=of.features_uf[here], embedding_ue=of.embedding_ue[here], gain_ug=of.gain_ug[here])


def logits_by_definition(phi: Tensor, of: GateState) -> Tensor:
    """(U, G), one user, module and rank at a time."""
    p = SPEC.parts(phi)
    rows = []
    for features, embedding, gain in zip(of.features_uf, of.embedding_ue, of.gain_ug):
        normed = (features - features.mean()) / (features.var(correction=0) + 1e-5).sqrt()
        inputs = torch.cat((normed, features.new_tensor([of.budget_share]), embedding))
        hidden = torch.nn.functional.gelu(p["input_weight"] @ inputs + p["input_bias"])
        h = p["output_weight"] @ hidden + p["output_bias"]
        row = []
        for j in range(SPEC.modules):
            gains = gain[j * SPEC.rank : (j + 1) * SPEC.rank]
            normed_gains = (gains - gains.mean()) / gains.std(correction=0)
            for r in range(SPEC.rank):
                e = p["module_factor"][j] * p["rank_factor"][r]
                row.append(e @ h + p["log_alpha"][0].exp() * normed_gains[r])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_logits_equal_their_definition() -> None:
    phi, of = trained(torch.float64), state(torch.float64)
    torch.testing.assert_close(SPEC.logits(phi, of), logits_by_definition(phi, of))


def test_a_fresh_gate_is_the_saliency_rule() -> None:
    of = state()
    logits = SPEC.logits(SPEC.init(generator(0)), of)
    torch.testing.assert_close(logits, 4.0 * standardise(of.gain_ug, SPEC.modules), rtol=1e-6, atol=0)
    top = logits.view(USERS, 3, 4).argmax(2)
    assert top.equal(of.gain_ug.view(USERS, 3, 4).argmax(2))


def test_a_fresh_gate_can_learn_from_its_first_gradient() -> None:
    gamma = torch.randn(USERS, 12, generator=generator(4))
    gradients, _ = SPEC.vjp(SPEC.init(generator(0)), state(), gamma)
    first = SPEC.parts(gradients.mean(0))
    assert all(first[name].norm() > 0 for name in ("output_weight", "output_bias", "log_alpha"))


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
            torch.testing.assert_close(single[0], block[u], rtol=1e-6, atol=1e-6)


def test_vjp_needs_no_gradient_mode() -> None:
    phi, of, gamma = trained(), state(), torch.ones(USERS, 12)
    with torch.no_grad():
        quiet = SPEC.vjp(phi, of, gamma)[0]
    assert quiet.equal(SPEC.vjp(phi, of, gamma)[0])
    assert not quiet.requires_grad


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_standardised_gains_have_mean_zero_and_deviation_one_at_any_scale(size: float) -> None:
    gain = size * torch.randn(5, 12, generator=generator(6))
    gain_ujr = standardise(gain, modules=3).view(5, 3, 4)
    torch.testing.assert_close(gain_ujr.mean(2), torch.zeros(5, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(gain_ujr.std(2, correction=0), torch.ones(5, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-7, 3e20])
def test_equal_gains_say_nothing(value: float) -> None:
    assert standardise(torch.full((2, 96), value), modules=3).abs().max() == 0


def test_size_counts_every_parameter_and_does_not_grow_with_units() -> None:
    assert SPEC.size == 6 * 8 + 6 + 7 * 6 + 7 + (3 + 4) * 7 + 1
    wide = replace(SPEC, modules=30, rank=40)
    assert wide.size - SPEC.size == (27 + 36) * 7


def test_parameters_of_another_gate_are_refused() -> None:
    with pytest.raises(PoolError, match=f"{SPEC.size} parameters, got 9"):
        SPEC.logits(torch.zeros(1, 9), state())


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", 0), ("rank", 0), ("embedding_width", -1), ("initial_alpha", 0.0)]
)
def test_a_gate_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SPEC, **{field: value})  # type: ignore[arg-type]
