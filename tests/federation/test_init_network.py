"""f_init against its equation user by user, and a mask as its special case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from federation.init_network import InitNetwork, cores_of_mask, starting_rows
from federation.pool.model import PooledModel
from federation.pool.spec import gather, rows_of_mask
from tests import models

MODULES, RANK, FEATURES, USERS, ROWS = 2, 4, 5, 3, 3
CONTEXTUAL = InitNetwork(MODULES, RANK, FEATURES, hidden=6, factors=3, combinations=2, contextual=True)
UNIVERSAL = replace(CONTEXTUAL, contextual=False)
NETWORKS = [CONTEXTUAL, UNIVERSAL, replace(CONTEXTUAL, combinations=0), replace(UNIVERSAL, combinations=0)]

generator = torch.Generator().manual_seed(0)
MASK_UG = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 1], [1, 0, 0, 1, 0, 1, 0, 0]]).bool()
FEATURES_UF = torch.randn(USERS, FEATURES, generator=generator)
IDS, VALID = rows_of_mask(MASK_UG, MODULES, ROWS)


def trained(network: InitNetwork, spread: float = 0.4) -> Tensor:
    """Parameters of each user's own: (U, size)."""
    generator = torch.Generator().manual_seed(1)
    first = network.init(generator)
    return first + spread * torch.randn(USERS, network.size, generator=generator)


