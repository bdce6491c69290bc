"""What is meta-learned besides the pool: the update rule and the start, and their sections of the trained state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.config import LocalConfig, MetaConfig
from federation.init_network import InitNetwork, cores_of_mask, starting_rows
from federation.meta_config import StartConfig
from federation.pool.model import PooledModel
from federation.pool.spec import PoolSpec, gather
from federation.rules import Parameters, Rule, rule_of
from federation.streams import Streams
from federation.update import Section, SectionSpec, Values

RATES_OF_UNITS = "rates/units"
SHARED_RATES = "rates/shared"
START_SECTION = "start"

LEARNED_PREFIXES = ("rates", "start")

_LEARNED_RATE = 1e-2
"""Of a learned rule, which moves an entry by about its rate in a step, whatever the gradient."""


@dataclass(frozen=True)
class ActiveUnits:
    """The units of U users' masks: ids_ujk (U, J, k) int64 in their modules, valid_ujk (U, J, k) bool."""

    ids_ujk: Tensor
    valid_ujk: Tensor

    def places(self, rank: int) -> tuple[Tensor, Tensor]:
        """Their numbers in the whole pool, padding 0, and which are no padding: (U, J * k) twice."""
        modules = self.ids_ujk.shape[1]
        numbers = self.ids_ujk + rank * torch.arange(modules)[:, None]
        return numbers.masked_fill(~self.valid_ujk, 0).flatten(1), self.valid_ujk.flatten(1)


@dataclass(frozen=True)
class Learner:
    """How users' rows start and step. network: f_init; None where they start as the pool's rows."""

    spec: PoolSpec
    rule: Rule
    network: InitNetwork | None

    def sections(self, max_rows: int) -> dict[str, SectionSpec]:
        """What is learned, where a user sends at most `max_rows` units per module."""
        found, modules = {}, len(self.spec.modules)
        if self.rule.unit_width:
            units = {"rates": self.rule.unit_width}
            found[RATES_OF_UNITS] = SectionSpec(self.spec.units, units, modules * max_rows)
        if self.rule.shared_width:
            found[SHARED_RATES] = SectionSpec(1, {"rates": self.rule.shared_width}, 1)
        if self.network is not None:
            found[START_SECTION] = SectionSpec(1, {"weights": self.network.size}, 1)
        return found

    def initial(self, streams: Streams) -> dict[str, Tensor]:
        """First values of these sections."""
        values, (unit, shared) = {}, self.rule.first(streams.generator("rule"))
        if self.rule.unit_width:
            values[RATES_OF_UNITS] = unit.repeat(self.spec.units, 1)
        if self.rule.shared_width:
            values[SHARED_RATES] = shared[None]
        if self.network is not None:
            values[START_SECTION] = self.network.init(streams.generator("start"))
        return values

    def copies(self, values: Values, active: ActiveUnits) -> dict[str, Tensor]:
        """U users' own copies of all that their adaptation depends on, as they send it: (U, k, width) by section."""
        copies, users = gather(values, self.spec, active.ids_ujk, active.valid_ujk), len(active.ids_ujk)
        for name in self.sections(self.spec.rank):
            if name == RATES_OF_UNITS:
                copies[name] = values[name][active.places(self.spec.rank)[0]]
            else:
                copies[name] = values[name].repeat(users, 1, 1)
        return copies

    def start(self, copies: Mapping[str, Tensor], active: ActiveUnits, features_uf: Tensor) -> dict[str, Tensor]:
        """Where users' rows start: {section: (U, k, d_in + d_out)}. features_uf: their context (U, F)."""
        if self.network is None:
            cores = cores_of_mask(active.valid_ujk)
        else:
            parameters_up = copies[START_SECTION][:, 0]
            cores = self.network.cores(parameters_up, features_uf, active.ids_ujk, active.valid_ujk)
        return starting_rows(copies, cores, self.spec.modules)

    def parameters(self, copies: Mapping[str, Tensor], active: ActiveUnits) -> Parameters:
        """Those of the rule."""
        shape, none = active.ids_ujk.shape, self.no_parameters(active)
        units = copies[RATES_OF_UNITS].view(*shape, -1) if RATES_OF_UNITS in copies else none.units
        return Parameters(units, copies[SHARED_RATES][:, 0] if SHARED_RATES in copies else none.shared)

    def no_parameters(self, active: ActiveUnits) -> Parameters:
        """Those of a rule that has none."""
        return Parameters(torch.zeros(*active.ids_ujk.shape, 0), torch.zeros(len(active.ids_ujk), 0))

    def sent(self, directions: Mapping[str, Tensor], active: ActiveUnits, taught_u: Tensor) -> dict[str, Section]:
        """The sections of U users' directions, which are laid out as `copies`. Who teaches nothing sends padding."""
        taught_u1, sections = taught_u[:, None], {}
        for j, module in enumerate(self.spec.modules):
            ids, valid = active.ids_ujk[:, j], active.valid_ujk[:, j]
            sections[module.section] = Section(ids.int(), valid & taught_u1, directions[module.section])
        for name in self.sections(self.spec.rank):
            ids, valid = (torch.zeros_like(taught_u1, dtype=torch.int64), taught_u1)
            if name == RATES_OF_UNITS:
                ids, valid = active.places(self.spec.rank)
            sections[name] = Section(ids.int(), valid & taught_u1, directions[name])
        return sections


def learner_of(meta: MetaConfig, local: LocalConfig, model: PooledModel) -> Learner:
    """The learner that a configuration describes, for a model's pool and features."""
    rule = rule_of(meta.rule, model.spec.modules, rate_of(meta, local)[1], local.steps)
    return Learner(model.spec, rule, _network(meta.start, model))


def rate_of(meta: MetaConfig, local: LocalConfig) -> tuple[str, float]:
    """The setting that says at what rate the update rule begins, and that rate."""
    if meta.rule.learning_rate is not None:
        return "meta.rule.learning_rate", meta.rule.learning_rate
    if meta.rule.name == "learned":
        return "meta.rule.learning_rate", _LEARNED_RATE
    return "local.learning_rate", local.learning_rate


def _network(config: StartConfig, model: PooledModel) -> InitNetwork | None:
    if config.name == "pool":
        return None
    return InitNetwork(
        modules=len(model.spec.modules),
        rank=model.spec.rank,
        feature_width=model.base.feature_width,
        hidden=config.hidden,
        factors=config.factors,
        combinations=config.combinations,
        contextual=config.name == "contextual",
    )
