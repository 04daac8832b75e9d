"""The cleaned log: duplicates, unknown items, what is there already."""

from typing import Any

from pyspark.sql import SparkSession

from etl.jobs import interactions, quarantine
from etl.sources.found_events import found_in as found_in_files
from etl.tables import INTERACTIONS, bucket_of
from tests.fixtures.frames import BUCKETS, frame, raw_events

EVENT = {"user": "u1", "item": "i1", "time": 5, "event_type": "view", "value": 1.0, "basket": "b"}


def test_transform_drops_exact_duplicates_and_keeps_the_first_line(spark: SparkSession) -> None:
    rows = [EVENT, EVENT | {"source_order": 9}, EVENT | {"value": None}, EVENT | {"value": None, "basket": None}]
    rows += [EVENT | {"value": None}]
    found = interactions.transform(raw_events(spark, rows), None, buckets=BUCKETS)
    assert found.columns == INTERACTIONS.schema.names
    kept = sorted((row["value"], row["basket"] or "", row["source_order"]) for row in found.collect() if row["value"])
    assert kept == [(1.0, "b", 1)]
    assert sorted(row["source_order"] for row in found.collect()) == [1, 3, 4]
    assert {row["bucket"] for row in found.collect()} == {bucket_of("u1", BUCKETS)}


def test_transform_leaves_rejected_rows_out(spark: SparkSession) -> None:
    found = interactions.transform(raw_events(spark, [EVENT, {"reason": "user is missing"}]), None, buckets=BUCKETS)
    assert [row["user"] for row in found.collect()] == ["u1"]


def test_transform_appends_only_what_the_table_lacks(spark: SparkSession) -> None:
    day = [EVENT, EVENT | {"event_type": None, "value": None, "basket": None}]
    old = interactions.transform(raw_events(spark, day), None, buckets=BUCKETS)
    new = raw_events(spark, [*day, EVENT | {"time": 6}, EVENT | {"basket": None}])
    found = interactions.transform(new, old, buckets=BUCKETS).collect()
    assert sorted((row["time"], row["basket"]) for row in found if row["basket"]) == [(6, "b")]
    assert len(found) == 2


def test_reject_unknown_says_so_and_keeps_what_was_read(spark: SparkSession) -> None:
    rows: list[dict[str, Any]] = [EVENT, EVENT | {"item": "i9"}, {"reason": "item is missing", "raw": "u1,,5"}]
    found_in = found_in_files({"log": 0}, several=False)
    marked = quarantine.reject_unknown(
        raw_events(spark, rows), frame(spark, [("i1",)], "item string"), found_in=found_in
    )
    assert [row["source_order"] for row in marked.where("rejected is null").collect()] == [1]
    rejected = quarantine.transform(quarantine.rejected_events(marked), section="source.events")
    found = {row["line"]: (row["file"], row["reason"], row["raw"]) for row in rejected.collect()}
    assert found[2][:2] == ("log", "unknown item")
    assert '"item":"i9"' in found[2][2]
    assert found[3] == ("log", "item is missing", "u1,,5")
    assert len(found) == 2
