"""The configuration of a federation: parsed once at the boundary, trusted inside.

Unknown keys are errors that name the nearest known one; every field says in its description what it means.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from federation.errors import ConfigError

S = TypeVar("S", bound="Settings")


class Settings(PydanticModel):
    """Base of all configuration: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PopulationConfig(Settings):
    """Who the users are."""

    name: str = Field("code", description="code, shakespeare, texts, synthetic, or a plugin")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the population (code: root, ...)")


class PoolConfig(Settings):
    """The shape of the pool."""

    rank: PositiveInt = Field(32, description="units per module (R)")
    scale: PositiveFloat = Field(2.0, description="s in y = base(x) + s (x down^T) up")
    start: Literal["fresh", "teacher"] = Field("fresh", description="first rows; teacher: the population's best ones")
    target_modules: tuple[str, ...] | None = Field(None, description="as in PEFT; the base model's own by default")


class GateConfig(Settings):
    """How users' masks are chosen, and how the gate learns."""

    policy: Literal["gate", "saliency", "random", "all"] = Field("gate", description="what chooses masks")
    distribution: Literal["budget", "bernoulli"] = Field("budget", description="fixed budget per module, or not")
    budget: PositiveInt = Field(8, description="active units per module (k)")
    embedding: PositiveInt = Field(8, description="width of the private user embedding")
    hidden: PositiveInt = Field(32, description="width of the gate's hidden layer")
    factors: PositiveInt = Field(16, description="width D of the unit factors e_g = a_j * b_r")
    initial_alpha: PositiveFloat = Field(4.0, description="initial weight of the standardised gain")
    samples: int = Field(4, ge=2, description="masks per user and round, for the leave-one-out baseline (K)")
    exploration: float = Field(0.05, ge=0, lt=1, description="share of masks drawn uniformly")
    entropy: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    price: float = Field(0.0, ge=0, description="price of an active unit (Bernoulli only)")
    embedding_rate: float = Field(0.1, ge=0, description="step of the private embedding along its policy gradient")
    warmup: int = Field(20, ge=0, description="first rounds with random masks: gains are zero while up = 0")

    def max_rows(self, rank: int) -> int:
        """Most units of one module, of a pool with `rank`, that a user may train."""
        fixed = self.policy != "all" and self.distribution == "budget"
        return self.budget if fixed else rank

    @model_validator(mode="after")
    def _price_needs_bernoulli(self) -> Self:
        if self.price and self.distribution != "bernoulli":
            raise ValueError("with a fixed budget a price has no gradient; set distribution = 'bernoulli' or price = 0")
        return self


_FACTORS: dict[str, tuple[str, ...]] = {"both": ("down", "up"), "down": ("down",), "up": ("up",), "nothing": ()}


class LocalConfig(Settings):
    """A user's work in one round."""

    steps: PositiveInt = Field(2, description="SGD steps on the active rows (S)")
    learning_rate: PositiveFloat = Field(0.5, description="of these steps")
    examples: PositiveInt = Field(4, description="support examples per step")
    gain_examples: PositiveInt = Field(8, description="support examples that the gains are measured on")
    batches: PositiveInt | None = Field(
        None, description="different batches that the steps take in turn; one for each step by default"
    )
    query_examples: PositiveInt = Field(4, description="query examples that rewards are measured on")
    train: Literal["both", "down", "up", "alternate", "nothing"] = Field(
        "both", description="which factors; alternate starts with up; nothing trains the gate alone"
    )

    @property
    def different_batches(self) -> int:
        """How many batches a round draws for its steps."""
        return min(self.batches or self.steps, self.steps)

    def factors(self, round_index: int) -> tuple[str, ...]:
        """The factors trained in a round (counted from 1)."""
        if self.train == "alternate":
            return ("up",) if round_index % 2 else ("down",)
        return _FACTORS[self.train]


class CodecConfig(Settings):
    """How rows are written."""

    rows: Literal["fp32", "fp16", "int8", "ternary"] = Field("fp32", description="format of the rows")
    top: float = Field(1.0, gt=0, le=1, description="share of values kept (ternary)")


