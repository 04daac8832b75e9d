"""The vocabulary of items: index, title, year, categories, attributes, degree, and whether k-core keeps the item.

It holds every item of the log and of the item file. An item that a delivery describes is described anew; what a
delivery doesn't mention keeps its description.
"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.vocabulary import described_by, first_described, with_index
from etl.tables import INTERACTIONS, ITEMS

_TYPES = {
    "title": "string",
    "year": "int",
    "categories": "array<string>",
    "attributes": "array<struct<name: string, value: string>>",
}


def transform(
    interactions: DataFrame, described: DataFrame | None, old: DataFrame | None, config: KCoreConfig
) -> DataFrame:
    """ITEMS. `described`: item, title, year, categories, attributes (one row an item); `old`: the table as it was."""
    degree = interactions.groupBy("item").agg(F.count(F.lit(1)).alias("degree"))
    ids = degree.select("item") if described is None else degree.select("item").unionByName(described.select("item"))
    frame = with_index(ids, old, column="item").join(degree, "item", "left")
    if config.iterate:
        kept = kcore.kept_items(interactions, config).withColumn("kept", F.lit(True))
        frame = frame.join(kept, "item", "left").withColumn("kept", F.coalesce("kept", F.lit(False)))
    else:  # the degree is at hand
        frame = frame.withColumn("kept", F.coalesce(F.col("degree") >= config.min_item, F.lit(False)))
    frame = frame.withColumn("degree", F.coalesce("degree", F.lit(0)).cast("long"))
    return describe(frame, described, old, key="item", types=_TYPES).select(*ITEMS.schema.names)


def describe(
    frame: DataFrame, described: DataFrame | None, old: DataFrame | None, *, key: str, types: dict[str, str]
) -> DataFrame:
    """Add the columns `types`: from the new description where the id has one, else the old; empty lists for none."""
    for number, told in enumerate([described, old]):
        if told is not None:
            columns = [F.col(name).cast(kind).alias(f"_{name}{number}") for name, kind in types.items()]
            frame = frame.join(told.select(key, *columns, F.lit(True).alias(f"_told{number}")), key, "left")
    for name, kind in types.items():
        value = F.lit(None).cast(kind)
        for number, told in reversed(list(enumerate([described, old]))):
            if told is not None:
                value = F.when(F.col(f"_told{number}"), F.col(f"_{name}{number}")).otherwise(value)
        frame = frame.withColumn(name, F.coalesce(value, F.array().cast(kind)) if kind.startswith("array") else value)
    return frame


def run(run: Run) -> Outcome:
    raw = run.engine.raw("items")
    described = None
    if raw is not None:
        quarantine.set_aside_if_any(run, raw, kind="items")
        described = first_described(raw, "item")
    return run.commit(transform(run.read(INTERACTIONS), described, run.own(), run.config.kcore))


JOB = Job(
    ITEMS,
    run,
    reads=(INTERACTIONS,),
    settings=lambda config: [described_by(config, "items"), config.kcore.model_dump()],
    files=lambda source, config: source.fingerprint(["items"]),
    needs_source=True,
)
