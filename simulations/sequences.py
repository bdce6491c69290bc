"""New users who meet one task after the other, by every rule that is to keep what they learned.

Effort is equal: each rule's rate and strength are chosen by ACC from one grid, on the test parts of the training users
that choose for methods too. Both references choose likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from client.continual.rules import continual_rule_of
from federation.config import RunConfig
from federation.data.population import Population, Sequenced
from federation.errors import ConfigError
from federation.streams import UserIds
from simulations.compute.worker import blocks
from simulations.compute.workers import Workers
from simulations.continual_metrics import References, continual_metrics, steps_to_target
from simulations.evaluate import evaluated_users
from simulations.progress import Progress, Stage
from simulations.sequence_rules import (
    PENALTIES,
    CoursePlan,
    plans_of_rule,
    references_of,
    rules_of,
)
from simulations.sequence_walks import Walk, measured_quality, walk_block, watched_steps
from simulations.serve import Trained
from simulations.setup import Setup
from simulations.statistics import Floats, clustered_error


@dataclass(frozen=True)
class SequenceResult:
    """A rule, or a reference, with what was chosen for it, and its users' walk."""

    plan: CoursePlan
    walk: Walk

    @property
    def name(self) -> str:
        return self.plan.rule.name


@dataclass(frozen=True)
class SequenceEvaluation:
    """All rules and references, over the same users in the same order. quality: "accuracy" or "bits"."""

    user_ids: UserIds
    groups_u: UserIds
    quality: str
    tasks: int
    steps: int
    rules: Sequence[SequenceResult]
    references: Mapping[str, SequenceResult]

    def references_of(self, result: SequenceResult) -> References:
        """What a rule is held against: its own start, and its pool's references."""
        alone, joint = (self.references[rule.name].walk for rule in references_of([result.plan.rule]))
        return References(result.walk.before_ui, alone.quality_uti[:, -1], joint.quality_uti[:, -1])

    def metrics(self, result: SequenceResult) -> dict[str, Floats]:
        """Every figure of `METRICS`, by user (U,)."""
        return {
            **continual_metrics(result.walk.quality_uti, self.references_of(result)),
            "steps_to_target": np.minimum(self.steps_ui(result), self.steps).mean(1),
        }

    def steps_ui(self, result: SequenceResult) -> Floats:
        """After how many steps each task was at its target, (U, N); infinity where it never was."""
        return steps_to_target(result.walk.rise_uis, watched_steps(self.steps), self.references_of(result))


def check_sequences(config: RunConfig, population: Population, federations: Mapping[str, Setup]) -> None:
    """Raises ConfigError where sequences cannot be measured: before anything is trained."""
    rules = rules_of(config)
    if not rules:
        return
    tasks = population.tasks if isinstance(population, Sequenced) else 1
    wanted = config.evaluate.sequence.tasks or 2
    if tasks < wanted:
        raise ConfigError(
            f"sequences are of at least {wanted} tasks, users of {population.name!r} have {tasks}; set tasks in "
            "population.options (digits, code), lower evaluate.sequence.tasks, or drop evaluate.sequence.rules"
        )
    most = config.evaluate.users
    if (config.evaluate.sequence.users or most) > most:
        raise ConfigError(
            f"sequences are measured on some of evaluate.users ({most}), got evaluate.sequence.users = "
            f"{config.evaluate.sequence.users}; lower it"
        )
    for rule in rules:
        setup = federations[rule.pool]
        plan = plans_of_rule(rule, config)[0]
        continual_rule_of(plan.continual(setup.config.personal.continual, wanted), setup.model.base)


def evaluate_sequences(
    workers: Workers, population: Population, trained: Trained, progress: Progress
) -> SequenceEvaluation | None:
    """Chooses every rule's rate and strength on training users, then lets new users walk; None without a rule."""
    config = trained.config
    rules = rules_of(config)
    if not rules:
        return None
    assert isinstance(population, Sequenced), population.name
    sequence = config.evaluate.sequence
    tasks = sequence.tasks or population.tasks
    tuning_ids, new_ids = evaluated_users(population, config)
    new_ids = new_ids[: sequence.users]
    shared, block = workers.share(trained), config.evaluate.block

    def walk(name: str, ids: UserIds, plans: Sequence[CoursePlan]) -> dict[CoursePlan, Walk]:
        jobs = [(shared, ids[part], plans, tasks) for part in blocks(len(ids), block)]
        return _walk(workers, jobs, plans, progress.stage(name, len(jobs)))

    everyone = [*references_of(rules), *rules]
    grid = [plan for rule in everyone for plan in plans_of_rule(rule, config)]
    trials = walk("choose for sequences", tuning_ids, grid)
    chosen = [max(plans_of_rule(rule, config), key=lambda plan: _mean_acc(trials[plan])) for rule in everyone]
    walks = walk("sequences", new_ids, chosen)
    results = [SequenceResult(plan, walks[plan]) for plan in chosen]
    split = len(results) - len(rules)
    return SequenceEvaluation(
        user_ids=new_ids,
        groups_u=population.groups(new_ids),
        quality=measured_quality(config, population.base_model()),
        tasks=tasks,
        steps=sequence.steps,
        rules=results[split:],
        references={result.name: result for result in results[:split]},
    )


