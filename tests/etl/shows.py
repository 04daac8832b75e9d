"""A small partitioned table for the tests of Delta, its files written by pyarrow, and readers that are not ours."""

import os
import random
import signal
import uuid
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder

from etl.lake import commit as committing
from etl.lake.commit import Commit, Written, commit_files
from etl.lake.datafile import DataFile, data_schema
from etl.lake.snapshots import current_version
from etl.tables import Table

SHOWS = Table(
    "shows",
    pa.schema(
        [
            pa.field("domain", pa.string()),
            pa.field("bucket", pa.int32(), nullable=False),
            pa.field("user", pa.int64(), nullable=False),
            pa.field("items", pa.list_(pa.int32()), nullable=False),
            pa.field("title", pa.string()),
            pa.field("score", pa.float32()),
        ]
    ),
    key=("domain", "user"),
    partition_by=("domain", "bucket"),
    order=("user",),
)


def file_of(
    lake: Path, users: Sequence[int], domain: str | None = "a", bucket: Any = 0, rows: pa.Table | None = None
) -> DataFile:
    """A data file in the table's folder that holds `users` (or `rows`), committed by nobody."""
    path = f"part-{uuid.uuid4().hex}.parquet"
    if rows is None:
        rows = pa.table(
            {
                "user": pa.array(users, pa.int64()),
                "items": pa.array([[user, user + 1] for user in users], pa.list_(pa.int32())),
                "title": pa.array([f"title {user}" for user in users]),
                "score": pa.array([0.5] * len(users), pa.float32()),
            },
            schema=data_schema(SHOWS),
        )
    (lake / "shows").mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, lake / "shows" / path, compression="zstd")
    return DataFile(path, {"domain": domain, "bucket": str(bucket)}, (lake / "shows" / path).stat().st_size)


def commit(
    lake: Path,
    files: Sequence[DataFile],
    mode: Any = "append",
    app: str | None = None,
    app_version: int = 1,
    **more: Any,
) -> Written:
    """Commit `files`; without `app`, as a delivery of its own."""
    app = app or uuid.uuid4().hex
    return commit_files(
        str(lake), SHOWS, files, Commit(mode=mode, app=app, app_version=app_version, metadata={"job": "test"}, **more)
    )


def deliver(lake: Path, number: int, rows: int = 10) -> Written:
    """Delivery `number` of a log: users 10 × number to 10 × number + 9, once whoever delivers it how often."""
    users = range(number * rows, (number + 1) * rows)
    return commit(lake, [file_of(lake, users)], app=f"delivery-{number}")


def users_of(lake: Path) -> list[int]:
    """Users in the newest version, sorted, as three readers that are not ours agree on them."""
    import duckdb  # here, since the processes that only commit start faster without
    import polars as pl

    table = DeltaTable(lake / "shows")
    found = pl.read_delta(str(lake / "shows")).get_column("user").sort().to_list()
    files = table.file_uris()
    if files:
        (ours,) = duckdb.sql(
            'select list("user" order by "user") from read_parquet($files)', params={"files": files}
        ).fetchall()[0]
        assert (ours or []) == found
    query = QueryBuilder().register("shows", table).execute('select "user" from shows')
    assert sorted(pa.table(query).column("user").to_pylist()) == found
    return found


def deliver_together(barrier: Barrier, lake: Path, numbers: list[int], seed: int) -> None:
    random.Random(seed).shuffle(numbers)
    barrier.wait(300)
    for number in numbers:
        deliver(lake, number)


def deliver_and_die(barrier: Barrier, lake: Path, function: str, before: bool) -> None:
    """Deliver 1, but be killed before or after the last call of `function`."""
    real = getattr(committing, function)
    calls = 2 if function == "_sync_log" and current_version(str(lake), SHOWS) is None else 1

    def die(*arguments: Any) -> Any:
        nonlocal calls
        calls -= 1
        if before and calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments)
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(committing, function, die)
    barrier.wait(300)
    deliver(lake, 1)
