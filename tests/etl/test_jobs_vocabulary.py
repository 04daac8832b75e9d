"""Indices that only grow, k-core, and the descriptions beside them."""

import polars as pl
import pytest
from pyspark.sql import SparkSession

from etl.config import KCoreConfig
from etl.jobs import items, kcore, users
from etl.jobs.vocabulary import first_described, with_index
from etl.sources.schema import RAW_ITEMS, spark_schema
from etl.tables import FIRST_INDEX, ITEMS, USERS
from tests.etl.frames import BUCKETS, frame, interactions


def _random_log(seed: int, *, num_users: int = 40, num_items: int = 30, rows: int = 260) -> list[tuple[str, str, int]]:
    import numpy as np

    draw = np.random.default_rng(seed)
    user = draw.integers(0, num_users, rows)
    item = np.minimum(draw.zipf(1.4, rows), num_items)
    return [(f"u{u}", f"i{i}", t) for t, (u, i) in enumerate(zip(user.tolist(), item.tolist(), strict=True))]


@pytest.mark.parametrize(("partitions", "range_ids"), [(1, 100), (3, 1), (7, 2)])
def test_with_index_numbers_by_bytes_whatever_the_partitions_and_ranges(
    spark: SparkSession, partitions: int, range_ids: int
) -> None:
    ids = ["b", "a", "é", "Z", "a10", "a9", "", "b", *map(str, range(40))]
    rows = frame(spark, [(i,) for i in ids], "id string").repartition(partitions)
    found = with_index(rows, None, column="id", range_ids=range_ids)
    in_order = sorted(set(ids), key=str.encode)
    assert {row["id"]: row["index"] for row in found.collect()} == {
        name: FIRST_INDEX + place for place, name in enumerate(in_order)
    }


def test_with_index_appends_after_the_old(spark: SparkSession) -> None:
    old = frame(spark, [("m", 5), ("z", 6)], "id string, index int")
    found = with_index(frame(spark, [("a",), ("z",), ("b",)], "id string"), old, column="id")
    assert {row["id"]: row["index"] for row in found.collect()} == {"m": 5, "z": 6, "a": 7, "b": 8}
    again = with_index(frame(spark, [("m",)], "id string"), found, column="id")
    assert again.count() == 4


def _core(log: pl.DataFrame, min_user: int, min_item: int) -> pl.DataFrame:
    while True:
        left = log.filter(pl.len().over("user") >= min_user).filter(pl.len().over("item") >= min_item)
        if len(left) == len(log):
            return left
        log = left


@pytest.mark.parametrize("seed", [0, 1])
def test_kcore_is_the_fixed_point(spark: SparkSession, seed: int) -> None:
    rows, config = _random_log(seed), KCoreConfig(min_user=6, min_item=5)
    core = _core(pl.DataFrame(rows, schema=["user", "item", "time"], orient="row"), 6, 5)
    log = interactions(spark, rows).persist()
    kept = kcore.kept_items(log, config)
    assert len(core) > 0
    assert {row[0] for row in kept.collect()} == set(core["item"])
    assert {row[0] for row in kcore.kept_users(log, kept, config).collect()} == set(core["user"])


def test_kcore_once_goes_by_raw_degrees(spark: SparkSession) -> None:
    # i1 has two raw events, though u1, who made one of them, goes.
    log = interactions(spark, [("u1", "i1", 1), ("u2", "i1", 2), ("u2", "i2", 3), ("u2", "i3", 4)])
    once, core = KCoreConfig(min_user=2, min_item=2, iterate=False), KCoreConfig(min_user=2, min_item=2)
    assert [row[0] for row in kcore.kept_items(log, once).collect()] == ["i1"]
    assert [row[0] for row in kcore.kept_users(log, kcore.kept_items(log, once), once).collect()] == ["u2"]
    assert kcore.kept_items(log, core).count() == 0


