"""Checkpoints: what is loaded is what was saved, or it is refused, wherever a bit flips or a process dies."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation.errors import CheckpointError
from server.checkpoint import Checkpoint, checksum, load, load_latest, rounds, save
from tests.child import exit_code

Tensors = dict[str, dict[str, Tensor]]


def state(round_index: int) -> tuple[Tensors, dict[str, Any]]:
    generator = torch.Generator().manual_seed(round_index)
    tensors = {
        "pool": {
            "pool/z": torch.randn(4, 3, generator=generator),
            "pool/a": torch.randn(2, 2, generator=generator),
        },
        "optimizer": {"step": torch.tensor(round_index), "seen": torch.tensor([True, False])},
    }
    return tensors, {"seed": 7, "ledger": ["a", {"b": [1.5, None]}], "name": "größer"}


def save_round(folder: Path, round_index: int) -> Path:
    return save(folder, round_index, *state(round_index))


def assert_is_round(checkpoint: Checkpoint, round_index: int) -> None:
    tensors, meta = state(round_index)
    assert checkpoint.round_index == round_index
    assert checkpoint.meta == meta
    assert [*checkpoint.tensors] == [*tensors]
    for part, by_name in tensors.items():
        assert [*checkpoint.tensors[part]] == [*by_name]
        assert all(torch.equal(checkpoint.tensors[part][name], by_name[name]) for name in by_name)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -------------------------------------------------------------------------------- contract


def test_what_is_loaded_is_what_was_saved_in_its_order(tmp_path: Path) -> None:
    path = save_round(tmp_path, 123)
    assert path == tmp_path / "round-000123"
    assert names(path) == ["manifest.json", "optimizer.safetensors", "pool.safetensors"]
    assert_is_round(load(path), 123)
    assert_is_round(load_latest(tmp_path), 123)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    tensors = {
        "part": {"turned": base.T, "view": base[1:], "empty": base[:0], "scalar": base[2, 3]},
        "none": {},
    }
    loaded = load(save(tmp_path, 0, tensors, {})).tensors
    assert loaded["none"] == {}
    for name, tensor in tensors["part"].items():
        assert loaded["part"][name].dtype == dtype
        assert torch.equal(loaded["part"][name], tensor)


def test_numbers_that_are_not_finite_and_negative_zero_come_back(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0])
    loaded = load(save(tmp_path, 0, {"part": {"odd": odd}}, {})).tensors["part"]["odd"]
    assert torch.equal(loaded.view(torch.int32), odd.view(torch.int32))


def test_the_manifest_holds_the_checksums_of_the_files(tmp_path: Path) -> None:
    path = save_round(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    for part, entry in manifest["parts"].items():
        content = (path / f"{part}.safetensors").read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)


@pytest.mark.parametrize("meta", [{"a": float("nan")}, {"a": (1, 2)}, {1: "a"}, {"a": torch.zeros(1)}, {"a": b"x"}])
def test_meta_that_json_would_change_is_refused(tmp_path: Path, meta: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="meta must"):
        save(tmp_path, 1, {}, meta)
    assert names(tmp_path) == []


@pytest.mark.parametrize("part", ["", "../x", "a/b", "A", ".a"])
def test_a_part_that_is_no_file_name_is_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(CheckpointError, match="part's name"):
        save(tmp_path, 1, {part: {}}, {})
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------- checksum


def test_the_checksum_depends_on_the_state_alone(tmp_path: Path) -> None:
    tensors, meta = state(3)
    first = checksum(load(save(tmp_path / "a", 3, tensors, meta)))
    turned = {part: dict(reversed(by_name.items())) for part, by_name in reversed(tensors.items())}
    assert checksum(load(save(tmp_path / "b", 3, turned, dict(reversed(meta.items()))))) == first
    assert checksum(Checkpoint(3, tensors, meta)) == first


def test_the_checksum_changes_with_every_part_of_the_state() -> None:
    def one(tensor: Tensor) -> Tensors:
        return {"pool": {"a": tensor}}

    base = Checkpoint(3, one(torch.tensor([0.0, 1.0])), {"seed": 7})
    others = [
        replace(base, round_index=4),
        replace(base, meta={"seed": 8}),
        replace(base, tensors=one(torch.tensor([-0.0, 1.0]))),
        replace(base, tensors=one(torch.tensor([[0.0, 1.0]]))),
        replace(base, tensors=one(torch.tensor([0.0, 1.0]).view(torch.int32))),
        replace(base, tensors={"pool": {"b": torch.tensor([0.0, 1.0])}}),
        replace(base, tensors={"gate": {"a": torch.tensor([0.0, 1.0])}}),
        replace(base, tensors={**base.tensors, "gate": {}}),
    ]
    assert len({checksum(checkpoint) for checkpoint in [base, *others]}) == len(others) + 1


# -------------------------------------------------------------------------------- what is kept


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for round_index in (0, 2, 9, 10, 999_999, 1_000_000):
        save(tmp_path, round_index, *state(round_index), keep=4)
    assert rounds(tmp_path) == (9, 10, 999_999, 1_000_000)
    assert_is_round(load_latest(tmp_path), 1_000_000)
    with pytest.raises(CheckpointError, match="keep=2"):
        save(tmp_path, 1_000_001, {}, {}, keep=2)


def test_a_resume_from_an_older_round_gives_up_the_later_ones(tmp_path: Path) -> None:
    for round_index in (1, 2, 3):
        save_round(tmp_path, round_index)
    save(tmp_path, 2, {"pool": {"x": torch.ones(1)}}, {})
    assert rounds(tmp_path) == (1, 2)
    assert load_latest(tmp_path).tensors["pool"]["x"] == 1
    assert_is_round(load(tmp_path / "round-000001"), 1)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert rounds(tmp_path / "absent") == ()
    with pytest.raises(CheckpointError, match="there is none"):
        load_latest(tmp_path / "absent")


# -------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("file", ["manifest.json", "pool.safetensors", "optimizer.safetensors"])
def test_every_flipped_bit_and_every_cut_is_refused(tmp_path: Path, file: str) -> None:
    path = save_round(tmp_path, 1)
    content = (path / file).read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        (path / file).write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"round-000001 is damaged: (manifest.json|part)"):
            load(path)
    for length_changed in (b"", content[:8], content[: len(content) // 2], content[:-1], content + b"\n"):
        (path / file).write_bytes(length_changed)
        with pytest.raises(CheckpointError, match=r"round-000001 is damaged: (manifest.json|part)"):
            load(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=f"damaged: {file} cannot be read"):
        load(path)
    (path / file).write_bytes(content)
    assert_is_round(load(path), 1)


def test_parts_of_another_checkpoint_or_a_renamed_folder_are_refused(tmp_path: Path) -> None:
    first, second = save_round(tmp_path, 1), save_round(tmp_path, 2)
    shutil.copy(first / "pool.safetensors", second / "pool.safetensors")
    with pytest.raises(CheckpointError, match="part 'pool' does not match"):
        load(second)
    first.rename(tmp_path / "round-000007")
    with pytest.raises(CheckpointError, match="is of round 1"):
        load(tmp_path / "round-000007")


def test_another_version_or_form_is_refused_though_its_checksum_is_right(tmp_path: Path) -> None:
    path = save_round(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())

    def forge(**changes: Any) -> None:
        body = {key: value for key, value in (manifest | changes).items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps({**body, "sha256": digest}, indent=1))

    forge()
    assert_is_round(load(path), 1)
    for changes, message in (
        ({"version": 2}, "needs 'fedquilt checkpoint' 1"),
        ({"parts": {"../../secret": manifest["parts"]["pool"]}}, "part's name"),
        ({"parts": {"pool": {}}}, "not of the form"),
        ({"parts": {"pool": manifest["parts"]["pool"] | {"tensors": ["x"]}}}, "not of the form"),
    ):
        forge(**changes)
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for round_index in (1, 2, 3):
        save_round(tmp_path, round_index)
    (tmp_path / "round-000003" / "pool.safetensors").unlink()
    (tmp_path / "round-000002" / "manifest.json").write_text("{")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.ERROR):
        warnings.simplefilter("always")
        assert_is_round(load_latest(tmp_path), 1)
    for said in ([str(warning.message) for warning in caught], caplog.messages):
        assert len(said) == 2
        assert "round-000003" in said[0]
        assert "pool.safetensors" in said[0]
        assert "round-000002" in said[1]
        assert "manifest.json" in said[1]
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_when_none_is_usable_all_are_named(tmp_path: Path) -> None:
    for round_index in (1, 2):
        (save_round(tmp_path, round_index) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"round-000002.*round-000001.*restore"):
        load_latest(tmp_path)


# -------------------------------------------------------------------------------- kills, full disks


def _dying_save(folder: Path, step: int) -> Callable[[], None]:
    """Save round 5 over 2..5 and be gone, as if by SIGKILL, before the step-th flush, rename or removal."""

    def run() -> None:
        steps_left = step

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal steps_left
                steps_left -= 1
                if steps_left == 0:
                    os._exit(9)
                return original(*arguments, **options)

            return call

        os.fsync, Path.rename, os.unlink = counted(os.fsync), counted(Path.rename), counted(os.unlink)
        save(folder, 5, *state(50))

    return run


def test_a_save_killed_at_any_step_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    step, ended, seen = 1, False, set()
    while not ended:
        folder = tmp_path / str(step)
        for round_index in (2, 3, 4, 5):
            save(folder, round_index, *state(round_index), keep=4)
        ended = exit_code(_dying_save(folder, step)) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_latest(folder)
        seed = 50 if checksum(found) == checksum(Checkpoint(5, *state(50))) else found.round_index
        assert checksum(found) == checksum(Checkpoint(found.round_index, *state(seed)))
        seen.add(seed)
        save_round(folder, 6)
        assert names(folder) == [f"round-{kept:06d}" for kept in rounds(folder)]
        assert len(rounds(folder)) == 3
        step += 1
    assert seen == {4, 5, 50}  # 4: between the renames that replace round 5
    assert step > 10


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    save_round(tmp_path, 1)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
        with pytest.raises(CheckpointError, match=r"round-000002 cannot be written .* free space"):
            save(tmp_path, 2, {"pool": {"x": torch.zeros(5000)}}, {})

    assert exit_code(child) == 0
    assert names(tmp_path) == ["round-000001"]
    assert_is_round(load_latest(tmp_path), 1)
