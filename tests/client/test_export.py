"""Exported adapters in stock PEFT, on a fresh copy of the base, against the bound rows they came from."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from client.export import export_lora, lora_adapter
from federation.base import BaseModel, frozen
from federation.errors import ConfigError, PoolError, RunError
from federation.pool.model import PooledModel
from tests import models

SCALE = 1.7
LAYOUTS = ["universal", "pattern"]
BASES = [models.gpt2, models.llama, models.bert, models.mlp]


class Lookalikes(nn.ModuleDict):
    """Layers whose names end in, or match as regular expressions, one another's."""

    NAMES = ("a.b", "aXb", "deep.a.b", "deep.aXb")

    def forward(self, x):
        for name in self.NAMES:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def lookalikes():
    torch.manual_seed(0)

    def level():
        return {"a": nn.ModuleDict({"b": nn.Linear(5, 5)}), "aXb": nn.Linear(5, 5)}

    module = Lookalikes(level() | {"deep": nn.ModuleDict(level())})
    return BaseModel(frozen(module), lambda m, x, y: m(x).mean(1), lambda m, x: x, 5, ("b", "aXb"), "lookalikes")


def user_rows(model, ranks, seed=3):
    """One user's rows with `ranks[j]` active units in module j; cycled."""
    generator = torch.Generator().manual_seed(seed)
    counts = [ranks[j % len(ranks)] for j in range(len(model.spec.modules))]
    return {
        m.section: 0.5 * torch.randn(k, m.width, generator=generator)
        for m, k in zip(model.spec.modules, counts, strict=True)
    }


def outputs(module, base):
    inputs = models.batch_for(base, 1, 4).inputs[0] if base.name != "lookalikes" else torch.eye(5)
    with torch.no_grad():
        result = module(inputs)
    return getattr(result, "logits", result)


def bound_outputs(model, rows):
    with model.bound({section: row[None] for section, row in rows.items()}):
        return outputs(model.base.module, model.base)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [(2, 0, 3), (2, 3, 0, 0), (1,), (0, 9)], ids=str)
@pytest.mark.parametrize("make", [*BASES, lookalikes])
def test_stock_peft_computes_what_the_bound_rows_do(make, ranks, layout, tmp_path):
    model = PooledModel.around(make(), rank=12, scale=SCALE)
    rows = user_rows(model, ranks)
    expected = bound_outputs(model, rows)
    export_lora(model, rows, tmp_path / "adapter", layout, "some/base")
    fresh = make()
    unadapted = outputs(fresh.module, fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing from the file
        loaded = PeftModel.from_pretrained(fresh.module, tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded, fresh), expected, rtol=0, atol=1e-5)
    assert (expected - unadapted).abs().max() > 1e-2
    adapted = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    active = {m.name for m in model.spec.modules if layout == "universal" or len(rows[m.section])}
    assert adapted == active
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, fresh), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_the_universal_layout_is_right_however_an_engine_scales(make, tmp_path):
    """Both alpha / r of the configuration and alpha / rank of a tensor give every module's s * up^T down."""
    model = PooledModel.around(make(), rank=12, scale=SCALE)
    rows = user_rows(model, (9, 0, 2))
    export_lora(model, rows, tmp_path / "adapter", "universal", None)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for m in model.spec.modules:
        a, b = (tensors.pop(f"base_model.model.{m.name}.lora_{factor}.weight") for factor in "AB")
        down, up = rows[m.section][:, : m.d_in], rows[m.section][:, m.d_in :]
        for alpha_over_r in (config["lora_alpha"] / config["r"], config["lora_alpha"] / len(a)):
            torch.testing.assert_close(alpha_over_r * b @ a, SCALE * up.T @ down)
    assert not tensors


@pytest.mark.parametrize(("units", "rank"), [(1, 8), (8, 8), (9, 16), (129, 256), (256, 256)])
def test_the_universal_rank_is_the_next_that_engines_accept(units, rank):
    model = PooledModel.around(models.mlp(), rank=300, scale=SCALE)
    adapter = lora_adapter(model, user_rows(model, (0, units)), "universal", None)
    assert adapter.config.r == rank
    assert {len(tensor) for name, tensor in adapter.tensors.items() if "lora_A" in name} == {rank}


def test_more_units_than_engines_accept_still_fit_peft():
    model = PooledModel.around(models.mlp(), rank=300, scale=SCALE)
    rows = user_rows(model, (257, 0))
    with pytest.raises(PoolError, match="at most 256 units per module, got 257"):
        lora_adapter(model, rows, "universal", None)
    assert lora_adapter(model, rows, "pattern", None).config.r == 257


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("make", "task", "conv1d"),
    [(models.gpt2, "CAUSAL_LM", True), (models.llama, "CAUSAL_LM", False), (models.mlp, None, False)],
)
def test_the_folder_holds_what_other_tools_read(make, task, conv1d, layout, tmp_path):
    model = PooledModel.around(make(), rank=4, scale=SCALE)
    export_lora(model, user_rows(model, (2, 0)), tmp_path / "adapter", layout, "some/base")
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == "some/base"
    assert (config.task_type, config.fan_in_fan_out) == (task, conv1d)
    modules = {name.split(".lora_")[0] for name in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    everything = {f"base_model.model.{m.name}" for m in model.spec.modules}
    assert modules == everything if layout == "universal" else modules < everything


def test_bad_input_is_named_and_writes_nothing(tmp_path):
    model = PooledModel.around(models.gpt2(), rank=4, scale=SCALE)
    rows, out = user_rows(model, (2, 0)), tmp_path / "adapter"
    with pytest.raises(ConfigError, match="did you mean 'universal'"):
        export_lora(model, rows, out, "univresal", None)
    with pytest.raises(PoolError, match="serve the base"):
        export_lora(model, user_rows(model, (0,)), out, "pattern", None)
    for wrong in ({}, {s: r[:, :-1] for s, r in rows.items()}, {s: r[None] for s, r in rows.items()}):
        with pytest.raises(PoolError, match="another pool"):
            export_lora(model, wrong, out, "pattern", None)
    with pytest.raises(PoolError, match="finite"):
        export_lora(model, {s: r / 0 for s, r in rows.items()}, out, "pattern", None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_stays_as_it_is(tmp_path):
    model = PooledModel.around(models.gpt2(), rank=4, scale=SCALE)
    rows = user_rows(model, (2,))
    taken, empty, file = tmp_path / "taken", tmp_path / "empty", tmp_path / "file"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    file.write_text("too")
    empty.mkdir()
    for out in (taken, file):
        with pytest.raises(RunError, match="new or empty folder"):
            export_lora(model, rows, out, "pattern", None)
    assert (taken / "thesis.tex").read_text() == "years of work"
    export_lora(model, rows, empty, "pattern", None)
    export_lora(model, rows, tmp_path / "new/parents/adapter", "pattern", None)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    model = PooledModel.around(models.gpt2(), rank=4, scale=SCALE)
    with pytest.raises(RunError, match="No space left on device"):
        export_lora(model, user_rows(model, (2,)), tmp_path / "adapter", "universal", None)
    assert list(tmp_path.iterdir()) == []
