"""Parquet files to columns, a row group at a time; a row's line is its number."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.sources.delimited import Chunk
from etl.sources.files import RawFile, open_raw, reading


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
        opened = pq.ParquetFile(stream)
        read = sorted({_read_as(opened.schema_arrow, name) for name in wanted})
        for batch in opened.iter_batches(1 << 16, row_groups=[group], columns=read):
            size = batch.num_rows
            yield Chunk(
                pa.array(np.arange(line, line + size)),
                [_parquet_cells(batch, name) for name in wanted],
                pa.nulls(size, pa.string()),
                pa.nulls(size, pa.string()),
            )
            line += size


def _read_as(schema: pa.Schema, name: str) -> str:
    """The name by which Parquet reads a column: of a field in a list's structs, the whole list."""
    outer = next((field for field in schema if name.startswith(f"{field.name}.") and _is_list(field.type)), None)
    return name if outer is None or name in schema.names else outer.name


def _names(field: pa.Field, prefix: str = "") -> Iterator[str]:
    """A column's name, and those of the fields of a struct, or of a list's structs, as `outer.inner`."""
    yield prefix + field.name
    inside = field.type.value_type if _is_list(field.type) else field.type
    if pa.types.is_struct(inside):
        for inner in inside:
            yield from _names(inner, f"{prefix}{field.name}.")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _parquet_cells(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer = max((one for one in batch.schema.names if name.startswith(one + ".")), key=len)
    return _inner(batch.column(outer), name.removeprefix(outer + ".").split("."))


def _inner(cells: pa.Array, steps: Sequence[str]) -> pa.Array:
    """Fields inside structs, or inside the structs of lists."""
    if not steps:
        return cells
    if _is_list(cells.type):
        inside = _inner(cells.flatten(), steps)
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(cells), 0).to_numpy())])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), inside)
    return _inner(pc.struct_field(cells, steps[0]), steps[1:])
