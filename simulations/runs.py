"""One run from a configuration to its record: federations first, then new users served by every method."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from federation.config import RunConfig, identity
from federation.data.population import Population
from federation.data.registry import make_population
from federation.errors import ConfigError, PluginError, RunError
from federation.settings import overridden, parse
from federation.update import Values
from server.checkpoint import checksum
from server.checkpoint import rounds as checkpointed_rounds
from simulations.audit import Audit, audit
from simulations.compute.workers import Workers, on_device, start_workers
from simulations.evaluate import Evaluation, check_methods, evaluate, federated_users
from simulations.federate import CHECKPOINTS_NAME, RoundReport, federate, last_checkpoint, read_history
from simulations.mask_quality import mask_quality
from simulations.methods import methods_of, points_alone, sources_of
from simulations.populations.text import prepare
from simulations.pretrain import describe_base
from simulations.progress import Progress, Silent, Stage
from simulations.record import (
    RECORD_NAME,
    USERS_NAME,
    comparisons,
    method_table,
    provenance,
    read_record,
    recorded_config,
    rounded,
    users_table,
    write_json,
)
from simulations.sequence_rules import rules_of
from simulations.sequences import (
    SequenceEvaluation,
    check_sequences,
    continual_record,
    continual_users,
    evaluate_sequences,
)
from simulations.serve import Trained
from simulations.setup import Setup, first_pool, set_up, wrap
from simulations.variants import MAIN as MAIN
from simulations.variants import differing, federations_of

CONFIG_NAME = "config.json"
POPULATION_NAME = "population.json"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its record, and the evaluation (None when no methods were asked for)."""

    folder: Path
    record: Mapping[str, Any]
    evaluation: Evaluation | None


def run(config: RunConfig, out: Path, resume: bool = False, progress: Progress | None = None) -> Run:
    """Runs a configuration in the folder `out`; with `resume`, continues what is there.

    Raises RunError when the folder holds a run and `resume` is off, when it holds another run's configuration, and
    when it cannot be written; and when there is no device as asked for, before any work. ConfigError for a variant or
    a method that cannot be.
    """
    config = on_device(config)
    progress, federations = progress or Silent(), _federations(config)
    if (out / CONFIG_NAME).exists() and not resume:
        raise RunError(f"{out} holds a run already; continue it with --resume, or give another --out")
    try:
        _claim(out, config)
        place = out.absolute()  # workers may stand elsewhere
        record, evaluation, sequences = _train_and_serve(config, federations, place, resume, progress)
        write_json(out / RECORD_NAME, record)
        if evaluation is not None:
            walked = {} if sequences is None else {"continual": continual_users(sequences)}
            write_json(out / USERS_NAME, {**users_table(evaluation), **walked})
    except OSError as error:
        raise RunError(
            f"a run writes to its folder, {out} cannot be written ({error}); nothing that was checkpointed is lost: "
            "make room and run the same command with --resume"
        ) from error
    return Run(out, record, evaluation)


def _train_and_serve(
    config: RunConfig, federations: Mapping[str, RunConfig], out: Path, resume: bool, progress: Progress
) -> tuple[dict[str, Any], Evaluation | None, SequenceEvaluation | None]:
    origin, started = provenance(), time.perf_counter()
    before = sum(line["seconds"] for name in federations for line in read_history(out / name))
    prepare_base(config, progress)
    population = make_population(config.population)
    model = wrap(config, population.base_model())
    setups = {name: set_up(federation, model) for name, federation in federations.items()}
    check_setups(setups)
    if config.evaluate.methods:
        check_methods(methods_of(config), population, setups)
    check_sequences(config, population, setups)
    _claim_population(out, population)
    workers = start_workers(config)
    try:
        trained: dict[str, Values] = {}
        for name, federation in federations.items():
            setup = set_up(federation, model, first_pool(federation, population, trained.get(MAIN)))
            with _Observer(out, name, federation.federation.rounds, progress) as observer:
                users = federated_users(population, federation)
                state = federate(setup, workers, users, out / name, resume, observer)
            trained[name] = state.values
        evaluation = _evaluate(config, population, workers, federations, trained, progress)
        sequences = evaluate_sequences(workers, population, Trained(config, trained, federations), progress)
        audited = audit(set_up(federations[MAIN], model), workers, federated_users(population, config), out / MAIN)
    finally:
        workers.close()
    seconds = before + time.perf_counter() - started
    record = _record(config, federations, population, out, evaluation, audited, origin, seconds)
    if sequences is not None:
        record["continual"] = continual_record(sequences)
    return record, evaluation, sequences


