"""Variants: what they share with the main federation, and that methods are served by the one that they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from client.personal import known_of, proposed_mask
from federation.config import Policy, RunConfig, load_config
from federation.data.population import Population
from federation.errors import ConfigError, PluginError, RunError
from federation.state import GATE_SECTION
from federation.update import Values
from simulations import runs
from simulations.compute.worker import Worker
from simulations.evaluate import check_methods, federated_users
from simulations.federate import last_checkpoint
from simulations.methods import methods_of
from simulations.runs import Run, reevaluate, run
from simulations.setup import first_pool
from simulations.variants import begins_as_the_teachers, differing, federations_of
from tests.simulations.tiny import tiny_config

POOLS = ("pool/fc1", "pool/fc2")


def federations(*overrides: str) -> dict[str, RunConfig]:
    return federations_of(load_config(None, overrides))


# -------------------------------------------------------------------------------- settings


def test_a_variant_is_the_main_federation_but_for_what_it_says() -> None:
    said: Mapping[str, Any] = {
        "gate": {"samples": 8, "estimator": {"name": "disarm"}, "reward": {"steps": 5}},
        "federation": {"rounds": 7},
        "local": {"train": "nothing"},
    }
    main = RunConfig(gate={"warmup": 3, "hidden": 9}, seed=4, variants={"own": said})
    found = federations_of(main)
    assert list(found) == ["pool", "shared", "random", "own"]
    assert all(federation.variants == {} for federation in found.values())
    assert differing(found["pool"], found["own"]) == said
    assert differing(found["own"], found["own"]) == {}
    assert found["pool"] == main.model_copy(update={"variants": {}})
    assert differing(found["pool"], found["random"]) == {"gate": {"policy": "random"}}
    shared = {"pool": {"rank": 8}, "gate": {"policy": "all"}, "strategy": {"name": "fedavg"}}
    assert differing(found["pool"], found["shared"]) == shared


def test_tables_that_are_no_sections_differ_as_a_whole() -> None:
    priced = "gate={distribution='bernoulli', reward={price=0.1, cost={fc1=1.0, fc2=2.0}}}"
    options = "strategy={name='trimmed_mean', options={share=0.1}}"
    found = federations(priced, options, "variants.v={gate={reward={cost={fc1=1.0}}}, strategy={options={}}}")
    expected = {"gate": {"reward": {"cost": {"fc1": 1.0}}}, "strategy": {"options": {}}}
    assert differing(found["pool"], found["v"]) == expected


def test_another_plugin_does_not_inherit_options() -> None:
    options = "strategy={name='trimmed_mean', options={share=0.1}}"
    found = federations(options, "variants.other.strategy.name=fedavg", "variants.same.strategy.name=trimmed_mean")
    assert found["other"].strategy.options == found["shared"].strategy.options == {}
    assert found["same"].strategy.options == {"share": 0.1}


def test_a_table_that_is_no_section_is_replaced_as_a_whole() -> None:
    priced = "gate={distribution='bernoulli', reward={price=0.1, cost={fc1=1.0, fc2=2.0}}}"
    found = federations(priced, "variants.v.gate.reward.cost={fc1=3.0}")
    assert found["v"].gate.reward.cost == {"fc1": 3.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["variants.random.gate.samples=2"], "none of pool, shared, random,.*'random'"),
        (["variants.shared.gate.samples=2"], "none of pool, shared.*'shared'"),
        (["variants={'a/b'={}}"], "letters, digits and _ .*'a/b'; rename"),
        (["variants.v.gate.smaples=2"], "in the variant 'v': unknown key 'gate.smaples'; did you mean 'samples'"),
        (["variants.v.gaet.samples=2"], "in the variant 'v': unknown key 'gaet'; did you mean 'gate'"),
        (["variants.v.gate.budget=33"], r"in the variant 'v': .*gate.budget \(33\) cannot exceed pool.rank"),
        (["variants.v.gate=3"], "in the variant 'v': gate"),
        (["variants.v.seed=3"], "seed of a run are the same.*'v'"),
        (["variants.v.name=w", "variants.v.population.name=synthetic"], "name, population of a run"),
        (["variants.v.evaluate.users=3"], "evaluate of a run"),
        (["variants.v.compute.workers=3"], "compute of a run"),
        (["variants.v.variants.w.gate.samples=3"], "variants of a run"),
        (["variants.v.pool.scale=3.0"], "pool.scale of the variant 'v' must be the run's"),
        (["variants.v.pool={start='trained', rank=16}"], "pool.rank of the variant 'v' must be the run's"),
        (["pool.start=trained"], r"it is for variants; set 'fresh', or move it into \[variants.NAME.pool\]"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        federations(*overrides)
    with pytest.raises(ConfigError):
        run(load_config(None, overrides), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_federations_leave_the_same_users_out() -> None:
    config = tiny_config("variants.v.federation.rounds=2", "evaluate.methods=['dsa_t0[pool=v]']")
    population = Worker(config).population
    users = [list(federated_users(population, federation)) for federation in federations_of(config).values()]
    assert all(some == users[0] for some in users)


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ("gate={estimator={name='reinfroce'}}", PluginError, "in the variant 'v': .*'reinfroce'.*'reinforce'"),
        ("gate={reward={quality={name='acuracy'}}}", PluginError, "in the variant 'v': .*'acuracy'.*'accuracy'"),
        ("gate={estimator={name='disarm'}, samples=3}", ConfigError, "in the variant 'v': .*'disarm'.* multiples of 2"),
        ("strategy={name='fedavgg'}", PluginError, "in the variant 'v': .*'fedavgg'.*'fedavg'"),
    ],
)
def test_what_a_variant_cannot_make_is_refused_before_anything_is_trained(
    tmp_path: Path, own: str, error: type[Exception], message: str
) -> None:
    config = tiny_config(f"variants.v={{{own}}}", "evaluate.methods=['dsa_t0[pool=v]']", "gate.distribution=bernoulli")
    with pytest.raises(error, match=message):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "pool").exists()


# -------------------------------------------------------------------------------- a run

METHODS = (
    "dsa_t0", "dsa_t0[pool=own]", "dsa_t0[pool=own,windows=2,budget=1]", "saliency_mask[windows=3]",
    "other_mask[pool=own]", "random_mask[pool=random]", "magnitude_mask[pool=own,budget=4]", "best_mask", "type_mask",
    "dsa_t1[pool=own]", "shared",
)  # fmt: skip


def small(*overrides: str) -> RunConfig:
    own = "{pool={start='trained'}, gate={warmup=0, samples=4}, local={train='nothing'}, federation={rounds=3}}"
    methods = f"evaluate.methods={list(METHODS)}"
    return tiny_config(f"variants.own={own}", "federation.rounds=2", "pool.start=teacher", methods, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(small(), tmp_path_factory.mktemp("variants") / "run")


def final(found: Run, federation: str) -> Values:
    return last_checkpoint(found.folder / federation).tensors["values"]


def without_time(record: Mapping[str, Any]) -> Any:
    """A record without what two equal runs differ in."""
    dropped = ("seconds", "users_per_second", "seconds_per_user", "peak_mib", "object_store_mib", "command")
    if isinstance(record, Mapping):
        return {key: without_time(value) for key, value in record.items() if key not in dropped}
    return record


def test_the_trained_pool_is_where_the_variant_starts_and_its_gate_is_fresh(finished: Run) -> None:
    """It trains the gate alone, so the rows are still there at its end; and the gate has moved from its start."""
    main, own = final(finished, "pool"), final(finished, "own")
    for name in POOLS:
        assert torch.equal(main[name], own[name])
    config = federations_of(small())
    first = Worker(config["own"]).setup(config["own"]).begin().values[GATE_SECTION]
    begun = run(small("variants.own.federation.rounds=0"), finished.folder.parent / "begun")
    assert torch.equal(final(begun, "own")[GATE_SECTION], first)
    assert not torch.equal(own[GATE_SECTION], first)


def test_methods_are_served_what_their_federation_proposes(finished: Run) -> None:
    """Against one direct call for all users, and the loss of the rows that its masks pick."""
    config, evaluation = small(), finished.evaluation
    assert evaluation is not None
    worker, ids = Worker(config), evaluation.user_ids
    setups = {name: worker.setup(federation) for name, federation in federations_of(config).items()}

    def proposed(pool: str, windows: int, budget: int, policy: Policy) -> torch.Tensor:
        values = final(finished, pool)
        known = known_of(setups[pool], values, worker, ids, windows, budget)
        return proposed_mask(setups[pool], known, ids, policy)

    gate = proposed("own", 8, 2, "gate")
    expected = {
        "dsa_t0": proposed("pool", 8, 2, "gate"),
        "dsa_t0[pool=own]": gate,
        "dsa_t0[pool=own,windows=2,budget=1]": proposed("own", 2, 1, "gate"),
        "saliency_mask[windows=3]": proposed("pool", 3, 2, "saliency"),
        "other_mask[pool=own]": gate[np.roll(np.arange(len(ids)), len(ids) // 2)],
        "random_mask[pool=random]": proposed("random", 8, 2, "random"),
        "magnitude_mask[pool=own,budget=4]": proposed("own", 8, 4, "magnitude"),
        "best_mask": worker.population.best_mask(ids),
        "type_mask": worker.population.state_best_mask(ids),
    }
    results = {result.method.name: result for result in evaluation.results}
    test = worker.batch(ids, "test", None, setups["pool"].streams)
    for name, mask_ug in expected.items():
        method = results[name].method
        assert torch.equal(evaluation.masks[method.choice], mask_ug), name
        assert results[name].active_share == pytest.approx(float(mask_ug.float().mean()))
        setup, values = setups[method.source], final(finished, method.source)
        spec = setup.model.spec
        held = mask_ug.view(len(ids), -1, spec.rank, 1)
        rows = {m.section: values[m.section] * held[:, j] for j, m in enumerate(spec.modules)}
        with torch.no_grad(), setup.model.bound(rows):
            loss_u = setup.model.loss(test) / np.log(2)
        np.testing.assert_allclose(results[name].loss_u, loss_u.numpy(), rtol=1e-5, err_msg=name)


def test_the_record_says_what_differs_and_how_each_went(finished: Run) -> None:
    record = finished.record
    assert record["variants"]["own"] == {
        "pool": {"start": "trained"},
        "gate": {"warmup": 0, "samples": 4},
        "local": {"train": "nothing"},
        "federation": {"rounds": 3},
    }
    assert set(record["variants"]) == set(record["federations"]) == {"own", "random", "shared"}
    assert [line["round"] for line in record["history"]] == [1, 2]
    assert [line["round"] for line in record["federations"]["own"]["history"]] == [1, 2, 3]
    assert "reward" in record["federations"]["own"]["history"][0]
    assert "reward" not in record["federations"]["random"]["history"][0]
    assert record["federations"]["own"]["users_per_second"] > 0
    assert list(record["methods"]) == ["base", *METHODS]


def test_masks_are_held_against_the_best_ones(finished: Run) -> None:
    """Against means over users and types counted in a loop."""
    quality, evaluation = finished.record["masks"], finished.evaluation
    assert evaluation is not None
    assert set(quality) == {name for name in METHODS if not name.startswith(("dsa_t1", "shared")) and "own" not in name}
    assert (quality["best_mask"]["f1"], quality["best_mask"]["reward_share"]) == (1, 1)
    assert quality["type_mask"]["f1_of_type"] == 1
    population, ids = Worker(small()).population, evaluation.user_ids
    mask_ug = next(evaluation.masks[r.method.choice] for r in evaluation.results if r.method.name == "dsa_t0")
    best_ug = population.best_mask(ids)
    by_type: dict[int, list[tuple[float, float, float]]] = {}
    for u, kind in enumerate(population.type_of(ids)):
        one = ids[u : u + 1]
        nothing, own, best = (
            float(population.expected_loss(one, mask[None]))
            for mask in (torch.zeros_like(best_ug[u]), mask_ug[u], best_ug[u])
        )
        f1 = 2 * int((mask_ug[u] & best_ug[u]).sum()) / int(mask_ug[u].sum() + best_ug[u].sum())
        by_type.setdefault(int(kind), []).append((f1, nothing - own, nothing - best))
    assert set(quality["dsa_t0"]["by_type"]) == {str(kind) for kind in by_type}
    everyone = [figures for some in by_type.values() for figures in some]
    entries = [(quality["dsa_t0"], everyone)]
    entries += [(quality["dsa_t0"]["by_type"][str(kind)], some) for kind, some in by_type.items()]
    for entry, some in entries:
        f1, saved, most = np.mean(some, axis=0)
        assert entry["f1"] == pytest.approx(f1, abs=1e-6)
        assert entry["reward_share"] == pytest.approx(saved / most, abs=1e-5)


def test_a_run_that_stopped_in_a_variant_ends_the_same(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federate = runs.federate

    def stopping(setup: Any, workers: Any, users: Any, folder: Path, *rest: Any) -> Any:
        if folder.name == "random":
            raise KeyboardInterrupt
        return federate(setup, workers, users, folder, *rest)

    monkeypatch.setattr(runs, "federate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path / "run")
    assert (tmp_path / "run" / "own").is_dir()
    assert not (tmp_path / "run" / "random").exists()
    monkeypatch.undo()
    again = run(small(), tmp_path / "run", resume=True)
    assert without_time(again.record) == without_time(finished.record)


def test_new_users_are_served_again_by_the_variants_there_are(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(small("evaluate.methods=['dsa_t0', 'dsa_t0[pool=own]']"), folder)
    again = reevaluate(folder, ["evaluate.methods=['dsa_t0[pool=own,windows=2,budget=1]']"])
    name = "dsa_t0[pool=own,windows=2,budget=1]"
    assert again.record["methods"][name]["loss"] == finished.record["methods"][name]["loss"]
    assert json.loads((folder / "evaluation.json").read_text())["loss"].keys() == {"base", name}
    with pytest.raises(RunError, match="2 rounds of the federation 'random'"):
        reevaluate(folder, ["evaluate.methods=['random_mask[pool=random]']"])


@pytest.mark.parametrize("name", ["type_mask", "informed_mask"])
def test_best_masks_need_a_population_that_knows_them(name: str) -> None:
    nobody = cast(Population, SimpleNamespace(name="letters"))
    with pytest.raises(ConfigError, match=f"'{name}' needs a population with known best masks, 'letters' has none"):
        check_methods(methods_of(tiny_config(f"evaluate.methods=['{name}']")), nobody, {})


def test_best_masks_need_the_teachers_shape_before_anything_is_trained(tmp_path: Path) -> None:
    config = tiny_config("evaluate.methods=['best_mask']", "pool={rank=6, start='teacher'}")
    with pytest.raises(ConfigError, match="best masks are of 16 units, the pool of 'pool' has 12"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "pool").exists()


@pytest.mark.parametrize(
    ("overrides", "pool", "expected"),
    [
        (["pool.start=teacher"], "pool", True),
        (["pool.start=teacher"], "random", True),
        (["pool.start=teacher"], "shared", False),
        ([], "pool", False),
        (["variants.v.pool.start=teacher"], "v", True),
        (["pool.start=teacher", "variants.v.pool.start=fresh"], "v", False),
        (["pool.start=teacher", "variants.v.pool.start=trained"], "v", False),
        (["pool.start=teacher", "local.train=nothing", "variants.v.pool.start=trained"], "v", True),
        (["local.train=nothing", "variants.v.pool.start=trained"], "v", False),
    ],
)
def test_masks_are_of_the_teachers_units_where_the_pool_begins_as_the_teachers(
    overrides: list[str], pool: str, expected: bool
) -> None:
    found = federations(*overrides)
    assert begins_as_the_teachers(found, pool) == expected


@pytest.mark.parametrize("name", ["best_mask", "type_mask", "informed_mask"])
def test_best_masks_of_other_units_are_refused(tmp_path: Path, name: str) -> None:
    options = "{train_users=60, new_users=20, widths=[8, 8, 8], rank=8, budget=2, kind='additive'}"
    config = tiny_config(f"population.options={options}", f"evaluate.methods=['{name}']")
    with pytest.raises(ConfigError, match=r"the teacher's units, the pool of 'pool' has units of its own.*= 'teacher'"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / "pool").exists()


def test_only_a_run_has_a_trained_pool_to_start_from() -> None:
    config = tiny_config("pool.start=trained")
    with pytest.raises(ConfigError, match=r"for variants of a run.*set 'fresh'"):
        first_pool(config, Worker(tiny_config()).population)


def test_units_in_use_are_those_of_the_main_federations_own_choice(finished: Run) -> None:
    table, evaluation = json.loads((finished.folder / "evaluation.json").read_text()), finished.evaluation
    assert evaluation is not None
    (mask_ug,) = (evaluation.masks[r.method.choice] for r in evaluation.results if r.method.name == "dsa_t0")
    assert table["units_in_use"] == pytest.approx(mask_ug.float().mean(0).tolist())
