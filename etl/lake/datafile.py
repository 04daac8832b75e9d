"""One data file that is about to be named by a commit: checked against the table's contract, described for the log.

`deltalake` commits whatever it is given, so everything a reader relies on is verified here: the path lies under the
table, the file exists with the size its writer reported, its Parquet footer parses and has the contract's
columns and types, columns that may not be null hold no null, partition values parse to their types, and the statistics
in the log are the ones computed here from the footer. Apart from `spark_io` because it needs neither Spark nor a log.
"""

import datetime
import json
import posixpath
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import Table

MAX_STATISTIC = 64  # characters; longer strings get no bounds in the log
_MAGIC = b"PAR1"


class InvalidFile(GraftrecError):
    """A data file that must not be committed."""


@dataclass(frozen=True)
class DataFile:
    """A file an executor wrote: `path` relative to the table as on disk, and what partition it belongs to.

    `partition` maps each partition column to its value as text, None for null. `size` is what the writer reported, in
    bytes; None: not known.
    """

    path: str
    partition: Mapping[str, str | None]
    size: int | None = None

    def key(self, table: Table) -> tuple[str | None, ...]:
        """Partition values in the order of `table.partition_by`."""
        return tuple(self.partition[column] for column in table.partition_by)


def data_schema(table: Table) -> pa.Schema:
    """The columns of a data file's rows in memory: all but the partition columns, which only the log holds."""
    return pa.schema([field for field in table.schema if field.name not in table.partition_by])


def file_schema(table: Table) -> pa.Schema:
    """As data_schema, as a data file holds them."""
    return pa.schema([field for field in table.stored if field.name not in table.partition_by])


def check_file(filesystem: pafs.FileSystem, file: DataFile, table: Table) -> tuple[AddAction, int]:
    """Verify `file` (`filesystem` is rooted at the table); its log entry and number of rows. Raises InvalidFile."""
    check_path(file.path)
    _check_partition(file, table)
    info = filesystem.get_file_info(file.path)
    if info.type != pafs.FileType.File:
        raise InvalidFile(f"{table.name}: expected a data file at {file.path}, found none; write it again")
    if file.size is not None and info.size != file.size:
        raise InvalidFile(
            f"{table.name}: {file.path} should have {file.size:,} bytes, found {info.size:,}; write it again"
        )
    metadata = _footer(filesystem, file.path, info.size, table)
    _check_columns(metadata, file.path, table)
    nulls = _null_counts(metadata)
    _check_nulls(filesystem, file.path, metadata, nulls, table)
    modified = int(info.mtime.timestamp() * 1000) if info.mtime else int(time.time() * 1000)
    stats = json.dumps({"numRecords": metadata.num_rows, **_bounds(metadata), "nullCount": nulls}, ensure_ascii=False)
    return AddAction(file.path, info.size, dict(file.partition), modified, True, stats), metadata.num_rows


def check_path(path: str) -> None:
    """Raise InvalidFile unless `path` is relative, normalised, under the table's root and visible to every reader."""
    parts = path.split("/")
    if (
        not path
        or path != posixpath.normpath(path)
        or path.startswith("/")
        or "://" in path
        or path.startswith("file:")
        or "\\" in path
        or any(part in ("", ".", "..") or part[0] in "._" for part in parts)
        or any(ord(character) < 32 for character in path)
    ):
        raise InvalidFile(
            f"expected a data file's path relative to its table and normalised, no part of it starting with . or _; "
            f"found {path!r}; write the file under the table"
        )


def partition_text(value: Any) -> str | None:
    """A partition value as the log spells it. The empty string is null there, as in every Delta table."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime.date) else str(value)


def partition_value(text: str | None, field: pa.Field) -> Any:
    """Parse a partition value as the log spells it. Raises ValueError where it isn't the one spelling of its type."""
    value: Any
    if text is None:
        value = None
    elif pa.types.is_string(field.type):
        value = text
    elif pa.types.is_integer(field.type):
        value = pa.scalar(int(text), field.type).as_py()  # ArrowInvalid, a ValueError, where it is out of range
    elif pa.types.is_boolean(field.type):
        value = {"true": True, "false": False}.get(text, text)
    elif pa.types.is_date32(field.type):
        value = datetime.date.fromisoformat(text)
    else:
        raise ValueError(f"partition columns of type {field.type} are not supported")
    if partition_text(value) != text:
        raise ValueError(f"{text!r} is no {field.type}")
    if value is None and not field.nullable:
        raise ValueError("null (or an empty string) in a column that has no nulls")
    return value


def _check_partition(file: DataFile, table: Table) -> None:
    if set(file.partition) != set(table.partition_by):
        raise InvalidFile(
            f"{table.name}: {file.path} should have values of the partition columns {list(table.partition_by)}, "
            f"found {sorted(file.partition)}; name exactly these"
        )
    for column in table.partition_by:
        text = file.partition[column]
        try:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{text!r} is not text")
            partition_value(text, table.schema.field(column))
        except ValueError as error:
            raise InvalidFile(
                f"{table.name}: {file.path}: partition column {column} is {table.schema.field(column).type}, "
                f"but {error}; write the file to the partition it belongs to"
            ) from None


