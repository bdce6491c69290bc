"""Admission against a slow judge that looks at one user at a time, with damage anywhere in the block."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from federation.errors import PoolError
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock, admit

USERS, SLOTS = 5, 4
SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 2, "up": 3}, max_rows=3),
        "pool/b": SectionSpec(rows=4, factors={"down": 3, "up": 1}, max_rows=3),
        "gate": SectionSpec(rows=1, factors={"phi": 7}, max_rows=1),
    }
)
NAN, INF = math.nan, math.inf


def block_of(users: int = USERS, seed: int = 0) -> UpdateBlock:
    """Well-formed updates in four slots per section, of which the last ones are padding full of garbage."""
    generator = torch.Generator().manual_seed(seed)
    sections = {}
    for name, spec in SCHEMA.sections.items():
        ids = torch.stack([torch.randperm(max(spec.rows, SLOTS), generator=generator)[:SLOTS] for _ in range(users)])
        used = torch.randint(0, spec.max_rows + 1, (users, 1), generator=generator)
        valid = torch.arange(SLOTS) < used
        ids = torch.where(valid, ids % spec.rows, -77).int()
        rows = torch.randn(users, SLOTS, spec.width, generator=generator).masked_fill(~valid[..., None], NAN)
        sections[name] = Section(ids, valid, rows)
    metrics = {"reward": torch.randn(users, generator=generator)}
    return UpdateBlock(sections, 0.5 + torch.rand(users, generator=generator), metrics, 3, "r2-00")


def with_section(block: UpdateBlock, name: str, **tensors: Tensor) -> UpdateBlock:
    changed = replace(block.sections[name], **tensors)
    return replace(block, sections={**block.sections, name: changed})


def assert_equal(a: UpdateBlock, b: UpdateBlock) -> None:
    """Equal, bit for bit."""
    assert set(a.sections) == set(b.sections)
    for name in a.sections:
        for tensor in ("ids_uk", "valid_uk", "rows_ukw"):
            assert torch.equal(getattr(a.sections[name], tensor), getattr(b.sections[name], tensor))
    assert torch.equal(a.weight_u, b.weight_u)
    assert set(a.metrics) == set(b.metrics)
    assert all(torch.equal(a.metrics[name], b.metrics[name]) for name in a.metrics)
    assert (a.round_index, a.pool_version) == (b.round_index, b.pool_version)


def test_what_is_well_formed_comes_through_and_its_padding_is_zero() -> None:
    block = block_of()
    admitted, rejections = admit(block, SCHEMA, Limits(max_weight=10.0))
    assert len(rejections) == 0
    assert torch.equal(admitted.weight_u, block.weight_u)
    for name, section in block.sections.items():
        kept = admitted.sections[name]
        assert torch.equal(kept.rows_ukw[section.valid_uk], section.rows_ukw[section.valid_uk])
        assert not kept.rows_ukw[~section.valid_uk].any()


# -------------------------------------------------------------------------------- one bad user


def use(block: UpdateBlock, u: int, name: str, ids: list[int]) -> UpdateBlock:
    """User u sends these rows of a section, all ones."""
    section = block.sections[name]
    new_ids, new_valid, new_rows = section.ids_uk.clone(), section.valid_uk.clone(), section.rows_ukw.clone()
    new_ids[u, : len(ids)], new_valid[u] = torch.tensor(ids, dtype=torch.int32), torch.arange(SLOTS) < len(ids)
    new_rows[u, : len(ids)] = 1.0
    return with_section(block, name, ids_uk=new_ids, valid_uk=new_valid, rows_ukw=new_rows)


def put(block: UpdateBlock, u: int, name: str, value: float) -> UpdateBlock:
    """User u sends one row with one odd number in it."""
    changed = use(block, u, name, [0])
    rows = changed.sections[name].rows_ukw.clone()
    rows[u, 0, -1] = value
    return with_section(changed, name, rows_ukw=rows)


def weigh(block: UpdateBlock, u: int, weight: float) -> UpdateBlock:
    weight_u = block.weight_u.clone()
    weight_u[u] = weight
    return replace(block, weight_u=weight_u)


def tell(block: UpdateBlock, u: int, value: float) -> UpdateBlock:
    reward_u = block.metrics["reward"].clone()
    reward_u[u] = value
    return replace(block, metrics={"reward": reward_u})


@dataclass(frozen=True)
class Damage:
    """What one user does wrong, and the words that the reason must hold."""

    make: Callable[[UpdateBlock, int], UpdateBlock]
    reason: str


DAMAGES = {
    "id below": Damage(lambda b, u: use(b, u, "pool/a", [-1]), "'pool/a': a row id outside 0..5"),
    "id above": Damage(lambda b, u: use(b, u, "pool/b", [0, 4]), "'pool/b': a row id outside 0..3"),
    "id far above": Damage(lambda b, u: use(b, u, "gate", [2**31 - 1]), "'gate': a row id outside 0..0"),
    "id twice": Damage(lambda b, u: use(b, u, "pool/a", [2, 5, 2]), "'pool/a': a row id sent twice"),
    "too many rows": Damage(lambda b, u: use(b, u, "pool/a", [0, 1, 2, 3]), "'pool/a': more than 3 rows"),
    "absurd norm": Damage(lambda b, u: put(b, u, "gate", 501.0), "'gate': a norm above 1000 times the largest"),
    "absurd norm of two": Damage(
        lambda b, u: put(put(b, u, "pool/a", 1e3), u, "pool/b", -1.2e3), "'pool': a norm above"
    ),
    "absurd and beyond float32": Damage(lambda b, u: put(b, u, "pool/a", 3e38), "'pool': a norm above 1000 times"),
    "NaN": Damage(lambda b, u: put(b, u, "pool/b", NAN), "'pool/b': a number that is not finite"),
    "inf": Damage(lambda b, u: put(b, u, "gate", INF), "'gate': a number that is not finite"),
    "-inf": Damage(lambda b, u: put(b, u, "pool/a", -INF), "'pool/a': a number that is not finite"),
    "negative weight": Damage(lambda b, u: weigh(b, u, -1e-3), "weight must be finite and not negative"),
    "NaN weight": Damage(lambda b, u: weigh(b, u, NAN), "weight must be finite and not negative"),
    "infinite weight": Damage(lambda b, u: weigh(b, u, INF), "weight must be finite and not negative"),
    "NaN metric": Damage(lambda b, u: tell(b, u, NAN), "metric 'reward' must be finite"),
    "infinite metric": Damage(lambda b, u: tell(b, u, -INF), "metric 'reward' must be finite"),
}
LIMITS = Limits({"pool": 1.5, "gate": 0.5}, max_weight=0.8)


@pytest.mark.parametrize("position", [0, USERS // 2, USERS - 1])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_user_is_refused_and_the_others_come_through_bit_for_bit(damage: Damage, position: int) -> None:
    block = block_of()
    admitted, rejections = admit(damage.make(block, position), SCHEMA, LIMITS)
    assert list(rejections.reasons) == [position]
    assert damage.reason in rejections.reasons[position]
    others = torch.tensor([u for u in range(USERS) if u != position])
    assert_equal(admitted, admit(block.take(others), SCHEMA, LIMITS)[0])


def norm(block: UpdateBlock, u: int, prefix: str) -> float:
    """A user's norm over the sections of a prefix, without padding, in plain Python."""
    total = 0.0
    for name, section in block.sections.items():
        if name.split("/")[0] == prefix:
            total += sum(v * v for v in section.rows_ukw[u][section.valid_uk[u]].flatten().tolist())
    return math.sqrt(total)


