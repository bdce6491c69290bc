"""Rounding of rows: laws, closed forms, and a twin that sorts a user's values in a list."""

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.formats import RowFormat, quantise
from federation.update import Section

EVERY = [
    RowFormat("fp32"),
    RowFormat("fp16"),
    RowFormat("int8"),
    RowFormat("ternary", 0.3),
    RowFormat("ternary"),
]
every_format = pytest.mark.parametrize("row_format", EVERY, ids=lambda f: f"{f.kind}-{f.top}")


def sections(users: int = 5, seed: int = 0) -> dict[str, Section]:
    """Two modules of other widths, rows of other sizes, and padding that holds garbage."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, k, width in (("pool/a", 4, 33), ("pool/b", 3, 17)):
        rows = torch.randn(users, k, width, generator=generator) * torch.rand(users, k, 1, generator=generator)
        valid = torch.rand(users, k, generator=generator) < 0.8
        ids = torch.rand(users, 9, generator=generator).argsort(1)[:, :k].int()
        made[name] = Section(ids, valid, rows.masked_fill(~valid[..., None], float("nan")))
    return made


def rounded(given: dict[str, Section], row_format: RowFormat) -> dict[str, Section]:
    return quantise(given, {"pool": row_format})


def bits(rows: Tensor) -> Tensor:
    """float32 numbers as integers, so that equal means equal in every bit."""
    return rows.contiguous().view(torch.int32)


@every_format
def test_a_block_equals_single_users_bit_for_bit(row_format: RowFormat) -> None:
    given = sections(users=7)
    stacked = rounded(given, row_format)
    for user in range(7):
        alone = rounded({name: section.take(torch.tensor([user])) for name, section in given.items()}, row_format)
        for name in given:
            assert torch.equal(bits(stacked[name].rows_ukw[user]), bits(alone[name].rows_ukw[0]))


@every_format
def test_the_order_of_rows_and_sections_does_not_matter(row_format: RowFormat) -> None:
    given = sections()
    straight = rounded(given, row_format)
    turned = rounded(
        {n: Section(s.ids_uk.flip(1), s.valid_uk.flip(1), s.rows_ukw.flip(1)) for n, s in reversed(given.items())},
        row_format,
    )
    assert list(turned) == list(reversed(straight))
    for name in given:
        assert torch.equal(bits(turned[name].rows_ukw.flip(1)), bits(straight[name].rows_ukw))


@every_format
def test_rounding_twice_changes_nothing(row_format: RowFormat) -> None:
    once = rounded(sections(), row_format)
    twice = rounded(once, row_format)
    for name in once:
        torch.testing.assert_close(twice[name].rows_ukw, once[name].rows_ukw, rtol=2**-8, atol=0.0)
        if row_format.kind != "int8":  # its peak, 127 * scale, is not a bfloat16
            assert torch.equal(bits(twice[name].rows_ukw), bits(once[name].rows_ukw))


@every_format
def test_padding_becomes_zero_and_the_input_is_left_alone(row_format: RowFormat) -> None:
    given = sections()
    before = {name: section.rows_ukw.clone() for name, section in given.items()}
    for name, section in rounded(given, row_format).items():
        assert (section.rows_ukw[~section.valid_uk] == 0).all()
        assert torch.isfinite(section.rows_ukw).all()
        torch.testing.assert_close(given[name].rows_ukw, before[name], rtol=0, atol=0, equal_nan=True)


@every_format
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_shows(row_format: RowFormat, poison: float) -> None:
    given = sections(users=3)
    given["pool/a"].valid_uk[1, 2] = True
    given["pool/a"].rows_ukw[1, 2] = 0.25
    given["pool/a"].rows_ukw[1, 2, 5] = poison
    rows = rounded(given, row_format)["pool/a"].rows_ukw
    assert not torch.isfinite(rows[1, 2]).all()
    assert torch.isfinite(rows[[0, 2]]).all()


def test_fp32_is_exact_and_fp16_is_numpys() -> None:
    given = sections()
    for name, section in given.items():
        valid = section.valid_uk
        assert torch.equal(rounded(given, RowFormat("fp32"))[name].rows_ukw[valid], section.rows_ukw[valid])
        halves = section.rows_ukw[valid].numpy().astype(np.float16).astype(np.float32)
        assert np.array_equal(rounded(given, RowFormat("fp16"))[name].rows_ukw[valid].numpy(), halves)


def test_int8_is_within_half_a_step() -> None:
    given = sections()
    for name, section in rounded(given, RowFormat("int8")).items():
        rows = given[name].rows_ukw[section.valid_uk]
        half_step = rows.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 2**-8)
        assert ((section.rows_ukw[section.valid_uk] - rows).abs() <= half_step).all()


@pytest.mark.parametrize("top", [0.05, 0.3, 0.5, 1.0])
def test_ternary_equals_a_list_of_the_users_values(top: float) -> None:
    given = sections(users=4)
    found = rounded(given, RowFormat("ternary", top))
    for user in range(4):
        mine = {name: s.rows_ukw[user][s.valid_uk[user]].tolist() for name, s in given.items()}
        ranked = sorted((abs(x) for rows in mine.values() for row in rows for x in row), reverse=True)
        kept = set(ranked[: max(1, round(top * len(ranked)))])
        for name, rows in mine.items():
            for row, got in zip(rows, found[name].rows_ukw[user][given[name].valid_uk[user]]):
                large = [abs(x) for x in row if abs(x) in kept]
                scale = torch.tensor(sum(large) / len(large) if large else 0.0).bfloat16().item()
                want = [(scale if x > 0 else -scale) if abs(x) in kept else 0.0 for x in row]
                assert got.tolist() == want


def test_no_other_scale_has_a_smaller_error() -> None:
    given = sections(users=1)
    row = given["pool/a"].rows_ukw[0][given["pool/a"].valid_uk[0]][0].double()
    got = rounded(given, RowFormat("ternary", 0.4))["pool/a"].rows_ukw[0][given["pool/a"].valid_uk[0]][0].double()
    kept = got != 0
    error = lambda factor: (row[kept] - factor * got[kept]).square().sum()  # noqa: E731
    assert error(1.0) < min(error(0.99), error(1.01))


def test_ties_are_all_kept_and_zeros_never() -> None:
    rows = torch.tensor([[[0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.25]]])
    given = {"pool/a": Section(torch.zeros(1, 1).int(), torch.ones(1, 1, dtype=torch.bool), rows)}
    quarter = rounded(given, RowFormat("ternary", 0.25))["pool/a"].rows_ukw
    assert quarter.tolist() == [[[0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]]]
    for top in (0.9, 1.0):  # more than there are numbers other than zero
        everything = rounded(given, RowFormat("ternary", top))["pool/a"].rows_ukw
        assert everything.tolist() == (rows.sign() * 0.4375).tolist()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("row_format", [RowFormat("int8"), RowFormat("ternary")], ids=lambda f: f.kind)
def test_scaled_formats_have_the_range_of_float32(row_format: RowFormat, size: float) -> None:
    rows = torch.tensor([[[size, -size, size]]])
    given = {"pool/a": Section(torch.zeros(1, 1).int(), torch.ones(1, 1, dtype=torch.bool), rows)}
    torch.testing.assert_close(rounded(given, row_format)["pool/a"].rows_ukw, rows, rtol=2**-8, atol=0.0)


def test_int8_keeps_signs_where_its_scale_is_coarse() -> None:
    """At 1.6e-38 the scale is the smallest bfloat16: 178 steps do not fit, and wrapping turns the sign."""
    rows = torch.tensor([[[1.63e-38, -1.63e-38, 0.0]]])
    given = {"pool/a": Section(torch.zeros(1, 1).int(), torch.ones(1, 1, dtype=torch.bool), rows)}
    assert torch.equal(rounded(given, RowFormat("int8"))["pool/a"].rows_ukw.sign(), rows.sign())


def test_a_users_budget_is_shared_by_the_sections_of_a_prefix() -> None:
    quiet, loud = torch.full((1, 1, 10), 0.1), torch.linspace(1.0, 2.0, 10).view(1, 1, 10)
    one = torch.ones(1, 1, dtype=torch.bool)
    given = {"pool/a": Section(one.int(), one, quiet), "pool/b": Section(one.int(), one, loud)}
    found = rounded(given, RowFormat("ternary", 0.5))
    assert (found["pool/a"].rows_ukw == 0).all()
    assert (found["pool/b"].rows_ukw != 0).all()


def test_bad_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of .*'ternary'.*got 'int4'"):
        RowFormat("int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"top=0\.0"):
        RowFormat("ternary", 0.0)
    with pytest.raises(ConfigError, match="only ternary"):
        RowFormat("int8", 0.5)
    with pytest.raises(ConfigError, match=r"'pool' has none; formats are given for \['gate'\]"):
        quantise(sections(), {"gate": RowFormat("fp32")})
