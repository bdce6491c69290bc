"""The tree against the shape that its docstring promises."""

import pytest

from server.tree import fold


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "a"), (2, "(ab)"), (3, "((ab)c)"), (5, "(((ab)(cd))e)"), (8, "(((ab)(cd))((ef)(gh)))")],
)
def test_neighbours_merge_first_and_order_is_kept(count, expected):
    assert fold("abcdefgh"[:count], lambda a, b: f"({a}{b})") == expected