def _footer(filesystem: pafs.FileSystem, path: str, size: int, table: Table) -> pq.FileMetaData:
    try:
        with filesystem.open_input_file(path) as file:
            if file.read_at(4, 0) != _MAGIC or file.read_at(4, max(size - 4, 0)) != _MAGIC:
                raise ValueError("it doesn't begin and end with PAR1")
            metadata = pq.read_metadata(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = one_line(error)
        raise InvalidFile(f"{table.name}: {path} is no whole Parquet file ({reason}); write it again") from None
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    ends = [_end(group.column(column)) for group in groups for column in range(metadata.num_columns)]
    if sum(group.num_rows for group in groups) != metadata.num_rows or max(ends, default=0) > size - 8:
        raise InvalidFile(f"{table.name}: {path} has a footer that doesn't fit its {size:,} bytes; write it again")
    return metadata


def _end(chunk: pq.ColumnChunkMetaData) -> int:
    start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    return int(min(start, chunk.data_page_offset) + chunk.total_compressed_size)


def _check_columns(metadata: pq.FileMetaData, path: str, table: Table) -> None:
    found = {field.name: field.type for field in metadata.schema.to_arrow_schema()}
    expected = {field.name: field.type for field in file_schema(table)}
    if missing := [name for name in expected if name not in found]:
        raise InvalidFile(f"{table.name}: {path} lacks the columns {missing}; write all of {list(expected)}")
    if extra := [name for name in found if name not in expected]:
        raise InvalidFile(f"{table.name}: {path} has the columns {extra} besides {list(expected)}; leave them out")
    for name, kind in expected.items():
        if _plain(found[name]) != _plain(kind):
            raise InvalidFile(f"{table.name}: {path}: column {name} should be {kind}, found {found[name]}; cast it")


def _plain(kind: pa.DataType) -> Any:
    """A type without what Parquet doesn't keep: the names of list elements, 64-bit offsets, dictionaries."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return ("list", _plain(kind.value_type))
    if pa.types.is_map(kind):
        return ("map", _plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_struct(kind):
        return ("struct", *((field.name, _plain(field.type)) for field in kind))
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) else kind


def _flat(metadata: pq.FileMetaData) -> dict[str, int]:
    """Top-level columns that are no lists or structs: name -> index of their chunk."""
    columns = (metadata.schema.column(index) for index in range(metadata.num_columns))
    return {column.name: index for index, column in enumerate(columns) if column.path == column.name}


def _null_counts(metadata: pq.FileMetaData) -> dict[str, int]:
    """Nulls of each flat column whose writer counted them in every row group."""
    counts: dict[str, int] = {}
    for name, index in _flat(metadata).items():
        statistics = [metadata.row_group(group).column(index).statistics for group in range(metadata.num_row_groups)]
        if all(s is not None and s.has_null_count for s in statistics):
            counts[name] = sum(s.null_count for s in statistics)
    return counts


def _check_nulls(
    filesystem: pafs.FileSystem, path: str, metadata: pq.FileMetaData, counts: Mapping[str, int], table: Table
) -> None:
    """Refuse nulls where the contract has none. Lists are read if need be: their footers don't tell null from empty."""
    optional = {field.name for field in metadata.schema.to_arrow_schema() if field.nullable}
    for field in data_schema(table):
        if field.nullable or field.name not in optional:
            continue
        count = counts.get(field.name)
        if count is None:
            count = 0 if _no_leaf_null(metadata, field.name) else _count_nulls(filesystem, path, field.name)
        if count:
            raise InvalidFile(
                f"{table.name}: {path}: column {field.name} may not be null, found {count:,}; mend the job"
            )


def _no_leaf_null(metadata: pq.FileMetaData, name: str) -> bool:
    columns = (metadata.schema.column(index) for index in range(metadata.num_columns))
    leaves = [index for index, column in enumerate(columns) if column.path.split(".")[0] == name]
    return all(
        (statistics := metadata.row_group(group).column(index).statistics) is not None
        and statistics.has_null_count
        and statistics.null_count == 0
        for group in range(metadata.num_row_groups)
        for index in leaves
    )


def _count_nulls(filesystem: pafs.FileSystem, path: str, name: str) -> int:
    with filesystem.open_input_file(path) as file:
        batches = pq.ParquetFile(file).iter_batches(columns=[name], batch_size=65_536, use_threads=False)
        return sum(batch.column(0).null_count for batch in batches)


def _bounds(metadata: pq.FileMetaData) -> dict[str, dict[str, int | str]]:
    """`minValues` and `maxValues` of integer, timestamp and string columns. Floats get none: their NaNs have no place
    in them."""
    low: dict[str, int | str] = {}
    high: dict[str, int | str] = {}
    for name, index in _flat(metadata).items():
        statistics = [metadata.row_group(group).column(index).statistics for group in range(metadata.num_row_groups)]
        known = [s for s in statistics if s is not None and s.has_min_max]
        all_null = [s for s in statistics if s is not None and not s.has_min_max and s.num_values == 0]
        if not known or len(known) + len(all_null) != len(statistics):
            continue
        smallest: Any
        largest: Any
        if metadata.schema.column(index).logical_type.type == "TIMESTAMP":
            smallest, largest = _to_milliseconds(min(s.min_raw for s in known), max(s.max_raw for s in known))
        else:
            smallest, largest = min(s.min for s in known), max(s.max for s in known)
        if isinstance(smallest, bool) or not isinstance(smallest, int | str):
            continue
        if isinstance(smallest, str) and max(len(smallest), len(largest)) > MAX_STATISTIC:
            continue
        low[name], high[name] = smallest, largest
    return {"minValues": low, "maxValues": high}


def _to_milliseconds(smallest: int, largest: int) -> tuple[str | None, str | None]:
    """Bounds of timestamps in microseconds as the log spells them, to the millisecond and rounded outwards; None beyond
    the years 1 to 9999."""
    try:
        low, high = (
            datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=number)
            for number in (smallest // 1_000, -(-largest // 1_000))
        )
    except OverflowError:
        return None, None
    return f"{low.isoformat(timespec='milliseconds')}Z", f"{high.isoformat(timespec='milliseconds')}Z"
