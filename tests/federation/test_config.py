"""Configurations: what is written is what is meant, and what is misspelt says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from federation.config import LocalConfig, RunConfig, Settings, load_config, parse
from federation.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------- reading


def test_a_file_gives_what_it_says_and_defaults_for_the_rest(tmp_path: Path) -> None:
    text = '[gate]\nbudget = 3\n[population]\nname = "synthetic"\noptions = {rank = 4}\n'
    config = load_config(write(tmp_path, text))
    assert config.gate.budget == 3
    assert config.population.options == {"rank": 4}
    default = RunConfig()
    assert config.local == default.local
    assert config.gate.model_copy(update={"budget": default.gate.budget}) == default.gate


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("federation.rounds=10", "federation.rounds", 10),
        ("local.learning_rate = 0.25", "local.learning_rate", 0.25),
        ("gate.policy=saliency", "gate.policy", "saliency"),
        ('gate.policy="random"', "gate.policy", "random"),
        ("name=two words = here", "name", "two words = here"),
        ("evaluate.methods=['shared', 'dsa_t2']", "evaluate.methods", ("shared", "dsa_t2")),
        ("population.options.widths=[8, 4]", "population.options", {"widths": [8, 4]}),
        ("population.options.root=/some/folder", "population.options", {"root": "/some/folder"}),
        ("evaluate.personal={rows = 'int8'}", "evaluate.personal.rows", "int8"),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(override: str, path: str, value: object) -> None:
    found: object = load_config(overrides=[override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value


def test_the_last_override_wins_over_the_file_and_over_those_before(tmp_path: Path) -> None:
    path = write(tmp_path, "[federation]\nrounds = 1\ncohort = 7\n")
    config = load_config(path, ["federation.rounds=2", "federation.rounds=3"])
    assert (config.federation.rounds, config.federation.cohort) == (3, 7)


def test_a_configuration_comes_back_from_its_json() -> None:
    config = load_config(overrides=["gate.budget=3", "evaluate.methods=['base']", "pool.target_modules=['a']"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# -------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federaton.rounds=1", r"unknown key 'federaton'; did you mean 'federation'\?"),
        ("federation.round=1", r"unknown key 'federation.round'; did you mean 'rounds'\?"),
        ("evaluate.personal.row=int8", r"unknown key 'evaluate.personal.row'; did you mean 'rows'\?"),
        ("strategy.nme=fedavg", r"unknown key 'strategy.nme'; did you mean 'name'\?"),
        ("codec.zzzzzz=1", r"unknown key 'codec.zzzzzz'; known keys are rows, top"),
        ("local.steps=0", r"local.steps: .*greater than 0 \(got 0\)"),
        ("local.learning_rate=fast", r"local.learning_rate: .*number.* \(got 'fast'\)"),
        ("local.learning_rate=nan", r"local.learning_rate: .* \(got nan\)"),
        ("gate.policy=gaet", r"gate.policy: .*'gate', 'saliency', 'random' or 'all' \(got 'gaet'\)"),
        ("gate.samples=1", r"gate.samples: .*greater than or equal to 2"),
        ("gate.exploration=1.0", r"gate.exploration: .*less than 1"),
        ("codec.top=0.0", r"codec.top: .*greater than 0"),
        ("federation.rounds=-1", r"federation.rounds: .*greater than or equal to 0"),
        ("evaluate.steps=[5, 0]", r"evaluate.steps.1: .*greater than 0"),
        ("gate.price=0.1", r"gate: with a fixed budget a price has no gradient; set distribution = 'bernoulli'"),
        ("gate.budget=33", r"gate.budget \(33\) cannot exceed pool.rank \(32\); lower it"),
        ("gate=3", r"gate: .*valid dictionary"),
        ("rounds", r"an override is key=value, got 'rounds'; for example federation.rounds=10"),
    ],
)
def test_a_fault_says_where_it_is_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'gate.budgt'; did you mean 'budget'\?; local.steps: .*"):
        parse(RunConfig, {"gate": {"budgt": 1}, "local": {"steps": -1}})


def test_an_override_cannot_go_through_a_value() -> None:
    with pytest.raises(ConfigError, match=r"'name.first' goes through 'name', which is a value; name a section"):
        load_config(overrides=["name=x", "name.first=y"])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"readable TOML file, got .*absent\.toml': No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"experiment\.toml is not valid TOML: .*line 1"):
        load_config(write(tmp_path, "[gate\n"))


def test_the_budget_may_exceed_the_rank_where_everyone_uses_every_unit() -> None:
    config = load_config(overrides=["pool.rank=4", "gate.budget=8", "gate.policy=all"])
    assert config.pool.rank == 4


# -------------------------------------------------------------------------------- meaning


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("both", [("down", "up")] * 3),
        ("down", [("down",)] * 3),
        ("up", [("up",)] * 3),
        ("alternate", [("up",), ("down",), ("up",)]),
    ],
)
def test_the_factors_of_rounds_1_to_3(train: str, expected: list[tuple[str, ...]]) -> None:
    local = parse(LocalConfig, {"train": train})
    assert [local.factors(round_index) for round_index in (1, 2, 3)] == expected


def test_every_field_says_what_it_is() -> None:
    """Help text is written once, on the field; names that say it all need none."""
    plain = {"name", "options", "seed", "rounds"}

    def undescribed(kind: type[Settings]) -> list[str]:
        names = []
        for name, field in kind.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Settings):
                names += undescribed(inner)
            elif field.description is None and name not in plain:
                names.append(f"{kind.__name__}.{name}")
        return names

    assert undescribed(RunConfig) == []


def test_a_plugins_option_alone_keeps_the_default_plugin() -> None:
    config = load_config(None, ["strategy.options.kappa=1.0", "pool_optimizer.learning_rate=0.1"])
    assert (config.strategy.name, config.strategy.options) == ("masked_mean", {"kappa": 1.0})
    assert (config.pool_optimizer.name, config.pool_optimizer.learning_rate) == ("adam", 0.1)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(ConfigError, match=r"local\.learning_rate: .*finite"):
        load_config(None, [f"local.learning_rate={value}"])
