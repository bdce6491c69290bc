"""What a user's own examples say of its best mask, when its type is known: exact chances, in closed form.

Alternatives write to outputs of their own (`habits`), so each has its own log-evidence. The prior couples them, since
a mask takes a fixed number of each class; that is summed over by the recursion of elementary symmetric polynomials.

Shapes: U users, N examples, J modules, C classes of A alternatives each, E outputs of an alternative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.data.population import Batch
from simulations.populations.habits import Arrangement
from simulations.populations.teacher import Parallel

_IMPOSSIBLE = -1e30
"""The logarithm of an impossible event. Finite: the gradient of logaddexp(-inf, -inf) is NaN."""

_LEAST_NOISE = 1e-3
"""Standard deviation that stands for none: far above what rounding leaves."""


@dataclass(frozen=True)
class Noise:
    """Of an example's targets: normal with deviation `usual`; in a share `outliers` of the examples, `corrupted`."""

    usual: float
    corrupted: float
    outliers: float

    def densities(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of errors (.., E), usual and corrupted, up to what both share: (..) each."""
        deviations = max(self.usual, _LEAST_NOISE), self.corrupted
        usual, corrupted = (-(error / d).square().sum(-1) / 2 - error.shape[-1] * math.log(d) for d in deviations)
        return usual, corrupted


@dataclass(frozen=True)
class Residuals:
    """Targets less what the base network gives, float64.

    own_unjcae: on the outputs of alternatives. idle_uni: on the others. written_unjcae: what each alternative would
    write. weight_un: 0 for padding.
    """

    own_unjcae: Tensor
    idle_uni: Tensor
    written_unjcae: Tensor
    weight_un: Tensor


def residuals_of(teacher: Parallel, arrangement: Arrangement, second_ujn: Tensor, examples: Batch) -> Residuals:
    """What examples leave for the alternatives to explain. second_ujn: where the second substitute is meant."""
    users, modules, alternatives = second_ujn.shape
    shape = (modules, len(arrangement.chosen), alternatives)
    known = len(arrangement.effects())
    all_used = torch.ones(users, *shape, dtype=torch.bool)
    units_ujr = arrangement.units(all_used, second_ujn).view(users, modules, -1)[..., :known]
    written_ujo = units_ujr.float() @ arrangement.effects()
    strength_unj = teacher.strengths(examples.inputs)
    by_module = torch.split(teacher.untaught(examples.inputs, examples.targets), list(teacher.widths[1:]), 2)
    own_unjo = torch.stack([residual[..., :known] for residual in by_module], 2)
    idle_uni = torch.cat([residual[..., known:] for residual in by_module], 2)
    written_unjcae = strength_unj[..., None, None, None] * written_ujo.view(users, 1, *shape, -1)
    return Residuals(
        own_unjo.reshape(*written_unjcae.shape).double(),
        idle_uni.double(),
        written_unjcae.double(),
        (examples.weight * _first_seen(examples)).double(),
    )


def _first_seen(examples: Batch) -> Tensor:
    """False where an example was drawn before, (U, N) bool: drawn again, it says nothing new."""
    inputs, targets = examples.inputs[..., 0], examples.targets[..., 0]
    same_unn = (inputs[:, :, None] == inputs[:, None]) & torch.isclose(targets[:, :, None], targets[:, None], atol=1e-5)
    return ~same_unn.tril(-1).any(2)


def log_evidence(residuals: Residuals, chance_ujca: Tensor, noise: Noise) -> Tensor:
    """Log-likelihood ratio of each alternative in use against not, (U, J, C, A).

    chance_ujca: prior. All outputs of an example are corrupted, or none. How likely that is is judged for each
    alternative from the example's other outputs, with the prior chances of what they hold. Without outliers exact.
    """
    used = noise.densities(residuals.own_unjcae - residuals.written_unjcae)
    unused = noise.densities(residuals.own_unjcae)
    chance = chance_ujca[:, None]
    usual, corrupted = (
        torch.logaddexp(chance.log() + yes, (-chance).log1p() + no) for yes, no in zip(used, unused, strict=True)
    )
    idle_usual, idle_corrupted = noise.densities(residuals.idle_uni)
    own_unjca = corrupted - usual
    all_un = own_unjca.sum((2, 3, 4)) + idle_corrupted - idle_usual
    prior = torch.tensor(noise.outliers, dtype=torch.float64).logit()
    odds_unjca = prior + (all_un[:, :, None, None, None] - own_unjca)

    def mixed(densities: tuple[Tensor, Tensor]) -> Tensor:
        return torch.logaddexp(F.logsigmoid(-odds_unjca) + densities[0], F.logsigmoid(odds_unjca) + densities[1])

    return torch.einsum("un,unjca->ujca", residuals.weight_un, mixed(used) - mixed(unused))


def prior_chances(habit_ujca: Tensor, flips: float, chosen: tuple[int, ...]) -> Tensor:
    """The chance of each alternative given the habit alone, (U, J, C, A) float64.

    1 - flips if habitual, else flips k / (A - k); exact while a mask has room for all swaps, 2 k <= A.
    """
    alternatives = habit_ujca.shape[3]
    others = [flips * k / max(alternatives - k, 1) for k in chosen]
    other_ca = torch.tensor(others, dtype=torch.float64)[:, None]
    return torch.where(habit_ujca, 1.0 - flips, other_ca)


def posterior_chances(evidence_ujca: Tensor, habit_ujca: Tensor, flips: float, chosen: tuple[int, ...]) -> Tensor:
    """The chance of each alternative given the habit and the evidence, (U, J, C, A): exact.

    With k habitual of A alternatives, a mask with o others has one prior chance w_o (`_swap_law`). So with likelihood
    ratios x the masks weigh sum over o of w_o e_(k-o)(x of the habit) e_o(x of the others) together, e the elementary
    symmetric polynomials, and its logarithm's derivative by log x is the chance.
    """
    with torch.enable_grad():
        log_x = evidence_ujca.detach().requires_grad_()
        classes = zip(log_x.unbind(2), habit_ujca.unbind(2), chosen, strict=True)
        total = torch.stack([_log_total(log_uja, habit_uja, flips, k) for log_uja, habit_uja, k in classes])
        return torch.autograd.grad(total.sum(), log_x)[0]


def _log_total(log_uja: Tensor, habit_uja: Tensor, flips: float, chosen: int) -> Tensor:
    """Logarithm of what all masks weigh, (U, J)."""
    habitual = _log_polynomials(log_uja.masked_fill(~habit_uja, _IMPOSSIBLE), chosen)
    others = _log_polynomials(log_uja.masked_fill(habit_uja, _IMPOSSIBLE), chosen)
    law_o = log_uja.new_tensor(_swap_law(log_uja.shape[2], chosen, flips))
    return torch.logsumexp(law_o[:, None, None] + others + habitual.flip(0), 0)


def _log_polynomials(log_uja: Tensor, most: int) -> Tensor:
    """log e_m for m = 0..most, (most + 1, U, J)."""
    none = torch.full_like(log_uja[:, :, 0], _IMPOSSIBLE)
    log_muj = torch.stack([torch.zeros_like(none), *[none] * most])
    for log_uj in log_uja.unbind(2):
        log_muj = torch.cat((log_muj[:1], torch.logaddexp(log_muj[1:], log_uj + log_muj[:-1])))
    return log_muj


def _swap_law(alternatives: int, chosen: int, flips: float) -> list[float]:
    """Log-chance of each single mask with o = 0..chosen alternatives beyond the habit, by `habits.swapped`.

    s of the habit stay. The others come in at random, and where there are too few of them, swapped ones come back.
    """
    others = alternatives - chosen
    law = []
    for o in range(chosen + 1):
        stays = range(chosen - o + 1) if o == others else [chosen - o]
        chance = sum(
            math.comb(chosen - o, s)
            * flips ** (chosen - s)
            * (1.0 - flips) ** s
            / math.comb(chosen - s, chosen - o - s)
            for s in stays
        )
        law.append(math.log(chance / math.comb(others, o)) if o <= others and chance else _IMPOSSIBLE)
    return law
