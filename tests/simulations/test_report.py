"""Reports: whole pages that need nothing else, whatever a record lacks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from federation.errors import RunError
from simulations.continual_metrics import METRICS
from simulations.report import findings, headline, write_comparison, write_report
from tests.simulations.meta_records import made_up_continual, with_curves
from tests.simulations.records import made_up_record, made_up_users

VOID = {"meta", "br"}
SECTIONS = [
    "Users never seen in training",
    "Who gains, and who does not",
    "The federation learns",
    "Which units users share",
    "What left the devices",
]


class _Page(HTMLParser):
    """Tags must close in turn; keeps headings, ids, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        for name, value in attrs:
            if name in ("src", "href"):
                self.fetched.append(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def save(folder: Path, record: dict[str, Any], users: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    if users is not None:
        (folder / "evaluation.json").write_text(json.dumps(users))
    return folder


def page_of(path: Path) -> _Page:
    return _Page(path.read_text())


def test_a_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    path = write_report(save(tmp_path, made_up_record(), made_up_users()))
    page = page_of(path)
    assert path == tmp_path / "report.html"
    assert page.fetched == []
    assert [heading for heading in page.headings if heading in SECTIONS] == SECTIONS
    assert len(set(page.ids)) == len(page.ids) == 5
    for fact in ("0.310 ± 0.012", "0123abcd", "torch 2.13.0", "fedquilt simulate code", '"budget": 2', "feed"):
        assert fact in page.text
    assert "1 of 8 users is worse off" in page.text
    assert path.read_text().count("plotly.js v") == 1


@pytest.mark.parametrize("missing", [key for key in made_up_record() if key != "kind"])
def test_a_report_shows_what_there_is(tmp_path: Path, missing: str) -> None:
    record = made_up_record()
    del record[missing]
    page = page_of(write_report(save(tmp_path, record, made_up_users())))
    gone = {"methods": SECTIONS[:1], "history": SECTIONS[2:3]}.get(missing, [])
    assert [heading for heading in page.headings if heading in SECTIONS] == [s for s in SECTIONS if s not in gone]


def test_a_report_without_evaluation(tmp_path: Path) -> None:
    record = made_up_record()
    for key in ("methods", "comparisons", "base_bits_per_char"):
        del record[key]
    page = page_of(write_report(save(tmp_path, record, None)))
    assert page.headings[0] == "A pool trained for 3 rounds; no users were served with it"
    assert [heading for heading in page.headings if heading in SECTIONS] == [SECTIONS[2], SECTIONS[4]]


def test_a_report_of_the_base_alone(tmp_path: Path) -> None:
    record, users = made_up_record(), made_up_users()
    record |= {"methods": {"base": record["methods"]["base"]}, "comparisons": []}
    users["loss"] = {"base": users["loss"]["base"]}
    page = page_of(write_report(save(tmp_path, record, users)))
    assert "plot-bytes" not in page.ids
    assert "plot-users" not in page.ids


def test_names_cannot_inject_code(tmp_path: Path) -> None:
    record, users = made_up_record(), made_up_users()
    attack = '</script><script>alert("x")</script><img src=x>'
    for name in ("name", "command", "commit"):
        record[name] = attack
    record["methods"][attack] = record["methods"]["dsa_t0"]
    record["comparisons"].append(record["comparisons"][0] | {"a": "dsa_t2", "b": attack})
    users["loss"][attack] = users["loss"]["dsa_t0"]
    path = write_report(save(tmp_path, record, users))
    assert page_of(path).fetched == []
    assert "<script>alert" not in path.read_text()


def test_headline_compares_bytes_and_gain() -> None:
    record = made_up_record()
    assert headline(record) == "7,064 bytes for each user give 89% of the gain of a LoRA of 73,728 bytes"
    record["methods"]["dense_lora"]["mean"] = -0.1
    assert headline(record) == "7,064 bytes for each user save 0.310 bits per character"
    del record["methods"]["dsa_t2"], record["methods"]["dense_lora"]
    assert headline(record).startswith("dsa_t2@ternary:0.2 saves 0.200")


def test_findings_follow_the_intervals() -> None:
    record = made_up_record()
    for entry in record["comparisons"]:
        entry["low"], entry["high"] = entry["difference"] - 0.25, entry["difference"] + 0.25
    text = " ".join(findings(record))
    # dsa_t2 gains 0.31: base 0, shared 0.05, dense_lora 0.35, dsa_t0 0.075, ternary 0.2, ngram_cache 0.6
    assert text == (
        "dsa_t2 is better than base (+0.310), shared (+0.260). dsa_t2 is worse than ngram_cache (-0.290). "
        "dsa_t2 cannot be told apart from dense_lora (-0.040), dsa_t0 (+0.235), dsa_t2@ternary:0.2 (+0.110)."
    )


def test_little_headroom_is_said_plainly(tmp_path: Path) -> None:
    record = made_up_record()
    for entry in record["comparisons"]:
        entry["se"] = 0.2
    page = page_of(write_report(save(tmp_path, record, None)))
    assert re.search(r"Little headroom: .* the comparison of methods says nothing", page.text)


def test_what_left_depends_on_the_gate(tmp_path: Path) -> None:
    record = made_up_record()

    def text() -> str:
        return page_of(write_report(save(tmp_path, record, None))).text

    assert "policy gradient" in text()
    assert "(the load)" in text()
    assert "(the price)" not in text()
    record["config"]["gate"]["reward"] = {"price": 0.1, "target": 0.1}
    assert "(the price)" in text()
    record["config"]["gate"]["policy"] = "saliency"
    assert not any(part in text() for part in ("policy gradient", "(the load)", "(the price)"))


def test_what_the_server_computes_is_not_said_to_be_sent(tmp_path: Path) -> None:
    record = made_up_record()
    record["history"] = [
        {"round": 1, "support_loss": 3.0, "reward": -2.0, "unused_share": 0.5, "revived": 0.0},
        {"round": 2, "support_loss": 3.0, "gate_entropy": 0.5, "unused_share": 0.5, "revived": 1.0},
    ]
    page = page_of(write_report(save(tmp_path, record, None)))
    assert "a few figures: support_loss, reward, gate_entropy" in page.text
    assert not re.search(r"a few figures: [^.]*(unused_share|revived|round)", page.text)


def test_the_gates_health_is_shown_where_one_was_trained(tmp_path: Path) -> None:
    record = made_up_record()
    assert "plot-gate" not in page_of(write_report(save(tmp_path, record, None))).ids
    for line, revived in zip(record["history"], (0, 2, 5)):
        line.update({"gate_entropy": 0.5, "unused_share": 0.1, "revived": revived})
    page = page_of(write_report(save(tmp_path, record, None)))
    assert "plot-gate" in page.ids
    assert "7 times a unit that was unused was taken up again" in page.text
    assert "everyone gets the same few" in page.text


def test_a_run_of_no_rounds_has_a_report(tmp_path: Path) -> None:
    record = made_up_record() | {"history": []}
    assert "What left the devices" in page_of(write_report(save(tmp_path, record, None))).headings


CURVES, KEPT = "How few steps a new user needs", "What users keep when tasks come one after the other"
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox'


def test_few_shot_curves_are_drawn_and_take_no_rows(tmp_path: Path) -> None:
    record, users = with_curves(), made_up_users()
    for name in record["methods"]:
        users["loss"].setdefault(name, users["loss"]["base"])
    path = write_report(save(tmp_path, record, users))
    page, text = page_of(path), path.read_text()
    assert CURVES in page.headings
    assert KEPT not in page.headings
    assert "melpa is at least there with 50.0% after 1 step" in page.text
    assert "melpa[shots=5,steps=1]" not in text
    assert text.count(DRAWING) == 1


def test_the_headline_is_of_the_first_curve_where_there_is_no_dsa() -> None:
    record = with_curves()
    del record["methods"]["dsa_t2"]
    assert headline(record) == "melpa is at 62.0% accuracy after 5 steps on 5 examples; the frozen model is at 25.0%"


def test_sequences_show_matrices_one_table_and_what_every_figure_means(tmp_path: Path) -> None:
    record = made_up_record() | {"continual": made_up_continual()}
    path = write_report(save(tmp_path, record, None))
    page = page_of(path)
    assert KEPT in page.headings
    assert CURVES not in page.headings
    for words in METRICS.values():
        assert page.text.count(words.label) == 2
        assert words.meaning in page.text
    for fact in ("after task 3", "60.0 points forgotten", "4,096", "-50.0 ± 1.0"):
        assert fact in page.text
    assert path.read_text().count(DRAWING) == 1


def test_a_run_that_compared_no_rules_shows_none(tmp_path: Path) -> None:
    record = made_up_record() | {"continual": made_up_continual() | {"rules": {}}}
    assert KEPT not in page_of(write_report(save(tmp_path, record, None))).headings


def test_what_left_depends_on_what_is_learned(tmp_path: Path) -> None:
    record = made_up_record()

    def text(**meta: object) -> str:
        record["config"]["meta"] = meta
        return page_of(write_report(save(tmp_path, record, None))).text

    assert "how far its steps moved their rows" in text(signal="reptile")
    learned = text(signal="fomaml", rule={"name": "rates"}, start={"name": "contextual"})
    assert "moved their rows" not in learned
    for part in ("the gradient of its query loss", "the update rule's parameters", "can reveal its context"):
        assert part in learned
    assert "update rule's" not in text(signal="maml", rule={"name": "sgd"}, start={"name": "universal"})


def test_a_comparison_is_one_page_of_all_settings(tmp_path: Path) -> None:
    folders = []
    for seed, budget in ((0, 2), (1, 2), (0, 4)):
        record = made_up_record(seed)
        record["config"]["gate"]["budget"] = budget
        folders.append(save(tmp_path / f"{seed}-{budget}", record, made_up_users()))
    path = write_comparison(folders, tmp_path / "all.html")
    page = page_of(path)
    assert page.fetched == []
    assert page.headings == ["3 runs of made up", "gate.budget = 2", "gate.budget = 4", "The runs"]
    assert page.ids == ["plot-gains", "plot-bytes-0", "plot-bytes-1"]
    assert "8 new users and seeds 0, 1" in page.text


def test_a_comparison_needs_evaluated_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no evaluation\.json"):
        write_comparison([save(tmp_path / "a", made_up_record(), None)], tmp_path / "all.html")
    with pytest.raises(RunError, match="finished run"):
        write_report(tmp_path / "nowhere")
    broken = save(tmp_path / "b", made_up_record(), None)
    (broken / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match="not JSON"):
        write_report(broken)
