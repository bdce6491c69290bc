"""The rows of the table: which names are known, and what each asks for."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.config import load_config
from federation.errors import ConfigError
from federation.formats import RowFormat
from simulations.methods import Choice, MethodName, curve_names, methods_of, parsed_name, sources_of

OWN = (
    "variants.disarm.gate={estimator={name='disarm'}, budget=3}",
    "variants.free.gate={distribution='bernoulli'}",
    "variants.plain.gate={policy='saliency'}",
    "evaluate.gain_examples=64",
    "gate.budget=5",
)


def methods(*names: str, policy: str = "gate"):
    return methods_of(load_config(None, [*OWN, f"evaluate.methods={list(names)}", f"gate.policy={policy}"]))


def choice(name: str) -> Choice | None:
    return methods(name)[1].choice


def test_the_base_is_always_measured_and_first() -> None:
    assert [m.name for m in methods("dsa_t0", "base", "shared")] == ["base", "dsa_t0", "shared"]


def test_another_format_changes_how_a_method_is_written_and_nothing_else() -> None:
    _, plain, written = methods("dsa_t2[windows=4]", "dsa_t2[windows=4]@ternary:0.2")
    assert written.rows == RowFormat("ternary", 0.2)
    assert written.start == plain.start


def test_methods_say_what_must_be_trained_before() -> None:
    assert sources_of(methods("dsa_t2", "dense_lora")) == ["base", "pool", "fresh"]
    named = methods("shared_tuned", "dsa_t0[pool=disarm]", "random_mask[pool=random]", "dsa_t2[pool=disarm]")
    assert sources_of(named) == ["base", "shared", "disarm", "random"]


word = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1)
names = st.builds(MethodName, word, st.dictionaries(word, word), st.just("") | st.builds("{}:{}".format, word, word))


@given(names)
def test_a_name_is_read_as_it_was_written(name: MethodName) -> None:
    assert parsed_name(str(name)) == name


@given(names.filter(lambda name: name.options))
def test_spaces_around_options_mean_nothing(name: MethodName) -> None:
    assert parsed_name(re.sub(r"([\[\]=,])", r" \1 ", str(name)).replace(" [", "[").replace("] ", "]")) == name


def test_options_are_the_federations_unless_they_are_given() -> None:
    assert choice("saliency_mask") == Choice("saliency", "pool", 64, 5)
    assert choice("dsa_t0[pool=disarm]") == Choice("gate", "disarm", 64, 3)
    assert choice("dsa_t2[pool=disarm, windows=4, budget=7]@int8") == Choice("gate", "disarm", 4, 7)
    assert choice("magnitude_mask[budget=2]") == Choice("magnitude", "pool", 64, 2)
    assert choice("dsa_t0[pool=free,windows=1]") == Choice("gate", "free", 1, 5)
    assert choice("random_mask[pool=random]") == Choice("random", "random", 64, 5)
    assert choice("best_mask[pool=plain]") == Choice("best", "plain", 64, 5)
    assert choice("dense_lora") is choice("shared") is choice("ngram_cache") is None


def test_methods_that_differ_in_an_option_are_tuned_apart() -> None:
    starts = [m.start for m in methods("dsa_t2", "dsa_t2[budget=4]", "dsa_t2[windows=4]", "dsa_t2[pool=disarm]")]
    assert len(set(starts)) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dsa_t9", "unknown method 'dsa_t9' .* did you mean 'dsa_t"),
        ("dsa_t9[windows=4]", r"unknown method 'dsa_t9\[windows=4\]' .* did you mean 'dsa_t"),
        ("dsa_t2@zip", "a format is written method@kind .*'dsa_t2@zip'"),
        ("dsa_t2@ternary:2", "share in"),
        ("dsa_t2@", r"is written name\[option=value"),
        ("dsa_t0[]", r"is written name\[option=value"),
        ("dsa_t0[windows]", r"is written name\[option=value"),
        ("dsa_t0[windows=4", r"is written name\[option=value"),
        ("dsa_t0[windows=4]x", r"is written name\[option=value"),
        ("dsa_t0[windows=4,windows=8]", "each option once"),
        ("dsa_t0[window=4]", "has no option 'window'.*did you mean 'windows'"),
        ("random_mask[windows=4]", "has no option 'windows'.*known: budget, pool"),
        ("dense_lora[budget=4]", "has no option 'budget'.*known: shots, steps"),
        ("dsa_t0[windows=many]", "windows is a whole number from 1, got 'many'"),
        ("dsa_t0[budget=0]", "budget is a whole number from 1, got '0'"),
        ("dsa_t0[budget=2.5]", "budget is a whole number from 1, got '2.5'"),
        ("dsa_t0[budget=33]", "at most the pool's rank, 32, got 33"),
        (
            "dsa_t0[pool=disram]",
            "called 'disram'.*did you mean 'disarm'.*free, plain, pool, random, shared",
        ),
        ("dsa_t0[pool=free,budget=4]", "Bernoulli gate has no budget.*'free'"),
        ("dsa_t0[steps=2]", "has no option 'steps'.*known: budget, pool, windows"),
        ("shared[shots=2]", "has no option 'shots'.*known: none"),
        ("neighbours[steps=2]", "has no option 'steps'.*known: shots"),
        ("shared_tuned[by=sgd]", "has no option 'by'.*known: shots, steps"),
        ("melpa[by=lbfgs]", r"one of \('adam', 'sgd', 'rule'\), got by = 'lbfgs'"),
        ("melpa", "by = 'rule' steps as the pool was meta-trained for, but meta.signal is 'delta'.*write by=adam"),
        ("melpa[pool=mean]", "no federation is called 'mean'"),
        ("maml", r"by a federation called 'maml', there is none; add \[variants.maml.meta\]"),
        ("fomaml", "called 'fomaml', there is none"),
        ("reptile@int8", r"'reptile@int8' .* called 'reptile', there is none"),
        ("reptile[steps=2]", "by a federation called 'reptile', there is none"),
        ("dsa_t2[shots=0]", "shots is a whole number from 1, got '0'"),
        ("dsa_t2[steps=-1]", "steps is a whole number from 0, got '-1'"),
        ("dsa_t0[pool=plain]", "takes a gate's masks, but gate.policy is 'saliency' in the federation 'plain'"),
        ("other_mask[pool=random]", "takes a gate's masks, but gate.policy is 'random' in the federation 'random'"),
    ],
)
def test_a_method_that_cannot_be_is_named_with_what_to_change(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods(name)


@pytest.mark.parametrize("name", ["dsa_t0", "dsa_t2_cache", "other_mask"])
def test_a_gates_masks_need_a_gate(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*gate.policy is 'magnitude'"):
        methods(name, policy="magnitude")


def test_a_variant_may_have_the_gate_that_the_main_federation_has_not() -> None:
    config = ["gate.policy=saliency", "variants.g.gate.policy=gate", "evaluate.methods=['dsa_t0[pool=g]']"]
    assert methods_of(load_config(None, config))[1].choice == Choice("gate", "g", 64, 8)


@pytest.mark.parametrize(("policy", "budget"), [("gate", 5), ("random", 5), ("all", 32)])
def test_what_was_meta_trained_is_served_with_the_masks_that_it_trained_with(policy: str, budget: int) -> None:
    settings = ["meta.signal=maml", f"gate={{policy='{policy}', budget=5}}", "evaluate.methods=['melpa']"]
    (_, melpa) = methods_of(load_config(None, settings))
    assert (melpa.mask, melpa.budget, melpa.source, melpa.by, melpa.learned) == (policy, budget, "pool", "rule", True)
    assert melpa.choice == (None if policy == "all" else Choice(policy, "pool", 64, 5))  # type: ignore[arg-type]


def test_another_federation_may_serve_by_its_own_rule_and_masks() -> None:
    (_, melpa) = methods("melpa[pool=plain,shots=2,windows=9,by=adam]")
    assert melpa.choice == Choice("saliency", "plain", 9, 5, 2)
    assert (melpa.source, melpa.by, melpa.seen) == ("plain", "adam", 2)


def test_a_few_examples_are_all_that_a_choice_can_see() -> None:
    seen = {name: choice(name).seen for name in ("dsa_t2", "dsa_t2[shots=3]", "dsa_t2[shots=3,windows=2]")}  # type: ignore[union-attr]
    assert list(seen.values()) == [64, 3, 2]


def test_the_head_and_votes_choose_nothing() -> None:
    _, head, votes = methods("head_only", "neighbours[shots=2]")
    assert (head.mask, head.source, head.choice, head.neighbours) == ("head", "fresh", None, False)
    assert (votes.tuned, votes.source, votes.choice, votes.neighbours, votes.shots) == (
        "nothing",
        "base",
        None,
        True,
        2,
    )


CURVES = "evaluate.curves={methods=['shared_tuned@int8', 'melpa[by=adam]'], steps=[0, 3], shots=[2, 4]}"


def test_curves_are_every_method_at_every_amount_and_step() -> None:
    config = load_config(None, [CURVES, "evaluate.methods=['shared']"])
    names = curve_names(config.evaluate.curves)
    places = [(shots, steps) for shots in (2, 4) for steps in (0, 3)]
    assert names == [
        *(f"shared_tuned[shots={shots},steps={steps}]@int8" for shots, steps in places),
        *(f"melpa[by=adam,shots={shots},steps={steps}]" for shots, steps in places),
    ]
    found = methods_of(config)
    assert [m.name for m in found] == ["base", "shared", *names]
    assert [(m.shots, m.steps) for m in found[2:]] == places * 2


def test_curves_without_amounts_are_of_all_examples_and_a_row_that_is_a_point_comes_once() -> None:
    config = load_config(
        None,
        ["meta.signal=maml", "evaluate.curves={methods=['melpa'], steps=[5]}", "evaluate.methods=['melpa[steps=5]']"],
    )
    assert [(m.name, m.shots) for m in methods_of(config)] == [("base", 0), ("melpa[steps=5]", 0)]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ("{methods=['neighbours']}", "'neighbours' has no option 'steps'"),
        ("{methods=['dsa_t0']}", "'dsa_t0' has no option 'steps'"),
        ("{methods=['melpa'], steps=[-1]}", "steps is a whole number from 0, got '-1'"),
        ("{methods=['melpa'], shots=[0]}", "greater than 0"),
    ],
)
def test_a_curve_that_cannot_be_is_refused(curves: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods_of(load_config(None, [f"evaluate.curves={curves}"]))


def test_the_budget_of_a_federations_own_masks_is_the_federations() -> None:
    maml = "variants.maml={meta={signal='maml'}, gate={policy='saliency', budget=3}}"
    found = methods_of(load_config(None, [maml, "gate.budget=5", "evaluate.methods=['maml', 'maml[steps=5]']"]))
    assert [m.budget for m in found[1:]] == [3, 3]


@pytest.mark.parametrize("name", ["melpa[budget=2]", "dsa_t2_cache[shots=3]"])
def test_an_option_that_would_be_without_effect_is_refused(name: str) -> None:
    """All units of a federation without masks are active; a cache reads all that a user owns."""
    policy = "all" if name.startswith("melpa") else "gate"
    with pytest.raises(ConfigError, match=r"a budget is of masks|has no option 'shots'"):
        methods_of(load_config(None, ["meta.signal=maml", f"gate.policy={policy}", f"evaluate.methods=['{name}']"]))
