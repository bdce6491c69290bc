"""Payloads as a partial, against a loop that decodes, admits and lifts one user at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import pytest
import torch

from federation.codec import decode
from federation.config import ComputeConfig
from federation.errors import RunError
from federation.state import metric_names
from federation.update import UpdateBlock, admit
from server.admission.lifting import InProcessLifter, Lifted, Terms, lift_payloads, make_lifter
from server.round import begin, rules_of
from strategies.means import Sums
from tests.server.admission.replies import SCHEMA, WORK, bits, config_of, payload_of, update_of

CONFIG = config_of("limits.weight=0.75")
RULES = rules_of(CONFIG, SCHEMA)
STATE = begin(RULES, SCHEMA.zeros()).strategy
TERMS = Terms(RULES, STATE, WORK.round_index, WORK.version, metric_names(CONFIG, WORK.round_index))
NAN = torch.tensor([math.nan])
SCALES = (1.0, 0.5, 0.25, 0.125, 1.0)


def payloads(bad: dict[int, bytes]) -> list[bytes]:
    """Five users', some of them replaced."""
    return [bad.get(user) or payload_of(update_of(user)) for user in range(5)]


def one_by_one(sent: Sequence[bytes], scales: Sequence[float]) -> tuple[Sums, list[UpdateBlock]]:
    """The slow twin: the sum of the users' partials, and what was admitted of each."""
    admitted = [admit(decode(payload, SCHEMA, WORK.version), SCHEMA, RULES.limits)[0] for payload in sent]
    scaled = [replace(user, weight_u=user.weight_u * scale) for user, scale in zip(admitted, scales, strict=True)]
    return reduce(RULES.strategy.merge, [RULES.strategy.lift(user, STATE) for user in scaled]), admitted


def assert_lifted(lifted: Lifted, sent: Sequence[bytes], scales: Sequence[float]) -> None:
    partial, admitted = one_by_one(sent, scales)
    assert lifted.admitted == len(sent)
    torch.testing.assert_close(vars(lifted.partial), vars(partial), rtol=1e-6, atol=1e-7)
    sums = {name: math.fsum(float(user.metrics[name]) for user in admitted) for name in TERMS.metrics}
    assert lifted.metric_sums == pytest.approx(sums, rel=1e-12)


def test_a_block_is_the_sum_of_its_users_clipped_capped_and_scaled() -> None:
    lifted = lift_payloads(TERMS, payloads({}), SCALES)
    assert (lifted.malformed, lifted.refused) == ({}, {})
    assert_lifted(lifted, payloads({}), SCALES)
    weights = [min(float(update_of(user).weight_u), 0.75) * scale for user, scale in enumerate(SCALES)]
    assert float(lifted.partial.weight) == pytest.approx(sum(weights), rel=1e-6)
    assert any(float(update_of(user).weight_u) > 0.75 for user in range(5))


def test_bad_users_are_left_out_alone_and_named_by_their_position() -> None:
    cut = payloads({})[1][:-1]
    refused = payload_of(replace(update_of(3), weight_u=NAN))
    lifted = lift_payloads(TERMS, payloads({1: cut, 3: refused}), SCALES)
    assert list(lifted.malformed) == [1]
    assert lifted.refused == {3: "the weight must be finite and not negative"}
    good = payloads({})
    assert_lifted(lifted, [good[0], good[2], good[4]], [SCALES[0], SCALES[2], SCALES[4]])


@pytest.mark.parametrize("bad", [b"", payload_of(replace(update_of(0), weight_u=NAN))])
def test_nobody_is_no_partial(bad: bytes) -> None:
    lifted = lift_payloads(TERMS, [bad, bad], [1.0, 1.0])
    assert (lifted.partial, lifted.admitted, lifted.metric_sums) == (None, 0, {})
    assert {**lifted.malformed, **lifted.refused}.keys() == {0, 1}


def test_the_scale_one_changes_no_bit() -> None:
    sent = payloads({})
    block = [admit(decode(payload, SCHEMA, WORK.version), SCHEMA, RULES.limits)[0] for payload in sent]
    for payload, user in zip(sent, block):
        lifted = lift_payloads(TERMS, [payload], [1.0])
        assert bits(lifted.partial) == bits(RULES.strategy.lift(user, STATE))


def test_without_an_address_blocks_are_lifted_at_once_in_this_process() -> None:
    lifter = make_lifter(ComputeConfig())
    assert isinstance(lifter, InProcessLifter)
    lifter.begin(TERMS)
    (lifted,) = lifter.submit(payloads({}), SCALES)
    assert bits(lifted) == bits(lift_payloads(TERMS, payloads({}), SCALES))
    assert lifter.drain() == []
    lifter.close()


def test_an_address_needs_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "server.admission.ray_lifting", raising=False)
    with pytest.raises(RunError, match=r"ray_address = '127\.0\.0\.1:1' needs Ray .*install fedquilt\[simulation\]"):
        make_lifter(ComputeConfig(ray_address="127.0.0.1:1"))
