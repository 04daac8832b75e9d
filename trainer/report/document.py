"""A page of headings, text, tables and pictures, written as HTML (`page.html`) and as Markdown from the same blocks.

The HTML is one file that needs nothing else: its style is in it, its pictures are inline SVG, whose ink follows the
page's (light or dark). A table wider than the page scrolls sideways under a scroll bar and a shadow at its cut edge;
its first column stays. The template escapes all text.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure

from etl import text_table
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
    alt_text: str


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


def fold(summary: str, blocks: Sequence[Block]) -> list[Block]:
    return [Fold(summary, blocks)] if blocks else []


def write_document(title: str, blocks: Sequence[Block], folder: Path, name: str) -> Path:
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


def to_html(title: str, blocks: Sequence[Block]) -> str:
    return _template().render(title=title, blocks=blocks)


@cache
def _template() -> jinja2.Template:
    """`page.html`, which tells blocks apart by the names of their classes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(kind=lambda block: type(block).__name__, cell=_cell, svg=_inline)
    return environment.get_template("page.html")


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _inline(picture: Picture) -> markupsafe.Markup:
    return markupsafe.Markup(_svg(picture, transparent=True))


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
        case Picture(name, _, alt_text):
            return f"![{_plain(alt_text)}]({prefix}{name}.svg)"
        case Fold(summary, blocks):
            return "\n\n".join([f"**{_plain(summary)}**", *(_markdown(one, prefix) for one in blocks)])
        case Columns(left, right):
            return "\n\n".join(_markdown(one, prefix) for one in [*left, *right])
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    rows = [
        [f"**{_plain(row)}**", *[""] * (len(table.head) - 1)]
        if isinstance(row, str)
        else [_markdown_cell(_cell(cell)) for cell in row]
        for row in table.rows
    ]
    return "\n".join(text_table.markdown([_plain(name) for name in table.head], rows, words=table.texts))


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.tone in ("up", "down") and cell.text else _plain(cell.text)
    return text + (f" ({_plain(cell.beside)})" if cell.beside else "")


def _plain(text: str) -> str:
    """Text as one line, with Markdown's characters escaped."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(text.split()))
