"""What was delivered when: a row for each file that a version of `interactions` has read, as its commit records it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.jobs.deliveries import RECORDED
from etl.jobs.job import Job, Outcome, Run
from etl.lake import spark_io
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import existing_table, our_commits
from etl.lake.spark_io import spark_schema
from etl.sources.columns import FILE_SHIFT
from etl.tables import DELIVERIES, INTERACTIONS, QUARANTINE


def transform(
    spark: SparkSession, commits: Sequence[Mapping[str, Any]], events: DataFrame, rejects: Mapping[str, int]
) -> DataFrame:
    """DELIVERIES of commits of INTERACTIONS, oldest first. `events`: rows that came with them, and maybe others;
    `rejects`: file -> rows in quarantine."""
    place = F.shiftright("source_order", FILE_SHIFT).alias("place")
    counts = events.groupBy(place).agg(F.min("time"), F.max("time"), F.count(F.lit(1))).collect()
    found = {row[0]: tuple(row)[1:] for row in counts}
    rows: dict[tuple[int, int], tuple[Any, ...]] = {}
    newest = {at: int(commit["version"]) for commit in commits for _, _, at in json.loads(commit[RECORDED])}
    for commit in commits:
        version, delivered = int(commit["version"]), 1_000 * int(commit["timestamp"])
        number = int(commit["table_version"]) if "table_version" in commit else None
        for digest, name, at in json.loads(commit[RECORDED]):
            own = found.get(at, (None, None, 0)) if newest[at] == version else (None, None, 0)
            rows[version, at] = (version, delivered, digest, name, number, at, *own, rejects.get(name, 0))
    return spark.createDataFrame(list(rows.values()), spark_schema(DELIVERIES))


def run(run: Run) -> Outcome:
    pinned = run.inputs[INTERACTIONS.name]
    since = run.last.get("inputs")
    read = int(json.loads(since)[INTERACTIONS.name]) if since else -1
    history = our_commits(existing_table(run.lake, INTERACTIONS, pinned))
    commits = [one for one in history if read < int(one["version"]) <= pinned and _is_delivery(one)]
    appended = run.appended(INTERACTIONS)
    events = run.read(INTERACTIONS) if appended is None else appended
    return run.commit(transform(run.spark, commits[::-1], events, _rejects(run.lake)), mode="append")


def _is_delivery(commit: Mapping[str, Any]) -> bool:
    """Not of a commit that repeats what another recorded, without rows of the log."""
    return RECORDED in commit and str(commit["app"]).startswith("job/")


def _rejects(lake: str) -> dict[str, int]:
    """File of the log -> rows in quarantine."""
    counts: dict[str, int] = {}
    if spark_io.current_version(lake, QUARANTINE) is None:
        return counts
    for file in spark_io.snapshot_files(lake, QUARANTINE, partitions={"kind": ["interactions"]}):
        with open_parquet(lake, QUARANTINE, file.path) as opened:
            name = str(file.partition["file"])
            counts[name] = counts.get(name, 0) + opened.metadata.num_rows
    return counts


JOB = Job(DELIVERIES, run, reads=(INTERACTIONS,))
