"""The text populations over the small base that is pre-trained on their own pre-training split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from federation.config import PopulationConfig
from federation.data.code import code_corpus
from federation.data.corpus import TextCorpus
from federation.data.population import Population
from federation.data.text import TextPopulation
from federation.plugins import check_options
from simulations.populations.drift import Drifting
from simulations.populations.shakespeare import shakespeare_corpus
from simulations.pretrain import PretrainConfig, Progress, no_progress, pretrained_population


def code(
    root: str | None = None, window: int = 64, pretraining: Mapping[str, Any] | None = None, tasks: int = 1
) -> TextPopulation | Drifting:
    """Users made of source code. root: a folder of your own projects, which become the new users.

    window: tokens per example. pretraining: fields of `PretrainConfig`. tasks: with more than one, users move from
    one project to the next (`Drifting`).
    """
    population = _population(_code(root), window, pretraining)
    return population if tasks == 1 else Drifting(population, tasks)


def shakespeare(window: int = 64, pretraining: Mapping[str, Any] | None = None) -> TextPopulation:
    """The speaking roles of Shakespeare's plays. Options as for `code`."""
    return _population(shakespeare_corpus, window, pretraining)


def prepare(config: PopulationConfig, progress: Progress) -> None:
    """Pre-trains the base of a text population unless the cache holds it, and says how far it is."""
    makers: dict[str, Callable[..., Population]] = {"code": code, "shakespeare": shakespeare}
    if config.name in makers:
        options = dict(config.options)
        check_options(f"population {config.name!r}", makers[config.name], options)
        root, _ = options.pop("root", None), options.pop("tasks", None)
        _population(shakespeare_corpus if config.name == "shakespeare" else _code(root), progress=progress, **options)


def _code(root: str | None) -> Callable[[], TextCorpus]:
    return lambda: code_corpus(Path(root).expanduser() if root else None)


def _population(
    corpus: Callable[[], TextCorpus],
    window: int = 64,
    pretraining: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> TextPopulation:
    check_options("pretraining", PretrainConfig, pretraining or {})
    return pretrained_population(corpus(), PretrainConfig(**(pretraining or {})), window, progress=progress)
