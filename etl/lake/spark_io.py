"""The one module that writes or reads Delta from Spark.

Writing: executors write Parquet (zstd, sorted by the table's order), with Spark's own writer on local disks, which is
3 to 5 times faster than anything through Python, and with pyarrow inside `mapInArrow` on object stores, which needs no
Hadoop file system, and on Sail, whose own writer heeds no bounds on row groups. The driver verifies each file and
commits all of them in one transaction (`etl.lake.commit`). A task that fails or runs twice leaves files that no version
names.

Reading: always a snapshot. The list of files comes from the log, and exactly these are read.

Through Arrow, an executor imports this package: on another machine it must be installed.
"""

import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import DataType, StructType
from pyspark.sql.window import Window

from etl.lake.commit import CHECKERS, Commit, CommitConflict, Mode, Written, commit_files, landed
from etl.lake.datafile import DataFile, InvalidFile, data_schema, file_schema, partition_text, partition_value
from etl.lake.file_reader import DigestSink, check_files, digest_name, digest_of, open_parquet
from etl.lake.forms import with_gained
from etl.lake.lease import LakeBusy, LeaseLost, writing
from etl.lake.retention import remove_orphans, unfinished_removed
from etl.lake.snapshots import (
    STAGING,
    LakeError,
    UnsupportedFeature,
    current_version,
    existing_table,
    form_of,
    last_commit,
    local_path,
    log_digest,
    make_folder,
    snapshot_files,
    table_filesystem,
    table_uri,
    transactions,
)
from etl.lake.write_tasks import check_wanted, counted_task
from etl.plain_path import absolute, is_plain
from etl.session import engine_of, user_errors
from etl.settings import GraftrecError
from etl.tables import Table

__all__ = [
    "Commit",
    "CommitConflict",
    "DataFile",
    "InvalidFile",
    "LakeBusy",
    "LakeError",
    "LeaseLost",
    "Mode",
    "UnsupportedFeature",
    "Written",
    "bucket_of",
    "commit_files",
    "current_version",
    "landed",
    "last_commit",
    "log_digest",
    "read",
    "remove_orphans",
    "snapshot_files",
    "spark_schema",
    "table_filesystem",
    "table_uri",
    "transactions",
    "unfinished_removed",
    "write",
    "writing",
]

ROW_GROUP_BYTES = 16 << 20
ROW_GROUP_ROWS = 65_536
MAX_NAME_BYTES = 255  # of a file or folder
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def spark_schema(table: Table) -> StructType:
    """The contract as a Spark schema."""
    return from_arrow_schema(table.schema)


def bucket_of(buckets: int) -> Column:
    """The bucket of the column `user`: see `etl.tables.bucket_of`."""
    return F.pmod(F.crc32(F.encode("user", "utf-8")), F.lit(buckets)).cast("int")


def read(
    spark: SparkSession,
    lake: str,
    table: Table,
    *,
    version: int | None = None,
    partitions: Mapping[str, Sequence[Any]] | None = None,
    files: Sequence[DataFile] | None = None,
    times: tuple[int, int] | None = None,
) -> DataFrame:
    """`table` at `version` (None: the newest as of this call), in the contract's columns; only `partitions` if given.
    `files`: of these files of a snapshot instead (see `etl.lake.snapshots.snapshot_files`). `times`:
    only rows whose `time` lies between these two, both included.

    Raises LakeError where there is no such table or version, or what is there can't be read.
    """
    lake = absolute(lake)  # executors have folders of their own
    schema = from_arrow_schema(_nullable(table.schema))
    whole = files is None
    if files is None:
        version = current_version(lake, table) if version is None else version
        files = snapshot_files(lake, table, version, partitions)
    if not files:
        return spark.createDataFrame([], schema)
    if local_path(lake) is not None:  # the engine's own readers check nothing
        check_files(lake, table, [file.path for file in files])
    if local_path(lake) is not None and engine_of(spark) == "sail":
        root = table_uri(lake, table)
        if whole and is_plain(root):
            return _in_memory(_read_sail(spark, lake, table, version, partitions or {}), table, times)
    elif _spark_reads(lake) and all(_hive_partition(file.path, table) == file.partition for file in files):
        root = table_uri(lake, table)
        stored = _nullable(form_of(existing_table(lake, table, version), lake, table))
        reader = spark.read.schema(from_arrow_schema(stored)).option("basePath", root).option("__globPaths__", "false")
        return _in_memory(reader.parquet(*(f"{root}/{file.path}" for file in files)), table, times)
    rows = [(json.dumps({"path": file.path, "partition": dict(file.partition)}),) for file in files]
    names = spark.createDataFrame(rows, "file string").repartition(len(rows))
    return _in_memory(names.mapInArrow(partial(_read_files, lake=lake, table=table), schema), table, times)


