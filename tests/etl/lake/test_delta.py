"""Delta through Spark: what is written is read back, by us and by readers that are not ours."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.lake import spark_io
from etl.settings import GraftrecError
from tests.fixtures.places import ROOT
from tests.fixtures.shows import SHOWS, file_of, users_of

ODD = "Children's & Co/50%"
ODDER = "é=ü {x}[y]#?*:"
ROWS: list[tuple[Any, ...]] = [
    (ODD, 1, 5, [1, 2], "a", 0.5),
    (ODD, 1, 4, [], None, None),
    (ODDER, 2, 3, [7], "b", 1.0),
    (None, 2, 9, [8, None], "c", -1.0),
    ("007", 0, 2, [1], "d", 0.0),
]
COLUMNS = SHOWS.schema.names


def frame_of(spark: SparkSession, rows: list[tuple[Any, ...]]) -> DataFrame:
    return spark.createDataFrame(rows, spark_io.spark_schema(SHOWS))


def write(
    spark: SparkSession,
    lake: Path,
    frame: DataFrame,
    mode: spark_io.Mode = "overwrite",
    app_version: int = 1,
    **more: Any,
) -> spark_io.Written:
    return spark_io.write(
        spark,
        frame,
        str(lake),
        SHOWS,
        spark_io.Commit(mode=mode, app="job", app_version=app_version, metadata={"job": "test"}, **more),
    )


def rows_of(frame: DataFrame) -> list[tuple[Any, ...]]:
    return sorted((tuple(row) for row in frame.collect()), key=str)


def rows_by_deltalake(lake: Path) -> list[tuple[Any, ...]]:
    """As deltalake's own engine reads them."""
    found = QueryBuilder().register("shows", DeltaTable(lake / "shows")).execute("select * from shows")
    return sorted((tuple(row.values()) for row in pa.table(found).select(COLUMNS).to_pylist()), key=str)