def check_setups(federations: Mapping[str, Setup]) -> None:
    """Raises ConfigError or PluginError for a federation that cannot be trained: before any of them is."""
    for name, setup in federations.items():
        try:
            _ = setup.local, setup.rules
        except (ConfigError, PluginError) as error:
            raise error if name == MAIN else type(error)(f"in the variant {name!r}: {error}") from error


def _claim(out: Path, config: RunConfig) -> None:
    """Writes the configuration of a run, unless the folder holds a run of another one."""
    path = out / CONFIG_NAME
    if path.exists() and identity(recorded_config({"config": json.loads(path.read_text())}, out)) != identity(config):
        raise RunError(
            f"a run resumes with the configuration it was started with, {out} was started with another; "
            "give that one, or another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, config.model_dump(mode="json"))


def _claim_population(out: Path, population: Population) -> None:
    """Writes what the population is, unless the folder holds a run over other data: its ids mean other users."""
    path, described = out / POPULATION_NAME, {"name": population.name, **population.describe()}
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(described)):
        raise RunError(
            f"a run resumes over the data it was started with, the population {population.name!r} has changed since "
            f"(other packages, other files? see {path}); restore it, or give another --out"
        )
    write_json(path, described)


def reevaluate(folder: Path, overrides: Sequence[str], progress: Progress | None = None) -> Run:
    """Serves new users again by the federations of a finished run, with other `evaluate` settings; its record, its
    evaluation and its configuration are replaced. Nothing is trained.

    Raises RunError when the folder is not that of a finished run, or a method needs a federation it does not have;
    ConfigError for an override of anything but `evaluate`.
    """
    for override in overrides:
        if not override.strip().startswith("evaluate."):
            raise ConfigError(f"only evaluate.* can change once a run is finished, got {override!r}; simulate it anew")
        if override.strip().startswith("evaluate.tuning_users"):
            raise ConfigError(f"who chooses rates was kept out of the federations, so {override!r} needs a new run")
    recorded = recorded_config(read_record(folder), folder)
    config = parse(RunConfig, overridden(recorded.model_dump(mode="json"), overrides))
    for name, federation in _federations(config).items():
        rounds = federation.federation.rounds
        done = last_checkpoint(folder / name).round_index if (folder / name).is_dir() else -1
        if done < rounds:
            raise RunError(
                f"the methods need all {rounds} rounds of the federation {name!r}, "
                f"{folder} has {max(0, done)}; leave out the methods that need it, or simulate with them"
            )
    return run(config, folder, resume=True, progress=progress)


def prepare_base(config: RunConfig, progress: Progress) -> None:
    """Pre-trains the base, unless the cache holds it."""
    stage: Stage | None = None

    def show(step: int, total: int, loss: float) -> None:
        nonlocal stage
        stage = stage or progress.stage("pre-train the base", total)
        stage.update(step, f"loss {loss:.3f}")

    prepare(config.population, show)
    if stage is not None:
        stage.close()


def _federations(config: RunConfig) -> dict[str, RunConfig]:
    """The main federation, and those that the compared methods and rules name, in their order."""
    federations = federations_of(config)
    sources = sources_of(methods_of(config)) if config.evaluate.methods else []
    pools = [rule.pool for rule in rules_of(config)]
    return {name: federations[name] for name in dict.fromkeys([MAIN, *sources, *pools]) if name in federations}


