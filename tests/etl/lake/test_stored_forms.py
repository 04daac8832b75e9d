"""Times are integers in memory and timestamps in files; attributes are maps in both; what the log says of them."""

import datetime as dt
import json
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder
from pyspark.sql import SparkSession

from etl.lake import spark_io
from etl.lake.commit import Commit, commit_files
from etl.lake.datafile import DataFile, InvalidFile, data_schema, file_schema
from etl.lake.file_reader import open_parquet
from etl.lake.forms import FIRST_ATTRIBUTES, as_map, in_memory
from etl.lake.snapshots import LakeError, OtherFormat, check_formats, snapshot_files, table_filesystem
from etl.lake.spark_io import FileWriter, data_files
from etl.tables import BASKETS, INTERACTIONS, PROPERTY_FORMAT, QUARANTINE, RELEASES, SEQUENCES, TIME_ORDINAL, Table
from tests.fixtures.local_rows import local_rows
from tests.fixtures.old_lakes import in_format_1

NOW = 1_700_000_000_123_456
TIMES = (NOW, NOW + 1, NOW + 10**9 + 543)


def write(lake: Path, times: tuple[int, ...], table: Table = INTERACTIONS, mode: Any = "append") -> list[DataFile]:
    """A file of events of user u at these times."""
    (lake / table.name).mkdir(parents=True, exist_ok=True)
    writer = FileWriter(table_filesystem(str(lake), table), table, (0,))
    rows = [{"bucket": 0, "user": "u", "item": "i", "time": time, "source_order": n} for n, time in enumerate(times)]
    writer.add(pa.RecordBatch.from_pylist(rows, schema=table.schema))
    files = data_files(writer.close()["file"].to_pylist())
    commit_files(str(lake), table, files, Commit(mode=mode, app=uuid.uuid4().hex, app_version=0, metadata={}))
    return files


def statistics(lake: Path, version: int) -> dict[str, Any]:
    lines = (lake / "interactions" / "_delta_log" / f"{version:020d}.json").read_text().splitlines()
    (add,) = (json.loads(line)["add"] for line in lines if '"add"' in line)
    return dict(json.loads(add["stats"]))


def test_other_readers_see_timestamps_and_skip_no_row_by_their_bounds(tmp_path: Path) -> None:
    write(tmp_path, TIMES)
    found = statistics(tmp_path, 1)
    assert found["minValues"]["time"] == "2023-11-14T22:13:20.123Z"
    assert found["maxValues"]["time"] == "2023-11-14T22:30:00.124Z"  # of .123999
    table = DeltaTable(tmp_path / "interactions")
    bounds = pa.table(table.get_add_actions(flatten=True)).select(["min.time", "max.time"]).to_pylist()
    assert [value.tzinfo is not None for value in bounds[0].values()] == [True, True]
    for place, time in enumerate(TIMES):
        moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=time)
        frame = pl.scan_delta(str(tmp_path / "interactions"))
        assert frame.filter(pl.col("time") >= moment).collect().height == len(TIMES) - place
        query = f"select count(*) as n from log where time >= timestamp '{moment.isoformat()}'"
        counted = pa.table(QueryBuilder().register("log", table).execute(query).read_all())
        assert counted["n"].to_pylist() == [len(TIMES) - place]
    assert pl.read_delta(str(tmp_path / "interactions"))["time"].dtype == pl.Datetime("us", "UTC")


@pytest.mark.parametrize(
    ("times", "low", "high"),
    [
        ((-1, -1_500), "1969-12-31T23:59:59.998Z", "1970-01-01T00:00:00.000Z"),
        ((-(2**62), 2**62), None, None),
        ((0, 1_000), "1970-01-01T00:00:00.000Z", "1970-01-01T00:00:00.001Z"),
    ],
)
def test_bounds_of_times_are_rounded_outwards(
    times: tuple[int, ...], low: str | None, high: str | None, tmp_path: Path
) -> None:
    (file,) = write(tmp_path, times)
    found = statistics(tmp_path, 1)
    assert (found["minValues"].get("time"), found["maxValues"].get("time")) == (low, high)
    with open_parquet(str(tmp_path), INTERACTIONS, file.path) as opened:
        for rows in (opened.read(), opened.read_row_group(0), *opened.iter_batches()):
            assert rows["time"].to_pylist() == list(times)
        assert opened.schema_arrow.field("time").type == pa.int64()


def test_spark_reads_integers_and_leaves_row_groups_of_other_times_out(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, TIMES)
    found = spark_io.read(spark, str(tmp_path), INTERACTIONS, times=(TIMES[1], TIMES[2] - 1))
    assert [row["time"] for row in found.collect()] == [TIMES[1]]
    found.explain()
    assert "GreaterThanOrEqual(time,2023-11-14" in capsys.readouterr().out
    rows = spark_io.read(spark, str(tmp_path), INTERACTIONS)
    done = Commit(mode="overwrite", app="a", app_version=0, metadata={})
    spark_io.write(spark, rows, str(tmp_path / "copy"), INTERACTIONS, done)
    tables = [DeltaTable(lake / "interactions").to_pyarrow_table() for lake in (tmp_path, tmp_path / "copy")]
    assert tables[0].schema == tables[1].schema
    assert sorted(map(repr, tables[0].to_pylist())) == sorted(map(repr, tables[1].to_pylist()))


