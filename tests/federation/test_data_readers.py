"""Users' documents from folders, JSON lines and datasets: who has what, in which order, and what is left out."""

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.data.corpus import in_parts, name_order
from federation.data.readers import read_documents
from federation.errors import PopulationError


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_sub_folder_is_a_user_with_all_files_of_text_below_it(tmp_path):
    root = write(
        tmp_path / "all",
        {
            "ada/a.txt": "one",
            "ada/deep/er/b.PY": "two",
            "Ben Böse/c.md": "drei ü",
            "ben/d.rs": "\ufeffvier\r\nfünf\r\n",
        },
    )
    found = read_documents(root)
    assert {user: sorted(texts) for user, texts in found.of_user.items()} == {
        "ada": ["one", "two"],
        "Ben Böse": ["drei ü"],
        "ben": ["vier\nfünf\n"],
    }
    assert found.left_out == {}


def test_what_gives_no_text_is_left_out_and_counted(tmp_path):
    root = write(
        tmp_path / "all",
        {
            "ada/a.txt": "one",
            "ada/.git/config.txt": "hidden",
            "ada/.hidden.txt": "hidden",
            "ada/photo.jpg": b"\xff\xd8",
            "ada/latin.txt": "café".encode("latin-1"),
            ".ben/b.txt": "hidden",
            "cleo/empty.txt": " \n",
            "dan/photo.jpg": b"",
            "loose.txt": "no one's",
        },
    )
    (root / "ada" / "again.txt").symlink_to(root / "ada" / "a.txt")
    (root / "eva").symlink_to(root / "ada")
    os.mkfifo(root / "ada" / "pipe.txt")
    found = read_documents(root)
    assert found.of_user == {"ada": ("one",)}
    assert found.left_out == {
        "links": 2,
        "files beside the users' folders": 1,
        "files of other kinds": 3,
        "files that are not UTF-8": 1,
        "users without text": 2,
    }


def test_names_that_are_no_text_are_left_out(tmp_path):
    root = write(tmp_path / "all", {"ada/a.txt": "one"})
    (root / os.fsdecode(b"b\xff")).mkdir()
    (root / "ada" / os.fsdecode(b"\xff.txt")).write_text("two")
    found = read_documents(root)
    assert found.of_user == {"ada": ("one",)}
    assert found.left_out == {"names that are not UTF-8": 2}


def test_what_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    """Whoever runs this may be allowed to read everything, so the refusal is made."""
    root = write(tmp_path / "all", {"ada/a.txt": "one", "ada/no.txt": "two", "ada/closed/c.txt": "three"})

    def refusing(method, name):
        def call(self, *args, **kwargs):
            if self.name == name:
                raise PermissionError(name)
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "read_text", refusing(Path.read_text, "no.txt"))
    monkeypatch.setattr(Path, "iterdir", refusing(Path.iterdir, "closed"))
    found = read_documents(root)
    assert found.of_user == {"ada": ("one",)}
    assert found.left_out == {"unreadable files": 1, "unreadable folders": 1}


def test_a_folder_of_files_alone_is_one_user_of_its_name(tmp_path):
    root = write(tmp_path / "ada", {"a.txt": "one", "b.md": "two", ".git/config.txt": "hidden"})
    found = read_documents(root)
    assert {user: sorted(texts) for user, texts in found.of_user.items()} == {"ada": ["one", "two"]}


def test_lines_are_gathered_by_user(tmp_path):
    path = tmp_path / "mails.jsonl"
    path.write_bytes(
        '{"user": "ada", "text": "one", "date": 3}\n\n{"user": 17, "text": "zwölf"}\n'
        '{"text": "two\u2028", "user": "ada"}\n{"user": "ben", "text": ""}'.encode()
    )
    found = read_documents(path)
    assert {user: sorted(texts) for user, texts in found.of_user.items()} == {
        "ada": ["one", "two\u2028"],
        "17": ["zwölf"],
    }
    assert found.left_out == {"users without text": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "a line is a JSON object, .*line 2 is a list"),
        (b'{"user": "a"', r"a line is a JSON object, .*line 2 is not \(.*mend"),
        (b'{"user": "a", "text": "caf\xe9"}', r"a line is a JSON object, .*line 2 is not \("),
        (b"[" * 100_000, "a line is a JSON object, .*line 2 is not"),
        (b'{"user": "a"}', "'text' is a string of Unicode, .*line 2 has none"),
        (b'{"user": "a", "text": 3}', "line 2 has one of type int"),
        (b'{"user": "a", "text": "secret \\ud800"}', "line 2 has one that is not Unicode"),
        (b'{"text": "a"}', "'user' is a name or a whole number, .*line 2 has none"),
        (b'{"user": "", "text": "a"}', "line 2 has an empty one"),
        (b'{"user": true, "text": "a"}', "line 2 has one of type bool"),
        (b'{"user": "\\ud800", "text": "a"}', "line 2 has one that is not Unicode"),
    ],
)
def test_a_wrong_line_is_named_without_its_content(tmp_path, line, message):
    path = tmp_path / "mails.jsonl"
    path.write_bytes(b'{"user": "ada", "text": "one"}\n' + line + b"\n")
    with pytest.raises(PopulationError, match=message) as caught:
        read_documents(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "mails.json", "nowhere.jsonl"])
