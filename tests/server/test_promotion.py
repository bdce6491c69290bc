"""The rule that promotes releases, and what a rollback goes back to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError, RunError
from server.promotion import Evaluation, Promotion, PromotionRule, previous, standing


def evaluation(loss: float, users: int = 10, split: str = "new", metric: str = "tuned_loss") -> Evaluation:
    return Evaluation(split=split, users=users, metrics={metric: loss})


def history(names: Sequence[str]) -> list[Promotion]:
    return [Promotion(name=name, when=datetime(2026, 1, 1, tzinfo=UTC), how="rule", why="") for name in names]


@pytest.mark.parametrize(
    ("loss", "margin", "promoted"),
    [
        (1.9, 0.0, True),
        (2.0, 0.0, True),
        (2.25, 0.0, False),
        (2.25, 0.25, True),
        (2.5, 0.25, False),
        (1.75, -0.25, True),
        (1.9, -0.25, False),
    ],
)
def test_a_candidate_is_promoted_unless_it_is_worse_by_more_than_the_margin(
    loss: float, margin: float, promoted: bool
) -> None:
    verdict = PromotionRule(margin=margin).judge(evaluation(loss), evaluation(2.0))
    assert verdict.promoted is promoted
    assert f"tuned_loss is {loss:g}" in verdict.why
    assert f"at most {2.0 + margin:g} is allowed" in verdict.why


def test_the_first_needs_no_other_but_enough_users() -> None:
    rule = PromotionRule(users=10)
    assert rule.judge(evaluation(2.0, users=10), None).promoted
    refused = rule.judge(evaluation(2.0, users=9), None)
    assert not refused.promoted
    assert "9 users, the rule wants 10" in refused.why


@pytest.mark.parametrize(
    "current",
    [evaluation(9.0, users=9), evaluation(9.0, split="train"), evaluation(9.0, metric="mask_loss")],
    ids=["users", "split", "metric"],
)
def test_what_cannot_be_compared_is_not_promoted(current: Evaluation) -> None:
    verdict = PromotionRule(users=10).judge(evaluation(1.0), current)
    assert not verdict.promoted
    assert "measured otherwise" in verdict.why
    assert f"{current.users} users of the split {current.split!r}" in verdict.why


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no metric 'tuned_los'; did you mean 'tuned_loss'\?"):
        PromotionRule("tuned_los").judge(evaluation(1.0), None)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ("", ""),
        ("a", "a"),
        ("abc", "abc"),
        ("abcb", "ab"),
        ("abcba", "a"),
        ("abcbc", "abc"),
        ("abad", "ad"),
        ("aab", "ab"),
    ],
)
def test_going_back_forgets_what_came_after(names: str, left: str) -> None:
    assert "".join(standing(history(names))) == left


@given(st.text("abcd", min_size=1))
def test_the_last_promotion_stands_and_nothing_stands_twice(names: str) -> None:
    left = standing(history(names))
    assert left[-1] == names[-1]
    assert len(set(left)) == len(left)


def test_rolling_back_again_and_again_reaches_the_first_and_ends_there() -> None:
    names = list("abcd")
    for expected in "cba":
        names.append(previous(standing(history(names))[:-1], None))
        assert names[-1] == expected
    with pytest.raises(RunError, match="nothing was"):
        previous(standing(history(names))[:-1], None)


@pytest.mark.parametrize("name", ["c", "z"])
def test_a_rollback_goes_to_what_was_before(name: str) -> None:
    before = standing(history("abc"))[:-1]
    assert previous(before, "a") == "a"
    with pytest.raises(RunError, match=rf"current before \(a, b\), got '{name}'; `fedquilt promote`"):
        previous(before, name)
