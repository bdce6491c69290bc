"""The configuration of a federation: every field says in its description what it means."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from federation.codec_config import CodecConfig as CodecConfig
from federation.continual_config import ContinualConfig as ContinualConfig
from federation.errors import ConfigError
from federation.gate_config import EstimatorConfig as EstimatorConfig
from federation.gate_config import GateConfig as GateConfig
from federation.gate_config import PluginConfig as PluginConfig
from federation.gate_config import Policy as Policy
from federation.gate_config import QualityConfig as QualityConfig
from federation.gate_config import RewardConfig as RewardConfig
from federation.meta_config import MetaConfig as MetaConfig
from federation.settings import Settings, overridden, parse


class PopulationConfig(Settings):
    """Who the users are."""

    name: str = Field("code", description="code, shakespeare, texts, digits, docs, synthetic, or a plugin")
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the population (code: root, ...)")


class PoolConfig(Settings):
    """The shape of the pool."""

    rank: PositiveInt = Field(32, description="units per module (R)")
    scale: PositiveFloat = Field(2.0, description="s in y = base(x) + s (x down^T) up")
    start: Literal["fresh", "teacher", "trained"] = Field(
        "fresh", description="first rows; teacher: the population's best ones; trained (of a variant): the run's own"
    )
    target_modules: tuple[str, ...] | None = Field(None, description="as in PEFT; the base model's own by default")


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
    rates_norm: PositiveFloat = Field(5.0, description="largest L2 norm of a user's gradient of the update rule")
    start_norm: PositiveFloat = Field(5.0, description="largest L2 norm of a user's gradient of f_init")
    weight: PositiveFloat = Field(1.0, description="largest weight")
    absurd: float = Field(1e3, gt=1, description="a norm of so many times the largest is refused, not clipped")
    node_weight: PositiveFloat | None = Field(None, description="largest weight of all users of one node together")


class FederationConfig(Settings):
    """Rounds, cohorts and how the work is cut."""

    rounds: int = Field(140, ge=0)
    cohort: PositiveInt = Field(32, description="users per round")
    present: float = Field(1.0, gt=0, le=1, description="share of users there in the first round; the others join")
    shards: PositiveInt = Field(4, description="fixed parts of the population (S), whatever the number of workers")
    sampling: Literal["uniform", "epochs"] = Field(
        "uniform", description="cohorts drawn anew each round, or dealt out so that all take part once per epoch"
    )
    checkpoint_every: PositiveInt = Field(1, description="rounds between checkpoints")

    @model_validator(mode="after")
    def _epochs_are_of_everyone(self) -> Self:
        if self.present < 1 and self.sampling == "epochs":
            raise ValueError(
                "an epoch deals out everyone, so users cannot join; set sampling = 'uniform', or present = 1"
            )
        return self

    def joined(self, users: int, round_index: int) -> int:
        """How many of the users are there in a round (counted from 1): they join evenly, the last in the last."""
        late, last = round((1 - self.present) * users), max(1, self.rounds - 1)
        came = late * min(round_index - 1, last) // last
        return min(users, max(self.cohort, users - late + came))


Precision = Literal["fp32", "bf16"]


class ComputeConfig(Settings):
    """Where the work is done, and how."""

    workers: int = Field(2, ge=0, description="Ray worker processes; 0 works in this process")
    block: PositiveInt = Field(16, description="users trained in one stacked computation (U)")
    device: Literal["cpu", "cuda", "auto"] = Field("cpu", description="auto: cuda where there is one")
    devices_per_worker: float = Field(1.0, gt=0, le=1, description="GPUs of a worker; 0.5: two workers share one")
    ray_address: str | None = Field(None, description="a running Ray cluster to work on; a local one by default")
    precision: Precision = Field("fp32", description="of forward and backward; rows stay fp32")


class CurvesConfig(Settings):
    """Few-shot curves: methods measured after so many steps, by users who own so many examples."""

    methods: tuple[str, ...] = Field((), description="whose curves are drawn; they tune")
    steps: tuple[int, ...] = Field((0, 1, 2, 5, 10, 20), min_length=1, description="numbers of steps")
    shots: tuple[PositiveInt, ...] = Field((), description="numbers of support examples owned; all by default")


class SequenceConfig(Settings):
    """Users who meet one task after the other: what they keep, and what they can still learn."""

    rules: tuple[str, ...] = Field(
        (),
        description="how users keep what they learned: names of personal.continual.rule, ewc:100 with a strength of "
        "its own, meta: the learned update rule; [pool=name] for that federation's; empty leaves sequences out",
    )
    tasks: int | None = Field(None, ge=2, description="tasks that users meet; all that the population has by default")
    users: int | None = Field(None, ge=2, description="the first so many of evaluate.users; all by default")
    steps: PositiveInt = Field(20, description="steps on each task; the joint reference takes as many for each")
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (3e-3, 1e-2), description="Adam rates to choose from, by ACC on the training users of evaluate.tuning_users"
    )
    strengths: tuple[PositiveFloat, ...] = Field(
        (1.0, 30.0, 1000.0), description="weights of a penalty to choose from, where the rule names none"
    )
    examples: PositiveInt = Field(8, description="support examples per step")
    quality: Literal["accuracy", "bits"] = Field(
        "accuracy", description="what is measured; minus bits per character where the base tells no accuracy"
    )


class EvaluateConfig(Settings):
    """How new users are served and measured."""

    methods: tuple[str, ...] = Field((), description="rows of the table; empty leaves evaluation out")
    claims: tuple[tuple[str, str], ...] = Field(
        (), description="pairs of methods (better, worse) that documents compare"
    )
    curves: CurvesConfig = CurvesConfig()
    sequence: SequenceConfig = SequenceConfig()
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
    continual: ContinualConfig = ContinualConfig()


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
    meta: MetaConfig = MetaConfig()
    codec: CodecConfig = CodecConfig()
    personal: PersonalConfig = PersonalConfig()

    @model_validator(mode="after")
    def _a_rule_learns_of_the_steps_that_serve(self) -> Self:
        if self.meta.adapts and self.local.train != "both":
            raise ValueError(
                f"meta.signal = {self.meta.signal!r} is of steps of both factors, as users are served, got "
                f"local.train = {self.local.train!r}; set it to 'both', or meta.signal to 'delta'"
            )
        if self.meta.learns and self.gate.reward.steps:
            raise ValueError(
                f"rewards after steps are of plain SGD, got gate.reward.steps = {self.gate.reward.steps} with a "
                "learned rule or start; set it to 0, or meta.rule.name = 'sgd' and meta.start.name = 'pool'"
            )
        return self

    @model_validator(mode="after")
    def _the_query_is_met_within_the_steps(self) -> Self:
        steps, meta = self.local.steps, self.meta
        if meta.query_steps and meta.query_steps[-1] != steps:
            raise ValueError(
                f"the last of meta.query_steps is local.steps ({steps}), since no step is taken for nothing, got "
                f"{meta.query_steps}; correct one of them"
            )
        if steps % meta.tasks or (self.local.different_batches != steps and meta.tasks > 1):
            raise ValueError(
                f"each of meta.tasks ({meta.tasks}) takes as many of local.steps ({steps}), each with a batch of its "
                "own; make the steps a multiple, and leave local.batches out"
            )
        told, met = max((self.local.gain_examples, *self.gate.windows)), steps // meta.tasks * self.local.examples
        if meta.tasks > 1 and told > met:
            raise ValueError(
                f"a policy is told of the first of meta.tasks, of which a round draws {met} examples, got {told} in "
                "local.gain_examples or gate.windows; lower them"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        largest = max((self.gate.budget, *self.gate.budgets))
        if self.gate.policy != "all" and largest > self.pool.rank:
            raise ValueError(f"gate.budget ({largest}) cannot exceed pool.rank ({self.pool.rank}); lower it")
        return self


class RunConfig(TaskConfig):
    """Everything a run needs; `fedquilt simulate` and a deployed server read it from TOML."""

    name: str = Field("run", description="what the record calls this run")
    kind: str = Field("simulation", description="what sort of evidence the record is")
    population: PopulationConfig = PopulationConfig()
    strategy: StrategyConfig = StrategyConfig()
    pool_optimizer: OptimizerConfig = OptimizerConfig()
    gate_optimizer: OptimizerConfig = OptimizerConfig()
    rates_optimizer: OptimizerConfig = Field(OptimizerConfig(learning_rate=0.05), description="of the update rule")
    start_optimizer: OptimizerConfig = OptimizerConfig()
    limits: LimitsConfig = LimitsConfig()
    federation: FederationConfig = FederationConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="further federations that methods may name: settings that differ, as tables"
    )

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