@pytest.fixture(params=["spark's writer", "arrow"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write and to read, as an object store's lake would take the second."""
    if request.param == "arrow":
        monkeypatch.setattr(spark_io, "_write_local", spark_io._write_arrow)
        monkeypatch.setattr(spark_io, "_hive_partition", lambda path, table: None)
    return str(request.param)


def test_a_relative_lake_is_the_drivers_to_executors_in_other_folders(
    writer: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # Spark's processes stay where they began
    write(spark, Path("a lake"), frame_of(spark, ROWS))
    assert rows_of(spark_io.read(spark, "a lake", SHOWS)) == sorted(ROWS, key=str)
    assert rows_by_deltalake(tmp_path / "a lake") == sorted(ROWS, key=str)


def test_written_is_read_back_by_anyone(spark: SparkSession, tmp_path: Path, writer: str) -> None:
    lake = tmp_path / "lake"
    shuffled = frame_of(spark, ROWS).select(*reversed(COLUMNS))
    assert write(spark, lake, shuffled, properties={"graftrec.time": "ordinal"}) == spark_io.Written(1, 5, True)
    assert sorted(pl.read_delta(str(lake / "shows")).select(COLUMNS).rows(), key=str) == sorted(ROWS, key=str)
    frame = spark_io.read(spark, str(lake), SHOWS)
    assert frame.schema.simpleString() == spark_io.spark_schema(SHOWS).simpleString()
    assert rows_of(frame) == sorted(ROWS, key=str)
    assert rows_by_deltalake(lake) == sorted(ROWS, key=str)
    some = spark_io.read(spark, str(lake), SHOWS, partitions={"domain": [ODD, "007"], "bucket": [1, 2]})
    assert [row["user"] for row in some.sort("user").collect()] == [4, 5]
    assert not write(spark, lake, frame.where(F.raise_error(F.lit("computed")).isNotNull())).committed
    assert [path.name for path in (lake / "shows").iterdir() if path.name.startswith("_")] == ["_delta_log"]


def test_snapshots_modes_and_empty_frames(spark: SparkSession, tmp_path: Path) -> None:
    write(spark, tmp_path, frame_of(spark, ROWS[:2]))
    write(spark, tmp_path, frame_of(spark, ROWS[2:]), "append", 2)
    write(spark, tmp_path, frame_of(spark, [(ODD, 1, 6, [6], "new", 6.0)]), "partitions", 3)
    write(spark, tmp_path, frame_of(spark, []), "partitions", 4, partition_scope={"domain": [ODDER]})
    write(spark, tmp_path, frame_of(spark, []), "overwrite", 5)
    frames = [spark_io.read(spark, str(tmp_path), SHOWS, version=version) for version in range(6)]
    users = [[row["user"] for row in frame.sort("user").collect()] for frame in frames]
    assert users == [[], [4, 5], [2, 3, 4, 5, 9], [2, 3, 6, 9], [2, 6, 9], []]
    assert frames[0].schema == frames[1].schema


def test_table_read_while_it_is_overwritten(spark: SparkSession, tmp_path: Path) -> None:
    """A pinned frame reads its snapshot, whatever comes after; a job may write the table it reads."""
    write(spark, tmp_path, frame_of(spark, ROWS))
    pinned = spark_io.read(spark, str(tmp_path), SHOWS)
    write(spark, tmp_path, pinned.withColumn("bucket", F.lit(3).cast("int")), app_version=2)
    assert rows_of(pinned) == sorted(ROWS, key=str)
    assert {row["bucket"] for row in spark_io.read(spark, str(tmp_path), SHOWS).collect()} == {3}


@pytest.mark.parametrize("constant", [True, False])
def test_files_are_sorted_and_compressed(spark: SparkSession, tmp_path: Path, writer: str, constant: bool) -> None:
    """A constant partition column once made Spark sort again, by partition alone."""
    frame = spark.range(3_000).select(
        (F.lit("a") if constant else F.when(F.col("id") < 5_000, "a")).alias("domain"),
        (F.col("id") % 2).cast("int").alias("bucket"),
        F.xxhash64("id").alias("user"),
        F.array(F.col("id").cast("int")).alias("items"),
        F.lit(None).cast("string").alias("title"),
        F.lit(None).cast("float").alias("score"),
    )
    assert write(spark, tmp_path, frame).rows == 3_000
    files = spark_io.snapshot_files(str(tmp_path), SHOWS)
    assert sorted(file.partition["bucket"] or "" for file in files) == ["0", "1"]
    for file in files:
        path = tmp_path / "shows" / file.path
        users = pq.read_table(path, partitioning=None).column("user").to_pylist()
        assert users == sorted(users)
        assert pq.ParquetFile(path).schema_arrow.names == ["user", "items", "title", "score"]
        assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"
    assert spark_io.read(spark, str(tmp_path), SHOWS).count() == 3_000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda frame: frame.drop("title"), "'title'"),
        (lambda frame: frame.withColumn("extra", F.lit(1)), "'extra'"),
        (lambda frame: frame.withColumn("user", F.col("user").cast("string")), "user should be bigint, found string"),
        (lambda frame: frame.withColumn("user", F.col("user").cast("int")), "user should be bigint, found int"),
        (lambda frame: frame.withColumn("score", F.lit(1.5)), "score should be float, found"),
        (lambda frame: frame.withColumn("user", F.when(F.col("user") > 4, F.col("user"))), "user may not be null"),
        (lambda frame: frame.withColumn("items", F.when(F.col("user") > 4, F.col("items"))), "items may not be null"),
        (lambda frame: frame.withColumn("bucket", F.when(F.col("user") > 4, 1)), "null"),
    ],
)
def test_frame_that_breaks_the_contract_is_refused(
    change: Any, reason: str, spark: SparkSession, tmp_path: Path
) -> None:
    write(spark, tmp_path, frame_of(spark, ROWS))
    with pytest.raises(GraftrecError) as refused:
        write(spark, tmp_path, change(frame_of(spark, ROWS)), app_version=2)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert users_of(tmp_path) == [2, 3, 4, 5, 9]


def test_null_in_an_executor_is_one_line(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spark_io, "_write_local", spark_io._write_arrow)
    frame = frame_of(spark, ROWS).withColumn("user", F.when(F.col("user") > 4, F.col("user")))
    with pytest.raises(GraftrecError, match=r"user may not be null, found 1; mend the job$"):
        write(spark, tmp_path, frame)


def test_partition_values_too_long_for_a_folder(spark: SparkSession, tmp_path: Path) -> None:
    rows = sorted([*ROWS, ("x/" * 200, 0, 77, [], None, None)], key=str)
    write(spark, tmp_path, frame_of(spark, rows))
    assert rows_of(spark_io.read(spark, str(tmp_path), SHOWS)) == rows
    assert rows_by_deltalake(tmp_path) == rows