def acceptable(block: UpdateBlock, u: int) -> bool:
    """The rules, for one user, in plain Python."""
    for name, spec in SCHEMA.sections.items():
        section = block.sections[name]
        sent = [k for k in range(SLOTS) if section.valid_uk[u, k]]
        ids = [int(section.ids_uk[u, k]) for k in sent]
        if len(ids) > spec.max_rows or len(set(ids)) < len(ids) or any(not 0 <= i < spec.rows for i in ids):
            return False
        if not all(math.isfinite(value) for k in sent for value in section.rows_ukw[u, k].tolist()):
            return False
    if any(norm(block, u, prefix) > 1000 * bound for prefix, bound in LIMITS.max_norm.items()):
        return False
    weight = float(block.weight_u[u])
    return math.isfinite(weight) and weight >= 0 and all(math.isfinite(float(m[u])) for m in block.metrics.values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rarity=st.sampled_from([40, 400]))
def test_random_damage_is_judged_user_by_user(seed: int, rarity: int) -> None:
    """Bit patterns in place of numbers, ids around the range, flags at random, each in one of `rarity` places."""
    generator = np.random.default_rng(seed)

    def damaged(tensor: Tensor, values: np.ndarray) -> Tensor:
        hit = torch.from_numpy(generator.integers(0, rarity, tensor.shape) == 0)
        return torch.where(hit, torch.from_numpy(values), tensor)

    def any_float(shape: torch.Size) -> np.ndarray:
        return generator.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)

    block = block_of(12)
    for name, section in block.sections.items():
        block = with_section(
            block,
            name,
            ids_uk=damaged(section.ids_uk, generator.integers(-2, 8, section.ids_uk.shape, dtype=np.int32)),
            valid_uk=damaged(section.valid_uk, generator.integers(0, 2, section.valid_uk.shape).astype(bool)),
            rows_ukw=damaged(section.rows_ukw, any_float(section.rows_ukw.shape)),
        )
    block = replace(block, weight_u=damaged(block.weight_u, any_float(block.weight_u.shape)))
    good = [u for u in range(12) if acceptable(block, u)]
    admitted, rejections = admit(block, SCHEMA, LIMITS)
    assert sorted(rejections.reasons) == [u for u in range(12) if u not in good]
    for place, u in enumerate(good):
        alone, none = admit(block.take(slice(u, u + 1)), SCHEMA, LIMITS)  # type: ignore[arg-type]
        assert not none.reasons
        assert_equal(admitted.take(slice(place, place + 1)), alone)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- a block that cannot be read

