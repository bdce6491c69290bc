"""Which release becomes current: a rule over evaluations, and the history of what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import FiniteFloat, PositiveInt

from federation.errors import ConfigError, RunError
from federation.plugins import suggest
from federation.settings import Settings


class Evaluation(Settings):
    """How a version serves users. metrics: means over `users` users of a split, spread over `nodes` nodes."""

    split: str
    users: PositiveInt
    nodes: PositiveInt = 1
    metrics: dict[str, FiniteFloat]


class Promotion(Settings):
    """One change of the current release. how: by the rule, by hand, or back to one that was current before.

    why: in words, "" where a person decided.
    """

    name: str
    when: datetime
    how: Literal["rule", "hand", "rollback"]
    why: str


class Promotions(Settings):
    """All changes, the last one decides."""

    format: Literal["fedquilt promotions 1"] = "fedquilt promotions 1"
    history: tuple[Promotion, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is promoted, and why, in words."""

    promoted: bool
    why: str


@dataclass(frozen=True)
class PromotionRule:
    """A candidate is promoted unless it is worse than the current release.

    metric: a loss. margin: how much worse it may be; a negative one says how much better it must be.
    users: the least number that both are measured on, of the same split.
    """

    metric: str = "tuned_loss"
    margin: float = 0.0
    users: int = 8

    def judge(self, candidate: Evaluation, current: Evaluation | None) -> Verdict:
        """Raises ConfigError when the candidate was not measured by the metric."""
        loss = self._loss(candidate)
        if candidate.users < self.users:
            return Verdict(False, f"it was measured on {candidate.users} users, the rule wants {self.users}")
        if current is None:
            return Verdict(True, "it is the first")
        if (current.split, self.metric in current.metrics) != (candidate.split, True) or current.users < self.users:
            return Verdict(False, f"the current one was measured otherwise: {_in_words(current)}")
        allowed = current.metrics[self.metric] + self.margin
        words = f"its {self.metric} is {loss:.6g}, at most {allowed:.6g} is allowed"
        return Verdict(loss <= allowed, words)

    def _loss(self, candidate: Evaluation) -> float:
        if self.metric not in candidate.metrics:
            raise ConfigError(f"a candidate has no metric {self.metric!r}; {suggest(self.metric, candidate.metrics)}")
        return candidate.metrics[self.metric]


def standing(history: Sequence[Promotion]) -> tuple[str, ...]:
    """The current release, last, and those before it that a rollback can go back to: none of them twice.

    Going back to one forgets those after it: rolling back twice goes back two releases, not forth again.
    """
    names: list[str] = []
    for promotion in history:
        if promotion.name in names:
            del names[names.index(promotion.name) + 1 :]
        else:
            names.append(promotion.name)
    return tuple(names)


def previous(before: Sequence[str], name: str | None) -> str:
    """The one of `before`, the last by default. Raises RunError when it is none of them."""
    target = name or "".join(before[-1:])
    if target not in before:
        raise RunError(
            f"a rollback goes back to what was current before ({', '.join(before) or 'nothing was'}), "
            f"got {name!r}; `fedquilt promote` makes any release current"
        )
    return target


def _in_words(evaluation: Evaluation) -> str:
    metrics = ", ".join(sorted(evaluation.metrics))
    return f"{metrics} of {evaluation.users} users of the split {evaluation.split!r}"