def test_items_are_those_of_the_log_and_of_the_file_described_anew(spark: SparkSession) -> None:
    log = interactions(spark, [("u1", "b", 1), ("u2", "b", 2), ("u1", "c", 3)])
    attributes = "attributes map<string, string>"
    schema = f"item string, title string, year int, categories array<string>, {attributes}"
    described = frame(spark, [("a", "A", 1990, ["x"], {"k": "v"}), ("b", "New", None, [], {})], schema)
    old_schema = f"item string, index int, title string, year int, categories array<string>, {attributes}"
    old = frame(spark, [("b", 5, "Old", 1980, ["y"], {}), ("z", 6, "Z", 1970, ["w"], {})], old_schema)
    once = KCoreConfig(min_user=1, min_item=2, iterate=False)
    found = items.transform(log, described, old, once)
    assert found.columns == ITEMS.schema.names
    rows = {row["item"]: row.asDict(recursive=True) for row in found.collect()}
    assert {name: row["index"] for name, row in rows.items()} == {"b": 5, "z": 6, "a": 7, "c": 8}
    assert {name: row["degree"] for name, row in rows.items()} == {"b": 2, "z": 0, "a": 0, "c": 1}
    assert [name for name, row in rows.items() if row["kept"]] == ["b"]
    assert rows["b"]["title"] == "New"
    assert rows["z"]["categories"] == ["w"]
    assert rows["c"] | {"index": 0} == {
        "item": "c",
        "index": 0,
        "kept": False,
        "degree": 1,
        "title": None,
        "year": None,
        "categories": [],
        "attributes": {},
    }
    assert rows["a"]["attributes"] == {"k": "v"}


def test_users_are_kept_by_their_events_with_kept_items(spark: SparkSession) -> None:
    log = interactions(spark, [("u1", "i1", 1), ("u1", "i2", 2), ("u2", "i1", 3), ("u2", "i1", 4)])
    catalogue = frame(spark, [("i1", True), ("i2", False)], "item string, kept boolean")
    found = users.transform(log, catalogue, None, None, KCoreConfig(min_user=2, min_item=1))
    assert found.columns == USERS.schema.names
    rows = {row["user"]: (row["index"], row["kept"], row["degree"]) for row in found.collect()}
    assert rows == {"u1": (5, False, 2), "u2": (6, True, 2)}
    once = users.transform(log, catalogue, None, None, KCoreConfig(min_user=2, min_item=1, iterate=False))
    assert all(row["kept"] for row in once.collect())


def test_first_described_takes_the_first_line_that_can_be_used(spark: SparkSession) -> None:
    rows = [
        ("a", None, None, None, None, "items", "f", 1, None, "item is torn", None, None, "a|"),
        ("a", "second", 1, [], {}, "items", "f", 2, None, None, None, None, None),
        ("a", "third", 1, [], {}, "items", "f", 3, None, None, None, None, None),
    ]
    found = first_described(frame(spark, rows, spark_schema(RAW_ITEMS)), "item").collect()
    assert [(row["item"], row["title"]) for row in found] == [("a", "second")]


def _days(seed: int) -> list[list[tuple[str, str, int]]]:
    """A log in three days: later ones bring new users and items, and old ones over the bar."""
    rows = _random_log(seed)
    new = [
        (f"n{user}" if n % 3 else user, f"j{item}" if n % 4 else item, t)
        for n, (user, item, t) in enumerate(rows[200:])
    ]
    return [rows[:120], rows[120:200], new]


@pytest.mark.parametrize(
    ("seed", "iterate", "num_days"),
    [
        (2, True, 2),
        pytest.param(2, False, 3, marks=pytest.mark.slow),
        pytest.param(3, True, 3, marks=pytest.mark.slow),
        *(pytest.param(seed, True, 3, marks=pytest.mark.slow) for seed in range(4, 8)),
    ],
)
def test_vocabularies_grown_by_day_equal_those_of_the_whole_log(
    spark: SparkSession, seed: int, iterate: bool, num_days: int
) -> None:
    config = KCoreConfig(min_user=4, min_item=4, iterate=iterate)
    days = _days(seed)[-num_days:]
    log = interactions(spark, days[0])
    catalogue = items.transform(log, None, None, config).persist()
    people = users.transform(log, catalogue, None, None, config).persist()
    for number in range(1, num_days):
        rows = [row for day in days[: number + 1] for row in day]
        whole, appended = interactions(spark, rows), interactions(spark, days[number])
        grown_log = kcore.GrownLog(log, appended, BUCKETS)
        catalogue_now = items.grow(grown_log, None, catalogue, people, config).persist()
        people = users.grow(grown_log, catalogue_now, None, people, config).persist()
        log, catalogue = whole, catalogue_now
        fresh = items.transform(whole, None, None, config)
        pairs = [(catalogue, fresh), (people, users.transform(whole, fresh, None, None, config))]
        for found, expected in pairs:
            key = found.columns[0]
            told = [{row[key]: (row["degree"], row["kept"]) for row in table.collect()} for table in (found, expected)]
            assert told[0] == told[1]
            assert any(kept for _, kept in told[0].values())
            assert sorted(row["index"] for row in found.collect()) == list(range(5, 5 + len(told[0])))
