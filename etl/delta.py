"""The one module that writes or reads Delta from Spark (DESIGN section 3).

Writing: executors write Parquet (zstd, sorted by the table's order), with Spark's own writer on local disks, which is
3 to 5 times faster than anything through Python, and with pyarrow inside `mapInArrow` on object stores, which needs no
Hadoop file system. The driver verifies each file and commits all of them in one transaction (`etl.commit`). A task that
fails or runs twice leaves files that no version names.

Reading: always a snapshot. The list of files comes from the log, and exactly these are read.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from etl.commit import (
    STAGING,
    CommitConflict,
    LakeError,
    Mode,
    UnsupportedFeature,
    Written,
    commit_files,
    current_version,
    landed,
    last_commit,
    local_path,
    snapshot_files,
    table_filesystem,
    table_uri,
    transactions,
)
from etl.datafile import DataFile, InvalidFile, data_schema, partition_text
from etl.tables import Table

__all__ = [
    "CommitConflict",
    "DataFile",
    "InvalidFile",
    "LakeError",
    "Mode",
    "UnsupportedFeature",
    "Written",
    "commit_files",
    "current_version",
    "landed",
    "last_commit",
    "read",
    "snapshot_files",
    "table_uri",
    "transactions",
    "write",
]

ROW_GROUP_BYTES = 16 << 20
ROW_GROUP_ROWS = 65_536
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def read(
    spark: SparkSession,
    lake: str,
    table: Table,
    *,
    version: int | None = None,
    partitions: Mapping[str, Sequence[Any]] | None = None,
) -> DataFrame:
    """`table` at `version` (None: the newest as of this call), in the contract's columns; only `partitions` if given.

    Raises LakeError where there is no such table or version, or what is there can't be read.
    """
    schema = from_arrow_schema(table.schema)
    files = snapshot_files(lake, table, version, partitions)
    if not files:
        return spark.createDataFrame([], schema)
    if local_path(lake) is not None and all(_hive_partition(file.path, table) == file.partition for file in files):
        root = table_uri(lake, table)
        reader = spark.read.schema(schema).option("basePath", root).option("__globPaths__", "false")
        return reader.parquet(*(f"{root}/{file.path}" for file in files)).select(table.schema.names)
    rows = [(json.dumps({"path": file.path, "partition": dict(file.partition)}),) for file in files]
    names = spark.createDataFrame(rows, "file string").repartition(len(rows))
    return names.mapInArrow(partial(_read_files, lake=lake, table=table), schema)


def write(
    spark: SparkSession,
    frame: DataFrame,
    lake: str,
    table: Table,
    *,
    mode: Mode,
    app: str,
    app_version: int,
    metadata: Mapping[str, str],
    properties: Mapping[str, str] | None = None,
    partition_scope: Mapping[str, Sequence[Any]] | None = None,
    transactions: Mapping[str, int] | None = None,
) -> Written:
    """Write `frame` to `table` in one transaction, once per (app, app_version): see `etl.commit.commit_files`.

    The frame must have the contract's columns and types, in any order. Where this (app, app_version) has landed already,
    nothing is computed.
    """
    if done := landed(lake, table, app, app_version):
        return done
    _check_frame(frame, table)
    columns = [F.col(f"`{name}`") for name in table.schema.names]
    frame = frame.select(*columns)
    if table.partition_by:
        frame = frame.repartition(*table.partition_by)
    if order := [*table.partition_by, *table.order]:
        frame = frame.sortWithinPartitions(*order)
    files = _write_local(frame, lake, table) if local_path(lake) is not None else _write_arrow(frame, lake, table)
    return commit_files(
        lake,
        table,
        files,
        mode=mode,
        app=app,
        app_version=app_version,
        metadata=metadata,
        properties=properties,
        partition_scope=partition_scope,
        transactions=transactions,
    )


def _check_frame(frame: DataFrame, table: Table) -> None:
    """The frame's columns and types must be the contract's: Spark and Delta would cast, and lose, in silence."""
    expected = {field.name: field.dataType for field in from_arrow_schema(table.schema)}
    found = {field.name: field.dataType for field in frame.schema}
    if expected.keys() != found.keys() or len(frame.columns) != len(expected):
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise InvalidFile(
            f"{table.name}: expected the columns {list(expected)}, found {missing} missing, {extra} extra"
        )
    for name, kind in expected.items():
        if _plain(kind) != _plain(found[name]):
            raise InvalidFile(
                f"{table.name}: column {name} should be {kind.simpleString()}, found {found[name].simpleString()}; cast it"
            )


def _plain(kind: Any) -> str:
    return str(kind.simpleString())  # nullability is checked in the files


# --- Spark's own writer -------------------------------------------------------------------------------------------------


def _write_local(frame: DataFrame, lake: str, table: Table) -> list[DataFile]:
    """Into a staging folder, then, renamed, into the table's. Until the commit no version names them."""
    root = Path(table_uri(lake, table))
    staging = root / f"{STAGING}{uuid.uuid4().hex}"
    try:
        (
            frame.write.option("compression", "zstd")
            .option("parquet.block.size", ROW_GROUP_BYTES)
            .option("parquet.block.row.count.limit", ROW_GROUP_ROWS)
            .partitionBy(*table.partition_by)
            .parquet(str(staging))
        )
        return [file for path in sorted(staging.rglob("*.parquet")) if (file := _move(path, staging, root, table))]
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what a version may name has been moved out of it


