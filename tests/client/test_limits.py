"""The owner's limits on what is meta-learned and remembered; those of a round: tests/client/test_node.py."""

from __future__ import annotations

import pytest

from client.limits import TaskLimits
from federation.config import TaskConfig
from federation.errors import NodeError
from federation.settings import overridden, parse

LEARNED = "meta={signal='fomaml', rule={name='learned', hidden=2}, start={name='contextual', hidden=2, factors=2}}"
LIMITS = TaskLimits(examples=80, gate_width=80, memory_kib=80)


@pytest.mark.parametrize(
    ("setting", "limit"),
    [
        ("meta.rule.hidden", "gate_width"),
        ("meta.start.hidden", "gate_width"),
        ("meta.start.factors", "gate_width"),
        ("meta.start.combinations", "gate_width"),
        ("personal.continual.examples", "examples"),
        ("personal.continual.max_kib", "memory_kib"),
    ],
)
def test_the_owner_limits_what_is_learned_and_remembered(setting: str, limit: str) -> None:
    within = ["personal.continual.max_kib=80", LEARNED]
    LIMITS.check(parse(TaskConfig, overridden({}, [*within, f"{setting}=80"])))
    with pytest.raises(NodeError, match=f"a task's {setting} is at most limits.{limit} of the node, 80, it is 81"):
        LIMITS.check(parse(TaskConfig, overridden({}, [*within, f"{setting}=81"])))
