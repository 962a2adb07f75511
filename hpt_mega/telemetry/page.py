"""The look of a report: its style sheet, and the small pieces of HTML it is put together from.

What stands on the page is decided in report.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1f2933; --muted: #616e7c;
  --line: #e4e7eb; --accent: #2f6fde; --good: #1f8a5b; --bad: #c2413b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b2129; --ink: #e6eaef; --muted: #9aa7b5;
    --line: #303945; --accent: #6ea2ff; --good: #52c493; --bad: #f0827c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p.note, .subtitle, figcaption, .tile small { color: var(--muted); }
p.note { margin: 0 0 .75rem; }
.subtitle { margin: .25rem 0 1.5rem; overflow-wrap: anywhere; }
.badge { display: inline-block; margin-left: .6rem; padding: .1rem .6rem; border-radius: 1rem;
  font-size: .8rem; font-weight: 600; vertical-align: middle;
  color: var(--bad); border: 1px solid currentColor; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .9rem 1.1rem; }
.tile.wide { grid-column: span 2; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.3; font-weight: 650; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile h3 { margin: 0; font-size: .85rem; font-weight: 600; }
.tile small { display: block; font-size: .85rem; }
.good, .bad { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.wide { display: grid; gap: 1rem; }
figure { margin: 0; padding: .75rem .75rem .9rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: .85rem; padding: .25rem .4rem 0; }
.card { overflow-x: auto; }
.pair { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .5rem .9rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
tr:first-child > th { border-top: 0; font-size: .8rem; color: var(--muted); font-weight: 600; }
.numbers :is(th, td):not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers th { vertical-align: bottom; }
tr.total td { font-weight: 650; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
td .text { font-size: .88rem; }
.samples td:nth-child(1) { width: 3.5rem; } .samples td:nth-child(2) { width: 34%; }
details { margin-top: 2.5rem; } summary { cursor: pointer; font-weight: 600; font-size: 1.15rem; }
pre { margin: .75rem 0 0; padding: 1rem; font-size: .85rem; overflow-x: auto; }
@media (max-width: 640px) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile b { font-size: 1.45rem; }
  table { font-size: .85rem; }
  th, td { padding: .45rem .55rem; }
  .samples tr:first-child { display: none; }
  .samples tr { display: block; padding: .6rem 0; border-top: 1px solid var(--line); }
  .samples tr:nth-child(2) { border-top: 0; }
  .samples td { display: block; width: auto !important; border: 0; padding: .2rem .55rem; }
  .samples td:not(:nth-child(2), :nth-child(3)) { display: inline-block; }
  .samples td::before { content: attr(data-label); display: block; font-size: .75rem; font-weight: 600;
    color: var(--muted); } }
"""


def page(title: str, body: str) -> str:
    """A whole document that needs nothing but itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def pair(left: str, right: str) -> str:
    """Two blocks side by side where the screen is wide enough."""
    return f'<div class="pair">{left}{right}</div>'


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def tile(label: str, value: str, note: str, *, wide: bool = False) -> str:
    """A big number; `note` is HTML."""
    kind = "tile wide" if wide else "tile"
    label, value = escape(label), escape(value)
    return f'<div class="{kind}"><h3>{label}</h3><b>{value}</b><small>{note}</small></div>'


def numbers(head: Sequence[str], rows: Sequence[Sequence[str]], *, total: int | None) -> str:
    """A table of a name and numbers a row; row `total`, where there is one, stands out."""
    standing_out = None if total is None else total % len(rows)
    body = "".join(
        f"<tr{' class=total' if index == standing_out else ''}>{_cells('td', row)}</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="card"><table class="numbers"><tr>{_cells("th", head)}</tr>{body}</table></div>'


def texts(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which becomes a list of cards on a narrow screen."""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(name)}"><div class="text">{escape(text)}</div></td>'
            for name, text in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table class="samples"><tr>{_cells("th", head)}</tr>{body}</table></div>'


def _cells(kind: str, values: Sequence[str]) -> str:
    return "".join(f"<{kind}>{escape(value)}</{kind}>" for value in values)
