"""The top-level packages of this distribution, and a check that Python finds ours under their generic names."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from federation.errors import ConfigError

PACKAGES = ("federation", "client", "server", "strategies", "simulations")
_HOUSE = Path(__file__).resolve().parent.parent


def check_house() -> None:
    """Imports none of the packages. One that is not installed here is fine: a device needs no simulations.

    Raises ConfigError, naming the file, when someone else's module would be imported in place of one of ours.
    """
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None:
            continue
        found = _folder(spec)
        if found != _HOUSE / name:
            raise ConfigError(
                f"the package {name!r} must be fedquilt's in {_HOUSE / name}, Python finds {found} first; "
                "start from another folder, take that one off PYTHONPATH, or use an environment without it"
            )


def _folder(spec: ModuleSpec) -> Path:
    """The folder of a package; a plain module's own file."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(str(spec.origin)).resolve()
