"""What a node's owner lets a server ask of the device."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from federation.config import TaskConfig
from federation.errors import NodeError
from federation.settings import Settings


class TaskLimits(Settings):
    """The most that a task may set, for each user that it works on."""

    steps: PositiveInt = Field(1000, description="largest number of steps of any kind")
    examples: PositiveInt = Field(4096, description="largest number of examples, of a step or to measure gains on")
    samples: PositiveInt = Field(256, description="largest gate.samples")

    def check(self, task: TaskConfig) -> None:
        """Raises NodeError for a task that sets more."""
        local, personal, gate = task.local, task.personal, task.gate
        self._check(
            "steps",
            {
                "local.steps": local.steps,
                "personal.steps": personal.steps,
                "gate.reward.steps": gate.reward.steps,
                "gate.rebuild": gate.rebuild,
            },
        )
        self._check("samples", {"gate.samples": gate.samples})
        self._check(
            "examples",
            {
                "local.examples": local.examples,
                "local.gain_examples": local.gain_examples,
                "local.query_examples": local.query_examples,
                "personal.examples": personal.examples,
                "personal.gain_examples": personal.gain_examples,
            },
        )

    def _check(self, limit: str, settings: dict[str, int]) -> None:
        most = getattr(self, limit)
        for name, value in settings.items():
            if value > most:
                raise NodeError(
                    "failed",
                    f"a task's {name} is at most limits.{limit} of the node, {most}, it is {value}; "
                    "lower it in the experiment, or have the node's owner raise the limit",
                )
