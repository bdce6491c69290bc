"""Configurations: what is written is what is meant, and what is misspelt says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from federation.config import GateConfig, LocalConfig, RunConfig, load_config
from federation.errors import ConfigError
from federation.settings import Settings, parse


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
        ("gate.policy=gaet", r"gate.policy: .*'gate', 'saliency', 'magnitude', 'random' or 'all' \(got 'gaet'\)"),
        ("gate.samples=0", r"gate.samples: .*greater than 0"),
        ("gate.inputs=['gain']", r"gate.inputs.0: .*'gains', 'context' or 'embedding' \(got 'gain'\)"),
        ("gate.scope=all", r"gate.scope: .*'module' or 'global' \(got 'all'\)"),
        ("gate.budgets=[4, 0]", r"gate.budgets.1: .*greater than 0 \(got 0\)"),
        ("gate.windows=[0]", r"gate.windows.0: .*greater than 0 \(got 0\)"),
        ("gate.rebuild=-1", r"gate.rebuild: .*greater than or equal to 0"),
        ("gate.balance=-0.1", r"gate.balance: .*greater than or equal to 0"),
        ("gate.every=0", r"gate.every: .*greater than 0"),
        ("gate.schedule=alternating", r"gate.schedule: .*'together' or 'alternate' \(got 'alternating'\)"),
        ("gate.estimator.nmae=disarm", r"unknown key 'gate.estimator.nmae'; did you mean 'name'\?"),
        ("gate.reward.qualty.name=loss", r"unknown key 'gate.reward.qualty'; did you mean 'quality'\?"),
        ("gate.reward.steps=-1", r"gate.reward.steps: .*greater than or equal to 0"),
        ("gate.reward.price=-1", r"gate.reward.price: .*greater than or equal to 0"),
        ("gate.reward.cost=bytes", r"gate.reward.cost.*'units' or 'parameters' \(got 'bytes'\)"),
        ("gate.reward.cost={fc1 = 0.0}", r"gate.reward.cost.*fc1: .*greater than 0 \(got 0.0\)"),
        ("gate.reward.target=1.0", r"gate.reward.target: .*less than 1 \(got 1.0\)"),
        ("gate.reward.price_rate=0", r"gate.reward.price_rate: .*greater than 0"),
        ("federation.present=0", r"federation.present: .*greater than 0"),
        ("federation.present=1.5", r"federation.present: .*less than or equal to 1"),
        ("local.train=none", r"local.train: .*'alternate' or 'nothing' \(got 'none'\)"),
        ("gate.exploration=1.0", r"gate.exploration: .*less than 1"),
        ("codec.top=0.0", r"codec.top: .*greater than 0"),
        ("federation.rounds=-1", r"federation.rounds: .*greater than or equal to 0"),
        ("evaluate.steps=[5, 0]", r"evaluate.steps.1: .*greater than 0"),
        ("gate.price=0.1", r"unknown key 'gate.price'; did you mean 'gate.reward.price'\?"),
        ("rounds=3", r"unknown key 'rounds'; did you mean 'federation.rounds'\?"),
        ("zzzzzz=3", r"unknown key 'zzzzzz'; known keys are codec, .*, variants$"),
        ("gate.budget=33", r"gate.budget \(33\) cannot exceed pool.rank \(32\); lower it"),
        ("gate.budgets=[4, 40]", r"gate.budget \(40\) cannot exceed pool.rank \(32\); lower it"),
        ("gate=3", r"gate: .*valid dictionary"),
        ("rounds", r"an override is key=value, got 'rounds'; for example federation.rounds=10"),
    ],
)
def test_a_fault_says_where_it_is_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


NO_GRADIENT = r"gate: a price on a fixed budget of equal units has no gradient; set distribution = 'bernoulli', or"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate.reward.price=0.1"], NO_GRADIENT),
        (["gate.reward.price=0.1", "gate.scope=global"], NO_GRADIENT),
        (["gate.reward.price=0.1", "gate.reward.cost=parameters"], NO_GRADIENT),
        (
            ["gate.distribution=bernoulli", "gate.reward.target=0.1"],
            r"gate.reward: a price that is steered to a target begins above 0; set price = 1e-3, say",
        ),
        (
            ["gate.reward={price = 0.1, cost = 'parameters', target = 0.1}", "gate.scope=global"],
            r"gate: a budget fixes the share of active units; set distribution = 'bernoulli', or no target",
        ),
        (
            ["gate.schedule=alternate", "gate.every=1"],
            r"gate: an alternating gate that learns in every round leaves the pool none; set every = 2",
        ),
        (
            ["gate.distribution=bernoulli", "gate.scope=global"],
            r"gate: a scope is of fixed budgets, got scope = 'global' with .*; set scope = 'module', or distribution",
        ),
        (
            ["gate.distribution=bernoulli", "gate.budgets=[2, 4]"],
            r"gate: budgets are of fixed budgets, got \(2, 4\) with .*; set budgets = \[\], or distribution = 'budget'",
        ),
        (
            ["gate.rebuild=2", "gate.inputs=['gains']"],
            r"gate: what is rebuilt is an embedding .* rebuild = 2 with inputs = \['gains'\]; add 'embedding'",
        ),
        (
            ["gate.rebuild=2", "gate.reward.steps=3"],
            r"gate: an embedding is rebuilt by rewards before any step, got rebuild = 2 with reward.steps = 3; set one",
        ),
        (
            ["gate.reward.cost=parameters"],
            r"gate.reward: what units cost counts only with a price, got cost = 'parameters' .*; set a price, or cost",
        ),
    ],
)
def test_settings_that_make_no_sense_together_say_what_to_change(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["gate.reward.price=0.1", "gate.scope=global", "gate.reward.cost=parameters"],
        ["gate.reward.price=0.1", "gate.scope=global", "gate.reward.cost={fc1 = 1.0, fc2 = 2.5}"],
        ["gate.reward={price = 0.1, target = 0.1}", "gate.distribution=bernoulli"],
        ["gate.schedule=alternate", "gate.every=2"],
        ["gate.samples=1"],  # enough for some estimators: each says how many it needs
        ["gate.inputs=[]"],
    ],
)
def test_what_makes_sense_together_is_taken(overrides: list[str]) -> None:
    config = load_config(overrides=overrides)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


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
        ("nothing", [()] * 3),
    ],
)
def test_the_factors_of_rounds_1_to_3(train: str, expected: list[tuple[str, ...]]) -> None:
    local = parse(LocalConfig, {"train": train})
    assert [local.factors(round_index) for round_index in (1, 2, 3)] == expected


@pytest.mark.parametrize(
    ("settings", "chooses", "learns", "rests"),
    [
        ({"warmup": 2, "every": 1}, [3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], []),
        ({"warmup": 0, "every": 3}, [1, 2, 3, 4, 5, 6, 7, 8], [1, 4, 7], []),
        ({"warmup": 3, "every": 2, "schedule": "alternate"}, [4, 5, 6, 7, 8], [4, 6, 8], [4, 6, 8]),
        ({"warmup": 20}, [], [], []),
        ({"warmup": 0, "policy": "saliency"}, [], [], []),
        ({"warmup": 0, "every": 2, "schedule": "alternate", "policy": "all"}, [], [], []),
    ],
)
def test_the_rounds_in_which_the_gate_chooses_and_learns_and_the_pool_rests(
    settings: dict[str, object], chooses: list[int], learns: list[int], rests: list[int]
) -> None:
    gate, rounds = parse(GateConfig, settings), range(1, 9)
    assert [r for r in rounds if gate.chooses(r)] == chooses
    assert [r for r in rounds if gate.learns(r)] == learns
    assert [r for r in rounds if gate.rests(r)] == rests


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3),
        ({"budgets": [2, 5]}, 5),
        ({"budgets": [1, 2]}, 3),
        ({"policy": "magnitude"}, 3),
        ({"scope": "global"}, 9),
        ({"distribution": "bernoulli"}, 9),
        ({"policy": "all"}, 9),
    ],
)
def test_the_most_rows_of_a_module_of_nine_units(settings: dict[str, object], expected: int) -> None:
    assert parse(GateConfig, {"budget": 3, **settings}).max_rows(9) == expected


def test_the_share_that_is_asked_for_is_the_target_or_the_budgets() -> None:
    steered = parse(GateConfig, {"distribution": "bernoulli", "reward": {"price": 0.1, "target": 0.3}})
    assert steered.share(6, 24) == 0.3
    assert GateConfig().share(6, 24) == 0.25


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
