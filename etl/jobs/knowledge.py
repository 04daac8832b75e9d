"""Triples of items and entities: (head, relation, tail) with a rank: the first actor, the second…"""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.jobs import entities
from etl.jobs.job import Job, Outcome, Run
from etl.sources.schema import OTHER_END
from etl.tables import ENTITIES, ITEMS, KNOWLEDGE


def transform(facts: DataFrame, items: DataFrame, entities_table: DataFrame) -> DataFrame:
    """KNOWLEDGE of `facts` (item, relation, rank, name, key, source) about `items`.

    An entity that an item names twice in one relation counts once, at the better rank.
    """
    ends = {
        "head": F.when(entities.is_other("item"), _without_mark("item")).otherwise(F.col("item")),
        "tail": F.when(entities.is_other("key"), _without_mark("key")).otherwise(entities.entity()),
        "head_kind": F.when(entities.is_other("item"), "entity").otherwise("item"),
        "tail_kind": F.when(entities.is_other("key"), "item").otherwise("entity"),
    }
    triples = (
        facts.select("rank", "source", "relation", *(column.alias(name) for name, column in ends.items()))
        .groupBy(*ends, "relation")
        .agg(F.min(F.struct("rank", "source")).alias("_best"))
    )
    things = items.select(F.col("item").alias("_id"), "index", F.lit("item").alias("_kind")).unionByName(
        entities_table.select(F.col("entity").alias("_id"), "index", F.lit("entity").alias("_kind"))
    )
    joined = triples
    for end in ("head", "tail"):
        named = things.select(
            F.col("_id").alias(end), F.col("_kind").alias(f"{end}_kind"), F.col("index").alias(f"{end}_index")
        )
        joined = joined.join(named, [end, f"{end}_kind"])
    placed = joined.withColumn("rank", F.col("_best.rank")).withColumn("source", F.col("_best.source"))
    return placed.select(*KNOWLEDGE.schema.names)


def _without_mark(column: str) -> Column:
    return F.expr(f"substring({column}, {len(OTHER_END) + 1})")


def run(run: Run) -> Outcome:
    facts = run.engine.kept("facts", lambda: entities.facts(run))
    return run.commit(transform(facts, run.read(ITEMS), run.read(ENTITIES)))


JOB = Job(
    KNOWLEDGE,
    run,
    reads=(ITEMS, ENTITIES),
    settings=entities.settings,
    files=entities.fingerprint,
    needs_source=True,
)
