"""The meta-learned part of a configuration: where users' rows start, how they step, and what teaches both."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from federation.codec_config import CodecConfig
from federation.settings import Settings

SignalName = Literal["delta", "reptile", "fomaml", "maml"]
RuleName = Literal["sgd", "rates", "learned"]
StartName = Literal["pool", "universal", "contextual"]

OUTER_GRADIENTS: tuple[SignalName, ...] = ("fomaml", "maml")
"""Signals that are gradients of a query loss, so that they teach whatever the adapted rows depend on."""


class RuleConfig(Settings):
    """U, by which users' rows step."""

    name: RuleName = Field("sgd", description="sgd; rates: per unit and step, with decay and momentum; learned: an MLP")
    learning_rate: PositiveFloat | None = Field(
        None, description="that it begins at; local.learning_rate by default, 0.01 an entry for a learned rule"
    )
    bound: float = Field(16.0, gt=1, le=1e3, description="a learned rate is within this factor of where it begins")
    hidden: PositiveInt = Field(8, description="width of the learned rule's hidden layer")


class StartConfig(Settings):
    """f_init, which says where users' rows start."""

    name: StartName = Field("pool", description="pool: its rows as they are; universal: one start; contextual: f_init")
    hidden: PositiveInt = Field(16, description="width of f_init's hidden layer")
    factors: PositiveInt = Field(8, description="width of the unit factors e_g = a_j * b_r, as of the gate")
    combinations: int = Field(4, ge=0, description="directions in which units of a module are combined (Q)")


class MetaConfig(Settings):
    """What users send of the pool, and what is learned besides."""

    signal: SignalName = Field("delta", description="trained minus given rows, or by Reptile, FOMAML or exact MAML")
    rule: RuleConfig = RuleConfig()
    start: StartConfig = StartConfig()
    query_steps: tuple[int, ...] = Field(
        (), description="numbers of steps after which the query loss counts; after all of them by default"
    )
    recompute: bool = Field(False, description="exact MAML keeps one step's activations, and computes them again")
    written: CodecConfig = Field(
        CodecConfig(), description="how users will keep their rows: what the query loss is measured with (fomaml, maml)"
    )
    tasks: PositiveInt = Field(1, description="tasks of a user's sequence that a round adapts to, one after the other")

    @property
    def adapts(self) -> bool:
        """Whether users are served by the steps that the pool was trained for."""
        return self.signal in OUTER_GRADIENTS

    @property
    def learns(self) -> bool:
        """Whether there is a rule or a start to learn besides the pool."""
        return self.rule.name != "sgd" or self.start.name != "pool"

    @model_validator(mode="after")
    def _what_is_learned_has_a_teacher(self) -> Self:
        if self.learns and not self.adapts:
            raise ValueError(
                f"a rule or a start learns from the gradient of a query loss, got signal = {self.signal!r} with rule = "
                f"{self.rule.name!r} and start = {self.start.name!r}; set signal = 'fomaml' or 'maml', or rule = 'sgd' "
                "and start = 'pool'"
            )
        return self

    @model_validator(mode="after")
    def _a_learned_rule_is_of_first_order(self) -> Self:
        if self.rule.name == "learned" and self.signal == "maml":
            raise ValueError(
                "a learned rule takes its inputs as constants, so there is no second order to compute, got signal = "
                "'maml' with rule = 'learned'; set signal = 'fomaml'"
            )
        return self

    @model_validator(mode="after")
    def _query_steps_are_of_outer_gradients(self) -> Self:
        if self.written != CodecConfig() and not self.adapts:
            raise ValueError(
                f"rows are written before a query loss, which signal = {self.signal!r} has not, got written = "
                f"{self.written.rows!r}; drop it"
            )
        if self.query_steps and not self.adapts:
            raise ValueError(
                f"query_steps are of signals with a query loss, got {self.query_steps} with signal = {self.signal!r}; "
                "leave them out, or set signal = 'fomaml' or 'maml'"
            )
        if any(a >= b for a, b in pairwise((-1, *self.query_steps))):
            raise ValueError(f"query_steps are numbers from 0, ascending, got {self.query_steps}; correct them")
        if self.recompute and self.signal != "maml":
            raise ValueError(
                f"only exact MAML keeps activations of many steps, got recompute with signal = {self.signal!r}; drop it"
            )
        return self
