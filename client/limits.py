"""What a node's owner lets a server ask of the device."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, PositiveInt

from federation.config import PluginConfig, TaskConfig
from federation.errors import NodeError
from federation.estimators.registry import ESTIMATORS
from federation.gate_config import GateConfig
from federation.qualities import QUALITIES
from federation.settings import Settings

_EVALUATIONS = "(gate.rebuild + 1) * gate.samples * (gate.reward.steps + 1)"


class TaskLimits(Settings):
    """The most that a task may set, for each user that it works on, and the plugins that it may name."""

    steps: PositiveInt = Field(
        1000, description="largest number of steps of any kind; every integer option of an estimator or quality is one"
    )
    examples: PositiveInt = Field(4096, description="largest number of examples, of a step or to measure gains on")
    samples: PositiveInt = Field(256, description="largest gate.samples")
    evaluations: PositiveInt = Field(4096, description="mask evaluations and steps of a user's round together")
    gate_width: PositiveInt = Field(1024, description="largest width of the gate, and of what is meta-learned")
    memory_kib: PositiveInt = Field(65_536, description="largest personal.continual.max_kib")
    estimators: tuple[str, ...] = Field(tuple(ESTIMATORS.builtin), description="that a task may name; ours by default")
    qualities: tuple[str, ...] = Field(tuple(QUALITIES.builtin), description="that a task may name; ours by default")

    def check(self, task: TaskConfig) -> None:
        """Raises NodeError for a task that sets more, or that names another plugin."""
        local, personal, gate, meta = task.local, task.personal, task.gate, task.meta
        estimator, quality = gate.estimator, gate.reward.quality
        _check_name("gate.estimator.name", estimator.name, "estimators", self.estimators)
        _check_name("gate.reward.quality.name", quality.name, "qualities", self.qualities)
        self._check(
            "steps",
            {
                "local.steps": local.steps,
                "personal.steps": personal.steps,
                "gate.reward.steps": gate.reward.steps,
                "gate.rebuild": gate.rebuild,
                **_integers("gate.estimator.options", estimator),
                **_integers("gate.reward.quality.options", quality),
            },
        )
        self._check("samples", {"gate.samples": gate.samples})
        self._check("evaluations", {_EVALUATIONS: _evaluations(gate)})
        self._check(
            "gate_width",
            {
                "gate.hidden": gate.hidden,
                "gate.factors": gate.factors,
                "gate.embedding": gate.embedding,
                "meta.rule.hidden": meta.rule.hidden,
                "meta.start.hidden": meta.start.hidden,
                "meta.start.factors": meta.start.factors,
                "meta.start.combinations": meta.start.combinations,
            },
        )
        self._check("memory_kib", {"personal.continual.max_kib": personal.continual.max_kib})
        self._check(
            "examples",
            {
                "local.examples": local.examples,
                "local.gain_examples": local.gain_examples,
                "local.query_examples": local.query_examples,
                "personal.examples": personal.examples,
                "personal.gain_examples": personal.gain_examples,
                "personal.continual.examples": personal.continual.examples,
                "gate.windows": max(gate.windows, default=0),
            },
        )

    def _check(self, limit: str, settings: Mapping[str, int]) -> None:
        most = getattr(self, limit)
        for name, value in settings.items():
            if value > most:
                raise NodeError(
                    "failed",
                    f"a task's {name} is at most limits.{limit} of the node, {most}, it is {value}; "
                    "lower it in the experiment, or have the node's owner raise the limit",
                )


def _check_name(setting: str, name: str, limit: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise NodeError(
            "failed",
            f"a task's {setting} is one of limits.{limit} of the node, {', '.join(allowed) or 'none'}, it is {name!r}; "
            "change it in the experiment, or have the node's owner add the name",
        )


def _evaluations(gate: GateConfig) -> int:
    return (gate.rebuild + 1) * gate.samples * (gate.reward.steps + 1)


def _integers(place: str, plugin: PluginConfig) -> dict[str, int]:
    """A plugin's options that are integers, by their place: how long it works is known to it alone."""
    options = {f"{place}.{name}": value for name, value in plugin.options.items()}
    return {name: value for name, value in options.items() if type(value) is int}
