"""The result table: every drawing shows the same cells, and the cells are those counted by hand."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from federation.config import RunConfig
from simulations.methods import known_methods
from simulations.tables import (
    EXPLANATIONS,
    NOTHING,
    Headroom,
    Row,
    Table,
    bits,
    caption,
    explain,
    has_cache,
    headroom,
    html,
    markdown,
    result_table,
    terminal,
    unit_of,
)
from tests.simulations.records import made_up_record

HOSTILE = Table(
    ("a|b", "<b>c</b>"), (Row("<script>x</script>", "[red]m|n[/red]", ("1|2", "&amp;"), emphasised=True),), "<i>"
)


class _Cells(HTMLParser):
    """The text of every th, td, code and small, in order, and whether all tags are closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> list[str]:
    parser = _Cells()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser.texts


def shown(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=StringIO(), record=True, color_system=None)
    console.print(terminal(table))
    return console.export_text().splitlines()


def test_every_method_is_explained_and_its_cache_known() -> None:
    methods = known_methods(RunConfig())
    assert set(EXPLANATIONS) == set(methods)
    assert {name for name in methods if has_cache(name)} == {name for name, m in methods.items() if m.cache}


def test_cells_are_those_counted_by_hand() -> None:
    rows = {row.name: row for row in result_table(made_up_record()).rows}
    # gains add up to 2.48 over 8 users; sorted -0.32, 0.3, 0.4, ...; p10 at position 0.7: -0.32 + 0.7 * 0.62
    assert rows["dsa_t2"].cells == ("0.310 ± 0.012", "0.114", "0.430", "12.5%", "7,064", "50%", "12.3 ms")
    assert rows["dsa_t2@ternary:0.2"].meaning == "dsa_t2, written in ternary, the largest 20%"
    assert set(rows["base"].cells[1:]) == {NOTHING}


def test_options_and_formats_are_said_in_words() -> None:
    assert explain("dsa_t2[pool=disarm,windows=4]") == "dsa_t2, pool disarm, windows 4"
    assert explain("dsa_t2[budget=2]@ternary:0.2") == "dsa_t2, budget 2, written in ternary, the largest 20%"
    assert explain("random_mask_of_old[pool=x]") == ""


def test_a_dash_where_nothing_is_kept_or_tuned() -> None:
    for row in result_table(made_up_record()).rows:
        nothing_kept = row.name in ("base", "shared", "ngram_cache")
        assert (row.cells[4] == NOTHING) == nothing_kept
        assert (row.cells[6] == NOTHING) == (nothing_kept or row.name == "dsa_t0")


def test_rows_keep_the_records_order_and_the_best_without_a_cache_stands_out() -> None:
    record = made_up_record()
    rows = result_table(record).rows
    assert [row.name for row in rows] == list(record["methods"])
    assert max(record["methods"], key=lambda name: record["methods"][name]["mean"]) == "ngram_cache"
    assert [row.name for row in rows if row.emphasised] == ["dense_lora"]


def test_entries_of_another_version_leave_dashes() -> None:
    record = made_up_record()
    record["methods"] = {"base": {"mean": 0.0}, "of the future": {"mean": 0.1, "se": float("nan")}}
    row = result_table(record).rows[1]
    assert row.cells == ("0.100", *[NOTHING] * 6)
    assert row.meaning == ""


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("dsa_t2@int8", "dsa_t2, written in int8"),
        ("dense_lora@ternary:0.05", "dense_lora, written in ternary, the largest 5%"),
        ("unheard_of@int8", ""),
    ],
)
def test_formats_are_explained(name: str, meaning: str) -> None:
    assert explain(name) == meaning


def test_terminal_fits_80_columns_without_losing_a_cell() -> None:
    table = result_table(made_up_record())
    lines = shown(table, 80)
    assert max(map(len, lines)) <= 80
    for row in table.rows:
        line = next(line for line in lines if line.startswith(row.name + " "))
        assert line.split() == [row.name, *" ".join(row.cells).split()]
        assert any(line.split() == [row.name, *row.meaning.split()] for line in lines)
    assert " ".join(table.caption.split()) in " ".join(" ".join(lines).split())


def test_terminal_takes_brackets_for_text() -> None:
    assert "[red]m|n[/red]" in "\n".join(shown(HOSTILE, 80))


def test_markdown_has_as_many_cells_in_every_line() -> None:
    table = result_table(made_up_record())
    lines = markdown(table).split("\n\n")[0].splitlines()
    assert {line.count("|") for line in lines} == {len(table.columns) + 3}
    for row, line in zip(table.rows, lines[2:], strict=True):
        cells = [cell.strip().strip("*`") for cell in line.strip("|").split("|")]
        assert cells == [row.name, *row.cells, row.meaning]
    assert markdown(HOSTILE).splitlines()[2].replace("\\|", "").count("|") == 5


def test_html_reads_back_as_the_table() -> None:
    table = result_table(made_up_record())
    rows = [text for row in table.rows for text in (row.name, row.meaning, *row.cells)]
    assert parsed(html(table)) == ["method", *table.columns, *rows, table.caption]
    hostile = ["method", "a|b", "<b>c</b>", "<script>x</script>", "[red]m|n[/red]", "1|2", "&amp;", "<i>"]
    assert parsed(html(HOSTILE)) == hostile


def test_caption_names_users_and_the_unit() -> None:
    record = made_up_record()
    assert "bits per character saved" in caption(record)
    assert "8 new users of 5 projects ± standard error clustered by project" in caption(record)
    record["population"] = {"name": "synthetic"}
    assert unit_of(record) == "bits per target"
    assert "5 groups" in caption(record)


@given(st.floats(-1, 1), st.floats(0, 1))
def test_headroom_is_a_difference_of_more_than_two_errors(difference: float, se: float) -> None:
    room = Headroom(difference, se)
    assert room.enough == (difference - 2 * se > 0)
    assert ("says nothing" in room.sentence("bits")) != room.enough


def test_headroom_of_a_record_does_not_depend_on_the_order_of_the_pair() -> None:
    record = made_up_record()
    expected = record["methods"]["dense_lora"]["mean"] - record["methods"]["shared"]["mean"]
    found = headroom(record)
    assert found is not None
    assert found.difference == pytest.approx(expected)
    swapped = [
        entry | {"a": entry["b"], "b": entry["a"], "difference": -entry["difference"]}
        for entry in record["comparisons"]
    ]
    assert headroom(record | {"comparisons": swapped}) == found
    assert headroom(record | {"comparisons": []}) is None


def test_headroom_is_unknown_with_one_group() -> None:
    room = Headroom(0.5, float("nan"))
    assert not room.enough
    assert "unknown" in room.sentence("bits")


def test_tables_do_not_show_minus_zero() -> None:
    assert bits(-0.0001) == "0.000"
    assert replace(HOSTILE.rows[0], cells=(bits(-0.0006),)).cells == ("-0.001",)
