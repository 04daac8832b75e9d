"""Rows of a table's newest version read and written again without Spark: what maintenance needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from etl.lake.datafile import DataFile, data_schema, partition_value
from etl.lake.file_reader import open_parquet
from etl.lake.forms import with_gained
from etl.lake.snapshots import table_filesystem
from etl.lake.spark_io import FileWriter, data_files
from etl.tables import Table


def batches_of(
    lake: str, table: Table, file: DataFile, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """A data file's rows in memory's form, row group by row group; columns it has gained since are null."""
    schema = data_schema(table)
    wanted = pa.schema([schema.field(name) for name in columns]) if columns is not None else schema
    with open_parquet(lake, table, file.path) as opened:
        there = [name for name in wanted.names if name in opened.schema_arrow.names]
        for batch in opened.iter_batches(columns=there, use_threads=False):
            yield with_gained(batch, wanted).select(wanted.names)


def has_rows(lake: str, table: Table, file: DataFile, column: str, values: pa.Array) -> bool:
    """Whether a data file has a row whose `column` is one of `values`."""
    return any(
        pc.any(pc.is_in(batch.column(column), value_set=values.cast(batch.column(column).type))).as_py()
        for batch in batches_of(lake, table, file, [column])
    )


def partitions_of(files: Sequence[DataFile], table: Table) -> dict[tuple[str | None, ...], list[DataFile]]:
    """Files by partition."""
    found: dict[tuple[str | None, ...], list[DataFile]] = {}
    for file in files:
        found.setdefault(file.key(table), []).append(file)
    return found


def scope_of(key: tuple[str | None, ...], table: Table) -> Mapping[str, Sequence[Any]]:
    """A partition, as a commit's `partition_scope` names it."""
    return {
        name: [partition_value(text, table.schema.field(name))]
        for name, text in zip(table.partition_by, key, strict=True)
    }


def rewritten(
    lake: str, table: Table, files: Sequence[DataFile], change: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> tuple[list[DataFile], int]:
    """New files of what `change` leaves of the rows of `files`, and how many rows are gone. Nothing is committed."""
    written: list[DataFile] = []
    gone = 0
    filesystem = table_filesystem(lake, table)
    for file in files:
        key = tuple(partition_value(file.partition[name], table.schema.field(name)) for name in table.partition_by)
        writer: FileWriter | None = None
        for batch in batches_of(lake, table, file):
            left = change(batch)
            gone += batch.num_rows - left.num_rows
            if left.num_rows:
                writer = writer or FileWriter(filesystem, table, key)
                writer.add(left)
        if writer is not None:
            written += data_files(writer.close().column("file").to_pylist())
    return written, gone
