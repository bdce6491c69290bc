"""The gate: a small policy network from a user's state to one logit per unit.

    logit_ug = e_g . h(u) + exp(log_alpha + 2 tanh(a . v_u / 2)) * (z_ug + sum_r' z_ujr' M_jr'r - c)

    v_u = GELU(W1 x_u + b1), h(u) = W2 v_u + b2, and e_g = m_j * n_r (elementwise) for unit g = (j, r), so that the
    gate grows with J + R, not with G = J * R;
    x_u = layer-normed features, budget share, log2(1 + examples) / 8, embedding;
    z_ug = gain, standardised per user and module (or over all modules: `groups`); c is in its units;
    M_j, where `interactions` are asked for, says what the gain of one unit means for another one of its module. For
    units whose effects interact, gains are only the slope at one point: for a quadratic reward the best mask solves a
    linear system in them, and M learns what solves it.

How far the gate trusts the gains depends on the user, within a factor of e^2, and on how many examples they come from.
c shifts all logits of a user alike: masks with a fixed budget do not see it, Bernoulli ones are sparser for a larger c.

The last layer of h, a and M are zero at first: an untrained gate is the saliency rule "take the units of highest
first-order gain", and training learns what to correct.

The parameters phi are one flat row, the way they travel: section "gate", one row of |phi| numbers, in this order
(M only where there are interactions).

    symbol      part            shape
    W1          input_weight    (H, F + 2 + E)
    b1          input_bias      (H,)
    W2          output_weight   (D, H)
    b2          output_bias     (D,)
    m           module_factor   (J, D)
    n           rank_factor     (R, D)
    log_alpha   log_alpha       (1,)
    a           alpha_weight    (H,)
    c           threshold       (1,)
    M           interaction     (J, R, R)

Shapes: U users, F features, I inputs, E embedding, H hidden, D factor width, J modules, R ranks, G units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.errors import ConfigError, PoolError

Parts = dict[str, Tensor]
"""phi by name."""

_MOST_TRUST = 2.0
"""How far the logarithm of a user's trust in gains may be from that of all: unbounded, it runs away in training."""


@dataclass(frozen=True)
class GateState:
    """What the gate knows of U users.

    features_uf: (U, F), from the frozen model over the user's support data.
    embedding_ue: (U, E), private, trained along with the gate.
    gain_ug: (U, G), first-order gain of switching a unit on, in any unit of measure; all zero says nothing.
    examples_u: (U,), how many examples (their weight) the features and the gains were taken from; 0 is allowed.
    budget_share: the active share k / R asked for.

    What the gate is not told is zero: all features, all gains, the embedding.
    """

    features_uf: Tensor
    embedding_ue: Tensor
    gain_ug: Tensor
    examples_u: Tensor
    budget_share: float


def standardise(gain_ug: Tensor, groups: int) -> Tensor:
    """Mean 0 and standard deviation 1 over each user's gains of a group; 0 where all are equal: (U, G)."""
    gain = gain_ug.view(gain_ug.shape[0], groups, -1)
    largest = gain.abs().amax(2, keepdim=True)
    scaled = gain / torch.where(largest > 0, largest, 1.0)  # so that squares of tiny gains do not underflow
    centred = scaled - scaled.mean(2, keepdim=True)
    deviation = centred.square().mean(2, keepdim=True).sqrt()
    rounding = torch.finfo(gain.dtype).eps * gain.shape[2]
    differs = deviation > rounding
    return torch.where(differs, centred / torch.where(differs, deviation, 1.0), 0.0).view(gain_ug.shape)


@dataclass(frozen=True)
class _Hidden:
    """GELU's value v_u and slope (U, H), what the units' factors meet, h(u) (U, D), the trust in gains (U, 1), and the
    slope of its logarithm in a . v_u (U, 1)."""

    value_uh: Tensor
    slope_uh: Tensor
    output_ud: Tensor
    alpha_u1: Tensor
    trust_slope_u1: Tensor


