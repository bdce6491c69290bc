"""The rows of the table: which names are known, and what each asks for."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.config import load_config
from federation.errors import ConfigError
from federation.formats import RowFormat
from simulations.methods import Choice, MethodName, methods_of, parsed_name, sources_of

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
