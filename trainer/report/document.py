"""A page of headings, text, tables and pictures, written as HTML and as Markdown from the same blocks.

The HTML is one file that needs nothing else: its style is in it, its pictures are inline SVG, whose ink follows the
page's (light or dark). A table wider than the page scrolls sideways under a scroll bar and a shadow at its cut edge;
its first column stays.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.figure import Figure

from trainer import figures

Tone = Literal["", "up", "down", "faint", "lead"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a text, and a second one in smaller type beside it (the survey's number, an interval)."""

    text: str
    beside: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; a row that is a string is a title within the table. The first `texts` columns are words, the
    others numbers. Stacked: a cell's second text
    stands below the first, where it is long."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str] | str]
    texts: int = 1
    stacked: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its file beside the Markdown, and its alternative text."""

    name: str
    figure: Figure
    shows: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away until the reader opens them."""

    summary: str
    blocks: "Sequence[Block]"


@dataclass(frozen=True)
class Columns:
    """Two groups of blocks side by side; one below the other on a narrow screen and in Markdown."""

    left: "Sequence[Block]"
    right: "Sequence[Block]"


Block = Heading | Text | Points | Table | Picture | Fold | Columns


def write(title: str, blocks: Sequence[Block], folder: Path, name: str) -> Path:
    """Writes name.html, name.md and name-<picture>.svg (for the Markdown) into the folder; the path of the HTML."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name}.html"
    page.write_text(to_html(title, blocks), encoding="utf-8")
    (folder / f"{name}.md").write_text(to_markdown(title, blocks, prefix=f"{name}-"), encoding="utf-8")
    for picture in _pictures(blocks):
        (folder / f"{name}-{picture.name}.svg").write_text(_svg(picture, transparent=False), encoding="utf-8")
    return page


def _pictures(blocks: Iterable[Block]) -> Iterable[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Fold):
            yield from _pictures(block.blocks)
        elif isinstance(block, Columns):
            yield from _pictures([*block.left, *block.right])


# --- HTML ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --faint: #6a737d; --line: #dfe3e8; --band: #f5f7f9;
  --up: #00634a; --down: #a84300; --grid: #e5e5e5; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e4e7ea; --faint: #9aa3ac; --line: #353b42;
  --band: #20252a; --up: #4cc79d; --down: #f2935a; --grid: #343a40; --shade: #000b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; } ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
.lead { font-size: 1.08rem; max-width: 62rem; }
.columns > div > :first-child { margin-top: .6rem; }
@media (min-width: 60rem) { .columns { display: grid; gap: 2.5rem;
  grid-template-columns: minmax(0, 9fr) minmax(0, 8fr); } }
.table { overflow-x: auto; margin: .8rem 0; background:
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll; }
.table::-webkit-scrollbar { height: .6rem; } .table::-webkit-scrollbar-track { background: var(--band); }
.table::-webkit-scrollbar-thumb { background: var(--faint); border-radius: .3rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 24rem; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; }
.t { text-align: left; } td.t { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
tr.title td { background: var(--band); font-weight: 600; text-align: left; white-space: nowrap; }
small { color: var(--faint); font-size: .82em; margin-left: .35em; font-weight: 400; }
.stacked small { display: block; margin: 0; white-space: pre; } .stacked td { vertical-align: top; }
.stacked th, .stacked td { padding: .28rem .35rem; } .stacked table { font-size: .85rem; }
.up { color: var(--up); font-weight: 600; } .down { color: var(--down); font-weight: 600; }
.faint { color: var(--faint); }
figure { margin: 1rem 0; max-width: 44rem; } svg { display: block; width: 100%; height: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .2rem 0; }
@media (max-width: 40rem) { td.t { min-width: 7.5rem; } th, td { padding: .28rem .4rem; } table { font-size: .82rem; } }
@media print { .table { overflow: visible; background: none; } }
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, tone):
            return f'<p class="{tone}">{escape(text)}</p>' if tone else f"<p>{escape(text)}</p>"
        case Points(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Picture(_, _, shows):
            return f'<figure role="img" aria-label="{escape(shows)}">{_svg(block, transparent=True)}</figure>'
        case Fold(summary, blocks):
            inside = "\n".join(_html(one) for one in blocks)
            return f"<details><summary>{escape(summary)}</summary>\n{inside}\n</details>"
        case Columns(left, right):
            sides = ("\n".join(_html(one) for one in side) for side in (left, right))
            return f'<div class="columns"><div>{next(sides)}</div>\n<div>{next(sides)}</div></div>'
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    kinds = [' class="t"' if place < table.texts else "" for place in range(len(table.head))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.head, strict=True))
    lines = [f"<tr>{head}</tr>"]
    for row in table.rows:
        if isinstance(row, str):
            rest = f'<td colspan="{len(table.head) - 1}"></td>' if len(table.head) > 1 else ""
            lines.append(f'<tr class="title"><td>{escape(row)}</td>{rest}</tr>')
            continue
        cells = [f"<td{kind}>{_html_cell(_cell(cell))}</td>" for kind, cell in zip(kinds, row, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="table{" stacked" * table.stacked}" tabindex="0"><table>\n' + "\n".join(lines) + "\n</table></div>"
    )


def _html_cell(cell: Cell) -> str:
    text = f'<span class="{cell.tone}">{escape(cell.text)}</span>' if cell.tone else escape(cell.text)
    return text + (f"<small>{escape(cell.beside)}</small>" if cell.beside else "")


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _svg(picture: Picture, *, transparent: bool) -> str:
    """The figure as an SVG element whose texts are texts; inline (transparent) its ink and grid are the page's."""
    buffer = io.StringIO()
    # The salt makes ids (of clips, markers) differ between the pictures of a page, and not between two writings.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):
        picture.figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    if transparent:
        svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # names of parts (axes_1…), the same in every picture
        for colour, name in ((figures.INK, "ink"), (figures.FAINT, "faint"), (figures.GRID, "grid")):
            svg = svg.replace(colour.lower(), f"var(--{name})")
        svg = svg.replace("#ffffff", "var(--paper)")
    return svg


# --- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(title: str, blocks: Sequence[Block], *, prefix: str = "") -> str:
    """`prefix`: of the pictures' files."""
    return "\n\n".join([f"# {_plain(title)}", *(_markdown(block, prefix) for block in blocks)]) + "\n"


def _markdown(block: Block, prefix: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, _):
            return _plain(text)
        case Points(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(name, _, shows):
            return f"![{_plain(shows)}]({prefix}{name}.svg)"
        case Fold(summary, blocks):
            return "\n\n".join([f"**{_plain(summary)}**", *(_markdown(one, prefix) for one in blocks)])
        case Columns(left, right):
            return "\n\n".join(_markdown(one, prefix) for one in [*left, *right])
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    rule = [":--" if place < table.texts else "--:" for place in range(len(table.head))]
    rows = [
        [f"**{_plain(row)}**", *[""] * (len(table.head) - 1)]
        if isinstance(row, str)
        else [_markdown_cell(_cell(cell)) for cell in row]
        for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[_plain(name) for name in table.head], rule, *rows])


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.tone in ("up", "down") and cell.text else _plain(cell.text)
    return text + (f" ({_plain(cell.beside)})" if cell.beside else "")


def _plain(text: str) -> str:
    """Text as one line, with Markdown's characters escaped."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))