def _spark_reads(lake: str) -> bool:
    """Whether Spark's own reader and writer of Parquet know the lake's path as it is, on every machine."""
    local = local_path(lake)
    return local is not None and re.fullmatch(r"[\w ./-]*", str(local.absolute())) is not None


def _read_sail(
    spark: SparkSession, lake: str, table: Table, version: int | None, partitions: Mapping[str, Sequence[Any]]
) -> DataFrame:
    """By Sail's own reader of Delta: of Parquet files in hive folders it doesn't see the partition values."""
    reader = spark.read.format("delta").option("versionAsOf", str(version))
    frame = reader.load(Path(table_uri(lake, table)).as_uri())
    for name, values in partitions.items():
        given = F.col(f"`{name}`").isin([value for value in values if value is not None])
        frame = frame.where(given | F.col(f"`{name}`").isNull() if None in values else given)
    return frame


def _in_memory(frame: DataFrame, table: Table, times: tuple[int, int] | None) -> DataFrame:
    """Rows as files have them in memory's form, and those within `times` alone. The filter comes first: none is pushed
    down through the conversion."""
    kinds = dict(frame.dtypes)
    if times is not None:
        bounds = [F.lit(time) for time in times]
        if kinds["time"] == "timestamp":
            bounds = [F.timestamp_micros(bound) for bound in bounds]
        frame = frame.where(F.col("time").between(*bounds))
    return frame.select(*(_column_in_memory(field.name, field.dataType, kinds) for field in spark_schema(table)))


def _column_in_memory(name: str, wanted: DataType, kinds: Mapping[str, str]) -> Column:
    if name not in kinds:  # a column that the contract has gained since
        return F.lit(None).cast(wanted).alias(name)
    kind = kinds[name]
    column = F.col(f"`{name}`")
    if kind == "timestamp":
        return F.unix_micros(column).alias(name)
    if kind == "array<timestamp>":
        return F.transform(column, F.unix_micros).alias(name)
    if kind == "array<struct<name:string,value:string>>":
        return F.map_from_entries(column).alias(name)
    return column


def write(
    spark: SparkSession, frame: DataFrame, lake: str, table: Table, commit: Commit, *, partitioned: bool = False
) -> Written:
    """Write `frame` to `table` in one transaction: see `etl.lake.commit.commit_files`.

    The frame must have the contract's columns and types, in any order. `partitioned`: the rows of a partition lie
    together, and need not be shuffled. Where the commit's (app, app_version) has landed already, nothing is computed.
    """
    if done := landed(lake, table, commit.app, commit.app_version):
        return done
    _check_frame(frame, table)
    lake = absolute(lake)  # executors have folders of their own
    with unfinished_removed(lake, table):
        if engine_of(spark) == "sail":
            files = _write_arrow(_placed(frame, table), lake, table)
        elif not _spark_reads(lake):
            files = _write_arrow(_sorted(frame, table, partitioned=partitioned), lake, table)
        else:
            files = _write_local(_sorted(frame, table, partitioned=partitioned), lake, table)
        return commit_files(lake, table, files, commit)


def _sorted(frame: DataFrame, table: Table, *, partitioned: bool) -> DataFrame:
    """The rows of a partition together, each task's in the order of partitions, then the table's."""
    frame = frame.select(*(_opaque(f.name) if f.name in table.partition_by else _as_stored(f) for f in table.stored))
    if table.partition_by and not partitioned:
        frame = frame.repartition(*table.partition_by)
    order = [*table.partition_by, *table.order]
    return frame.sortWithinPartitions(*order) if order else frame


def _placed(frame: DataFrame, table: Table) -> DataFrame:
    """As _sorted, for Sail, which drops a sort whose order no operator asks for: the rows with their places in it."""
    window = Window.partitionBy(*table.partition_by) if table.partition_by else Window
    place = F.row_number().over(window.orderBy(*(table.order or table.key)))
    return frame.select(*_columns(table), place.alias("_place"))


def _as_stored(field: pa.Field) -> Column:
    column = F.col(f"`{field.name}`")
    if pa.types.is_timestamp(field.type):
        return F.timestamp_micros(column).alias(field.name)
    if pa.types.is_list(field.type) and pa.types.is_timestamp(field.type.value_type):
        return F.transform(column, F.timestamp_micros).alias(field.name)
    return column


def _opaque(name: str) -> Column:
    """The column, but no constant to the optimizer, which would drop that from our order, find the rows not sorted by
    partition, and sort them again by partition alone, losing ours.
    """
    return F.when(F.monotonically_increasing_id() >= 0, F.col(f"`{name}`")).alias(name)


def _columns(table: Table) -> list[str]:
    return [f"`{name}`" for name in table.schema.names]


def _nullable(schema: pa.Schema) -> pa.Schema:
    """As Spark reads any file."""
    return pa.schema([field.with_nullable(True) for field in schema])