class PluginConfig(Settings):
    """A plugin by name, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class StrategyConfig(PluginConfig):
    """An aggregation strategy."""

    name: str = "masked_mean"


class OptimizerConfig(PluginConfig):
    """A server optimizer and its rate."""

    name: str = "adam"
    learning_rate: PositiveFloat = Field(5e-3, description="learning rate in the first round")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="cosine falls to zero over the rounds")


class LimitsConfig(Settings):
    """What the server tolerates of one user."""

    pool_norm: PositiveFloat = Field(20.0, description="largest L2 norm of a user's pool update")
    gate_norm: PositiveFloat = Field(5.0, description="largest L2 norm of a user's gate gradient")
    weight: PositiveFloat = Field(1.0, description="largest weight")
    absurd: float = Field(1e3, gt=1, description="a norm of so many times the largest is refused, not clipped")
    node_weight: PositiveFloat | None = Field(None, description="largest weight of all users of one node together")


class FederationConfig(Settings):
    """Rounds, cohorts and how the work is cut."""

    rounds: int = Field(140, ge=0)
    cohort: PositiveInt = Field(32, description="users per round")
    shards: PositiveInt = Field(4, description="fixed parts of the population (S), whatever the number of workers")
    sampling: Literal["uniform", "epochs"] = Field(
        "uniform", description="cohorts drawn anew each round, or dealt out so that all take part once per epoch"
    )
    checkpoint_every: PositiveInt = Field(1, description="rounds between checkpoints")


Precision = Literal["fp32", "bf16"]


class ComputeConfig(Settings):
    """Where the work is done, and how."""

    workers: int = Field(2, ge=0, description="Ray worker processes; 0 works in this process")
    block: PositiveInt = Field(16, description="users trained in one stacked computation (U)")
    device: Literal["cpu", "cuda", "auto"] = Field("cpu", description="auto: cuda where there is one")
    devices_per_worker: float = Field(1.0, gt=0, le=1, description="GPUs of a worker; 0.5: two workers share one")
    ray_address: str | None = Field(None, description="a running Ray cluster to work on; a local one by default")
    precision: Precision = Field("fp32", description="of forward and backward; rows stay fp32")


class EvaluateConfig(Settings):
    """How new users are served and measured."""

    methods: tuple[str, ...] = Field((), description="rows of the table; empty leaves evaluation out")
    users: int = Field(96, ge=2, description="new users measured")
    tuning_users: PositiveInt = Field(16, description="training users on whose test part rates and steps are chosen")
    steps: tuple[PositiveInt, ...] = Field((20, 40), description="Adam steps to choose from")
    learning_rates: tuple[PositiveFloat, ...] = Field((3e-3, 1e-2), description="Adam rates to choose from")
    examples: PositiveInt = Field(4, description="support examples per step")
    gain_examples: PositiveInt = Field(64, description="support examples that the gains are measured on")
    personal: CodecConfig = Field(CodecConfig(rows="ternary", top=0.5), description="how personal values are written")
    block: PositiveInt = Field(8, description="users tuned in one stacked computation")


class PersonalConfig(Settings):
    """How a device makes a user's personal values, and how the federation measures that."""

    steps: PositiveInt = Field(40, description="Adam steps on the active rows")
    learning_rate: PositiveFloat = Field(7e-3, description="of the first of these steps; it falls to zero")
    examples: PositiveInt = Field(8, description="support examples per step")
    gain_examples: PositiveInt = Field(64, description="support examples that the gains are measured on")
    rows: CodecConfig = Field(CodecConfig(rows="ternary", top=0.5), description="how personal values are written")


