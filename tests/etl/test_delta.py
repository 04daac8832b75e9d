"""Delta through Spark: what is written is read back, by us and by readers that are not ours."""

from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from etl import delta
from etl.tables import Table

SHOWS = Table(
    "shows",
    pa.schema(
        [
            pa.field("domain", pa.string()),
            pa.field("bucket", pa.int32(), nullable=False),
            pa.field("user", pa.int32(), nullable=False),
            pa.field("items", pa.list_(pa.int32()), nullable=False),
            pa.field("title", pa.string()),
        ]
    ),
    key=("domain", "user"),
    partition_by=("domain", "bucket"),
    order=("user",),
)
ODD = "Children's & Co/50%"
ROWS = [
    (ODD, 1, 5, [1, 2], "a"),
    (ODD, 1, 4, [], None),
    ("é=ü {x}[y]#?*:", 2, 3, [7], "b"),
    (None, 2, 9, [8, None], "c"),
    ("plain", 0, 2, [1], "d"),
]


def write(
    spark: SparkSession,
    lake: Path | str,
    rows: list,
    mode: str = "overwrite",
    app: str = "job",
    app_version: int = 1,
    **more,
):
    frame = spark.createDataFrame(rows, delta.spark_schema(SHOWS))
    return delta.write(
        spark, frame, str(lake), SHOWS, mode=mode, app=app, app_version=app_version, metadata={"job": "test"}, **more
    )


def rows_of(frame) -> list:
    return sorted((tuple(row) for row in frame.collect()), key=str)


def test_write_and_read_back(spark: SparkSession, tmp_path: Path) -> None:
    written = write(spark, tmp_path, ROWS, properties={"graftrec.time": "ordinal"})
    assert written == delta.Written(1, 5, True)
    frame = delta.read(spark, str(tmp_path), SHOWS)
    assert frame.schema.simpleString() == delta.spark_schema(SHOWS).simpleString()
    assert rows_of(frame) == sorted(ROWS, key=str)
    assert write(spark, tmp_path, ROWS) == delta.Written(1, 5, False)
    assert delta.last_commit(str(tmp_path), SHOWS)["job"] == "test"
    found = pl.read_delta(str(tmp_path / "shows")).select(SHOWS.schema.names)
    assert sorted(found.rows(), key=str) == sorted(ROWS, key=str)
    table = DeltaTable(tmp_path / "shows")
    assert table.metadata().configuration == {"graftrec.time": "ordinal"}
    uris = table.file_uris()
    assert duckdb.sql("select count(*), sum(user) from read_parquet($f)", params={"f": uris}).fetchall() == [(5, 23)]
