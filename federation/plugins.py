"""Plugins by name: a static table of our own, and third parties' entry points; imported only when asked for.

A third party declares, in its `pyproject.toml`,

    [project.entry-points."fedquilt.strategies"]
    sign_mean = "their_package.module:SignMean"

The object named there is a class or a function that takes the options and returns an instance.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from federation.errors import ConfigError, PluginError

T = TypeVar("T")
OURS = "fedquilt"


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """All plugins of one kind.

    kind: the word for messages, such as "strategy".
    group: the group of entry points, such as "fedquilt.strategies".
    contract: the Protocol that instances fulfil.
    builtin: our own, {name: "module:object"}.
    """

    kind: str
    group: str
    contract: type
    builtin: Mapping[str, str]

    def known(self) -> dict[str, str]:
        """Every name and the distribution that it comes from. Imports none of them."""
        return {name: _origin(entry) for name, entry in self._entries().items()}

    def load(self, name: str) -> Callable[..., T]:
        """The factory called `name`. Raises PluginError: unknown, or its package cannot be imported."""
        entries = self._entries()
        if name not in entries:
            raise PluginError(f"no {self.kind} is called {name!r}; {suggest(name, entries)}")
        entry = entries[name]
        try:
            factory = entry.load()
        except Exception as error:  # a plugin's module runs anyone's code
            raise PluginError(
                f"the {self.kind} {name!r} must be importable, {_described(entry)} raised {error!r}; "
                f"repair or uninstall that package"
            ) from error
        if not callable(factory):
            raise PluginError(
                f"the {self.kind} {name!r} must be a class or a function, "
                f"{_described(entry)} is a {type(factory).__name__}"
            )
        return factory  # type: ignore[no-any-return]

    def make(self, name: str, /, **options: Any) -> T:
        """An instance, its options and methods checked before anything uses it.

        Raises PluginError as `load` does, and if the instance breaks the contract (`check_contract`);
        ConfigError for an option that is unknown, missing or of the wrong type.
        """
        factory = self.load(name)
        check_options(f"{self.kind} {name!r}", factory, options)
        try:
            instance = factory(**options)
        except TypeError as error:  # the names are right, so a value is of the wrong type
            raise ConfigError(f"{self.kind} {name!r} cannot take {options}: {error}") from error
        check_contract(f"{self.kind} {name!r}", instance, self.contract)
        return instance

    def _entries(self) -> dict[str, EntryPoint]:
        found = [EntryPoint(name, value, self.group) for name, value in self.builtin.items()]
        entries: dict[str, EntryPoint] = {}
        for entry in [*found, *entry_points(group=self.group)]:
            if entry.name in entries:
                first = entries[entry.name]
                raise PluginError(
                    f"a {self.kind}'s name must be unique, {entry.name!r} is both {_described(first)} "
                    f"and {_described(entry)}; uninstall or rename one"
                )
            entries[entry.name] = entry
        return entries


def suggest(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, if one is near, and all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def check_options(what: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raises ConfigError unless the factory takes exactly these options."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for option in options:
        if option not in by_name and not takes_any:
            raise ConfigError(f"{what} has no option {option!r}; {suggest(option, by_name)}")
    missing = sorted(n for n, p in by_name.items() if p.default is p.empty and n not in options)
    if missing:
        raise ConfigError(f"{what} needs the option(s) {', '.join(missing)}; give a value for each")


def check_contract(what: str, instance: object, contract: type) -> None:
    """Raises PluginError unless the instance has the Protocol's attributes and its methods' arguments.

    A method may take more, if the rest has defaults. Names and order count: callers may use either.
    """
    for name in getattr(contract, "__annotations__", {}):
        _require(what, instance, name)
    for name, member in vars(contract).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        attribute = _require(what, instance, name)
        if inspect.isfunction(member):
            _check_arguments(f"{what}: {name}", attribute, member)


def _require(what: str, instance: object, name: str) -> Any:
    if not hasattr(instance, name):
        raise PluginError(f"{what} must have {name!r}, and {type(instance).__name__} has not; add it")
    return getattr(instance, name)


def _check_arguments(where: str, method: Any, wanted: Callable[..., object]) -> None:
    names = list(inspect.signature(wanted).parameters)[1:]
    rule = f"{where} must be a method that takes ({', '.join(names)})"
    if not callable(method):
        raise PluginError(f"{rule}, it is a {type(method).__name__}")
    signature = inspect.signature(method)
    try:
        bound = signature.bind(*names).arguments
    except TypeError as error:
        raise PluginError(f"{rule}, it takes {signature}: {error}") from error
    if list(bound.items()) != list(zip(names, names)):
        raise PluginError(f"{rule}, it takes {signature}; use these names, in this order")


def _described(entry: EntryPoint) -> str:
    return f"{entry.value} (from {_origin(entry)})"


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else OURS