def test_order_stays_integers(tmp_path: Path) -> None:
    write(tmp_path, (3, 1, 2), INTERACTIONS.of(TIME_ORDINAL))
    assert pl.read_delta(str(tmp_path / "interactions"))["time"].to_list() == [3, 1, 2]
    check_formats(str(tmp_path))
    with pytest.raises(LakeError, match=r"graftrec.time=ordinal \(now timestamp\); overwrite it all"):
        write(tmp_path, TIMES)
    write(tmp_path, TIMES, mode="overwrite")  # settings with another kind of time
    assert pl.read_delta(str(tmp_path / "interactions"))["time"].dtype == pl.Datetime("us", "UTC")
    assert len(snapshot_files(str(tmp_path), INTERACTIONS)) == 1


def test_a_file_with_integers_for_timestamps_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, TIMES)
    rows = in_memory(pq.ParquetFile(tmp_path / "interactions" / files[0].path).read())
    pq.write_table(rows, tmp_path / "interactions" / "part-0.parquet")
    other = DataFile("part-0.parquet", {"bucket": "0"})
    with pytest.raises(InvalidFile, match=r"column time should be timestamp\[us, tz=UTC\], found int64"):
        commit_files(str(tmp_path), INTERACTIONS, [other], Commit(mode="append", app="x", app_version=0, metadata={}))


def test_columns_that_the_contract_has_gained_since_are_null(tmp_path: Path, spark: SparkSession) -> None:
    fewer = pa.schema(list(QUARANTINE.schema)[:-4])
    for lake in (tmp_path / "plain", tmp_path / "by task ="):  # read by Spark, and through Arrow
        for table, version in ((replace(QUARANTINE, schema=fewer), 1), (QUARANTINE, 3)):
            (lake / table.name).mkdir(parents=True, exist_ok=True)
            writer = FileWriter(table_filesystem(str(lake), table), table, ("interactions", f"{version}.csv"))
            row = {"line": 1, "reason": "not a number", "raw": "x", "setting": "columns"}
            writer.add(pa.RecordBatch.from_pylist([row], schema=data_schema(table)))
            commit = Commit(mode="append", app=f"t{version}", app_version=0, metadata={})
            files = data_files(writer.close()["file"].to_pylist())
            assert commit_files(str(lake), table, files, commit).version == version
            check_formats(str(lake))
            found = spark_io.read(spark, str(lake), QUARANTINE).orderBy("file").collect()
            assert [row["setting"] for row in found] == [None, "columns"][: len(found)]
            assert spark_io.read(spark, str(lake), QUARANTINE, version=1).collect()[0]["setting"] is None


def test_a_lake_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, TIMES)
    handle = DeltaTable(tmp_path / "interactions")
    handle.alter.set_table_properties({PROPERTY_FORMAT: "3"}, raise_if_not_exists=False)
    with pytest.raises(OtherFormat, match="expected format 2 or older, found 3; use a newer graftrec"):
        check_formats(str(tmp_path))


def test_a_lakes_events_are_a_source_in_either_form(tmp_path: Path) -> None:
    write(tmp_path / "new", TIMES)
    old = in_format_1(tmp_path / "new", tmp_path / "old")
    assert pl.read_delta(str(old / "interactions"))["time"].to_list() == list(TIMES)
    columns = {"user": "user", "item": "item", "time": "time"}
    for lake in ("new", "old"):
        found = local_rows(tmp_path / lake, path="interactions", format="delta", columns=columns, time_unit="us")
        assert [(row["user"], row["time"], row["reason"]) for row in found] == [("u", time, None) for time in TIMES]


def test_the_contract_says_what_is_stored() -> None:
    moment = pa.timestamp("us", "UTC")
    assert INTERACTIONS.stored.field("time").type == BASKETS.stored.field("time").type == moment
    assert file_schema(SEQUENCES).field("times") == pa.field("times", pa.list_(moment))
    assert RELEASES.stored.field("created").type == moment
    assert SEQUENCES.of(TIME_ORDINAL).stored == SEQUENCES.schema


def test_of_a_name_given_twice_the_first_value_counts() -> None:
    rows = [[("a", "1"), ("b", None), ("a", "2")], [], [("a", "3"), (None, "x"), ("a", "3")]]
    named = [[{"name": name, "value": value} for name, value in row] for row in rows]
    found = as_map(pa.array([[], *named], FIRST_ATTRIBUTES).slice(1))
    assert found.to_pylist() == [[("a", "1"), ("b", None)], [], [("a", "3")]]
