"""Documents that show figures are rendered from records: `python -m simulations.documents` writes them anew.

A document marks what is rendered, and a test holds it equal to its source:

    <!-- table: simulations/results/code.json -->          the result table of a record
    <!-- figures: simulations/results/throughput-w1.json --> the figures of a benchmark's record
    <!-- source: tests/plugins/installed/sign_mean.py -->  a file, as a block of code
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from simulations import tables

HOUSE = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/results.md")
_BLOCK = re.compile(r"<!-- (table|figures|source): (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def rendered(text: str) -> str:
    """The document with every marked block rendered from its source."""
    return _BLOCK.sub(_render, text)


def _render(match: re.Match[str]) -> str:
    kind, source = match.groups()
    path = HOUSE / source
    body = {"table": _table, "figures": _figures, "source": _source}[kind](path)
    return f"<!-- {kind}: {source} -->\n{body}\n<!-- end -->"


def _table(path: Path) -> str:
    record: dict[str, Any] = json.loads(path.read_text())
    table = tables.result_table(record)
    return f"{tables.markdown(table)}\n\n*{tables.caption(record)}* Record: `{path.relative_to(HOUSE)}`."


def _figures(path: Path) -> str:
    record: dict[str, Any] = json.loads(path.read_text())
    lines = [f"| {key} | {_figure(value)} |" for key, value in record["figures"].items()]
    return "\n".join(["| figure | value |", "|---|---|", *lines, "", f"Record: `{path.relative_to(HOUSE)}`."])


def _figure(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _source(path: Path) -> str:
    return f"```python\n{path.read_text().strip()}\n```"


def main() -> None:
    """Writes every document anew."""
    for name in DOCUMENTS:
        path = HOUSE / name
        path.write_text(rendered(path.read_text()))


if __name__ == "__main__":
    main()
