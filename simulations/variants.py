"""The federations of a run: the main one, and its variants, which differ from it in the settings that they name.

A run's own variants are tables of settings, as in

    [variants.disarm.gate.estimator]
    name = "disarm"

and two are built in: "shared" is one dense LoRA of rank k for everyone by federated averaging, a pool of k units that
all users use, of which each sends its plain difference; "random" is the same federation with random masks. Variants
have as many client visits as the main federation, unless they say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from federation.config import MetaConfig, PluginConfig, RunConfig
from federation.errors import ConfigError
from federation.meta_config import RuleConfig
from federation.settings import Settings, parse

MAIN = "pool"
SHARED = "shared"
RANDOM = "random"

_TAKEN = (MAIN, SHARED, RANDOM, "base", "fresh", "tensorboard")
_OF_THE_RUN = ("name", "kind", "seed", "population", "evaluate", "compute", "deployment", "variants")
_OF_THE_MODEL = ("scale", "target_modules")


def federations_of(config: RunConfig) -> dict[str, RunConfig]:
    """Every federation that methods may name, by its name: the main one, the built-in variants, the run's own.

    None of them has variants itself. Raises ConfigError for a main pool that starts trained, and for a variant that
    takes another's name, has settings that are the run's alone, or does not parse over the run's.
    """
    if config.pool.start == "trained":
        raise ConfigError(
            "pool.start = 'trained' takes the rows of the run's own federation, so it is for variants; "
            "set 'fresh', or move it into [variants.NAME.pool]"
        )
    main = config.model_copy(update={"variants": {}})
    found = {MAIN: main}
    for name, settings in {**_built_in(config), **config.variants}.items():
        if name in config.variants:
            _check(name, settings)
        found[name] = _over(main, name, settings)
    return found


def begins_as_the_teachers(federations: Mapping[str, RunConfig], name: str) -> bool:
    """Whether a federation's units are a teacher's, so that masks of them can be held against the teacher's.

    A pool that starts trained begins as the main one ended: its units are the teacher's if that one trained none.
    """
    start, main = federations[name].pool.start, federations[MAIN]
    untouched = main.pool.start == "teacher" and main.local.train == "nothing"
    return start == "teacher" or (start == "trained" and untouched)


def differing(settings: Settings, other: Settings) -> dict[str, Any]:
    """Those settings of `other` that differ, as nested tables of JSON. A table that is no section is one value."""
    found, data = {}, other.model_dump(mode="json")
    for key, value in other:
        own = getattr(settings, key)
        if isinstance(own, Settings) and isinstance(value, Settings):
            if inner := differing(own, value):
                found[key] = inner
        elif own != value:
            found[key] = data[key]
    return found


def _built_in(config: RunConfig) -> dict[str, dict[str, Any]]:
    return {
        SHARED: {
            "pool": {"rank": config.gate.budget, "start": "fresh"},
            "gate": {"policy": "all"},
            "meta": MetaConfig().model_dump(),
            "strategy": {"name": "fedavg", "options": {}},
        },
        RANDOM: {"gate": {"policy": "random"}},
    }


def _check(name: str, settings: Mapping[str, Any]) -> None:
    if name in _TAKEN or not re.fullmatch(r"\w+", name):
        raise ConfigError(
            f"a variant has a name of letters, digits and _ that is none of {', '.join(_TAKEN)}, got {name!r}; "
            "rename it"
        )
    if alien := [key for key in _OF_THE_RUN if key in settings]:
        raise ConfigError(
            f"{', '.join(alien)} of a run are the same for all its federations, the variant {name!r} has its own; "
            "leave them out of it, or make another run"
        )


def _over(main: RunConfig, name: str, settings: Mapping[str, Any]) -> RunConfig:
    """The main federation's configuration with a variant's settings in their places."""
    try:
        variant = parse(RunConfig, _changed(main, settings))
    except ConfigError as error:
        raise ConfigError(f"in the variant {name!r}: {error}") from None
    fixed = (*_OF_THE_MODEL, "rank") if variant.pool.start == "trained" else _OF_THE_MODEL
    if other := [key for key in fixed if getattr(variant.pool, key) != getattr(main.pool, key)]:
        raise ConfigError(
            f"{' and '.join(f'pool.{key}' for key in other)} of the variant {name!r} must be the run's: "
            "all federations share one model, and a pool that starts trained is of the trained one's shape; drop it"
        )
    return variant


def _changed(settings: Settings, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as tables, with changes in their places. What depends on a name, another name does not inherit."""
    data = settings.model_dump()
    renamed = changes.get("name", data.get("name")) != data.get("name")
    if renamed and isinstance(settings, PluginConfig):
        data["options"] = {}
    if renamed and isinstance(settings, RuleConfig):
        data["learning_rate"] = None
    for key, value in changes.items():
        own = getattr(settings, key, None)
        data[key] = _changed(own, value) if isinstance(own, Settings) and isinstance(value, Mapping) else value
    return data
