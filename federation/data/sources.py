"""Source files on this machine, grouped into units: packages, sub-packages of large ones, single modules."""

from __future__ import annotations

import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePath

from federation.data.clean import path_reason
from federation.errors import PopulationError

PYTHON = frozenset({".py"})
SOURCE = PYTHON | {
    *(".c", ".cc", ".cpp", ".cxx", ".h", ".hpp", ".cs", ".m", ".swift", ".java", ".kt", ".scala", ".groovy"),
    *(
        ".js",
        ".jsx",
        ".ts",
        ".tsx",
        ".vue",
        ".html",
        ".css",
        ".php",
        ".rb",
        ".pl",
        ".pm",
        ".lua",
        ".sh",
        ".tcl",
    ),
    *(
        ".rs",
        ".go",
        ".zig",
        ".nim",
        ".d",
        ".f90",
        ".jl",
        ".r",
        ".hs",
        ".ml",
        ".ex",
        ".exs",
        ".erl",
        ".el",
        ".clj",
    ),
    *(
        ".scm",
        ".lisp",
        ".dart",
        ".sql",
        ".proto",
        ".pyi",
        ".pyx",
        ".vim",
        ".md",
        ".rst",
        ".tex",
        ".txt",
        ".toml",
    ),
    *(".yaml", ".yml"),
}
UNIT_BYTES = 150_000
"""A folder with more source than this is split into its sub-folders."""

STANDARD = "python:"
"""Prefix of the standard library's projects."""
_NOT_PROJECTS = frozenset({"fedquilt", "pip", "setuptools", "wheel"})
_NOT_STANDARD = frozenset(
    {"test", "tests", "lib2to3", "idlelib", "ensurepip", "pydoc_data", "turtledemo", "__pycache__"}
)


@dataclass(frozen=True)
class SourceFile:
    """A file, its path starting with its project's folder, its size, and when it was changed."""

    path: Path
    relative: PurePath
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """Files that make one user, or one document to pre-train on."""

    project: str
    name: str
    files: tuple[SourceFile, ...]

    @cached_property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def environment_units(left_out: Counter[str]) -> list[Unit]:
    """Units of the installed distributions and of the standard library; files left out are counted by reason.

    A distribution is one project, whatever packages it has; so is each package or module of the standard
    library. Left out are this project itself, and what every environment carries in a version of its own.
    """
    owners = metadata.packages_distributions()
    units: list[Unit] = []
    for top in _installed():
        project = min(owners.get(top.stem, [top.stem])).lower()
        if project not in _NOT_PROJECTS and not top.stem.startswith("__"):
            units += _units(project, _source_files(top, PYTHON, left_out))
    for top in sorted(Path(sysconfig.get_path("stdlib")).iterdir()):
        if top.name not in _NOT_STANDARD and not top.name.endswith("-packages"):
            units += _units(STANDARD + top.stem, _source_files(top, PYTHON, left_out))
    return units


def _installed() -> list[Path]:
    folders = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    entries = [entry for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    return sorted(entry for entry in entries if entry.suffix == ".py" or (entry.is_dir() and not entry.suffix))


def folder_units(root: Path, left_out: Counter[str]) -> list[Unit]:
    """Units of own projects: each sub-folder of `root` is one, in any language of `SOURCE`.

    Raises PopulationError when `root` is not a folder, or none of its sub-folders holds source.
    """
    if not root.is_dir():
        raise PopulationError(f"the root of own projects is a folder, {str(root)!r} is not one")
    units: list[Unit] = []
    for top in sorted(root.iterdir()):
        if top.is_dir() and not top.name.startswith("."):
            units += _units(top.name, _source_files(top, SOURCE, left_out))
    if not units:
        raise PopulationError(f"each sub-folder of root is a project; none in {str(root)!r} holds source files")
    return units


def _source_files(top: Path, suffixes: frozenset[str], left_out: Counter[str]) -> list[SourceFile]:
    """The source files of a folder (or the one file), sorted by path; links to folders are not followed."""
    paths = [Path(folder, name) for folder, _, names in os.walk(top) for name in names] or [top]
    files: list[SourceFile] = []
    for path in paths:
        if path.suffix not in suffixes or not path.is_file():
            continue
        relative = path.relative_to(top.parent)
        if reason := path_reason(relative):
            left_out[reason] += 1
        else:
            status = path.stat()
            files.append(SourceFile(path, relative, status.st_size, status.st_mtime_ns))
    return sorted(files, key=lambda file: file.relative)


def _units(project: str, files: Sequence[SourceFile], depth: int = 1) -> Iterator[Unit]:
    """One unit; or, where that is too large, one of the loose files and those of each sub-folder."""
    if not files:
        return
    name = "/".join(files[0].relative.parts[:depth])
    loose = tuple(file for file in files if len(file.relative.parts) <= depth + 1)
    if len(loose) == len(files) or sum(file.size_bytes for file in files) <= UNIT_BYTES:
        yield Unit(project, name, tuple(files))
        return
    if loose:
        yield Unit(project, name + "/*", loose)
    by_folder: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        if len(file.relative.parts) > depth + 1:
            by_folder[file.relative.parts[depth]].append(file)
    for inside in by_folder.values():
        yield from _units(project, inside, depth + 1)
