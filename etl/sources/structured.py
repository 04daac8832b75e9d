"""JSON lines and Parquet to columns: the same `Chunk` that delimited text gives.

JSON: one object a line. pyarrow parses a block at once where all its lines are plain; a block with any oddity (a line
that is no object, cells of several kinds) is read line by line. Parquet: a row group at a time; a row's line is its
number.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from etl.settings import GraftrecError
from etl.sources.delimited import Chunk
from etl.sources.files import RawFile, open_raw, reading

_KINDS = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_EXACT = 2.0**53  # whole numbers below it are told apart by a float64
_NO_OBJECT = "not a JSON object"


def json_columns(rows: Chunk, wanted: Sequence[str]) -> Chunk:
    """The wanted keys of each line; an absent key is null. Lines that are no JSON object get a reason."""
    columns = _json_block(rows, wanted)
    if columns is not None:
        return Chunk(rows.line, columns, rows.reason, rows.raw)
    reasons: list[str | None] = []
    cells: list[list[Any]] = [[] for _ in wanted]
    for line, reason in zip(rows.raw.to_pylist(), rows.reason.to_pylist(), strict=True):
        found: dict[str, Any] = {}
        if reason is None:
            parsed = _object(line)
            found, reason = ({}, _NO_OBJECT) if parsed is None else (parsed, None)
        reasons.append(reason)
        for column, key in zip(cells, wanted, strict=True):
            column.append(_cell(_nested(found, key)))
    arrays = [_column(column) for column in cells]
    return Chunk(rows.line, arrays, pa.array(reasons, pa.string()), rows.raw)


def json_keys(head: bytes, *, name: str) -> list[str]:
    """Keys of the first hundred lines, for messages and to tell an absent column from a null.

    Raises GraftrecError where none of them is a JSON object.
    """
    lines = head.decode("utf-8", "replace").removeprefix("\ufeff").split("\n")[:100]
    objects = [found for line in lines if (found := _object(line)) is not None]
    if objects:
        return list(dict.fromkeys(key for found in objects for key in _keys(found)))
    first = next((line.strip() for line in lines if line.strip()), "")
    hint = "write one object a line"
    if first.startswith("["):
        hint = "an array: write one object a line, jq -c '.[]'"
    elif first.startswith("{") and "'" in first:
        hint = "Python's spelling of a dict: write JSON, json.dumps(ast.literal_eval(line))"
    raise GraftrecError(f"{name}: expected a JSON object on each line, found {first[:60]!r}; {hint}")


def _keys(found: dict[str, Any], prefix: str = "", depth: int = 8) -> Iterator[str]:
    """Keys of an object, and of objects in it as `outer.inner`."""
    for key, value in found.items():
        yield prefix + key
        if isinstance(value, dict) and depth:
            yield from _keys(value, f"{prefix}{key}.", depth - 1)


def _nested(found: dict[str, Any], key: str) -> Any:
    """The value of a key, else of `outer.inner` inside; null where there is none."""
    if key in found or "." not in key:
        return found.get(key)
    outer, inner = key.split(".", 1)
    inside = found.get(outer)
    return _nested(inside, inner) if isinstance(inside, dict) else None


def _object(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def parquet_groups(file: RawFile) -> tuple[list[str], list[int]]:
    """Column names and rows per row group. Raises GraftrecError for a file that is no Parquet file."""
    with reading(file), open_raw(file.path) as stream:
        opened = pq.ParquetFile(stream)
        meta = opened.metadata
        names = [name for field in opened.schema_arrow for name in _names(field)]
        return names, [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]


def parquet_chunks(file: RawFile, group: int, first_line: int, wanted: Sequence[str]) -> Iterator[Chunk]:
    """The wanted columns of one row group in batches."""
    with reading(file), open_raw(file.path) as stream:
        line = first_line
        for batch in pq.ParquetFile(stream).iter_batches(1 << 16, row_groups=[group], columns=sorted(set(wanted))):
            size = batch.num_rows
            yield Chunk(
                pa.array(np.arange(line, line + size)),
                [_parquet_cells(batch, name) for name in wanted],
                pa.nulls(size, pa.string()),
                pa.nulls(size, pa.string()),
            )
            line += size


def _names(field: pa.Field, prefix: str = "") -> Iterator[str]:
    """A column's name, and those of the fields of a struct as `outer.inner`."""
    yield prefix + field.name
    if pa.types.is_struct(field.type):
        for inner in field.type:
            yield from _names(inner, f"{prefix}{field.name}.")


