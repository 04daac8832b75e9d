"""The forms that a table's rows have: in memory (`Table.schema`), and in files of this format and of the one before.

Rows come from files in their form in memory, whatever the files hold: integers for timestamps, which copies nothing,
maps for the lists of format 1.
"""

from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.tables import ATTRIBUTES, TIME_ORDINAL, TIME_TIMESTAMP, Table

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)

FIRST_ATTRIBUTES = pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("value", pa.string())]))
_MICROSECONDS = pa.timestamp("us", "UTC")


def forms(table: Table) -> list[pa.Schema]:
    """The schemas that a version of the table may have in the log."""
    found = [table.of(TIME_TIMESTAMP).stored, table.of(TIME_ORDINAL).stored]
    return [*found, first_form(table)]


def first_form(table: Table) -> pa.Schema:
    """The schema of format 1."""
    return pa.schema(
        [field.with_type(FIRST_ATTRIBUTES) if field.type == ATTRIBUTES else field for field in table.schema]
    )


def schema_in_memory(schema: pa.Schema) -> pa.Schema:
    """The schema that in_memory gives rows of `schema`."""
    return pa.schema([field.with_type(_type_in_memory(field.type)) for field in schema], schema.metadata)


def in_memory(rows: Rows) -> Rows:
    """Rows as a file has them, in memory's form."""
    schema = schema_in_memory(rows.schema)
    if schema == rows.schema:
        return rows
    columns = [_column(rows.column(field.name), field.type) for field in schema]
    found: Rows = type(rows).from_arrays(columns, schema=schema)
    return found


def _type_in_memory(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.int64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        value = kind.value_type
        if pa.types.is_timestamp(value):
            return pa.list_(pa.int64()) if pa.types.is_list(kind) else pa.large_list(pa.int64())
        if pa.types.is_struct(value) and value.names == ["name", "value"]:
            return ATTRIBUTES
    return kind


def _column(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if column.type == kind:
        return column
    if kind == ATTRIBUTES:
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        maps = [as_map(chunk) for chunk in chunks]
        return pa.chunked_array(maps, ATTRIBUTES) if isinstance(column, pa.ChunkedArray) else maps[0]
    if pa.types.is_timestamp(column.type):
        return column.cast(_MICROSECONDS).cast(kind)  # of another unit, where others have rewritten the table
    timed = pa.list_(_MICROSECONDS) if pa.types.is_list(kind) else pa.large_list(_MICROSECONDS)
    return column.cast(timed).cast(kind)


def as_map(lists: pa.ListArray) -> pa.MapArray:
    """ATTRIBUTES of lists of structs {name, value}. Of a name that a list has twice the first value counts."""
    size = pc.list_value_length(lists).fill_null(0).to_numpy()
    flat = lists.flatten()
    owner = np.repeat(np.arange(len(size)), size)
    name, value = (pc.struct_field(flat, field).cast(pa.string()) for field in ("name", "value"))
    names = pc.dictionary_encode(name)
    code = names.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    _, first = np.unique(owner * (len(names.dictionary) + 1) + code, return_index=True)
    kept = np.sort(first[code[first] >= 0])
    offsets = np.searchsorted(owner[kept], np.arange(len(size) + 1))
    return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), name.take(pa.array(kept)), value.take(pa.array(kept)))
