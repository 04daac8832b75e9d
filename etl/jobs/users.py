"""The vocabulary of users: index, attributes, degree, and whether k-core keeps the user."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.items import describe
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.vocabulary import described_by, first_described, with_index
from etl.tables import INTERACTIONS, ITEMS, USERS

_TYPES = {"attributes": "array<struct<name: string, value: string>>"}


def transform(
    interactions: DataFrame, items: DataFrame, described: DataFrame | None, old: DataFrame | None, config: KCoreConfig
) -> DataFrame:
    """USERS. `items`: item, kept; `described`: user, attributes (one row a user); `old`: the table as it was."""
    degree = interactions.groupBy("user").agg(F.count(F.lit(1)).alias("degree"))
    ids = degree.select("user") if described is None else degree.select("user").unionByName(described.select("user"))
    frame = with_index(ids, old, column="user").join(degree, "user", "left")
    if config.iterate:
        kept = kcore.kept_users(interactions, items.where("kept"), config).withColumn("kept", F.lit(True))
        frame = frame.join(kept, "user", "left").withColumn("kept", F.coalesce("kept", F.lit(False)))
    else:
        frame = frame.withColumn("kept", F.coalesce(F.col("degree") >= config.min_user, F.lit(False)))
    frame = frame.withColumn("degree", F.coalesce("degree", F.lit(0)).cast("long"))
    return describe(frame, described, old, key="user", types=_TYPES).select(*USERS.schema.names)


def run(run: Run) -> Outcome:
    raw = run.engine.raw("users")
    described = None
    if raw is not None:
        quarantine.set_aside_if_any(run, raw, kind="users")
        described = first_described(raw, "user")
    return run.commit(transform(run.read(INTERACTIONS), run.read(ITEMS), described, run.own(), run.config.kcore))


JOB = Job(
    USERS,
    run,
    reads=(INTERACTIONS, ITEMS),
    settings=lambda config: [described_by(config, "users"), config.kcore.model_dump()],
    files=lambda source, config: source.fingerprint(["users"]),
    needs_source=True,
)
