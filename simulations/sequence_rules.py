"""The rules that users who meet tasks in turn are compared by: their names, and what may be chosen for them.

A rule is written `name:strength[pool=federation]`, as in `ewc`, `ewc:100` or `replay[pool=random]`. The name is one of
`personal.continual.rule`, or `meta`: the update rule that the federation has learned, with nothing else kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from federation.config import ContinualConfig, RunConfig
from federation.continual_config import ContinualName
from federation.errors import ConfigError
from federation.plugins import suggest
from simulations.variants import MAIN, federations_of

META = "meta"
RuleName = ContinualName | Literal["meta"]
ReferenceName = Literal["alone", "joint"]
PENALTIES: tuple[RuleName, ...] = ("ewc", "online_ewc", "lwf")
"""Rules with a strength."""

_NAMES: tuple[str, ...] = (*get_args(ContinualName), META)
_WRITTEN = re.compile(r"(?P<name>\w+)(?::(?P<strength>[0-9.eE+-]+))?(?:\[\s*pool\s*=\s*(?P<pool>[^\[\]\s]+)\s*\])?")


@dataclass(frozen=True)
class SequenceRule:
    """A row of the table. pool: the federation whose pool users begin with, by its name. strength: None to choose."""

    name: str
    rule: RuleName | ReferenceName
    pool: str = MAIN
    strength: float | None = None

    @property
    def kept(self) -> ContinualName:
        """What the rule is called in a configuration of devices."""
        return "none" if self.rule in (META, *get_args(ReferenceName)) else cast(ContinualName, self.rule)


@dataclass(frozen=True)
class CoursePlan:
    """A rule with the rate of its steps (0 where they are learned) and its strength (0 where it has none)."""

    rule: SequenceRule
    learning_rate: float
    strength: float

    def continual(self, config: ContinualConfig, tasks: int) -> ContinualConfig:
        """How users keep what they learned, of a sequence of so many tasks."""
        return config.model_copy(update={"rule": self.rule.kept, "strength": self.strength, "tasks": tasks})


def rules_of(config: RunConfig) -> list[SequenceRule]:
    """The configured rules, in the table's order.

    Raises ConfigError for a rule that is unknown, written otherwise or twice, for a strength of a rule that has none,
    for an unknown federation, for `meta` of a federation that learns no rule, and where there are no methods.
    """
    written, federations = config.evaluate.sequence.rules, federations_of(config)
    rules = [_rule(text, federations) for text in written]
    names = [rule.name for rule in rules]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"every rule is measured once, {twice} come twice in evaluate.sequence.rules; drop one")
    if rules and not config.evaluate.methods:
        raise ConfigError(
            f"sequences are measured on the users of evaluate.methods, which is empty, got the rules {names}; "
            "set evaluate.methods = ['base'], or drop evaluate.sequence.rules"
        )
    return rules


def references_of(rules: Sequence[SequenceRule]) -> list[SequenceRule]:
    """Both references of every pool that rules begin with, by plain fine-tuning."""
    pools = dict.fromkeys(rule.pool for rule in rules)
    references: tuple[ReferenceName, ...] = get_args(ReferenceName)
    return [SequenceRule(_named(kind, None, pool), kind, pool) for pool in pools for kind in references]


def plans_of_rule(rule: SequenceRule, config: RunConfig) -> list[CoursePlan]:
    """Every rate and strength that a rule may choose from."""
    sequence = config.evaluate.sequence
    rates = (0.0,) if rule.rule == META else sequence.learning_rates
    chosen = sequence.strengths if rule.strength is None else (rule.strength,)
    strengths = chosen if rule.rule in PENALTIES else (0.0,)
    return [CoursePlan(rule, rate, strength) for rate in rates for strength in strengths]


def _rule(text: str, federations: Mapping[str, RunConfig]) -> SequenceRule:
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"a rule is written name:strength[pool=federation], got {text!r} in evaluate.sequence.rules; for example "
            "ewc, ewc:100 or replay[pool=random]"
        )
    name, pool = match["name"], match["pool"] or MAIN
    if name not in _NAMES:
        raise ConfigError(f"unknown rule {text!r} in evaluate.sequence.rules; {suggest(name, _NAMES)}")
    if pool not in federations:
        raise ConfigError(f"no federation is called {pool!r}, in the rule {text!r}; {suggest(pool, federations)}")
    strength = _strength(match["strength"], text, name)
    if name == META and not federations[pool].meta.learns:
        raise ConfigError(
            f"the rule {text!r} steps by what its federation has learned, {pool!r} learns neither a rule nor a start; "
            "set meta.rule.name = 'rates', name another pool, or drop it from evaluate.sequence.rules"
        )
    return SequenceRule(_named(name, strength, pool), cast(RuleName, name), pool, strength)


def _strength(written: str | None, text: str, name: str) -> float | None:
    if written is None:
        return None
    if name not in PENALTIES:
        raise ConfigError(
            f"only {', '.join(PENALTIES)} have a strength, got {text!r} in evaluate.sequence.rules; write {name!r}"
        )
    try:
        strength = float(written)
    except ValueError:
        strength = -1.0
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"a strength is a number from 0, got {written!r} in the rule {text!r}; for example {name}:10")
    return strength


def _named(name: str, strength: float | None, pool: str) -> str:
    """As tables write it."""
    return name + (f":{strength:g}" if strength is not None else "") + (f"[pool={pool}]" if pool != MAIN else "")