def continual_record(evaluation: SequenceEvaluation) -> dict[str, Any]:
    """For the record: what was measured, every rule, and the references."""
    return {
        "quality": evaluation.quality,
        "tasks": evaluation.tasks,
        "steps": evaluation.steps,
        "users": len(evaluation.user_ids),
        "groups": len(set(evaluation.groups_u.tolist())),
        "rules": {result.name: _rule_entry(evaluation, result) for result in evaluation.rules},
        "references": {name: _reference_entry(evaluation, found) for name, found in evaluation.references.items()},
    }


def continual_users(evaluation: SequenceEvaluation) -> dict[str, Any]:
    """Each simulated user's ACC and BWT by rule, and who they are."""
    by_rule = {result.name: evaluation.metrics(result) for result in evaluation.rules}
    return {
        "ids": evaluation.user_ids.tolist(),
        "groups": evaluation.groups_u.tolist(),
        "acc": {name: np.round(metrics["acc"], 6).tolist() for name, metrics in by_rule.items()},
        "bwt": {name: np.round(metrics["bwt"], 6).tolist() for name, metrics in by_rule.items()},
    }


def _walk(
    workers: Workers, jobs: Sequence[tuple[Any, ...]], plans: Sequence[CoursePlan], stage: Stage
) -> dict[CoursePlan, Walk]:
    """Every plan's walk of all users: each job is of a block of them, in order."""
    found: dict[int, dict[CoursePlan, Walk]] = {}
    for position, _, report in workers.run(walk_block, jobs):
        found[position] = report
        stage.update(len(found), "")
    stage.close()
    return {plan: _joined([found[position][plan] for position in range(len(jobs))]) for plan in plans}


def _joined(walks: Sequence[Walk]) -> Walk:
    """Blocks of users as one."""
    return Walk(*(np.concatenate([getattr(walk, field.name) for walk in walks]) for field in fields(Walk)))


def _mean_acc(walk: Walk) -> float:
    """Of the users that choose."""
    mean = float(walk.quality_uti[:, -1].mean())
    return mean if np.isfinite(mean) else -np.inf


def _rule_entry(evaluation: SequenceEvaluation, result: SequenceResult) -> dict[str, Any]:
    """r: mean over users, row t after task t. before: of the rule's own start. reached: share of users and tasks that
    were at their target."""
    walk, plan = result.walk, result.plan
    groups_u = evaluation.groups_u
    return {
        **_chosen(plan),
        "r": _rounded(walk.quality_uti.mean(0)),
        "before": _rounded(walk.before_ui.mean(0)),
        "metrics": {name: _mean(value_u, groups_u) for name, value_u in evaluation.metrics(result).items()},
        "reached": round(float(np.isfinite(evaluation.steps_ui(result)).mean()), 6),
        "bytes_per_user": float(walk.bytes_u.mean()),
        "diverged": int(walk.diverged_u.sum()),
    }


def _reference_entry(evaluation: SequenceEvaluation, result: SequenceResult) -> dict[str, Any]:
    """quality: on every task, mean over users. before: of the start."""
    walk, groups_u = result.walk, evaluation.groups_u
    return {
        **_chosen(result.plan),
        "quality": _rounded(walk.quality_uti[:, -1].mean(0)),
        "before": _rounded(walk.before_ui.mean(0)),
        "metrics": {"acc": _mean(walk.quality_uti[:, -1].mean(1), groups_u)},
        "diverged": int(walk.diverged_u.sum()),
    }


def _chosen(plan: CoursePlan) -> dict[str, Any]:
    """learning_rate: None where steps are learned. strength: None for a rule without one."""
    return {
        "pool": plan.rule.pool,
        "learning_rate": plan.learning_rate or None,
        "strength": plan.strength if plan.rule.rule in PENALTIES else None,
    }


def _mean(value_u: Floats, groups_u: UserIds) -> dict[str, float]:
    return {"mean": round(float(value_u.mean()), 6), "se": round(clustered_error(value_u, groups_u), 6)}


def _rounded(values: Floats) -> Any:
    return np.round(values, 6).tolist()