class _Observer:
    """Shows and logs the rounds of one federation."""

    def __init__(self, out: Path, name: str, rounds: int, progress: Progress) -> None:
        self._writer = SummaryWriter(str(out / "tensorboard" / name))
        done = max(checkpointed_rounds(out / name / CHECKPOINTS_NAME), default=0)
        self._stage = progress.stage(f"federate {name}", rounds, done)
        self._rounds, self._note = rounds, ""

    def __enter__(self) -> _Observer:
        return self

    def __call__(self, report: RoundReport) -> None:
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.round_index)
        self._writer.add_scalar("users_per_second", report.users_per_second, report.round_index)
        if report.private_mib is not None:
            self._writer.add_scalar("private_mib", report.private_mib, report.round_index)
        self._note = f"{report.users_per_second:,.0f} users/s, loss {report.metrics['support_loss']:.3f}"
        self._stage.update(report.round_index, self._note)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        if kind is None:
            self._stage.update(self._rounds, self._note)  # a federation that was finished before shows as such
        self._stage.close()


def _evaluate(
    config: RunConfig,
    population: Population,
    workers: Workers,
    federations: Mapping[str, RunConfig],
    values: Mapping[str, Values],
    progress: Progress,
) -> Evaluation | None:
    if not config.evaluate.methods:
        return None
    return evaluate(workers, population, Trained(config, values, federations), progress)


def _record(
    config: RunConfig,
    federations: Mapping[str, RunConfig],
    population: Population,
    out: Path,
    evaluation: Evaluation | None,
    audited: Audit,
    origin: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": config.kind,
        "name": config.name,
        **origin,
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "population": {"name": population.name, **population.describe()},
        "base": describe_base(population.base_model()),
        "splits": {split: len(population.users(split)) for split in ("train", "new")},
        "seconds": round(seconds, 1),
        "variants": {
            name: differing(federations[MAIN], federation) for name, federation in federations.items() if name != MAIN
        },
        **_trained(federations, out, audited),
    }
    if evaluation is not None:
        record["splits"] |= {"measured": len(evaluation.user_ids), "groups": len(set(evaluation.groups_u.tolist()))}
        record["base_bits_per_char"] = float(evaluation.results[0].loss_u.mean())
        record["methods"] = method_table(evaluation)
        record["comparisons"] = comparisons(evaluation, points_alone(config.evaluate))
        record["masks"] = mask_quality(evaluation, population, federations)
    return record


def _trained(federations: Mapping[str, RunConfig], out: Path, audited: Audit) -> dict[str, Any]:
    """What the federations took and left: speed, users and history are the main one's, variants have their own."""
    histories = {name: read_history(out / name) for name in federations}
    rounds, visits = histories[MAIN], audited.visits
    every_round = [line for lines in histories.values() for line in lines]
    return {
        "rounds": federations[MAIN].federation.rounds,
        "users": visits.users,
        "users_per_second": _speed(rounds),
        "peak_mib": _most(line["private_mib"] for line in every_round),
        "object_store_mib": _most(line["object_store_mib"] for line in every_round),
        "bytes_per_user": round(audited.bytes_per_user, 1),
        "rejected": sum(sum(line["rejected"].values()) for line in rounds),
        "visits": visits.visits,
        "replaced_workers": sum(line["replaced_workers"] for line in every_round),
        "rebuilt_users": visits.rebuilt,
        "bit_identical": not visits.rebuilt
        and not any(line["halved_blocks"] or line["rebuilt"] for line in every_round),
        "checksum": checksum(last_checkpoint(out / MAIN)),
        "users_checksum": visits.checksum,
        "history": _metrics(rounds),
        "federations": {
            name: {"history": _metrics(lines), "users_per_second": _speed(lines)}
            for name, lines in histories.items()
            if name != MAIN
        },
    }


def _metrics(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [{"round": line["round_index"], **rounded(line["metrics"])} for line in rounds]


def _speed(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Users per second; None without a round."""
    users, seconds = (sum(line[key] for line in rounds) for key in ("users", "seconds"))
    return round(users / seconds, 1) if rounds else None


def _most(measured: Iterable[float | None]) -> float | None:
    return max((value for value in measured if value is not None), default=None)
