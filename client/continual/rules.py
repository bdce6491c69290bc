"""The continual rules by name."""

from __future__ import annotations

from client.continual.course import ContinualRule, Course
from client.continual.isolation import Isolation
from client.continual.penalties import Ewc, Lwf, Nothing, OnlineEwc
from client.continual.reservoir import Replay
from client.personal import ActiveRows, Tuning
from federation.base import BaseModel
from federation.continual_config import ContinualConfig
from federation.errors import ConfigError
from federation.pool.model import PooledModel


def continual_rule_of(config: ContinualConfig, base: BaseModel) -> ContinualRule:
    """The rule that a configuration describes, for a base model.

    Raises ConfigError for lwf where the base does not classify.
    """
    if config.rule == "lwf" and base.log_probs is None:
        raise ConfigError(
            f"lwf (personal.continual.rule) learns from what the model said before, so the base must classify; "
            f"{base.name!r} has no log_probs: take another rule, or a base with them"
        )
    rules: dict[str, ContinualRule] = {
        "none": Nothing(),
        "ewc": Ewc(config.strength),
        "online_ewc": OnlineEwc(config.strength, config.forget),
        "lwf": Lwf(config.strength),
        "replay": Replay(config.examples),
        "isolation": Isolation(config.tasks),
    }
    return rules[config.rule]


def course_of(model: PooledModel, active: ActiveRows, tuning: Tuning, config: ContinualConfig) -> Course:
    """A course by the configuration's rule and limit. Raises as `continual_rule_of`."""
    return Course(model, active, tuning, continual_rule_of(config, model.base), config.max_kib * 1024)