def _check_frame(frame: DataFrame, table: Table) -> None:
    """The frame's columns and types must be the contract's: Spark and Delta would cast, and lose, in silence.

    Nullability isn't compared: Spark calls most columns nullable; the files are checked for nulls.
    """
    expected = {field.name: field.dataType.simpleString() for field in spark_schema(table)}
    found = {field.name: field.dataType.simpleString() for field in frame.schema}
    if expected.keys() != found.keys() or len(frame.columns) != len(expected):
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise InvalidFile(
            f"{table.name}: expected the columns {list(expected)}, each once, found {frame.columns} (missing "
            f"{missing}, extra {extra}); mend the job"
        )
    for name, kind in expected.items():
        if kind != found[name]:
            raise InvalidFile(f"{table.name}: column {name} should be {kind}, found {found[name]}; cast it in the job")


# --- Spark's own writer -----------------------------------------------------------------------------------------------


def _write_local(frame: DataFrame, lake: str, table: Table) -> list[DataFile]:
    """Into a staging folder, then, renamed, into the table's. Until the commit no version names them."""
    root = Path(table_uri(lake, table))
    make_folder(root)
    staging = root / f"{STAGING}{uuid.uuid4().hex}"
    try:
        (
            frame.write.option("compression", "zstd")
            .option("parquet.block.size", ROW_GROUP_BYTES)
            .option("parquet.block.row.count.limit", ROW_GROUP_ROWS)
            .partitionBy(*table.partition_by)
            .parquet(str(staging))
        )
        with ThreadPoolExecutor(CHECKERS) as pool:
            moved = pool.map(lambda path: _move(path, staging, root, table), sorted(staging.rglob("*.parquet")))
            return [file for file in moved if file is not None]
    except Exception as error:
        if "No space left on device" in str(error):
            raise LakeError(
                f"{root}: no space left on the disk, nothing was committed; make room, then again"
            ) from None
        if re.search("File name too long|Mkdirs failed", str(error)):  # a partition value too long for a folder's name
            return _write_arrow(frame, lake, table)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # what a version may name has been moved out of it


def _move(path: Path, staging: Path, root: Path, table: Table) -> DataFile | None:
    """Give a staged file its place in the table; None for one without rows."""
    if pq.read_metadata(path).num_rows == 0:
        return None
    with pa.OSFile(str(path)) as file:
        name = digest_name(f"part-{uuid.uuid4().hex}.zstd.parquet", digest_of(file))
    target = path.relative_to(staging).parent / name
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    os.rename(path, root / target)
    return DataFile(target.as_posix(), _hive_partition(target.as_posix(), table) or {}, size)


def _hive_partition(path: str, table: Table) -> dict[str, str | None] | None:
    """The partition values a path spells, None unless it spells exactly the partition columns, in order."""
    folders = [part.partition("=") for part in path.split("/")[:-1]]
    if [name for name, _, _ in folders] != list(table.partition_by):
        return None
    return {name: None if text == _NULL_PARTITION else _unescape(text) for name, _, text in folders}


def _hive_folder(table: Table, key: tuple[Any, ...]) -> str:
    """Where a partition's files lie. The log decides, but Polars goes by this, and misreads a table that has
    a file without; a value too long for a folder's name leaves no choice.
    """
    texts = [_NULL_PARTITION if (text := partition_text(value)) is None else _escape(text) for value in key]
    names = [f"{column}={text}" for column, text in zip(table.partition_by, texts, strict=True)]
    return "" if any(len(name.encode()) > MAX_NAME_BYTES for name in names) else "".join(f"{name}/" for name in names)


def _escape(text: str) -> str:
    """As Spark does."""
    return re.sub(r"""[\x01-\x1f"#%'*/:=?\\\x7f{\[\]^]""", lambda found: f"%{ord(found[0]):02X}", text)


