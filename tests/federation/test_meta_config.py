"""What of the meta-learned part fits together, and what is refused with what to change."""

from __future__ import annotations

import pytest

from federation.config import RunConfig, load_config
from federation.errors import ConfigError

MAML = "meta.signal=maml"


@pytest.mark.parametrize("signal", ["delta", "reptile"])
@pytest.mark.parametrize(
    "learned",
    ["meta.rule.name=rates", "meta.rule.name=learned", "meta.start.name=universal", "meta.start.name=contextual"],
)
def test_what_is_learned_besides_the_pool_needs_an_outer_gradient(signal: str, learned: str) -> None:
    remedy = r"set signal = 'fomaml' or 'maml', or rule = 'sgd' and start = 'pool'"
    with pytest.raises(ConfigError, match=rf"meta: a rule or a start .* got signal = '{signal}' with .*; {remedy}"):
        load_config(overrides=[f"meta.signal={signal}", learned])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [MAML, "meta.rule.name=learned"],
            r"meta: a learned rule takes .* as constants, .*'maml' with rule = 'learned'; set signal = 'fomaml'",
        ),
        (
            ["meta.query_steps=[1]"],
            r"meta: query_steps are of signals with a query loss, got \(1,\) with signal = 'delta'; leave them out, or",
        ),
        (
            [MAML, "meta.query_steps=[-1, 1]"],
            r"meta: query_steps are numbers from 0, ascending, got \(-1, 1\); correct them",
        ),
        ([MAML, "meta.query_steps=[1, 1]"], r"meta: query_steps are numbers from 0, ascending, got \(1, 1\); correct"),
        (
            ["meta.signal=fomaml", "meta.recompute=true"],
            r"meta: only exact MAML keeps activations .* recompute with signal = 'fomaml'; drop it",
        ),
        (
            [MAML, "local.steps=2", "meta.query_steps=[1, 3]"],
            r"the last of meta.query_steps is local.steps \(2\), .* got \(1, 3\); correct one of them",
        ),
        (
            [MAML, "local.train=up"],
            r"meta.signal = 'maml' is of steps of both factors, .* local.train = 'up'; set it to",
        ),
        (
            ["meta.signal=fomaml", "meta.rule.name=rates", "gate.reward.steps=2"],
            r"rewards after steps are of plain SGD, got gate.reward.steps = 2 .*; set it to 0",
        ),
        (["meta.written.rows=int8"], r"meta: rows are written before a query loss, .* written = 'int8'; drop it"),
        (
            ["meta.tasks=2", "local.steps=4", "local.gain_examples=9"],
            r"a policy is told of the first of meta.tasks, .* draws 8 examples, got 9 .*; lower them",
        ),
        (["meta.rule.bound=1e9"], r"meta.rule.bound: .*less than or equal to 1000"),
        (["evaluate.curves.steps=[]"], r"evaluate.curves.steps: .*at least 1 item"),
        (
            ["meta.tasks=2", "local.steps=3"],
            r"each of meta.tasks \(2\) takes as many of local.steps \(3\), .*; make the steps a multiple",
        ),
        (
            ["meta.tasks=2", "local.steps=4", "local.batches=2"],
            r"each of meta.tasks \(2\) .* a batch of its own; .* leave local.batches out",
        ),
        (["meta.tasks=0"], r"meta.tasks: .*greater than 0"),
        (["meta.rule.bound=1.0"], r"meta.rule.bound: .*greater than 1"),
        (["meta.rule.hidden=0"], r"meta.rule.hidden: .*greater than 0"),
        (["meta.start.combinations=-1"], r"meta.start.combinations: .*greater than or equal to 0"),
        (["meta.signal=mmal"], r"meta.signal: .*'delta', 'reptile', 'fomaml' or 'maml' \(got 'mmal'\)"),
        (["meta.start.name=context"], r"meta.start.name: .*'pool', 'universal' or 'contextual'"),
        (["meta.rule.nmae=rates"], r"unknown key 'meta.rule.nmae'; did you mean 'name'\?"),
        (["limits.rates_norm=0"], r"limits.rates_norm: .*greater than 0"),
        (["limits.start_norm=-1"], r"limits.start_norm: .*greater than 0"),
    ],
)
def test_settings_that_make_no_sense_say_what_to_change(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ([], False),
        ([MAML], False),
        (["meta.signal=reptile"], False),
        ([MAML, "meta.rule.name=rates", "meta.recompute=true"], True),
        (["meta.signal=fomaml", "meta.rule.name=learned", "meta.start.name=contextual"], True),
        ([MAML, "meta.start={name = 'universal', combinations = 0}"], True),
        ([MAML, "local.steps=4", "meta.query_steps=[0, 2, 4]"], False),
        (["local.steps=4", "local.batches=4", "meta.tasks=2"], False),
        (["local.steps=4", "local.batches=2"], False),
    ],
)
def test_what_makes_sense_is_taken_and_comes_back_from_its_json(overrides: list[str], learns: bool) -> None:
    config = load_config(overrides=overrides)
    assert config.meta.learns is learns
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.task.meta == config.meta
