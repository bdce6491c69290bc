"""Documents that show figures are rendered from records: `python -m simulations.documents` writes them anew.

A document marks what is rendered, and a test holds it equal to its source:

    <!-- table: simulations/results/code.json -->        the result table of a run's record
    <!-- seeds: simulations/results/evidence.json -->    a sweep's methods over its seeds
    <!-- claims: simulations/results/evidence.json -->   paired differences of methods, over a sweep's seeds
    <!-- masks: simulations/results/synthetic.json -->   how near masks come to the best ones
    <!-- bench: simulations/results/pipeline.json -->     a benchmark's figures; of several, joined by +, side by side
    <!-- scale: simulations/results/million.json -->      time, memory and disk of a run
    <!-- source: tests/plugins/installed/sign_mean.py -->  a file, as a block of code
    <!-- settings: deployment -->                        a section of `RunConfig`: its settings, defaults and meaning
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from federation.config import RunConfig
from simulations import tables
from simulations.benchmarks.figures import figures

HOUSE = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/deploy.md", "docs/results.md", "docs/speed.md")
CLAIMS = (
    ("dsa_t2", "base"),
    ("dsa_t2", "shared"),
    ("dsa_t2", "dense_lora"),
    ("dsa_t0", "shared"),
    ("dsa_t0", "random_mask"),
    ("dsa_t0", "random_mask[pool=random]"),
    ("dsa_t0", "random_mask_random_pool"),  # the same in older records
    ("dsa_t0", "other_mask"),
    ("dsa_t0", "saliency_mask"),
    ("dsa_t1", "shared_scales"),
    ("dsa_t2@fp16", "shared_tuned"),
    ("dsa_t2", "shared_tuned_compressed"),
    ("dsa_t2@ternary:0.2", "shared_tuned@ternary:0.2"),
    ("dsa_t2@ternary:0.05", "shared_tuned@ternary:0.05"),
    ("dsa_t2", "dense_lora_compressed"),
    ("dsa_t2_cache", "ngram_cache"),
)
_BLOCK = re.compile(r"<!-- (\w+): (\S+) -->\n.*?<!-- end -->", re.DOTALL)
Record = dict[str, Any]


def rendered(text: str) -> str:
    """The document with every marked block rendered from its source."""
    return _BLOCK.sub(_render, text)


def _render(match: re.Match[str]) -> str:
    kind, source = match.groups()
    if kind == "settings":
        return f"<!-- {kind}: {source} -->\n{_settings(source)}\n<!-- end -->"
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
    rows = [
        (
            f"`{name}`",
            f"{method['gain']['mean']:.4f}",
            f"{method['gain']['low']:.4f} to {method['gain']['high']:.4f}",
            tables.percent(method["harmed"]),
            f"{method['bytes_per_user']:,.0f}",
            ", ".join(f"{gain:.4f}" for gain in method["seed_gains"]),
        )
        for name, method in summary["methods"].items()
    ]
    head = ("method", "gain", "95% interval", "harmed", "bytes", "by seed")
    return _markdown(head, rows) + f"\n\n{summary['users']} new users of {summary['groups']} projects."


def _claims(record: Record) -> str:
    pairs = {(c["a"], c["b"]): (c, 1) for c in _only_variant(record)["comparisons"]}
    pairs |= {(b, a): (c, -1) for (a, b), (c, _) in pairs.items()}
    rows = []
    for a, b in (claim for claim in CLAIMS if claim in pairs):
        found, sign = pairs[a, b]
        low, high = sorted((sign * found["low"], sign * found["high"]))
        difference = sign * found["difference"]
        rows.append(
            (f"`{a}` - `{b}`", f"{difference:+.4f}", f"{difference / found['se']:+.1f}", f"{low:+.4f} to {high:+.4f}")
        )
    return _markdown(("difference of gains", "mean", "in standard errors", "95% interval"), rows)


def _masks(record: Record) -> str:
    rows = [(rule, f"{q['f1']:.3f}", f"{q['f1_of_type']:.3f}") for rule, q in record["masks"].items()]
    return _markdown(("mask", "F1 against the user's best", "F1 against its type's habit"), rows)


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
    fields = getattr(RunConfig(), section).__class__.model_fields
    rows = [
        (f"`{name}`", "none" if f.default is None else f"{f.default:g}", f.description) for name, f in fields.items()
    ]
    return _markdown(("setting", "default", "meaning"), rows)


def _only_variant(record: Record) -> Record:
    (summary,) = record["variants"].values()
    return dict(summary)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


_KINDS: dict[str, Callable[..., str]] = {
    "table": _table,
    "seeds": _seeds,
    "claims": _claims,
    "masks": _masks,
    "bench": _bench,
    "scale": _scale,
}


def main() -> None:
    """Writes every document anew."""
    for name in DOCUMENTS:
        path = HOUSE / name
        path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
