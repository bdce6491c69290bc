"""The gate's part of a configuration: what chooses masks, and what a mask is worth."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from federation.settings import Settings

DistributionKind = Literal["budget", "bernoulli"]
Policy = Literal["gate", "saliency", "magnitude", "random", "all"]
GateInput = Literal["gains", "context", "embedding"]


class PluginConfig(Settings):
    """A plugin by name, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class EstimatorConfig(PluginConfig):
    """How the gate's gradient is estimated."""

    name: str = Field("reinforce", description="an estimator, of ours or of fedquilt.estimators")


class QualityConfig(PluginConfig):
    """What a user's reward measures."""

    name: str = Field("loss", description="loss (its negative), accuracy, or a plugin of fedquilt.qualities")


class RewardConfig(Settings):
    """What a mask is worth to a user: quality on the query part, minus a price for what it switches on."""

    quality: QualityConfig = QualityConfig()
    steps: int = Field(
        0, ge=0, description="SGD steps on both factors, on the support part, before the quality is measured"
    )
    price: float = Field(0.0, ge=0, description="lambda, of a unit of mean cost; with a target: where it begins")
    cost: Literal["units", "parameters"] | dict[str, PositiveFloat] = Field(
        "units", description="of a unit: 1, its parameters, or by module (measured latency); the mean counts as 1"
    )
    target: float | None = Field(None, gt=0, lt=1, description="share of active units to steer the price to")
    price_rate: PositiveFloat = Field(0.02, description="largest step of log lambda in a round, towards the target")

    @model_validator(mode="after")
    def _what_a_price_steers_needs_one(self) -> Self:
        if self.target is not None and not self.price:
            raise ValueError("a price that is steered to a target begins above 0; set price = 1e-3, say")
        if self.cost != "units" and not self.price:
            raise ValueError(
                f"what units cost counts only with a price, got cost = {self.cost!r} and price = 0; "
                "set a price, or cost = 'units'"
            )
        return self


class GateConfig(Settings):
    """How users' masks are chosen, and how the gate learns."""

    policy: Policy = Field("gate", description="what chooses masks")
    inputs: tuple[GateInput, ...] = Field(
        ("gains", "context", "embedding"), description="what the gate knows of a user; nothing: one mask for all"
    )
    distribution: DistributionKind = Field("budget", description="fixed budget, or each unit on its own")
    scope: Literal["module", "global"] = Field("module", description="budget units in each module, or as many in all")
    budget: PositiveInt = Field(8, description="active units per module (k), on average where the scope is global")
    budgets: tuple[PositiveInt, ...] = Field((), description="budgets drawn from, one a round; the budget by default")
    windows: tuple[PositiveInt, ...] = Field(
        (), description="numbers of examples that gains and context are taken from, one a round; all by default"
    )
    embedding: PositiveInt = Field(8, description="width of the private user embedding")
    embedding_rate: float = Field(0.1, ge=0, description="step of the private embedding along its policy gradient")
    rebuild: int = Field(0, ge=0, description="such steps for a user whose embedding is not known, before it is used")
    hidden: PositiveInt = Field(32, description="width of the gate's hidden layer")
    factors: PositiveInt = Field(16, description="width D of the unit factors e_g = a_j * b_r")
    initial_alpha: PositiveFloat = Field(4.0, description="initial weight of the standardised gain")
    interactions: bool = Field(
        False, description="whether gains of units speak for others of their module: R * R parameters more for each"
    )
    estimator: EstimatorConfig = EstimatorConfig()
    samples: PositiveInt = Field(4, description="masks per user and round that are tried (K)")
    reward: RewardConfig = RewardConfig()
    exploration: float = Field(0.05, ge=0, lt=1, description="share of masks drawn for units that are rarely used")
    entropy: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    balance: float = Field(0.0, ge=0, description="weight of the load balance: rarely used units are worth more")
    every: PositiveInt = Field(2, description="the gate learns in each n-th round after the warm-up")
    schedule: Literal["together", "alternate"] = Field(
        "together", description="alternate: where the gate learns, the pool rests"
    )
    warmup: int = Field(20, ge=0, description="first rounds with random masks: gains are zero while up = 0")

    def max_rows(self, rank: int) -> int:
        """Most units of one module, of a pool with `rank`, that a user may train."""
        per_module = self.policy != "all" and self.distribution == "budget" and self.scope == "module"
        return max((self.budget, *self.budgets)) if per_module else rank

    def share(self, budget: int, rank: int) -> float:
        """The share of active units that is asked for: the target, or a budget's of a module's units."""
        return self.reward.target if self.reward.target is not None else budget / rank

    def chooses(self, round_index: int) -> bool:
        """Whether the gate chooses the masks of a round (counted from 1)."""
        return self.policy == "gate" and round_index > self.warmup

    def learns(self, round_index: int) -> bool:
        """Whether the gate is trained in a round (counted from 1)."""
        return self.chooses(round_index) and (round_index - self.warmup - 1) % self.every == 0

    def rests(self, round_index: int) -> bool:
        """Whether the pool is left as it is in a round, while the gate learns."""
        return self.schedule == "alternate" and self.learns(round_index)

    @model_validator(mode="after")
    def _budgets_are_of_fixed_budgets(self) -> Self:
        if self.distribution == "bernoulli" and self.scope == "global":
            raise ValueError(
                "a scope is of fixed budgets, got scope = 'global' with distribution = 'bernoulli', where each unit is "
                "on its own; set scope = 'module', or distribution = 'budget'"
            )
        if self.distribution == "bernoulli" and self.budgets:
            raise ValueError(
                f"budgets are of fixed budgets, got {self.budgets} with distribution = 'bernoulli', where each unit is "
                "on its own; set budgets = [], or distribution = 'budget'"
            )
        return self

    @model_validator(mode="after")
    def _price_has_a_gradient(self) -> Self:
        equal = self.scope == "module" or self.reward.cost == "units"
        if self.reward.price and self.distribution == "budget" and equal:
            raise ValueError(
                "a price on a fixed budget of equal units has no gradient; set distribution = 'bernoulli', or price 0"
            )
        if self.reward.target is not None and self.distribution == "budget":
            raise ValueError("a budget fixes the share of active units; set distribution = 'bernoulli', or no target")
        return self

    @model_validator(mode="after")
    def _what_is_rebuilt_is_an_input(self) -> Self:
        if self.rebuild and "embedding" not in self.inputs:
            raise ValueError(
                f"what is rebuilt is an embedding that the gate knows, got rebuild = {self.rebuild} with inputs = "
                f"{list(self.inputs)}; add 'embedding' to inputs, or set rebuild = 0"
            )
        if self.rebuild and self.reward.steps:
            raise ValueError(
                f"an embedding is rebuilt by rewards before any step, got rebuild = {self.rebuild} with reward.steps = "
                f"{self.reward.steps}; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _alternation_leaves_the_pool_rounds(self) -> Self:
        if self.schedule == "alternate" and self.every == 1:
            raise ValueError("an alternating gate that learns in every round leaves the pool none; set every = 2")
        return self
