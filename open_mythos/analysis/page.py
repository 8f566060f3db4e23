"""One HTML page in one file: no script, no address, readable on light and on dark; escapes all text."""

from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #636c76; --line: #d8dee4;
  --paper: #fff; --tint: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --paper: #14171b; --tint: #1c2026; }
}
body { margin: 0 auto; max-width: 46rem; padding: 2rem 1.25rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p { margin: .5rem 0; }
.soft, figcaption { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.4rem 0; }
.tile { flex: 1 1 8.5rem; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .85rem;
  background: var(--tint); }
.tile b { display: block; font-size: 1.45rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: 400; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-size: .85rem; }
figure { margin: 1rem 0 1.6rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .92rem; margin-top: .3rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .85rem;
  margin: .3rem 0;
  overflow-x: auto; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; }
summary { cursor: pointer; }
.note { border-left: 3px solid #d55e00; padding-left: .8rem; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document; `title` is text, `body` markup made by the functions below."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Headline numbers: (number, what it is)."""
    inside = "".join(
        f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in items
    )
    return f'<div class="tiles">{inside}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is words, the others numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table>"


def figure(svg: str, caption: str) -> str:
    """`svg` is markup of our own making."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, markup: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{markup}</details>"