def test_a_path_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / "mails.json").write_text("[]")
    with pytest.raises(PopulationError, match=rf"a folder, a \.jsonl file or a dataset on disk, '.*{name}' is none"):
        read_documents(tmp_path / name)


def test_documents_are_ordered_by_their_names_alone(tmp_path):
    names = [f"{n}.txt" for n in range(20)]
    root = write(tmp_path / "folder", {f"ada/sub/{name}": name for name in names})
    assert read_documents(root).of_user["ada"] == tuple(sorted(names, key=lambda name: name_order(f"sub/{name}")))
    path = lines(tmp_path / "all.jsonl", *({"user": u, "text": f"{u}{n}"} for n in range(20) for u in "ab"))
    order = sorted(range(20), key=lambda n: name_order(str(n)))
    assert read_documents(path).of_user == {u: tuple(f"{u}{n}" for n in order) for u in "ab"}


@given(st.lists(st.integers(0, 10**6), min_size=5, max_size=60, unique=True), st.integers(0, 59))
def test_an_added_document_moves_at_most_three_others_to_another_part(numbers, place):
    """So what a user was trained on hardly becomes what it is measured on."""

    def part_of(ordered):
        parts = (part.split("\n\n") for part in in_parts([str(number) for number in ordered]))
        return {number: place for place, part in enumerate(parts) for number in part}

    before, after = part_of(numbers[:place] + numbers[place + 1 :]), part_of(numbers)
    if len(numbers) > 5:
        assert sum(before[number] != after[number] for number in before) <= 3


def test_a_dataset_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(PopulationError, match=r"pip install 'fedquilt\[data\]'"):
        read_documents(tmp_path)


def dataset_of(rows):
    """Not by `Dataset.from_list`: with a fingerprint given, datasets does not pickle the table to compute one."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(pyarrow.Table.from_pylist(rows)), fingerprint="test")


def save_dataset(path, rows):
    dataset_of(rows).save_to_disk(str(path))
    return path


@pytest.mark.slow
def test_a_dataset_on_disk_reads_like_its_lines(tmp_path):
    rows = [{"user": user, "text": f"über {n}", "n": n} for n in range(9) for user in ("ada", "ben")]
    from_lines = read_documents(lines(tmp_path / "mails.jsonl", *rows))
    assert read_documents(save_dataset(tmp_path / "mails", rows)) == from_lines


@pytest.mark.slow
def test_a_dataset_of_another_kind_is_refused(tmp_path):
    from datasets import DatasetDict

    with pytest.raises(PopulationError, match=r"columns user and text, .* has author, text; rename .* to be user$"):
        read_documents(save_dataset(tmp_path / "columns", [{"author": "ada", "text": "one"}]))
    hole = [{"user": "ada", "text": "one"}, {"user": "ada", "text": None}]
    with pytest.raises(PopulationError, match=r"'text' is a string of Unicode, .*row 1 has none"):
        read_documents(save_dataset(tmp_path / "hole", hole))
    damaged = save_dataset(tmp_path / "damaged", [{"user": "ada", "text": "one"}])
    (arrow,) = damaged.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(PopulationError, match=r"cannot be read .*save it again"):
        read_documents(damaged)
    DatasetDict({"train": dataset_of([{"user": "a", "text": "b"}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(PopulationError, match="holds several splits; give the folder of one of them"):
        read_documents(tmp_path / "splits")
    assert read_documents(tmp_path / "splits" / "train").of_user == {"a": ("b",)}
