"""The rows of the table: which names are known, and what each asks for."""

import pytest

from federation.config import load_config
from federation.errors import ConfigError
from federation.formats import RowFormat
from simulations.methods import methods_of, sources_of


def methods(*names: str, policy: str = "gate"):
    return methods_of(load_config(None, [f"evaluate.methods={list(names)}", f"gate.policy={policy}"]))


def test_the_base_is_always_measured_and_first() -> None:
    assert [m.name for m in methods("dsa_t0", "base", "shared")] == ["base", "dsa_t0", "shared"]


def test_another_format_changes_how_a_method_is_written_and_nothing_else() -> None:
    _, plain, written = methods("dsa_t2", "dsa_t2@ternary:0.2")
    assert written.rows == RowFormat("ternary", 0.2)
    assert written.start == plain.start


def test_methods_say_what_must_be_trained_before() -> None:
    assert sources_of(methods("dsa_t2", "dense_lora")) == {"base", "pool", "fresh"}
    assert sources_of(methods("shared_tuned", "random_mask_random_pool")) == {"base", "shared", "random_pool"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dsa_t9", "unknown method 'dsa_t9' .* did you mean 'dsa_t"),
        ("dsa_t2@zip", "a format is written method@kind .*'dsa_t2@zip'"),
        ("dsa_t2@ternary:2", "share in"),
    ],
)
def test_a_method_that_does_not_exist_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods(name)


@pytest.mark.parametrize("name", ["dsa_t0", "dsa_t2_cache", "other_mask"])
def test_a_gates_masks_need_a_gate(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*gate.policy is 'saliency'"):
        methods(name, policy="saliency")
