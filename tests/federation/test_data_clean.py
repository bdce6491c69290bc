"""What is left out of source code, one example of each reason."""

from pathlib import PurePath

import pytest

from federation.data.clean import Cleaner, path_reason, text_reason, without_leading_comments

CODE = "import os\n\n\ndef list_names(folder):\n    return sorted(os.listdir(folder))\n"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("project/core.py", None),
        ("tests/core.py", None),  # a project of that name
        ("project/tests/core.py", "tests"),
        ("project/test_core.py", "tests"),
        ("project/core_test.go", "tests"),
        ("project/contest.py", None),
        ("project/_vendor/core.py", "vendored"),
        ("project/web/node_modules/core.js", "vendored"),
        ("project/.git/core.py", "built or hidden"),
        ("project/build/core.py", "built or hidden"),
        ("project/core_pb2.py", "generated"),
        ("project/core.min.js", "generated"),
    ],
)
def test_paths(path, reason):
    assert path_reason(PurePath(path)) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CODE, None),
        ("# This file was automatically generated\n" + CODE, "generated"),
        (CODE + "x = 1  # do not edit\n" * 80, None if len(CODE) > 1500 else "generated"),
        ("TABLE = [\n" + "    0x1F, 0x2E,\n" * 50 + "]\n", "data"),
        ("NAMES = {\n" + "    'name': 'value',\n" * 50 + "}\n", "data"),
        (CODE + "blob = '" + "x" * 500 + "'\n", "data"),
        (" \n\n", "empty"),
    ],
)
def test_texts(text, reason):
    assert text_reason(text) == reason


@pytest.mark.parametrize(
    "comments",
    [
        "",
        "#!/usr/bin/env python\n# Copyright\n\n# License\n",
        "// Copyright\n// License\n\n",
        "/* Copyright\n   License */\n\n",
        "-- License\n",
    ],
)
def test_leading_comments_go_and_others_stay(comments):
    body = CODE + "# a remark\n"
    assert without_leading_comments(comments + body) == body


def test_text_of_comments_alone_becomes_empty():
    assert without_leading_comments("# only\n# comments") == ""
    assert without_leading_comments("/* never closed") == ""


def functions(*names):
    return "".join(f"def {name}_does_a_thing_of_its_own(argument):\n    return {name}(argument)\n" for name in names)


def test_a_near_copy_of_any_earlier_file_is_left_out_and_counted():
    cleaner = Cleaner()
    assert cleaner.clean(functions("a", "b", "c")) is not None
    assert cleaner.clean("# renamed\n" + functions("a", "b", "d")) is None
    assert cleaner.clean(functions("a", "e", "f")) is not None
    assert cleaner.clean(functions("d", "g", "h")) is not None  # a file that was left out is not remembered
    assert cleaner.left_out == {"copies": 1}
