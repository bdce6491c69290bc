"""Users of source code: units of folders, parts of users, splits by project, and the cache."""

import logging
import os
from collections import Counter

import pytest

from federation.data import code, sources
from federation.data.code import CodeLimits, build_corpus, code_corpus, split_of, user_text
from federation.data.sources import SOURCE, STANDARD, Unit, environment_units, folder_units
from federation.errors import PopulationError

LIMITS = CodeLimits(least_support=300, least_query=80, least_test=80, document=2048)


def module(name, functions=12):
    return "# Copyright\n\n" + "".join(
        f"def {name}_number_{i}(argument):\n    return {name}.table[argument + offset_{i}]\n\n"
        for i in range(functions)
    )


@pytest.fixture
def root(tmp_path):
    """Three projects: one module, six files, and nearly nothing; and what is no project."""
    projects = tmp_path / "projects"
    files = {f"many/pack/{name}.rs": module(name) for name in "abcdef"}
    files |= {
        "single/only.py": module("only", 30),
        "little/x.py": "x = 1\n",
        "many/notes.bin": "?",
        "loose.py": "y = 2\n",
    }
    for name, content in files.items():
        path = projects / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return projects


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A small environment instead of the real one: forty projects of two modules."""
    folder = tmp_path / "installed"
    for p in range(40):
        for m in range(2):
            path = folder / f"project{p}" / f"m{m}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(module(f"p{p}m{m}"))
    monkeypatch.setattr(code, "environment_units", lambda left_out: folder_units(folder, left_out))
    monkeypatch.setenv("FEDQUILT_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_folder_that_is_too_large_is_split_into_loose_files_and_sub_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    sizes = {
        "big/a.py": 70,
        "big/b.py": 80,
        "big/x/c.py": 60,
        "big/x/y/d.py": 30,
        "big/z/e.py": 90,
        "big/z/w/f.py": 20,
    }
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * size)
    units = {unit.name: [file.relative.as_posix() for file in unit.files] for unit in folder_units(tmp_path, Counter())}
    assert units == {
        "big/*": ["big/a.py", "big/b.py"],
        "big/x": ["big/x/c.py", "big/x/y/d.py"],
        "big/z/*": ["big/z/e.py"],
        "big/z/w": ["big/z/w/f.py"],
    }


def test_own_projects_are_sub_folders_in_any_language(root):
    left_out = Counter()
    units = folder_units(root, left_out)
    assert [(unit.project, len(unit.files)) for unit in units] == [("little", 1), ("many", 6), ("single", 1)]
    assert ".rs" in SOURCE


def test_a_root_without_projects_is_refused(tmp_path):
    with pytest.raises(PopulationError, match="is a folder"):
        folder_units(tmp_path / "nowhere", Counter())
    with pytest.raises(PopulationError, match=r"none in .* holds source files"):
        folder_units(tmp_path, Counter())


def test_the_environment_has_installed_packages_and_the_standard_library_but_not_this_project():
    left_out = Counter()
    units = environment_units(left_out)
    projects = {unit.project for unit in units}
    assert {"numpy", "torch", STANDARD + "heapq", STANDARD + "json"} <= projects
    assert not projects & {"fedquilt", "pip"}
    assert left_out["tests"] > 0
    assert len({(unit.project, unit.name) for unit in units}) == len(units)


def test_with_five_files_each_part_has_files_of_its_own():
    unit = Unit("p", "p", ())
    user = user_text(unit, [letter * 400 for letter in "abcde"], LIMITS)
    assert [set(part) - {"\n"} for part in (user.test, user.query, user.support)] == [
        {"a"},
        {"b"},
        {"c", "d", "e"},
    ]


def test_with_fewer_files_each_part_has_its_own_stretch_of_text():
    body = "".join(f"{i:06d}\n" for i in range(150))
    user = user_text(Unit("p", "p", ()), [body], LIMITS)
    assert user.support + user.query + user.test == body
    assert len(user.support) > 3 * len(user.query) > 0


def test_a_user_with_too_little_text_in_one_part_is_none():
    assert user_text(Unit("p", "p", ()), ["a" * 79, *["b" * 400] * 4], LIMITS) is None


def test_the_split_of_a_project_depends_on_its_name_alone():
    splits = Counter(split_of(f"project {i}") for i in range(9000))
    assert {name: round(count / 1000) for name, count in splits.items()} == {
        "pretraining": 3,
        "train": 4,
        "new": 2,
    }
    assert (split_of("transformers"), split_of("sympy"), split_of("numpy")) == ("pretraining", "train", "new")


def test_users_are_capped_per_project_and_what_is_left_out_is_counted(root):
    units = [Unit("same", f"same/{unit.name}", unit.files) for unit in folder_units(root, Counter())]
    limits = CodeLimits(users_per_project=1, least_support=300, least_query=80, least_test=80)
    corpus = build_corpus({"pretraining": [], "train": units, "new": units}, limits, Counter({"tests": 5}))
    assert len(corpus.train) == 1
    assert corpus.new == () or corpus.new[0].name != corpus.train[0].name  # its files are copies by now
    assert corpus.left_out["tests"] == 5
    assert corpus.left_out["users with too little text"] >= 1
    assert corpus.left_out["users beyond the limit per project"] >= 1


def test_own_projects_take_the_place_of_the_new_users(environment, root):
    without, own = code_corpus(limits=LIMITS), code_corpus(root, LIMITS)
    assert own.pretraining == without.pretraining
    assert own.train == without.train
    assert {user.project for user in own.new} == {"many", "single"}
    assert {user.project for user in without.new} == {
        p for p in map("project{}".format, range(40)) if split_of(p) == "new"
    }


def test_the_splits_share_no_project_and_no_licence(environment):
    corpus = code_corpus(limits=LIMITS)
    projects = [{text.project for text in texts} for texts in (corpus.pretraining, corpus.train, corpus.new)]
    assert all(projects)
    assert len(set.union(*projects)) == sum(map(len, projects)) == 40
    assert not any("Copyright" in text.support for text in corpus.train)


def test_the_corpus_is_cached_until_a_file_changes(environment, monkeypatch, tmp_path):
    first = code_corpus(limits=LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr(code, "build_corpus", None)
        assert code_corpus(limits=LIMITS) == first
    changed = environment / "project3" / "m0.py"
    changed.write_text(module("other"))
    os.utime(changed, (1, 1))
    assert code_corpus(limits=LIMITS).fingerprint != first.fingerprint


def test_a_damaged_cache_is_said_and_built_anew(environment, tmp_path, caplog):
    first = code_corpus(limits=LIMITS)
    (path,) = (tmp_path / "cache" / "corpora").glob("*/text.npy")
    path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        assert code_corpus(limits=LIMITS) == first
    assert "building it anew" in caplog.text
