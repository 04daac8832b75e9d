"""Social edges between users of the log. An edge listed twice counts once, with its larger weight."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.jobs import quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.vocabulary import described_by
from etl.sources.schema import RAW_EDGES, spark_schema
from etl.tables import SOCIAL, USERS


def transform(edges: DataFrame, users: DataFrame) -> DataFrame:
    """SOCIAL of raw edges (RAW_EDGES); an edge whose ends aren't both in `users` is left out."""
    good = edges.where(F.col("reason").isNull() & (F.col("user") != F.col("friend")))
    unique = good.groupBy("user", "friend").agg(F.max("weight").alias("weight"))
    left = users.select("user", F.col("index").alias("user_index"))
    right = users.select(F.col("user").alias("friend"), F.col("index").alias("friend_index"))
    return unique.join(left, "user").join(right, "friend").select(*SOCIAL.schema.names)


def run(run: Run) -> Outcome:
    raw = run.engine.raw("edges")
    if raw is None:
        return run.commit(transform(run.spark.createDataFrame([], spark_schema(RAW_EDGES)), run.read(USERS)))
    quarantine.set_aside_if_any(run, raw, kind="edges")
    return run.commit(transform(raw, run.read(USERS)))


JOB = Job(
    SOCIAL,
    run,
    reads=(USERS,),
    settings=lambda config: described_by(config, "edges"),
    files=lambda source, config: source.fingerprint(["edges"]),
    needs_source=True,
)
