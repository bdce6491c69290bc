"""What a server begins with: the rules and the first state that follow from a configuration and the base model."""

from __future__ import annotations

from federation.base import BaseModel
from federation.config import RunConfig
from federation.errors import ConfigError
from federation.learner import learner_of
from federation.learning import learning_of
from federation.pool.model import PooledModel
from federation.state import gate_spec, initial_values, schema_of
from federation.streams import Streams
from server.round import Rules, ServerState, begin, rules_of


def first_state(config: RunConfig, base: BaseModel) -> tuple[Rules, ServerState]:
    """The rules, and the state before the first round. Wraps the base in place.

    Raises ConfigError for a pool that starts with the rows of a teacher, or of another run: simulations have those;
    and for a task that no device could do, before one is asked to.
    """
    if config.pool.start != "fresh":
        raise ConfigError(
            f"a deployed pool starts fresh, got pool.start = {config.pool.start!r}: real users have no teacher, and a "
            "server trains no variants; drop it"
        )
    planned = PooledModel.planned(base, config.pool.rank, config.pool.scale, config.pool.target_modules)
    learning_of(config.gate, base, planned.spec)
    model = PooledModel.around(base, config.pool.rank, config.pool.scale, config.pool.target_modules)
    gate = gate_spec(model, config.gate)
    learner = learner_of(config.meta, config.local, model)
    schema = schema_of(learner, gate, config.gate)
    rules = rules_of(config, schema)
    values = initial_values(learner, gate, schema, config.gate, Streams(config.seed).at("initial"))
    return rules, begin(rules, values)
