"""The frame of a report: one HTML file that needs nothing else, light or dark as its reader prefers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

_STYLE = """
:root {
  color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fbfaf7; --card: #fff; --line: #dcd8cf;
  --accent: #00568a; --note: #fff3d6; --note-line: #b7791f;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8e6e1; --soft: #a3a9b1; --paper: #14171b; --card: #1b1f25; --line: #343a42;
  --accent: #7cc4f2; --note: #33290f; --note-line: #d9a441;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; }
header p { color: var(--soft); margin: 0; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; }
h1 { margin: .3rem 0 1rem; max-width: 24em; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .6rem; }
p, li { max-width: 46rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
.lead { font-size: 1.1rem; }
.note { background: var(--note); border-left: 4px solid var(--note-line); padding: .7rem 1rem; }
.cards div, figure, pre { background: var(--card); border: 1px solid var(--line); }
.cards div, figure, pre { border-radius: .6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.cards { margin: 1.5rem 0; }
.cards div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .8rem 1rem; }
.cards dd { margin: 0; font-size: 1.5rem; font-weight: 650; letter-spacing: -.02em; }
.cards dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; }
.scroll > svg { max-width: max(100%, 46rem); height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: .8rem; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 400; }
tbody small { display: block; color: var(--soft); font-size: .78rem; white-space: normal; min-width: 10rem; }
.best td, .best code { font-weight: 700; color: var(--accent); }
figure { margin: 1rem 0; padding: .5rem; }
figcaption { color: var(--soft); font-size: .88rem; padding: .5rem .6rem .3rem; max-width: 52rem; }
.facts { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding-top: .8rem; margin-top: 3rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: 1rem; }
.main-svg text { fill: var(--ink) !important; }
.main-svg .hoverlayer text { fill: inherit !important; }
@media (max-width: 40rem) { .main-svg .textpoint { display: none; } }
@media print { figure { break-inside: avoid; } }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
<script>$plotly</script>
</head>
<body><main>
$content
</main></body>
</html>
""")


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document around parts that are HTML already. Plotly's code is inlined once, for all figures."""
    content = "\n".join(part for part in parts if part)
    return _PAGE.substitute(title=escape(title), style=_STYLE, plotly=get_plotlyjs(), content=content)


def section(heading: str, *parts: str) -> str:
    """A section of parts that are HTML already; empty when there is nothing to show."""
    content = "".join(parts)
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph of a CSS class."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """Plain lines as a list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def figure(drawn: go.Figure, name: str, caption: str) -> str:
    """A plot with the sentence that says how to read it. `name` is unique on the page."""
    config = {"displayModeBar": False, "responsive": True}
    plot = drawn.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{name}", config=config)
    return f'<figure aria-label="{escape(caption)}">{plot}<figcaption>{escape(caption)}</figcaption></figure>'


def drawing(svg: str, caption: str) -> str:
    """A plot that is SVG already, with the sentence that says how to read it."""
    plot = f'<div class="scroll" tabindex="0">{svg}</div>'
    return f'<figure aria-label="{escape(caption)}">{plot}<figcaption>{escape(caption)}</figcaption></figure>'


def cards(figures: Mapping[str, str]) -> str:
    """Large figures, each over what it is."""
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items())
    return f'<dl class="cards">{entries}</dl>' if figures else ""


def facts(values: Mapping[str, object]) -> str:
    """Names and values, one a line; values that are None are left out."""
    shown = {name: value for name, value in values.items() if value is not None}
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in shown.items())
    return f'<dl class="facts">{entries}</dl>'