def _move(path: Path, staging: Path, root: Path, table: Table) -> DataFile | None:
    if pq.read_metadata(path).num_rows == 0:
        return None
    relative = path.relative_to(staging)
    target = relative.parent / f"part-{uuid.uuid4().hex}.zstd.parquet"
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, root / target)
    return DataFile(target.as_posix(), _hive_partition(target.as_posix(), table) or {}, (root / target).stat().st_size)


def _hive_partition(path: str, table: Table) -> dict[str, str | None] | None:
    """The partition values a path spells, None unless it spells exactly the partition columns, in order."""
    folders = [part.partition("=") for part in path.split("/")[:-1]]
    if [name for name, equals, _ in folders if equals] != list(table.partition_by) or not all(f[1] for f in folders):
        return None
    return {name: None if text == _NULL_PARTITION else _unescape(text) for name, _, text in folders}


def _unescape(text: str) -> str:
    return re.sub(r"%([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)


# --- through Arrow ------------------------------------------------------------------------------------------------------


def _write_arrow(frame: DataFrame, lake: str, table: Table) -> list[DataFile]:
    written = frame.mapInArrow(partial(_write_batches, lake=lake, table=table), "file string").collect()
    found = [json.loads(row["file"]) for row in written]
    return [DataFile(entry["path"], entry["partition"], entry["size"]) for entry in found]


def _write_batches(batches: Iterator[pa.RecordBatch], lake: str, table: Table) -> Iterator[pa.RecordBatch]:
    """One task: each run of rows with equal partition values (they come sorted) becomes a file."""
    filesystem = table_filesystem(lake, table)
    schema = data_schema(table)
    key: tuple[Any, ...] | None = None
    path, writer, sink = "", None, None
    done: list[str] = []

    def close() -> None:
        if writer is None or sink is None or key is None:
            return
        writer.close()
        size = sink.tell()
        sink.close()
        partition = dict(zip(table.partition_by, map(partition_text, key), strict=True))
        done.append(json.dumps({"path": path, "partition": partition, "size": size}))

    for batch in batches:
        for values, rows in _runs(pa.Table.from_batches([batch]), table):
            if values != key:
                close()
                key, path = values, f"part-{uuid.uuid4().hex}.zstd.parquet"
                sink = filesystem.open_output_stream(path)
                writer = pq.ParquetWriter(sink, schema, compression="zstd")
            assert writer is not None
            writer.write_table(rows.select(schema.names).cast(schema), row_group_size=ROW_GROUP_ROWS)
    close()
    yield pa.RecordBatch.from_pydict({"file": pa.array(done, pa.string())})


def _runs(rows: pa.Table, table: Table) -> Iterator[tuple[tuple[Any, ...], pa.Table]]:
    """Cut rows, sorted by partition columns, into (partition values, rows)."""
    if not rows.num_rows:
        return
    keys = (
        list(zip(*(rows.column(name).to_pylist() for name in table.partition_by), strict=True)) or [()] * rows.num_rows
    )
    start = 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] != keys[start]:
            yield keys[start], rows.slice(start, stop - start)
            start = stop


def _read_files(batches: Iterator[pa.RecordBatch], lake: str, table: Table) -> Iterator[pa.RecordBatch]:
    """One task: the named files, row group by row group, with the log's partition values as columns."""
    from etl.datafile import partition_value

    filesystem = table_filesystem(lake, table)
    schema = pa.schema([field.with_nullable(True) for field in table.schema])
    for batch in batches:
        for entry in batch.column(0).to_pylist():
            found = json.loads(entry)
            values = {c: partition_value(found["partition"][c], table.schema.field(c)) for c in table.partition_by}
            with filesystem.open_input_file(found["path"]) as file:
                for rows in pq.ParquetFile(file).iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
                    arrays = [
                        pa.repeat(pa.scalar(values[f.name], f.type), rows.num_rows)
                        if f.name in values
                        else rows.column(f.name).cast(f.type)
                        for f in schema
                    ]
                    yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def spark_schema(table: Table) -> StructType:
    """The contract as a Spark schema."""
    return from_arrow_schema(table.schema)
