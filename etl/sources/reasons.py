"""Why a row is rejected, and where: reason, column and what was found in it; file, line and place in the line."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from etl.identifiers import is_text
from etl.sources.delimited import Chunk
from etl.sources.schema import RAW_CHARACTERS

_TEXT = pa.scalar(None, pa.string())


class Check(NamedTuple):
    """`failed`: True for rows that are rejected for `reason`; `column`, where it is about one, and what it holds."""

    failed: pa.Array
    reason: str
    column: str | None = None
    cells: pa.Array | None = None


def first(chunk: Chunk, checks: Sequence[Check]) -> dict[str, pa.Array]:
    """`reason`, `column` and `found`: of the chunk, else of the first check that a row fails."""
    nothing = pa.nulls(len(chunk.line), pa.string())
    reason = chunk.reason
    column, found = (nothing, nothing) if chunk.cell is None else chunk.cell
    for check in checks:
        failed = pc.and_(pc.fill_null(check.failed, False), pc.is_null(reason))
        if not pc.any(failed).as_py():
            continue
        reason = pc.if_else(failed, check.reason, reason)
        if check.column is not None and check.cells is not None:
            column = pc.if_else(failed, check.column, column)
            found = pc.replace_with_mask(found, failed, shown(check.cells.filter(failed)))
    return {"reason": reason, "column": column, "found": found}


def shown(cells: pa.Array) -> pa.Array:
    """Cells of any type as text, cut."""
    if not is_text(cells.type):
        cells = pa.array([None if cell is None else str(cell) for cell in cells.to_pylist()], pa.string())
    elif not pa.types.is_string(cells.type):
        texts = [cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell for cell in cells.to_pylist()]
        cells = pa.array(texts, pa.string())
    return pc.utf8_slice_codeunits(cells, 0, RAW_CHARACTERS)


def located(table: pa.Table, chunk: Chunk, kind: str, name: str) -> pa.Table:
    """Put kind, file, line, place, reason, column, found and raw (of rejected rows) behind a shaped table, which holds
    what `first` gives."""
    size = len(chunk.line)
    reason, column, found = (table.column(name).combine_chunks() for name in ("reason", "column", "found"))
    raw = pa.nulls(size, pa.string())
    if reason.null_count < size:
        text = pc.utf8_slice_codeunits(_with_text(chunk, reason), 0, RAW_CHARACTERS)
        raw = pc.if_else(pc.is_valid(reason), text, _TEXT)
    return (
        table.drop_columns(["reason", "column", "found"])
        .append_column("kind", pa.repeat(pa.scalar(kind), size))
        .append_column("file", pa.repeat(pa.scalar(name), size))
        .append_column("line", chunk.line)
        .append_column("place", pa.nulls(size, pa.int64()) if chunk.place is None else chunk.place)
        .append_column("reason", reason)
        .append_column("column", column)
        .append_column("found", found)
        .append_column("raw", raw)
    )


def _with_text(chunk: Chunk, reason: pa.Array) -> pa.Array:
    """The rows' text; of a rejected row of a format without text (Parquet), its wanted cells."""
    bare = pc.and_(pc.is_valid(reason), pc.is_null(chunk.raw))
    if not pc.any(bare).as_py():
        return chunk.raw
    rows = zip(*(column.to_pylist() for column in (column.filter(bare) for column in chunk.columns)), strict=True)
    texts = pa.array([", ".join("null" if cell is None else str(cell) for cell in row) for row in rows], pa.string())
    return pc.replace_with_mask(pc.cast(chunk.raw, pa.string()), bare, texts)