@dataclass(frozen=True)
class GateSpec:
    """The shape of a gate, and its functions.

    The trust in gains is kept as its logarithm: it stays positive, so training may mute the gains but never turn
    them around, and an optimizer's step on it is relative.

    interactions: whether there is an M, which grows with J * R * R. groups: within which gains are standardised: each
    module, or 1 where one budget is for all modules, whose gains then compare as they are.

    Raises ConfigError for a width below 1 (an embedding may be 0 wide) and for an initial_alpha not above 0.
    """

    modules: int
    rank: int
    feature_width: int
    embedding_width: int
    hidden: int
    factor_width: int
    initial_alpha: float
    interactions: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("modules", "rank", "feature_width", "hidden", "factor_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a gate's {name} must be at least 1, got {getattr(self, name)}")
        if self.embedding_width < 0:
            raise ConfigError(f"a gate's embedding_width must not be negative, got {self.embedding_width}")
        if not self.initial_alpha > 0:
            raise ConfigError(
                f"a gate's initial_alpha must be positive, got {self.initial_alpha}; "
                "to leave the gains out, give gains of zero"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Where everything lies in phi, in order."""
        return {
            "input_weight": (self.hidden, self.feature_width + 2 + self.embedding_width),
            "input_bias": (self.hidden,),
            "output_weight": (self.factor_width, self.hidden),
            "output_bias": (self.factor_width,),
            "module_factor": (self.modules, self.factor_width),
            "rank_factor": (self.rank, self.factor_width),
            "log_alpha": (1,),
            "alpha_weight": (self.hidden,),
            "threshold": (1,),
            **({"interaction": (self.modules, self.rank, self.rank)} if self.interactions else {}),
        }

    @cached_property
    def size(self) -> int:
        """|phi|."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def parts(self, phi: Tensor) -> Parts:
        """Views of phi, (|phi|,) or (1, |phi|), by name. Raises PoolError when phi is another gate's."""
        if phi.numel() != self.size:
            raise PoolError(f"this gate has {self.size} parameters, got {phi.numel()}; was it made for another pool?")
        return self._views(phi.reshape(-1))

    def _views(self, phi: Tensor) -> Parts:
        """Views of (.., |phi|) by name, (.., *shape) each."""
        pieces = torch.split(phi, [math.prod(shape) for shape in self.shapes.values()], -1)
        return {name: piece.view(*phi.shape[:-1], *shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def init(self, generator: torch.Generator, threshold: float) -> Tensor:
        """Fresh parameters (1, |phi|) of a gate that is exactly alpha * (z - c), with this c."""
        phi = torch.zeros(1, self.size)
        parts = self.parts(phi)
        bound = 1.0 / math.sqrt(self.shapes["input_weight"][1])
        parts["input_weight"].uniform_(-bound, bound, generator=generator)
        for factor in ("module_factor", "rank_factor"):
            # The product of two has a standard deviation of 1 / sqrt(D), so e_g has a norm of about 1.
            parts[factor].normal_(0.0, self.factor_width**-0.25, generator=generator)
        parts["log_alpha"].fill_(math.log(self.initial_alpha))
        parts["threshold"].fill_(threshold)
        return phi

    def logits(self, phi: Tensor, state: GateState) -> Tensor:
        """(U, G) logits, unit (j, r) at j * R + r."""
        parts = self.parts(phi)
        hidden = self._hidden(parts, self._inputs(state))
        factored_ujd = hidden.output_ud[:, None] * parts["module_factor"]
        correction_ug = (factored_ujd @ parts["rank_factor"].t()).flatten(1)
        worth_ug = self._worth(parts, standardise(state.gain_ug, self.groups))
        return correction_ug + hidden.alpha_u1 * (worth_ug - parts["threshold"])

    def vjp(self, phi: Tensor, state: GateState, gamma_ug: Tensor) -> tuple[Tensor, Tensor]:
        """Every user's own gradient of sum_g gamma_ug * logit_ug, with gamma held constant.

        Shapes: gamma_ug (U, G); results d phi (U, |phi|) and d embedding (U, E).
        """
        parts = self.parts(phi)
        inputs_ui = self._inputs(state)
        hidden = self._hidden(parts, inputs_ui)
        gamma_ujr = gamma_ug.view(len(gamma_ug), self.modules, self.rank)
        d_factored_ujd = gamma_ujr @ parts["rank_factor"]
        d_output_ud = (d_factored_ujd * parts["module_factor"]).sum(1)
        z_ug = standardise(state.gain_ug, self.groups)
        above_ug = self._worth(parts, z_ug) - parts["threshold"]
        d_log_alpha_u1 = hidden.alpha_u1 * (above_ug * gamma_ug).sum(1, keepdim=True)
        d_trust_u1 = d_log_alpha_u1 * hidden.trust_slope_u1
        d_value_uh = d_output_ud @ parts["output_weight"] + d_trust_u1 * parts["alpha_weight"]
        d_sum_uh = d_value_uh * hidden.slope_uh

        # Each part is written where it lies in phi: a user's gradient is |phi| numbers, so copies would cost the most.
        d_phi = gamma_ug.new_empty(len(gamma_ug), self.size)
        out = self._views(d_phi)
        torch.mul(d_sum_uh[:, :, None], inputs_ui[:, None], out=out["input_weight"])
        out["input_bias"].copy_(d_sum_uh)
        torch.mul(d_output_ud[:, :, None], hidden.value_uh[:, None], out=out["output_weight"])
        out["output_bias"].copy_(d_output_ud)
        torch.mul(d_factored_ujd, hidden.output_ud[:, None], out=out["module_factor"])
        factored_ujd = hidden.output_ud[:, None] * parts["module_factor"]
        out["rank_factor"].copy_(gamma_ujr.transpose(1, 2) @ factored_ujd)
        out["log_alpha"].copy_(d_log_alpha_u1)
        torch.mul(d_trust_u1, hidden.value_uh, out=out["alpha_weight"])
        torch.mul(-hidden.alpha_u1, gamma_ug.sum(1, keepdim=True), out=out["threshold"])
        if self.interactions:
            d_worth_ujr = hidden.alpha_u1[:, :, None] * gamma_ujr
            torch.mul(z_ug.view(gamma_ujr.shape)[..., None], d_worth_ujr[:, :, None], out=out["interaction"])
        d_inputs_ui = d_sum_uh @ parts["input_weight"]
        return d_phi, d_inputs_ui[:, self.feature_width + 2 :]

    def _worth(self, parts: Parts, z_ug: Tensor) -> Tensor:
        """The standardised gains, with what they mean for each other: (U, G)."""
        if not self.interactions:
            return z_ug
        z_jur = z_ug.view(-1, self.modules, self.rank).transpose(0, 1)
        return (z_jur + z_jur @ parts["interaction"]).transpose(0, 1).reshape(z_ug.shape)

    def _inputs(self, state: GateState) -> Tensor:
        """x_u: (U, I) with I = F + 2 + E."""
        features = F.layer_norm(state.features_uf, (self.feature_width,))
        budget = torch.full_like(features[:, :1], state.budget_share)
        examples = torch.log2(1 + state.examples_u.to(features))[:, None] / 8
        return torch.cat((features, budget, examples, state.embedding_ue), 1)

    def _hidden(self, parts: Parts, inputs_ui: Tensor) -> _Hidden:
        sum_uh = F.linear(inputs_ui, parts["input_weight"], parts["input_bias"])
        normal_uh = torch.special.ndtr(sum_uh)
        density_uh = torch.exp(-0.5 * sum_uh.square()) / math.sqrt(2.0 * math.pi)
        value_uh = sum_uh * normal_uh
        output_ud = F.linear(value_uh, parts["output_weight"], parts["output_bias"])
        bounded_u1 = torch.tanh(value_uh @ parts["alpha_weight"][:, None] / _MOST_TRUST)
        alpha_u1 = (parts["log_alpha"] + _MOST_TRUST * bounded_u1).exp()
        return _Hidden(value_uh, normal_uh + sum_uh * density_uh, output_ud, alpha_u1, 1 - bounded_u1.square())