def named(network: InitNetwork, flat: Tensor) -> dict[str, Tensor]:
    """One user's parameters by name, in the order in which they lie."""
    units, q, h, d = MODULES * RANK, network.combinations, network.hidden, network.factors
    shapes = {"bias": (units,), "share": (q,), "left": (units, q), "right": (units, q)}
    if network.contextual:
        shapes |= {"inner": (FEATURES, h), "inner_bias": (h,), "module": (MODULES, d), "unit": (RANK, d)}
        shapes |= {"scale": (h, d), "shares": (h, q)}
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def core(network: InitNetwork, flat: Tensor, features: Tensor, ids: list[int], j: int) -> Tensor:
    """The core of one user's units of module j, entry by entry."""
    p = named(network, flat)
    hidden = torch.zeros(0)
    if network.contextual:
        even = (features - features.mean()) / (features.var(correction=0) + 1e-5).sqrt()
        hidden = torch.tanh(even @ p["inner"] + p["inner_bias"])
    found = torch.zeros(len(ids), len(ids))
    share = p["share"] + (hidden @ p["shares"] if network.contextual else 0.0)
    for a, unit in enumerate(ids):
        g = j * RANK + unit
        logit = p["bias"][g]
        if network.contextual:
            logit = logit + (p["module"][j] * p["unit"][unit]) @ (hidden @ p["scale"])
        found[a, a] = 2.0 / (1.0 + torch.exp(-logit))
        for b, other in enumerate(ids):
            found[a, b] += (share * p["left"][g] * p["right"][j * RANK + other]).sum()
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_the_cores_of_a_stack_are_those_of_the_equation(network: InitNetwork) -> None:
    flat = trained(network)
    cores = network.cores(flat, FEATURES_UF, IDS, VALID)
    assert cores.shape == (USERS, MODULES, ROWS, ROWS)
    for u in range(USERS):
        for j in range(MODULES):
            k = int(VALID[u, j].sum())
            expected = torch.zeros(ROWS, ROWS)
            expected[:k, :k] = core(network, flat[u], FEATURES_UF[u], IDS[u, j, :k].tolist(), j)
            torch.testing.assert_close(cores[u, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_user_alone_has_the_core_that_it_has_among_others(network: InitNetwork) -> None:
    flat = trained(network)
    together = network.cores(flat, FEATURES_UF, IDS, VALID)
    for u in range(USERS):
        one = slice(u, u + 1)
        alone = network.cores(flat[one], FEATURES_UF[one], IDS[one], VALID[one])
        torch.testing.assert_close(alone[0], together[u], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_begins_as_the_mask_alone_and_has_a_gradient(network: InitNetwork) -> None:
    flat = network.init(torch.Generator().manual_seed(1)).repeat(USERS, 1).requires_grad_()
    cores = network.cores(flat, FEATURES_UF, IDS, VALID)
    assert torch.equal(cores, cores_of_mask(VALID))
    onto = torch.randn(cores.shape, generator=torch.Generator().manual_seed(2))
    slope = torch.autograd.grad(cores, flat, onto)[0]
    moved = {"bias", "scale", "right"}
    for u in range(USERS):
        by_name = named(network, slope[u])
        assert {name for name, part in by_name.items() if part.any()} == moved & {
            n for n in by_name if by_name[n].numel()
        }


def test_without_context_features_do_not_matter_and_with_it_they_do() -> None:
    other = FEATURES_UF + torch.randn(FEATURES_UF.shape, generator=torch.Generator().manual_seed(3))
    flat = trained(UNIVERSAL)
    nothing = FEATURES_UF.new_zeros(USERS, 0)
    assert torch.equal(UNIVERSAL.cores(flat, FEATURES_UF, IDS, VALID), UNIVERSAL.cores(flat, nothing, IDS, VALID))
    flat = trained(CONTEXTUAL)
    one, another = (CONTEXTUAL.cores(flat, features, IDS, VALID) for features in (FEATURES_UF, other))
    both = VALID[..., None] & VALID[:, :, None]
    assert ((one - another).abs()[both] > 1e-5).all()
    scaled = CONTEXTUAL.cores(flat, 100.0 * FEATURES_UF + 7.0, IDS, VALID)
    torch.testing.assert_close(scaled, one, rtol=1e-3, atol=1e-3)  # features are normed


@pytest.mark.parametrize("network", [CONTEXTUAL, UNIVERSAL])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e6])
def test_scales_stay_between_0_and_2_and_gradients_finite(network: InitNetwork, size: float) -> None:
    flat = size * torch.randn(USERS, network.size, generator=torch.Generator().manual_seed(4))
    shares = {"share", "shares"}
    for u in range(USERS):
        for name in shares & set(named(network, flat[u])):
            named(network, flat[u])[name].zero_()
    cores = network.cores(flat.requires_grad_(), FEATURES_UF, IDS, VALID)
    scale = cores.diagonal(dim1=2, dim2=3)[VALID]
    assert ((scale >= 0) & (scale <= 2)).all()
    assert size > 1 or ((scale > 0) & (scale < 2)).all()
    assert torch.equal(cores, torch.diag_embed(cores.diagonal(dim1=2, dim2=3)))
    assert torch.autograd.grad(cores.sum(), flat)[0].isfinite().all()


def test_a_user_without_examples_has_a_core() -> None:
    """Its features are zero."""
    cores = CONTEXTUAL.cores(trained(CONTEXTUAL), torch.zeros(USERS, FEATURES), IDS, VALID)
    assert cores.isfinite().all()


@pytest.mark.parametrize("modules", [2, 20])
def test_its_size_hardly_grows_with_the_pool(modules: int) -> None:
    """A scale and 2 Q numbers for each unit; all else is of the modules and the ranks apart."""
    r, f, h, d, q = 8, 10, 16, 4, 3
    of_units = modules * r * (1 + 2 * q) + q
    universal = InitNetwork(modules, r, f, h, d, q, False)
    assert universal.size == of_units == universal.init(torch.Generator()).shape[1]
    contextual = replace(universal, contextual=True)
    assert contextual.size == of_units + (f + 1) * h + (modules + r) * d + h * (d + q)
    assert contextual.init(torch.Generator()).shape == (1, contextual.size)


# -------------------------------------------------------------------------------- a mask


def test_a_mask_is_a_core_of_ones_and_zeros() -> None:
    """All units of the pool with the mask between them do what the mask's own rows do, whatever the order."""
    model = PooledModel.around(models.mlp(), RANK, 1.5)
    spec, generator = model.spec, torch.Generator().manual_seed(5)
    values = {m.section: torch.randn(RANK, m.width, generator=generator) for m in spec.modules}
    batch = models.batch_for(model.base, USERS, 4)
    everything = rows_of_mask(torch.ones_like(MASK_UG), MODULES, RANK)
    cores = torch.diag_embed(MASK_UG.view(USERS, MODULES, RANK).float())
    outputs = []
    for rows in (
        gather(values, spec, IDS, VALID),
        starting_rows(gather(values, spec, IDS, VALID), cores_of_mask(VALID), spec.modules),
        starting_rows(gather(values, spec, *everything), cores, spec.modules),
    ):
        with torch.no_grad(), model.bound(rows):
            outputs.append(model.base.module(batch.inputs.flatten(0, 1)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-5)


def test_starting_rows_put_the_core_between_down_and_up() -> None:
    """delta W = s down^T C up, one user and module at a time."""
    model = PooledModel.around(models.mlp(), RANK, 1.5)
    generator = torch.Generator().manual_seed(6)
    rows = {m.section: torch.randn(USERS, ROWS, m.width, generator=generator) for m in model.spec.modules}
    cores = torch.randn(USERS, MODULES, ROWS, ROWS, generator=generator)
    started = starting_rows(rows, cores, model.spec.modules)
    for j, m in enumerate(model.spec.modules):
        for u in range(USERS):
            down, up = rows[m.section][u, :, : m.d_in], rows[m.section][u, :, m.d_in :]
            found = started[m.section][u]
            assert torch.equal(found[:, : m.d_in], down)
            torch.testing.assert_close(
                found[:, : m.d_in].t() @ found[:, m.d_in :], down.t() @ cores[u, j] @ up, rtol=1e-5, atol=1e-5
            )
