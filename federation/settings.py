"""Settings that are parsed once at the boundary and trusted inside: their base, and how text becomes settings.

Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, ValidationError

from federation.errors import ConfigError

S = TypeVar("S", bound="Settings")


class Settings(PydanticModel):
    """Base of all configuration: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with every `section.key=value` in its place (TOML values; bare words are text)."""
    changed = copy.deepcopy(dict(data))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"an override is key=value, got {override!r}; for example federation.rounds=10")
        _assign(changed, key.strip().split("."), _toml_value(value.strip()))
    return changed


def parse(kind: type[S], data: Mapping[str, Any]) -> S:
    """Validated settings; a ConfigError lists every fault with its place, and the nearest name for unknown keys."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(kind, dict(fault)) for fault in error.errors())) from None


def _assign(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{'.'.join(keys)!r} goes through {key!r}, which is a value; name a section")
    data[keys[-1]] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[Settings], fault: Mapping[str, Any]) -> str:
    place = [str(step) for step in fault["loc"]]
    where = ".".join(place) or kind.__name__
    if fault["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {_meant(place, _keys(kind, place[:-1]))}"
    return f"{where}: {str(fault['msg']).removeprefix('Value error, ')} (got {fault.get('input')!r})"


def _meant(place: Sequence[str], known: Mapping[str, Sequence[str]]) -> str:
    """What an unknown key may have been meant to be: one of a section beside it, or the nearest name."""
    *path, key = place
    within = [".".join((*path, section, key)) for section, inner in known.items() if key in inner]
    near = within or difflib.get_close_matches(key, known, 1)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys are {', '.join(known)}"


def _keys(kind: type[Settings], path: Sequence[str]) -> dict[str, list[str]]:
    """The keys of the section at a path, and of each the keys that it has as a section."""
    found: type[Settings] | None = kind
    for step in path:
        found = found and _section(found, step)
    inner = {name: _section(found, name) for name in sorted(found.model_fields)} if found else {}
    return {name: sorted(section.model_fields) if section else [] for name, section in inner.items()}


def _section(kind: type[Settings], key: str) -> type[Settings] | None:
    """The section that a key stands for, if it is one."""
    field = kind.model_fields.get(key)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None