def _parquet_cells(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer = max((one for one in batch.schema.names if name.startswith(one + ".")), key=len)
    return pc.struct_field(batch.column(outer), name.removeprefix(outer + ".").split("."))


def check_columns(wanted: Sequence[str | int], names: Sequence[str], *, name: str) -> list[str]:
    """The names of the wanted columns. Raises GraftrecError for one that isn't there."""
    found = []
    for column in wanted:
        if isinstance(column, int) and 0 <= column < len(names):
            found.append(names[column])
        elif column in names:
            found.append(str(column))
        else:
            raise GraftrecError(
                f"{name}: expected a column {column!r}; found columns: {', '.join(names)}; mend the name"
            )
    return found


def _json_block(rows: Chunk, wanted: Sequence[str]) -> list[pa.Array] | None:
    """All lines at once, or None where any of them needs a closer look."""
    if rows.reason.null_count < len(rows.reason) or not len(rows.raw) or any("." in key for key in wanted):
        return None
    trimmed = pc.ascii_trim_whitespace(rows.raw)
    objects = pc.and_(pc.starts_with(trimmed, "{"), pc.ends_with(trimmed, "}"))
    if not pc.all(objects).as_py():
        return None
    try:
        first = json.loads(rows.raw[0].as_py())
    except ValueError:
        return None
    fields = [pa.field(key, _KINDS.get(type(first.get(key)), pa.string())) for key in dict.fromkeys(wanted)]
    options = pa_json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    data = "\n".join(rows.raw.to_pylist()).encode()
    try:
        table = pa_json.read_json(
            pa.BufferReader(data), pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1), options
        )
    except pa.ArrowInvalid:
        return None
    columns = [table.column(key).combine_chunks() for key in wanted]
    if table.num_rows != len(rows.raw) or any(map(_may_have_lost_digits, columns)):
        return None
    return columns


def _may_have_lost_digits(column: pa.Array) -> bool:
    """Whether a float stands where a whole number of too many digits may have been written."""
    return pa.types.is_floating(column.type) and bool(pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py())


def _cell(value: Any) -> Any:
    """Numbers and text as they are; lists as lists of text; anything else as JSON text."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return _whole_characters(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list):
        return [_whole_characters(str(part)) for part in value if part is not None]
    return json.dumps(value)


def _column(cells: list[Any]) -> pa.Array:
    if any(isinstance(cell, list) for cell in cells):
        return pa.array(
            [cell if isinstance(cell, list) or cell is None else [str(cell)] for cell in cells], pa.list_(pa.string())
        )
    kinds = {type(cell) for cell in cells if cell is not None}
    is_mixed = kinds == {int, float} and not all(map(_is_exact_float, cells))
    if str in kinds or is_mixed or not all(map(_is_exact, cells)):
        return pa.array([None if cell is None else _spelled(cell) for cell in cells], pa.string())
    if float in kinds:
        return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())
    return pa.array(cells, pa.int64())


def _whole_characters(text: str) -> str:
    """U+FFFD for half of a surrogate pair, which is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_exact(cell: Any) -> bool:
    return not isinstance(cell, int) or abs(cell) < 1 << 62


def _is_exact_float(cell: Any) -> bool:
    return cell is None or abs(cell) < _EXACT or not math.isfinite(cell)


def _spelled(cell: Any) -> str:
    if isinstance(cell, float) and not math.isfinite(cell):
        return "NaN" if math.isnan(cell) else str(cell)
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < _EXACT:
        return str(int(cell))
    return cell if isinstance(cell, str) else str(cell)
