"""Documents that show figures are rendered from records: `python -m simulations.documents` writes them anew.

A document marks what is rendered, and a test holds it equal to its source:

    <!-- table: simulations/results/code.json -->        the result table of a run's record
    <!-- seeds: simulations/results/evidence.json -->    a sweep's methods over its seeds
    <!-- claims: simulations/results/evidence.json -->   paired differences of methods, over a sweep's seeds
    <!-- masks: simulations/results/synthetic.json -->   how near masks come to the best ones, in a run or a sweep
    <!-- types: simulations/results/gate-late.json -->   a sweep's masks by type of user
    <!-- gate: simulations/results/gate-late.json -->    a sweep's federations: their gates and how they ended
    <!-- curve: simulations/results/gate-price.json -->  a sweep's masks: quality against sparsity
    <!-- shots: simulations/results/meta-digits.json -->    few-shot curves of a run or a sweep, as a table
    <!-- shots_plot: simulations/results/meta-digits.json -->  the same as a plot beside the document
    <!-- continual: simulations/results/meta-continual.json -->  rules that keep what users learned, in a run or a sweep
    <!-- continual_claims: simulations/results/meta-continual.json -->  paired differences of rules, over seeds
    <!-- tasks_plot: simulations/results/meta-continual.json -->  what users had of every task after each, as a plot
    <!-- words: continual -->                             what is measured of rules, in words
    <!-- variance: simulations/results/gate.json -->     the variance of estimators (`fedquilt bench gate`)
    <!-- bench: simulations/results/pipeline.json -->     a benchmark's figures; of several, joined by +, side by side
    <!-- scale: simulations/results/million.json -->      time, memory and disk of a run
    <!-- source: tests/plugins/installed/sign_mean.py -->  a file, as a block of code
    <!-- settings: deployment -->                        a section of `RunConfig`, or one within (personal.continual)
    <!-- end -->

Plots are files in `docs/plots`, for documents in `docs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from federation.config import RunConfig
from federation.settings import Settings
from simulations import continual_tables, curves, meta_sections, svg, sweep_tables, tables
from simulations.benchmarks.figures import figures

HOUSE = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/deploy.md", "docs/gate.md", "docs/meta.md", "docs/results.md", "docs/speed.md")
PLOTS = HOUSE / "docs" / "plots"
_BLOCK = re.compile(r"<!-- (\w+): (\S+) -->\n.*?<!-- end -->", re.DOTALL)
Record = dict[str, Any]


def rendered(text: str) -> str:
    """The document with every marked block rendered from its source."""
    return _BLOCK.sub(_render, text)


def plots_of(text: str) -> dict[Path, str]:
    """The plots that a document shows: the SVG of every file."""
    shown = [match.groups() for match in _BLOCK.finditer(text)]
    return {
        _plot_path(kind, source): _PLOTS[kind].drawn(json.loads((HOUSE / source).read_text()))
        for kind, source in shown
        if kind in _PLOTS
    }


def _render(match: re.Match[str]) -> str:
    kind, source = match.groups()
    if kind in _OF_THE_CODE:
        return f"<!-- {kind}: {source} -->\n{_OF_THE_CODE[kind](source)}\n<!-- end -->"
    if kind in _PLOTS:
        image = f"![{_PLOTS[kind].words}](plots/{_plot_path(kind, source).name})"
        caption = _PLOTS[kind].caption(json.loads((HOUSE / source).read_text()))
        return f"<!-- {kind}: {source} -->\n{image}\n\n{caption}\n\nRecord: `{source}`.\n<!-- end -->"
    texts = [(HOUSE / path).read_text() for path in source.split("+")]
    if kind == "source":
        body = f"```python\n{texts[0].strip()}\n```"
    else:
        named = " and ".join(f"`{path}`" for path in source.split("+"))
        body = f"{_KINDS[kind](*map(json.loads, texts))}\n\nRecord: {named}."
    return f"<!-- {kind}: {source} -->\n{body}\n<!-- end -->"


def _table(record: Record) -> str:
    return tables.markdown(tables.result_table(record)).strip()


def _seeds(record: Record) -> str:
    summary = _only_variant(record)
    users = f"{summary['users']} new users of {summary['groups']} groups."
    return _markdown(*sweep_tables.seeds(summary)) + f"\n\n{users}"


def _masks(record: Record) -> str:
    """Of a sweep, or of one run."""
    if record["kind"] == "sweep":
        return _markdown(*sweep_tables.masks(_only_variant(record)))
    rows = [(rule, f"{q['f1']:.3f}", f"{q['f1_of_type']:.3f}") for rule, q in record["masks"].items()]
    return _markdown(("mask", "F1 against the user's best", "F1 against its type's habit"), rows)


def _shots(record: Record) -> str:
    found = _few_shots(record)
    return _markdown(*curves.table(found)) + f"\n\nMean {found.unit} over new users."


def _few_shots(record: Record) -> curves.FewShots:
    """Of a sweep, or of one run."""
    sweep = record["kind"] == "sweep"
    found = curves.curves_of_summary(_only_variant(record)) if sweep else curves.curves_of_record(record)
    assert found is not None, "the record holds no method after two numbers of steps"
    return found


def _continual(record: Record) -> str:
    """Of a sweep, or of one run."""
    if record["kind"] == "sweep":
        return _markdown(*sweep_tables.continual(_only_variant(record)))
    return tables.markdown(continual_tables.rules_table(record["continual"])).strip()


def _matrices(record: Record) -> continual_tables.Continual:
    found: continual_tables.Continual = (_only_variant(record) if record["kind"] == "sweep" else record)["continual"]
    return found


def _words(kind: str) -> str:
    """Of all that is measured of this kind."""
    assert kind == "continual", kind
    lines = [f"- **{label}.** {meaning}" for label, meaning in continual_tables.words_of_metrics()]
    return "\n".join(lines)


def _plot_path(kind: str, source: str) -> Path:
    return PLOTS / f"{Path(source).stem}-{kind.removesuffix('_plot')}.svg"


def _of_variant(rows_of: Callable[[Record], sweep_tables.Drawn]) -> Callable[[Record], str]:
    return lambda record: _markdown(*rows_of(_only_variant(record)))


def _variance(record: Record) -> str:
    return _markdown(*sweep_tables.variance(record))


def _bench(*records: Record) -> str:
    return _figures(records, records[0]["kind"])


def _scale(record: Record) -> str:
    return _figures([record], "run")


def _figures(records: Sequence[Record], kind: str) -> str:
    """The first figure heads the table when it has several values: it is what the others depend on."""
    columns = [{label: values for label, *values in figures(record, kind)} for record in records]
    rows = [(label, *(value for column in columns for value in column.get(label, ["—"]))) for label in columns[0]]
    width = len(rows[0])
    if width > 2 and all(rows[0]):
        return _markdown(rows[0], rows[1:])
    return _markdown(("figure", "value", *[""] * (width - 2)), rows)


def _settings(section: str) -> str:
    return _markdown(
        ("setting", "default", "meaning"), list(_settings_rows(reduce(getattr, section.split("."), RunConfig()), ""))
    )


def _settings_rows(settings: Settings, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Those of a section within it have their place in their name, as in `reward.price`."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _settings_rows(value, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}`", _default(value), field.description or "as the plugin takes them"


def _default(value: object) -> str:
    """
    >>> [_default(value) for value in (None, 0.5, True, "gate", ("gains", "context"), (), {})]
    ['none', '0.5', 'true', 'gate', 'gains, context', 'none', 'none']
    """
    if value is None or (isinstance(value, tuple | dict) and not value):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(_default, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _only_variant(record: Record) -> Record:
    (summary,) = record["variants"].values()
    return dict(summary)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


_KINDS: dict[str, Callable[..., str]] = {
    "table": _table,
    "seeds": _seeds,
    "claims": _of_variant(sweep_tables.claims),
    "masks": _masks,
    "types": _of_variant(sweep_tables.types),
    "gate": _of_variant(sweep_tables.gates),
    "curve": _of_variant(sweep_tables.curve),
    "shots": _shots,
    "continual": _continual,
    "continual_claims": _of_variant(sweep_tables.continual_claims),
    "variance": _variance,
    "bench": _bench,
    "scale": _scale,
}


_OF_THE_CODE: dict[str, Callable[[str], str]] = {"settings": _settings, "words": _words}


@dataclass(frozen=True)
class _Plot:
    """words: what the image shows, for who cannot see it. Of a record, drawn: the SVG, caption: how to read it."""

    words: str
    drawn: Callable[[Record], str]
    caption: Callable[[Record], str]


_PLOTS: dict[str, _Plot] = {
    "shots_plot": _Plot(
        "Quality after few steps, by method and number of examples owned",
        lambda record: svg.few_shot_curves(_few_shots(record)),
        lambda record: meta_sections.shots_caption(_few_shots(record)),
    ),
    "tasks_plot": _Plot(
        "Quality on every task after each task was learned, by rule",
        lambda record: svg.task_matrices(_matrices(record)),
        lambda record: meta_sections.tasks_caption(_matrices(record)),
    ),
}


def main() -> None:
    """Writes every document and its plots anew."""
    for name in DOCUMENTS:
        path = HOUSE / name
        text = rendered(path.read_text())
        path.write_text(text)
        for plot, drawn in plots_of(text).items():
            plot.parent.mkdir(exist_ok=True)
            plot.write_text(drawn)


if __name__ == "__main__":
    main()