def test_full_disk_is_one_line(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spark_io, "_move", full)
    with pytest.raises(spark_io.LakeError, match="no space left"):
        write(spark, tmp_path, frame_of(spark, ROWS))
    assert spark_io.current_version(str(tmp_path), SHOWS) is None
    assert list((tmp_path / "shows").iterdir()) == []


def test_lake_in_a_folder_with_an_odd_name(spark: SparkSession, tmp_path: Path, writer: str) -> None:
    lake = tmp_path / "lake [1] {2} é"
    write(spark, lake, frame_of(spark, ROWS))
    assert rows_of(spark_io.read(spark, str(lake), SHOWS)) == sorted(ROWS, key=str)


def test_files_by_other_writers_are_read(spark: SparkSession, tmp_path: Path) -> None:
    """Partition values come from the log, wherever a file lies."""
    write(spark, tmp_path, frame_of(spark, ROWS))
    spark_io.commit_files(
        str(tmp_path),
        SHOWS,
        [file_of(tmp_path, [70], ODD, 6)],
        spark_io.Commit(mode="append", app="x", app_version=1, metadata={}),
    )
    found = spark_io.read(spark, str(tmp_path), SHOWS).where("user = 70 or user = 5").sort("user").collect()
    assert [(row["domain"], row["bucket"], row["user"]) for row in found] == [(ODD, 1, 5), (ODD, 6, 70)]


# --- kills ------------------------------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from pathlib import Path
from pyspark.sql import functions as F
from tests.fixtures.shows import SHOWS
from etl.lake import commit
from etl.lake import spark_io as delta
from etl.config import SparkConfig
from etl.session import spark_session
lake, moment, marks = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "task":
    def suicidal(batches):  # the first attempt takes its Python worker, or the worker's JVM, with it
        import pathlib
        from pyspark import TaskContext
        mark = pathlib.Path(marks) / f"{TaskContext.get().partitionId()}"
        for batch in batches:
            yield batch
        if not mark.exists() and TaskContext.get().partitionId() < 2:
            mark.touch()
            daemon = os.getppid()
            jvm = int(pathlib.Path(f"/proc/{daemon}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(jvm if TaskContext.get().partitionId() else os.getpid(), signal.SIGKILL)
elif moment == "before the files move":
    delta._move = kill
elif moment == "before the commit":
    delta.commit_files = kill
elif moment == "after the commit":
    commit._sync_log = lambda lake, table, version: kill() if version else None
master = "local-cluster[2,1,1024]" if moment == "task" else "local[1]"
settings = {"spark.executorEnv.PYTHONPATH": os.environ["PYTHONPATH"]}
spark = spark_session(SparkConfig(master=master, shuffle_partitions=4, settings=settings))
frame = spark.range(0, 1000, 1, 4).select(
    F.concat(F.lit("d"), (F.col("id") % 2)).alias("domain"), (F.col("id") % 3).cast("int").alias("bucket"),
    F.col("id").alias("user"), F.array(F.col("id").cast("int")).alias("items"), F.lit("t").alias("title"),
    F.lit(1).cast("float").alias("score"),
)
if moment == "task":
    frame = frame.mapInArrow(suicidal, frame.schema)
print(delta.write(spark, frame, lake, SHOWS, delta.Commit(mode="append", app="job", app_version=1, metadata={})))
"""


def drive(lake: Path, moment: str, marks: Path) -> subprocess.CompletedProcess[str]:
    script = marks / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, str(script), str(lake), moment, str(marks)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the files move", "before the commit", "after the commit"])
def test_driver_killed_and_run_again_lands_once(moment: str, spark: SparkSession, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    killed = drive(lake, moment, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = drive(lake, "none", tmp_path)
    assert f"committed={moment != 'after the commit'}" in again.stdout, again.stderr
    assert users_of(lake) == list(range(1_000))
    assert spark_io.read(spark, str(lake), SHOWS).count() == 1_000
    named = {file.path for file in spark_io.snapshot_files(str(lake), SHOWS)}
    orphans = spark_io.remove_orphans(str(lake), SHOWS, older_than_seconds=-1, keep_versions=[])
    assert bool(orphans) == (moment != "after the commit")
    assert not named & set(orphans)
    assert users_of(lake) == list(range(1_000))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java") or sys.platform != "linux", reason="kills an executor by /proc")
def test_killed_workers_and_executors_lose_and_double_nothing(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    done = drive(lake, "task", tmp_path)
    assert "committed=True" in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}  # both were killed
    assert users_of(lake) == list(range(1_000))
