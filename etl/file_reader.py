"""Data files of a table, opened where the lake lies: on local disks and in object stores by the same calls."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.lake import table_filesystem
from etl.tables import Table


@contextmanager
def open_parquet(
    lake: str,
    table: Table,
    path: str,
    *,
    metadata: pq.FileMetaData | None = None,
    read_dictionary: Sequence[str] | None = None,
) -> Iterator[pq.ParquetFile]:
    """A data file at `path` (relative to its table, as `DataFile` has it), closed at the end of the context.

    `metadata`: its footer, where it was read before. `read_dictionary`: columns to read as dictionaries.
    """
    with open_data_file(lake, table, path) as file:
        yield pq.ParquetFile(
            file, metadata=metadata, read_dictionary=read_dictionary, pre_buffer=False, page_checksum_verification=True
        )


def open_data_file(lake: str, table: Table, path: str) -> pa.NativeFile:
    """As open_parquet, unparsed. Raises OSError."""
    return _filesystem(lake, table).open_input_file(path)


@functools.lru_cache(maxsize=64)
def _filesystem(lake: str, table: Table) -> pafs.FileSystem:
    """One client a table, whose connections to an object store are used again."""
    return table_filesystem(lake, table)
