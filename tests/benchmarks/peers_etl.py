"""Sequences of a cleaned log of 20 M interactions, ours against Spark's idiom, Polars and DuckDB; then every table.

All read the same files (interactions, users, items) and write each user's items and times, in order of time and place
in the log, as lists; ours also the offsets of the hold-out, into a committed Delta table.
"""

import glob
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.benchmarks.__main__ import Options
from tests.benchmarks.growth import ITEMS
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median
from tests.benchmarks.lakes import write_lake
from tests.benchmarks.logs import write_log

EVENTS = 20_000_000
EVENTS_PER_USER = 100
BUCKETS = 16
QUARTER = psutil.virtual_memory().total // 4
GB = 2**30


def measure(report: Report, options: Options, *, events: int = EVENTS, rounds: int = 1) -> None:
    lake = options.work / f"lake-peers-{events}"
    write_lake(lake, events=events, users=events // EVENTS_PER_USER, items=ITEMS, buckets=BUCKETS)
    output = options.work / "peers-etl-output"
    cases = [
        Case(name, f"tests.benchmarks.peers_etl:{function}", {"lake": str(lake), **arguments})
        for name, function, arguments in (
            ("ours, Spark, 1 GB heap", "ours", {"engine": "spark"}),
            ("ours, Sail", "ours", {"engine": "sail"}),
            ("Spark, sort_array(collect_list)", "spark_idiom", {"output": str(output / "spark")}),
            ("Polars, streaming", "polars_streaming", {"output": str(output / "polars")}),
            ("DuckDB", "duckdb_lists", {"output": str(output / "duckdb")}),
        )
    ]
    output.mkdir(parents=True, exist_ok=True)
    found = alternate(cases, rounds=rounds)
    rows = {name: [median(n, key) for key in ("seconds", "wall_seconds", "peak_bytes")] for name, n in found.items()}
    report.say(f"default heap: a quarter of the machine's memory, {QUARTER / GB:.1f} GB")
    report.table(
        f"{events:,} interactions to sequences",
        ["who", "seconds", "with start-up", "peak GB", "users", "events"],
        [
            [name, seconds, wall, peak / GB, found[name][0]["users"], found[name][0]["events"]]
            for name, (seconds, wall, peak) in rows.items()
        ],
    )
    ours, idiom = rows["ours, Spark, 1 GB heap"], rows["Spark, sort_array(collect_list)"]
    same = {(n[0]["users"], n[0]["events"], n[0]["check"]) for n in found.values()}
    report.bar("kinds of results among them", len(same), at_most=1)
    report.bar("sequences on Spark, time over the idiom's", ours[0] / idiom[0], at_most=1.0)
    report.bar("sequences on Spark, peak memory over the idiom's", ours[2] / idiom[2], at_most=0.5)
    polars = rows["Polars, streaming"][0]
    report.bar("sequences on Sail, time over Polars'", rows["ours, Sail"][0] / polars, at_most=2.0)
    shutil.rmtree(output)
    _all_tables(report, options, events)


def _all_tables(report: Report, options: Options, events: int) -> None:
    log = write_log(options.work / f"log-{events}", events=events, users=events // EVENTS_PER_USER, items=ITEMS)
    rows: list[list[object]] = []
    jobs: list[str] = []
    for engine in ("spark", "sail"):
        lake = options.work / f"lake-peers-all-{engine}"
        shutil.rmtree(lake, ignore_errors=True)
        spark = {"engine": engine, "driver_memory": "3g", "shuffle_partitions": 16}
        arguments = {"log": str(log), "lake": str(lake), "spark": spark}
        numbers = alternate([Case(engine, "tests.benchmarks.growth:etl", arguments)], rounds=1)[engine][0]
        jobs = jobs or list(numbers["jobs"])
        rows.append(
            [engine, numbers["seconds"], numbers["peak_bytes"] / GB, *(numbers["jobs"].get(job, 0.0) for job in jobs)]
        )
        shutil.rmtree(lake)
    report.table(f"`python -m etl all`, {events:,} interactions: seconds", ["engine", "all", "peak GB", *jobs], rows)


# --- cases ------------------------------------------------------------------------------------------------------------


def ours(*, lake: str, engine: str) -> Numbers:
    from etl.config import EtlConfig
    from etl.jobs.job import Run, RunContext, plan_run
    from etl.jobs.sequences import JOB

    shutil.rmtree(Path(lake) / "sequences", ignore_errors=True)
    config = EtlConfig.model_validate(
        yaml.safe_load(f"{{lake: {lake!r}, source: {{kind: generator}}, spark: {{engine: {engine}}}}}")
    )
    made = RunContext(config)
    made.spark.range(1).collect()
    begun = time.perf_counter()
    run = plan_run(JOB, made)
    assert isinstance(run, Run)
    JOB.run(run)
    return {"seconds": time.perf_counter() - begun, **_told(f"{lake}/sequences/**/*.parquet")}


def spark_idiom(*, lake: str, output: str) -> Numbers:
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    builder = SparkSession.builder.master("local[*]").config("spark.driver.memory", f"{QUARTER >> 20}m")
    spark = builder.config("spark.ui.enabled", "false").config("spark.log.level", "ERROR").getOrCreate()
    spark.range(1).collect()
    begun = time.perf_counter()
    users = spark.read.parquet(f"{lake}/users").where("kept").select("user", F.col("index").alias("user_index"))
    items = spark.read.parquet(f"{lake}/items").where("kept").select("item", "index")
    events = spark.read.parquet(f"{lake}/interactions").join(items, "item").join(users, "user")
    event = F.struct("time", "source_order", "index")
    lists = events.groupBy("user_index").agg(F.sort_array(F.collect_list(event)).alias("events"))
    rows = lists.select(
        F.col("user_index").alias("user"), F.col("events.index").alias("items"), F.col("events.time").alias("times")
    )
    rows.write.mode("overwrite").option("compression", "zstd").parquet(output)
    seconds = time.perf_counter() - begun
    spark.stop()
    return {"seconds": seconds, **_told(f"{output}/*.parquet")}


def polars_streaming(*, lake: str, output: str) -> Numbers:
    import polars as pl

    begun = time.perf_counter()
    users = pl.scan_parquet(f"{lake}/users/*.parquet").filter("kept").select("user", user_index="index")
    items = pl.scan_parquet(f"{lake}/items/*.parquet").filter("kept").select("item", "index")
    events = pl.scan_parquet(f"{lake}/interactions/**/*.parquet", hive_partitioning=False)
    events = events.select("user", "item", "time", "source_order").join(items, on="item").join(users, on="user")
    events = events.select("user_index", "index", "time", "source_order").sort("user_index", "time", "source_order")
    lists = events.group_by("user_index", maintain_order=True).agg(items="index", times="time")
    Path(output).mkdir(exist_ok=True)
    lists.rename({"user_index": "user"}).sink_parquet(f"{output}/0.parquet", compression="zstd", engine="streaming")
    return {"seconds": time.perf_counter() - begun, **_told(f"{output}/*.parquet")}


def duckdb_lists(*, lake: str, output: str) -> Numbers:
    import duckdb

    Path(output).mkdir(exist_ok=True)
    begun = time.perf_counter()
    duckdb.sql(
        f"""COPY (
            SELECT u.index AS "user", list(i.index ORDER BY time, source_order) AS items,
                list(time ORDER BY time, source_order) AS times
            FROM read_parquet('{lake}/interactions/*/*.parquet', hive_partitioning=false) e
            JOIN read_parquet('{lake}/items/*.parquet') i ON e.item = i.item AND i.kept
            JOIN read_parquet('{lake}/users/*.parquet') u ON e.user = u.user AND u.kept GROUP BY u.index
        ) TO '{output}/0.parquet' (FORMAT parquet, COMPRESSION zstd)"""
    )
    return {"seconds": time.perf_counter() - begun, **_told(f"{output}/*.parquet")}


def _told(pattern: str) -> dict[str, Any]:
    """What the files hold: users, events, and a number that any other order of a user's items would change."""
    import numpy as np
    import pyarrow.parquet as pq

    users = events = check = 0
    for path in glob.glob(pattern, recursive=True):
        for batch in pq.ParquetFile(path).iter_batches(columns=["user", "items"], use_threads=False):
            lists = batch["items"]
            offsets = np.asarray(lists.offsets)
            item = np.asarray(lists.values)[offsets[0] : offsets[-1]].astype(np.int64)
            size = np.diff(offsets)
            place = np.arange(len(item)) - np.repeat(offsets[:-1] - offsets[0], size)
            user = np.repeat(batch["user"].to_numpy(), size).astype(np.int64)
            check = (check + int((item * (place + 1) * (user % 1_009 + 1) % 1_000_003).sum())) % (1 << 60)
            users, events = users + batch.num_rows, events + len(item)
    return {"users": users, "events": events, "check": check}