STRUCTURES: dict[str, tuple[Callable[[UpdateBlock], UpdateBlock], str]] = {
    "section missing": (
        lambda b: replace(b, sections={n: s for n, s in b.sections.items() if n != "gate"}),
        r"missing or unknown: \['gate'\]",
    ),
    "section unknown": (
        lambda b: replace(b, sections={**b.sections, "pool/c": b.sections["pool/a"]}),
        r"missing or unknown: \['pool/c'\]",
    ),
    "width": (
        lambda b: with_section(b, "pool/a", rows_ukw=b.sections["pool/a"].rows_ukw[..., :-1]),
        "'pool/a' must have shapes",
    ),
    "ids flat": (
        lambda b: with_section(b, "pool/a", ids_uk=b.sections["pool/a"].ids_uk.flatten()),
        "'pool/a' must have shapes",
    ),
    "another number of users": (
        lambda b: with_section(b, "gate", valid_uk=b.sections["gate"].valid_uk[:-1]),
        "'gate' must have shapes",
    ),
    "slots differ": (
        lambda b: with_section(b, "pool/b", valid_uk=b.sections["pool/b"].valid_uk[:, :-1]),
        "'pool/b' must have shapes",
    ),
    "rows float64": (
        lambda b: with_section(b, "pool/b", rows_ukw=b.sections["pool/b"].rows_ukw.double()),
        "'pool/b' must be int32, bool, float32",
    ),
    "ids int64": (
        lambda b: with_section(b, "pool/b", ids_uk=b.sections["pool/b"].ids_uk.long()),
        "'pool/b' must be int32, bool, float32",
    ),
    "valid uint8": (
        lambda b: with_section(b, "gate", valid_uk=b.sections["gate"].valid_uk.byte()),
        "'gate' must be int32, bool, float32",
    ),
    "weight float64": (lambda b: replace(b, weight_u=b.weight_u.double()), "weight must be"),
    "weight by row": (lambda b: replace(b, weight_u=b.weight_u[:, None]), "weight must be"),
    "a scalar metric": (lambda b: replace(b, metrics={"reward": torch.tensor(1.0)}), "metric 'reward' must have shape"),
    "a short metric": (lambda b: replace(b, metrics={"reward": torch.ones(2)}), "metric 'reward' must have shape"),
}


@pytest.mark.parametrize(("break_it", "reason"), STRUCTURES.values(), ids=STRUCTURES)
def test_a_block_of_the_wrong_form_is_refused_whole(
    break_it: Callable[[UpdateBlock], UpdateBlock], reason: str
) -> None:
    admitted, rejections = admit(break_it(block_of()), SCHEMA, LIMITS)
    assert sorted(rejections.reasons) == list(range(USERS))
    assert len(admitted.weight_u) == 0
    assert all(re.search(reason, given) for given in rejections.reasons.values())
    assert admit(admitted, SCHEMA, LIMITS)[1].reasons == {}  # nobody is a well-formed block


# -------------------------------------------------------------------------------- limits


def test_the_sections_of_a_prefix_are_clipped_together() -> None:
    block = block_of(30)
    limits = Limits({"pool": 2.0}, max_weight=10.0)
    admitted, _ = admit(block, SCHEMA, limits)
    norms = [norm(block, u, "pool") for u in range(30)]
    assert min(norms) < 2.0 < max(norms)
    for u, size in enumerate(norms):
        factor = min(1.0, 2.0 / size) if size else 1.0
        for name, section in block.sections.items():
            valid = section.valid_uk[u]
            expected = section.rows_ukw[u][valid] * (factor if name != "gate" else 1.0)
            torch.testing.assert_close(admitted.sections[name].rows_ukw[u][valid], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-30])
