"""Triples about items: (item, relation, entity) with a rank: the first actor, the second…"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.jobs import entities
from etl.jobs.job import Job, Outcome, Run
from etl.tables import ENTITIES, ITEMS, KNOWLEDGE


def transform(facts: DataFrame, items: DataFrame, entities_table: DataFrame) -> DataFrame:
    """KNOWLEDGE of `facts` (item, relation, rank, name, key, source) about `items`.

    An entity that an item names twice in one relation counts once, at the better rank.
    """
    named = facts.withColumn("tail", entities.entity()).groupBy("item", "relation", "tail")
    triples = named.agg(F.min(F.struct("rank", "source")).alias("_best"))
    heads = items.select("item", F.col("index").alias("head_index"))
    tails = entities_table.select(F.col("entity").alias("tail"), F.col("index").alias("tail_index"))
    joined = triples.join(heads, "item").join(tails, "tail").withColumnRenamed("item", "head")
    placed = joined.withColumn("rank", F.col("_best.rank")).withColumn("source", F.col("_best.source"))
    return placed.select(*KNOWLEDGE.schema.names)


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
