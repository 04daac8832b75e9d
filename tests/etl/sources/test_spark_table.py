"""Tables that the session reads: known by their content, compared as a whole, on Spark and on Sail."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.config import CleaningConfig, LogSource
from etl.settings import GraftrecError
from etl.sources.log import FileLog
from tests.fixtures.local_rows import read_rows


def _source(spark: SparkSession, **events: object) -> FileLog:
    columns = {"user": "who.id", "item": "item", "time": "at"}
    described = LogSource.model_validate({"events": {"format": "table", "columns": columns, **events}})
    return FileLog(described, CleaningConfig(), session=lambda: spark)


def test_a_table_of_the_session_is_a_log(spark: SparkSession) -> None:
    rows = [({"id": k % 3}, None if k == 4 else k, 1_000 + k) for k in range(6)]
    frame = spark.createDataFrame(rows, "who struct<id: bigint>, item int, at bigint")
    frame.createOrReplaceTempView("clicks")
    source = _source(spark, path="clicks")
    found = read_rows(source, "events", spark)
    assert sorted((row["user"], row["item"], row["time"]) for row in found if row["reason"] is None) == sorted(
        (str(k % 3), str(k), (1_000 + k) * 1_000_000) for k in (0, 1, 2, 3, 5)
    )
    assert [(row["file"], row["reason"]) for row in found if row["reason"]] == [("clicks", "item is missing")]
    assert len({row["source_order"] for row in found}) == 6
    frame.orderBy("item").repartition(5).createOrReplaceTempView("clicks")
    assert _source(spark, path="clicks").fingerprint() == source.fingerprint()
    frame.limit(5).createOrReplaceTempView("clicks")
    assert _source(spark, path="clicks").fingerprint() != source.fingerprint()


@pytest.mark.parametrize("events", [{"path": "nowhere"}, {"path": "x", "reader": "no.such.reader"}])
def test_no_such_table_is_one_line(spark: SparkSession, events: dict[str, str]) -> None:
    with pytest.raises(
        GraftrecError, match=r"^source.events.path: expected a table .*with the columns who.id, item, at"
    ):
        _source(spark, **events).fingerprint()


@pytest.mark.slow
@pytest.mark.ci
def test_on_sail_rows_that_leave_a_table_leave_the_lake(tmp_path: Path) -> None:
    config = {
        "lake": str(tmp_path / "lake"),
        "source": {
            "kind": "log",
            "events": {
                "format": "table",
                "reader": "parquet",
                "path": str(tmp_path / "log"),
                "columns": {"user": "user", "item": "item", "time": "at"},
            },
        },
        "kcore": {"min_user": 1, "min_item": 1},
        "spark": {"engine": "sail", "master": "local[2]"},
    }
    (tmp_path / "etl.yaml").write_text(yaml.safe_dump(config))
    for users in (8, 8, 6):
        rows = [(f"u{user}", f"i{k}", 1_000 + k) for user in range(users) for k in range(7)]
        (tmp_path / "log").mkdir(exist_ok=True)
        pl.DataFrame(rows, schema=["user", "item", "at"], orient="row").write_parquet(tmp_path / "log" / "part.parquet")
        command = [sys.executable, "-m", "etl", "all", "--config", str(tmp_path / "etl.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "14 rows retracted, 0 added" in done.stdout
    assert pl.read_delta(str(tmp_path / "lake" / "users"))["user"].sort().to_list() == [f"u{k}" for k in range(6)]
