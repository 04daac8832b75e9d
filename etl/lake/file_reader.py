"""Data files, opened where the lake lies, on disks and in object stores alike, if their bytes are those once written.
Their rows come in their form in memory (`etl.lake.forms`).

A data file's name carries the CRC-32 of its bytes, ``part-<UUID>.<CRC-32>.zstd.parquet``. A commit names its files, so
it records their digests, and whoever has a path can check, on every engine and machine. CRC-32 (zlib) finds any damaged
byte, and any run of four, at a third of the cost of SHA-256; it is no defence against somebody who rewrites a file on
purpose. Files with other names (older lakes', other writers') are read unchecked, but for the checksums of their pages.
"""

import contextlib
import functools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.lake.forms import in_memory, schema_in_memory
from etl.lake.snapshots import local_path, table_filesystem, table_uri
from etl.settings import GraftrecError
from etl.tables import Table

PIECE_BYTES = 1 << 20
WHOLE_BYTES = 32 << 20  # of files in object stores: what is checked and parsed from memory, not fetched twice
_NAME = re.compile(r"(?:.*/)?part-[0-9a-f]{32}\.([0-9a-f]{8})\.zstd\.parquet")
_intact: set[tuple[str, ...]] = set()  # place, path, and on a disk size and time: checked by this process


def digest_name(path: str, digest: int) -> str:
    """The path of a data file, ``…/part-<UUID>.zstd.parquet``, with the CRC-32 of its bytes."""
    return path.removesuffix(".zstd.parquet") + f".{digest:08x}.zstd.parquet"


class DigestSink:
    """A stream to write to that counts bytes and their CRC-32."""

    def __init__(self, sink: pa.NativeFile) -> None:
        self._sink = pa.BufferedOutputStream(sink, PIECE_BYTES)
        self.size, self.digest = 0, 0

    @property
    def closed(self) -> bool:
        return bool(self._sink.closed)

    def write(self, data: bytes) -> int:
        self.digest = zlib.crc32(data, self.digest)
        self.size += len(data)
        try:
            # In pieces that the buffer takes: longer ones go to the sink as they are, and deltalake's refuses them.
            for start in range(0, len(data), PIECE_BYTES // 2):
                self._sink.write(memoryview(data)[start : start + PIECE_BYTES // 2])
        except BaseException:
            self._give_up()
            raise
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self._sink.close()

    def _give_up(self) -> None:
        # Arrow's stream, left open, writes when it is dropped, and prints a failure.
        with contextlib.suppress(Exception):
            self._sink.close()

    def __del__(self) -> None:
        self._give_up()  # a file that nobody finished, since its task failed elsewhere


class LakeFile(pq.ParquetFile):  # type: ignore[misc]
    """A data file whose rows and `schema_arrow` are in memory's form."""

    @property
    def schema_arrow(self) -> pa.Schema:
        return schema_in_memory(super().schema_arrow)

    def read(self, columns: Sequence[str] | None = None, *, use_threads: bool = True) -> pa.Table:
        return in_memory(super().read(columns, use_threads=use_threads))

    def read_row_group(self, i: int, columns: Sequence[str] | None = None, *, use_threads: bool = True) -> pa.Table:
        return in_memory(super().read_row_group(i, columns, use_threads=use_threads))

    def iter_batches(
        self, batch_size: int = 65_536, *, columns: Sequence[str] | None = None, use_threads: bool = True
    ) -> Iterator[pa.RecordBatch]:
        return map(in_memory, super().iter_batches(batch_size, columns=columns, use_threads=use_threads))


@contextmanager
def open_parquet(
    lake: str,
    table: Table,
    path: str,
    *,
    metadata: pq.FileMetaData | None = None,
    read_dictionary: Sequence[str] | None = None,
) -> Iterator[LakeFile]:
    """A data file at `path` (relative to its table, as `DataFile` has it), closed at the end of the context.

    `metadata`: its footer, where it was read before. `read_dictionary`: columns to read as dictionaries. Raises
    GraftrecError where its bytes are not those its name says, OSError.
    """
    with open_data_file(lake, table, path) as file:
        yield LakeFile(
            file, metadata=metadata, read_dictionary=read_dictionary, pre_buffer=False, page_checksum_verification=True
        )


def open_data_file(lake: str, table: Table, path: str) -> pa.NativeFile:
    """As open_parquet, unparsed. Raises OSError too."""
    expected, key = _expected(path), _key(lake, table, path)
    file = _filesystem(lake, table).open_input_file(path)
    if expected is None or key in _intact:
        return file
    if local_path(lake) is None and file.size() <= WHOLE_BYTES:
        file = pa.BufferReader(file.read_buffer())
    found = digest_of(file)
    if found != expected:
        raise GraftrecError(
            f"{table_uri(lake, table)}/{path}: expected the bytes once written (CRC-32 {expected:08x}), found others "
            f"({found:08x}); restore the file from a copy, or make the table anew in another lake"
        )
    file.seek(0)
    _intact.add(key)
    return file


def check_files(lake: str, table: Table, paths: Iterable[str]) -> None:
    """Raise GraftrecError where the bytes of a file are not those its name says. For what others will open."""

    def check(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # who opens it will say so
            if _expected(path) is not None and _key(lake, table, path) not in _intact:
                open_data_file(lake, table, path).close()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for _ in pool.map(check, paths):
            pass


def digest_of(file: pa.NativeFile) -> int:
    """The CRC-32 of what is left to read."""
    digest = 0
    while piece := file.read_buffer(PIECE_BYTES):
        digest = zlib.crc32(piece, digest)
    return digest


def _expected(path: str) -> int | None:
    match = _NAME.fullmatch(path)
    return int(match[1], 16) if match else None


def _key(lake: str, table: Table, path: str) -> tuple[str, ...]:
    place = table_uri(lake, table)
    if local_path(lake) is None:
        return place, path
    status = os.stat(f"{place}/{path}")
    return place, path, str(status.st_size), str(status.st_mtime_ns), str(status.st_ino)


def _filesystem(lake: str, table: Table) -> pafs.FileSystem:
    return _client(lake, table, os.environ.get("AWS_ENDPOINT_URL"))


@functools.lru_cache(maxsize=64)
def _client(lake: str, table: Table, endpoint: str | None) -> pafs.FileSystem:
    """One client a table, whose connections to an object store are used again."""
    return table_filesystem(lake, table)
