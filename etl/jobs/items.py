"""The vocabulary of items: index, title, year, categories, attributes, degree, and whether k-core keeps the item.

It holds every item of the log and of the item file. An item that a delivery describes is described anew; what a
delivery doesn't mention keeps its description.
"""

import json

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.retraction import past
from etl.jobs.vocabulary import described_by, first_described, grown, mark_kept, vocabulary
from etl.lake import spark_io
from etl.session import held
from etl.tables import INTERACTIONS, ITEMS, USERS

_TYPES = {
    "title": "string",
    "year": "int",
    "categories": "array<string>",
    "attributes": "map<string, string>",
}


def transform(
    interactions: DataFrame,
    described: DataFrame | None,
    old: DataFrame | None,
    config: KCoreConfig,
    *,
    first: int | None = None,
) -> DataFrame:
    """ITEMS. `described`: item, title, year, categories, attributes (one row an item); `old`: the table as it was."""
    counts = interactions.groupBy("item").agg(F.count(F.lit(1)).alias("degree"))
    found = held(counts.withColumn("kept", F.lit(False)))
    found = mark_kept(found, kcore.kept_items(interactions, config, found), "item")
    return vocabulary(found, described, old, column="item", types=_TYPES, first=first).select(*ITEMS.schema.names)


def grow(
    grown_log: kcore.GrownLog,
    described: DataFrame | None,
    old: DataFrame,
    users: DataFrame,
    config: KCoreConfig,
    *,
    first: int | None = None,
) -> DataFrame:
    """ITEMS as `transform` gives them for a grown log, up to the order of indices.

    `old`, `users`: ITEMS and USERS as the log before gave them.
    """
    log, appended, buckets = grown_log.log, grown_log.appended, grown_log.buckets
    found = grown(old, appended, "item")
    if config.iterate:
        kept = kcore.grown_items(log, appended, found, grown(users, appended, "user"), config, buckets=buckets)
    else:
        kept = found.where(F.col("degree") >= config.min_item)
    found = mark_kept(found, kept, "item")
    return vocabulary(found, described, old, column="item", types=_TYPES, first=first).select(*ITEMS.schema.names)


def run(run: Run) -> Outcome:
    raw = run.engine.raw("items")
    described = None
    if raw is not None:
        quarantine.set_aside_if_any(run, raw, kind="items")
        described = first_described(raw, "item")
    appended, users, config = run.appended(INTERACTIONS), _users_then(run), run.config.kcore
    then = past(run, INTERACTIONS, "item", [run.read(INTERACTIONS), described])
    old, first = then.old, then.first
    if appended is None or old is None or users is None:
        frame = transform(run.read(INTERACTIONS), described, old, config, first=first)
        return run.commit(frame, metadata=then.metadata)
    grown_log = kcore.GrownLog(run.read_before(INTERACTIONS), appended, run.config.buckets)
    frame = grow(grown_log, described, old, users, config, first=first)
    return run.commit(frame, metadata=then.metadata)


def _users_then(run: Run) -> DataFrame | None:
    """USERS as made of the log and items before, None where the table isn't of these."""
    last = spark_io.last_commit(run.lake, USERS)
    if run.before is None or run.base is None or last.get("kcore") != kcore.rules(run.config.kcore):
        return None
    if json.loads(last["inputs"]) != {**run.before, ITEMS.name: run.base}:
        return None
    return spark_io.read(run.spark, run.lake, USERS, version=int(last["version"]))


JOB = Job(
    ITEMS,
    run,
    reads=(INTERACTIONS,),
    settings=lambda config: [described_by(config, "items"), config.kcore.model_dump()],
    files=lambda source, config: source.fingerprint(["items"]),
    needs_source=True,
)