def _unescape(text: str) -> str:
    return re.sub(r"%([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)


# --- through Arrow ----------------------------------------------------------------------------------------------------


def _write_arrow(frame: DataFrame, lake: str, table: Table) -> list[DataFile]:
    if local_path(lake) is not None:
        make_folder(Path(table_uri(lake, table)))
    with user_errors():
        rows = frame.mapInArrow(partial(_write_batches, lake=lake, table=table), "file string").collect()
    return data_files(row["file"] for row in rows)


def data_files(entries: Iterable[str]) -> list[DataFile]:
    """What tasks report of the files they wrote: see FileWriter.close."""
    written = [json.loads(entry) for entry in entries]
    return [DataFile(entry["path"], entry["partition"], entry["size"]) for entry in written]


def _write_batches(batches: Iterator[pa.RecordBatch], lake: str, table: Table) -> Iterator[pa.RecordBatch]:
    """One task: each run of rows with equal partition values (they come sorted) becomes a file."""
    filesystem = table_filesystem(lake, table)
    writer: FileWriter | None = None
    with counted_task():
        for batch in batches:
            for key, rows in _runs(batch, table):
                if writer is None or writer.key != key:
                    if writer is not None:
                        yield writer.close()
                    writer = FileWriter(filesystem, table, key)
                writer.add(rows)
        if writer is not None:
            yield writer.close()


class FileWriter:
    """One data file of one partition, in row groups of at most ROW_GROUP_ROWS, and ROW_GROUP_BYTES before encoding."""

    def __init__(
        self, filesystem: pafs.FileSystem, table: Table, key: tuple[Any, ...], *, packed: Sequence[str] = ()
    ) -> None:
        """`packed`: columns of lists of integers in no order: packed into few bits, not a dictionary and zstd."""
        check_wanted()
        self.key = key
        self._filesystem, self._table, self._schema = filesystem, table, file_schema(table)
        folder = _hive_folder(table, key)
        if folder:
            filesystem.create_dir(folder, recursive=True)
        self._path = f"{folder}part-{uuid.uuid4().hex}.zstd.parquet"
        self._sink = DigestSink(filesystem.open_output_stream(self._path))
        leaves = [leaf for field in data_schema(table) for leaf in _leaves(field.name, field.type)]
        packs = {f"{name}.list.element" for name in packed}
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression={path: "none" if path in packs else "zstd" for path, _ in leaves},
            column_encoding={path: "DELTA_BINARY_PACKED" for path in packs} or None,
            use_dictionary=[path for path, kind in leaves if path not in packs and kind != pa.int64()],  # times differ
            write_statistics=[
                path for path, _ in leaves if path in self._schema.names
            ],  # nobody asks for those of lists
            write_page_checksum=True,
        )
        self._waiting: list[pa.RecordBatch] = []

    def add(self, rows: pa.RecordBatch) -> None:
        for field in self._schema:
            if not field.nullable and (nulls := rows.column(field.name).null_count):
                raise GraftrecError(
                    f"{self._table.name}: column {field.name} may not be null, found {nulls:,}; mend the job"
                )
        if sum(batch.nbytes for batch in self._waiting) + rows.nbytes > ROW_GROUP_BYTES:
            self._flush()
        self._waiting.append(rows.select(self._schema.names))
        if sum(batch.num_rows for batch in self._waiting) >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> pa.RecordBatch:
        """Finish the file; gives what the driver needs to know of it."""
        check_wanted()
        self._flush()
        self._writer.close()
        self._sink.close()
        path = digest_name(self._path, self._sink.digest)
        self._filesystem.move(self._path, path)
        entry = {
            "path": path,
            "partition": dict(zip(self._table.partition_by, map(partition_text, self.key), strict=True)),
            "size": self._sink.size,
        }
        return pa.RecordBatch.from_pydict({"file": [json.dumps(entry)]})

    def _flush(self) -> None:
        if self._waiting:
            check_wanted()
            rows = pa.Table.from_batches(self._waiting).cast(self._schema)
            self._writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
            self._waiting = []


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """The columns of numbers or strings that Parquet makes of a column: path, type."""
    if pa.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_map(kind):
        yield from ((f"{path}.key_value.key", kind.key_type), (f"{path}.key_value.value", kind.item_type))
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    else:
        yield path, kind


def _runs(batch: pa.RecordBatch, table: Table) -> Iterator[tuple[tuple[Any, ...], pa.RecordBatch]]:
    """Cut rows, sorted by partition columns, into (partition values, rows), without a Python object per row."""
    if not batch.num_rows:
        return
    columns = [batch.column(name) for name in table.partition_by]
    changes = np.zeros(batch.num_rows - 1, bool)
    for column in columns:
        changes |= np.diff(pc.dictionary_encode(column, null_encoding="encode").indices.to_numpy()) != 0
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), batch.num_rows]
    for start, stop in itertools.pairwise(starts):
        yield tuple(column[start].as_py() for column in columns), batch.slice(start, stop - start)


def _read_files(batches: Iterator[pa.RecordBatch], lake: str, table: Table) -> Iterator[pa.RecordBatch]:
    """One task: the named files, row group by row group, with the log's partition values as columns."""
    schema = _nullable(table.schema)
    for entry in (json.loads(text) for batch in batches for text in batch.column(0).to_pylist()):
        values = {
            name: partition_value(entry["partition"][name], table.schema.field(name)) for name in table.partition_by
        }
        with open_parquet(lake, table, entry["path"]) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
                rows = with_gained(batch, schema)
                columns = [
                    pa.repeat(pa.scalar(values[field.name], field.type), rows.num_rows)
                    if field.name in values
                    else rows.column(field.name).cast(field.type)
                    for field in schema
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