class DeploymentConfig(Settings):
    """How a server works with real nodes: what it waits for, and what it takes from them."""

    nodes: PositiveInt = Field(2, description="nodes that must be online before a round begins")
    join_seconds: PositiveFloat = Field(300.0, description="longest wait for these nodes")
    round_seconds: PositiveFloat = Field(600.0, description="a round's deadline; who has not answered is left out")
    quorum: float = Field(0.5, gt=0, le=1, description="least share of a round's users that must be admitted")
    attempts: PositiveInt = Field(3, description="tries of a round below its quorum, pauses between them")
    poll_seconds: PositiveFloat = Field(0.2, description="pause between looks for replies")
    users_per_node: PositiveInt = Field(10_000, description="most users of a node; one that counts more is left out")
    replies: PositiveInt = Field(8, description="replies held at a time")
    max_update_mib: PositiveFloat = Field(16.0, description="largest update of one user")
    max_reply_mib: PositiveFloat = Field(256.0, description="largest reply of one node")
    quarantine_rounds: PositiveInt = Field(10, description="rounds without a node that sent a bad reply")
    evaluate_every: int = Field(0, ge=0, description="rounds between evaluations; 0: after the last alone")


class TaskConfig(Settings):
    """What a node must know to do a user's work: everything else is the server's business, or the node's."""

    seed: int = 0
    pool: PoolConfig = PoolConfig()
    gate: GateConfig = GateConfig()
    local: LocalConfig = LocalConfig()
    codec: CodecConfig = CodecConfig()
    personal: PersonalConfig = PersonalConfig()

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        if self.gate.policy != "all" and self.gate.budget > self.pool.rank:
            raise ValueError(f"gate.budget ({self.gate.budget}) cannot exceed pool.rank ({self.pool.rank}); lower it")
        return self


class RunConfig(TaskConfig):
    """Everything a run needs; `fedquilt simulate` and a deployed server read it from TOML."""

    name: str = Field("run", description="what the record calls this run")
    kind: str = Field("simulation", description="what sort of evidence the record is")
    population: PopulationConfig = PopulationConfig()
    strategy: StrategyConfig = StrategyConfig()
    pool_optimizer: OptimizerConfig = OptimizerConfig()
    gate_optimizer: OptimizerConfig = OptimizerConfig()
    limits: LimitsConfig = LimitsConfig()
    federation: FederationConfig = FederationConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deployment: DeploymentConfig = DeploymentConfig()

    @property
    def task(self) -> TaskConfig:
        """The part that nodes are told."""
        return TaskConfig.model_validate({name: getattr(self, name) for name in TaskConfig.model_fields})


FREE_SETTINGS: Mapping[str, set[str]] = {
    "federation": {"checkpoint_every"},
    "compute": {"workers", "devices_per_worker", "ray_address"},
}
"""Settings that decide no bits: who works, and how often is saved. A run may resume with others."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides the bits: not who works, nor what is measured afterwards."""
    unnamed = dict.fromkeys(("name", "kind", "personal", "evaluate", "deployment"), True)
    free: Any = {**unnamed, **FREE_SETTINGS}
    return config.model_dump(mode="json", exclude=free)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a TOML file, with overrides as `overridden` takes them."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"an experiment is a readable TOML file, got {str(path)!r}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return parse(RunConfig, overridden(data, overrides))


def overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with every `section.key=value` in its place (TOML values; bare words are text)."""
    changed = copy.deepcopy(dict(data))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"an override is key=value, got {override!r}; for example federation.rounds=10")
        _assign(changed, key.strip().split("."), _toml_value(value.strip()))
    return changed


def parse(kind: type[S], data: Mapping[str, Any]) -> S:
    """Validated settings; a ConfigError lists every fault with its place, and the nearest name for unknown keys."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, dict(fault)) for fault in error.errors())) from None


def _assign(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{'.'.join(keys)!r} goes through {key!r}, which is a value; name a section")
    data[keys[-1]] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[Settings], fault: Mapping[str, Any]) -> str:
    place = [str(step) for step in fault["loc"]]
    where = ".".join(place) or kind.__name__
    if fault["type"] == "extra_forbidden":
        known = _known_keys(kind, place[:-1])
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    return f"{where}: {str(fault['msg']).removeprefix('Value error, ')} (got {fault.get('input')!r})"


def _known_keys(kind: type[Settings], path: Sequence[str]) -> list[str]:
    for step in path:
        annotation = kind.model_fields[step].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            return []
        kind = annotation
    return sorted(kind.model_fields)