def test_a_norm_of_zero_and_tiny_ones_are_left_alone(value: float) -> None:
    block = use(block_of(), 1, "pool/a", [0, 1])
    rows = {name: torch.full_like(section.rows_ukw, value) for name, section in block.sections.items()}
    for name in rows:
        block = with_section(block, name, rows_ukw=rows[name])
    admitted, rejections = admit(block, SCHEMA, Limits({"pool": 1.0, "gate": 1e-9}))
    assert not rejections.reasons
    for name, section in admitted.sections.items():
        assert torch.equal(section.rows_ukw, rows[name].masked_fill(~section.valid_uk[..., None], 0.0))


def test_a_huge_update_counts_as_its_direction_at_the_bound() -> None:
    largest = torch.finfo(torch.float32).max
    block = use(block_of(), 1, "pool/a", [0, 1])
    rows = block.sections["pool/a"].rows_ukw.clone()
    rows[1] = largest
    admitted, rejections = admit(
        with_section(block, "pool/a", rows_ukw=rows), SCHEMA, Limits({"pool": 3.0}, absurd=INF)
    )
    assert not rejections.reasons
    assert norm(admitted, 1, "pool") == pytest.approx(3.0, rel=1e-6)


def test_a_norm_at_the_absurd_bound_is_clipped_and_the_next_one_refused() -> None:
    block = block_of(2)
    rows = torch.zeros(2, SLOTS, 7)
    rows[0, 0, 3], rows[1, 0, 3] = 2.0, np.nextafter(np.float32(2.0), np.float32(3.0)).item()
    gate = Section(torch.zeros(2, SLOTS).int(), torch.arange(SLOTS).expand(2, SLOTS) < 1, rows)
    block = replace(block, sections={**block.sections, "gate": gate})
    admitted, rejections = admit(block, SCHEMA, Limits({"gate": 0.25}, absurd=8.0))
    assert list(rejections.reasons) == [1]
    assert torch.equal(admitted.sections["gate"].rows_ukw, rows[:1] / 8)


def test_without_a_largest_norm_none_is_absurd() -> None:
    _, rejections = admit(put(block_of(), 1, "gate", 1e30), SCHEMA, Limits({"pool": 1.5}))
    assert not rejections.reasons


def test_reasons_hold_nothing_of_the_user() -> None:
    """Whatever the numbers are, users with the same fault are given the same words."""
    for first, second in ((1e4, -3e38), (NAN, INF)):
        one, other = (admit(put(block_of(), 1, "pool/a", value), SCHEMA, LIMITS)[1] for value in (first, second))
        assert one.reasons == other.reasons != {}


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_padding_does_not_change_a_bit_of_a_norm(gap: int) -> None:
    """Norms added row by row, with padding before each row, meet a bound that is exactly theirs, and no lower one."""
    users, rows = 30, 60
    generator = torch.Generator().manual_seed(3)
    schema = Schema({"pool/a": SectionSpec(rows, {"down": 5}, (1 + gap) * rows)})
    size_uk = torch.randn(users, rows, 1, generator=generator).exp()  # or most sums would be exact in any order
    sent_ukw = size_uk * torch.randn(users, rows, 5, generator=generator)
    place = torch.arange((1 + gap) * rows)
    valid_uk = (place % (1 + gap) == gap).expand(users, -1)
    rows_ukw = sent_ukw.repeat_interleave(1 + gap, 1).masked_fill(~valid_uk[..., None], NAN)
    section = Section((place // (1 + gap)).int().expand(users, -1), valid_uk, rows_ukw)
    block = UpdateBlock({"pool/a": section}, torch.ones(users), {}, 3, "r2-00")
    for u, norms in enumerate(torch.linalg.vector_norm(sent_ukw, dim=2).tolist()):
        total = 0.0
        for row_norm in norms:
            total += row_norm**2
        bound = math.sqrt(total) / 2
        alone = block.take(torch.tensor([u]))
        assert not admit(alone, schema, Limits({"pool": bound}, absurd=2.0))[1].reasons
        assert admit(alone, schema, Limits({"pool": math.nextafter(bound, 0.0)}, absurd=2.0))[1].reasons


# -------------------------------------------------------------------------------- specs


def test_factors_are_columns_in_order() -> None:
    spec = SCHEMA.sections["pool/a"]
    assert [list(range(spec.width))[spec.columns(f)] for f in ("down", "up")] == [[0, 1], [2, 3, 4]]
    with pytest.raises(PoolError, match=r"\['down', 'up'\], got 'left'"):
        spec.columns("left")
    assert {name: tuple(v.shape) for name, v in SCHEMA.zeros().items()} == {
        "pool/a": (6, 5), "pool/b": (4, 4), "gate": (1, 7)
    }  # fmt: skip
