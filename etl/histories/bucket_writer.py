"""Tables made of users' histories are written bucket by bucket, without a shuffle of events.

Only the kept users travel: brought together by bucket they are the rows of one `mapInArrow` pass, whose tasks read
their buckets' part of the log (`reader`) and write the data files. A task that fails or runs twice leaves files
that no version names.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.command import is_full
from etl.histories.incremental import PreviousState, refresh_bucket
from etl.histories.reader import PART_EVENTS, Inputs, Key, Rows, histories, read_catalogue, runs
from etl.lake.datafile import DataFile
from etl.lake.snapshots import local_path, make_folder, table_filesystem, table_uri
from etl.lake.spark_io import ROW_GROUP_BYTES, FileWriter, bucket_of, data_files
from etl.lake.write_tasks import counted_task
from etl.redaction import one_line
from etl.session import engine_of, user_errors
from etl.settings import GraftrecError
from etl.tables import Table

# Sail runs its tasks as threads of one process: no more at once than there are cores, or each would hold a part.
_TURNS = threading.BoundedSemaphore(os.cpu_count() or 1)


@dataclass(frozen=True)
class BucketWork:
    """What becomes of users' histories: rows of `table`, partitioned by split, domain and bucket.

    `rows` turns histories into ((split, domain), rows in the table's order), once for each that has any. `before`: of
    SEQUENCES, what can be copied.
    """

    rows: Rows
    lake: str
    table: Table
    read: Inputs
    before: PreviousState | None = None


def write(users: DataFrame, work: BucketWork, *, buckets: int, tasks: int) -> list[DataFile]:
    """Write data files from the histories of the kept `users`. The files are the caller's to commit.

    `tasks`: how many at most share the buckets.
    """
    kept = users.where("kept").select(bucket_of(buckets).alias("bucket"), "user", "index", "degree")
    return written_by(partial(write_task, work=work), kept, work.lake, work.table, buckets=buckets, tasks=tasks)


def written_by(
    task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    users: DataFrame,
    lake: str,
    table: Table,
    *,
    buckets: int,
    tasks: int,
) -> list[DataFile]:
    """The files of `table` that `task` writes, given the `users` (bucket, index…) of some buckets: see in_turn."""
    if local_path(lake) is not None:
        make_folder(Path(table_uri(lake, table)))
    with user_errors():
        written = gathered(users, buckets=buckets, tasks=tasks).mapInArrow(task, "file string")
        return data_files(row["file"] for row in written.collect())


def gathered(users: DataFrame, *, buckets: int, tasks: int) -> DataFrame:
    """The rows of each `bucket` in one partition: as many buckets to each of at most `tasks` partitions. Sail can only
    go by hash; there are so many partitions that few get more than one bucket, for it runs empty ones for nothing.
    """
    if engine_of(users.sparkSession) == "sail":
        return users.repartition(4 * buckets, "bucket")
    tasks = min(tasks, buckets)
    return users.repartitionById(tasks, F.col("bucket") % tasks)


def write_task(batches: Iterable[pa.RecordBatch], work: BucketWork) -> Iterator[pa.RecordBatch]:
    """One task: the users (bucket, user, index, degree) of some buckets, in any order, to these buckets' files."""
    yield from in_turn(batches, partial(_write_buckets, work=work), work.lake, work.table)


def in_turn(
    batches: Iterable[pa.RecordBatch],
    write: Callable[[pa.Table], Iterator[pa.RecordBatch]],
    lake: str,
    table: Table,
) -> Iterator[pa.RecordBatch]:
    """What `write` tells of the files it wrote for the users (bucket, index…), which it gets by bucket and index."""
    received = [batch for batch in batches if batch.num_rows]
    if not received:
        return
    users = pa.Table.from_batches(received)
    users = users.take(pa.array(np.lexsort((users["index"].to_numpy(), users["bucket"].to_numpy()))))
    with counted_task(), _TURNS:
        try:
            written = list(write(users))
        except OSError as error:
            what = one_line(error)
            if is_full(error):
                raise GraftrecError(
                    f"{table.name}: a task can't write its files ({what}); make room in {lake} and in "
                    f"{tempfile.gettempdir()}, then again"
                ) from None
            raise GraftrecError(
                f"{table.name}: a task can't read or write its files below {lake} ({what}); where a file is damaged, "
                "restore it from a copy"
            ) from None
    yield from written


def _write_buckets(users: pa.Table, work: BucketWork) -> Iterator[pa.RecordBatch]:
    rows, table, read, before = work.rows, work.table, work.read, work.before
    filesystem = table_filesystem(work.lake, table)
    catalogue = read_catalogue(read)
    for bucket, start, stop in runs(users["bucket"].to_numpy()):
        mine = users.slice(start, stop - start)
        copied = None if before is None else refresh_bucket(mine, bucket, rows, catalogue, read, before)
        if copied is not None:
            yield from _write_merged(copied, filesystem, table, bucket)
            continue
        for part in histories(mine, bucket, catalogue, read):
            for key, batch in rows(part):
                writer = FileWriter(filesystem, table, (*key, bucket))
                for piece in _pieces(batch, ROW_GROUP_BYTES):
                    writer.add(piece)
                yield writer.close()


def _write_merged(
    batches: Iterator[tuple[Key, pa.RecordBatch]], filesystem: pafs.FileSystem, table: Table, bucket: int
) -> Iterator[pa.RecordBatch]:
    """Files of about as many events as the parts that a bucket is cut into. Pieces are small, to fill row groups."""
    writer: FileWriter | None = None
    num_events = 0
    for key, batch in batches:
        for piece in _pieces(batch, ROW_GROUP_BYTES // 16):
            if writer is not None and (writer.key != (*key, bucket) or num_events > PART_EVENTS):
                yield writer.close()
                writer = None
            if writer is None:
                writer, num_events = FileWriter(filesystem, table, (*key, bucket)), 0
            writer.add(piece)
            num_events += len(piece["items"].flatten())
    if writer is not None:
        yield writer.close()


def _pieces(rows: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch]:
    """Halve rows until a piece has no more than `most` bytes: of long lists few fit."""
    if rows.nbytes <= most or rows.num_rows == 1:
        yield rows
        return
    half = rows.num_rows // 2
    yield from _pieces(rows.slice(0, half), most)
    yield from _pieces(rows.slice(half), most)
