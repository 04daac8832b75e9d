"""A table made of users' histories: all of it, or of a table that is there only the buckets that new rows touch.

A bucket is what can be replaced, and it is made anew as a whole. To copy its other users' rows instead would save less
than a third of the work: its part of the log is read for the new rows' sake, and its files are written, either way.
"""

from collections.abc import Mapping

from pyspark.sql import DataFrame

from etl import bucketed, delta
from etl.datafile import DataFile
from etl.histories import inputs
from etl.jobs.domains import names_of
from etl.jobs.job import Outcome, Run
from etl.tables import DOMAINS, INTERACTIONS, ITEMS, USERS, Table


def write(
    run: Run, rows: bucketed.Rows, *, columns: tuple[str, ...], needs: bool = False, properties: Mapping[str, str]
) -> Outcome:
    """Write and commit the table of `run`. `rows`, `columns`: see `etl.bucketed.write` and `etl.histories.inputs`.

    `needs`: without any of `columns` in the log there are no rows.
    """
    config = run.config
    buckets = int(delta.last_commit(run.lake, INTERACTIONS)["buckets"])
    max_events = config.sequences.max_events
    read = inputs(run.lake, run.inputs, names=names_of(config.domains), columns=columns, max_events=max_events)
    if needs and not read.columns:
        return run.commit_files([], properties=properties)
    touched = _touched(run, buckets)
    users = run.read(USERS)
    if touched is not None:
        run.notes.append(f"{len(touched)} of {buckets} buckets made anew")
        users = users.where(bucketed.bucket_of(buckets).isin(touched))
    files: list[DataFile] = []
    if touched is None or touched:
        tasks = config.spark.shuffle_partitions
        files = bucketed.write(users, rows, run.lake, run.job.table, read, buckets=buckets, tasks=tasks)
    if touched is None:
        return run.commit_files(files, properties=properties)
    return run.commit_files(files, mode="partitions", partition_scope={"bucket": touched}, properties=properties)


def _touched(run: Run, buckets: int) -> list[int] | None:
    """The buckets whose rows may differ from those of the table's last commit; None: all."""
    appended = run.appended(INTERACTIONS)
    if appended is None:
        return None
    touched = {row["bucket"] for row in appended.select("bucket").distinct().collect()}
    if len(touched) == buckets or _old_items_differ(run):
        return None
    now, before = (frame.where("kept").select("user", "index") for frame in _now_and_before(run, USERS))
    for differing in (_less(now, before), _less(before, now)):
        rows = differing.select(bucketed.bucket_of(buckets).alias("bucket")).distinct().collect()
        touched |= {row["bucket"] for row in rows}
    return None if len(touched) == buckets else sorted(touched)


def _old_items_differ(run: Run) -> bool:
    """Whether items that were there before are in other domains or kept anew: any bucket may have events of them."""
    (items, items_before), (members, members_before) = _now_and_before(run, ITEMS), _now_and_before(run, DOMAINS)
    now = members.select("item", "index", "domain").join(items.where("kept").select("item"), "item")
    before = members_before.select("item", "index", "domain").join(items_before.where("kept").select("item"), "item")
    gained = _less(now, before).join(items_before.select("item"), "item")
    return bool(gained.limit(1).collect() or _less(before, now).limit(1).collect())


def _now_and_before(run: Run, table: Table) -> tuple[DataFrame, DataFrame]:
    return run.read(table), run.read_before(table)


def _less(rows: DataFrame, others: DataFrame) -> DataFrame:
    return rows.join(others, rows.columns, "left_anti")
