"""The continual part of a configuration: how users that adapt again keep what they learned before."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from federation.settings import Settings

ContinualName = Literal["none", "ewc", "online_ewc", "lwf", "replay", "isolation"]


class ContinualConfig(Settings):
    """What a user remembers between adaptations, and what it does with it."""

    rule: ContinualName = Field(
        "none",
        description="none; ewc, online_ewc: a penalty on moving what mattered; lwf: the model as it was teaches; "
        "replay: kept examples; isolation: units of earlier tasks stay",
    )
    strength: float = Field(1.0, ge=0, description="weight of the penalty (ewc, online_ewc, lwf)")
    forget: float = Field(0.1, ge=0, lt=1, description="share of earlier importance that a task forgets (online_ewc)")
    examples: PositiveInt = Field(16, description="examples that are kept (replay)")
    tasks: PositiveInt = Field(5, description="tasks that share a user's units (isolation)")
    max_kib: PositiveInt = Field(1024, description="largest memory of a user; a rule that needs more is refused")
