"""Item lists that were taken together, in time order. The last basket of a user is the test part, the one before it
validation, where there are at least three.

Baskets are made per domain: of a basket, a domain sees its own items. Where a split is `causal`, other domains' events
at or after the first held-out item's time are left out first.
"""

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from etl.config import SplitConfig
from etl.jobs.domains import names_of
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.sequences import kept_events, settings
from etl.tables import BASKETS, DOMAINS, INTERACTIONS, ITEMS, SEQUENCES, USERS

_MIN_BASKETS = 3


def transform(
    interactions: DataFrame,
    users: DataFrame,
    items: DataFrame,
    domains: DataFrame,
    sequences: DataFrame,
    *,
    names: Sequence[str],
    splits: Sequence[SplitConfig],
) -> DataFrame:
    """BASKETS. `sequences` says where causal splits cut."""
    found = F.array(*(F.when(_in(k), F.lit(name)) for k, name in enumerate(names)))
    events = (
        kept_events(interactions.where("basket is not null"), items, domains, names)
        .join(users.where("kept").select("user", F.col("index").alias("user_index")), "user")
        .withColumn("domain", F.explode(F.filter(found, lambda name: name.isNotNull())))
        .withColumn("split", F.explode(F.array(*(F.lit(split.name) for split in splits))))
    )
    for split in splits:
        if split.causal_target is not None:
            events = _cut(events, sequences, split)
    event = F.struct("time", "source_order", "index")
    whole = events.groupBy("split", "domain", "bucket", "user_index", "basket").agg(
        F.sort_array(F.collect_list(event)).alias("events")
    )
    of_user = Window.partitionBy("split", "domain", "bucket", "user_index")
    first = F.struct(F.col("events")[0]["time"], F.col("events")[0]["source_order"])
    placed = whole.withColumn("number", F.row_number().over(of_user.orderBy(first)) - 1)
    left = F.count(F.lit(1)).over(of_user) - F.col("number")
    enough = F.count(F.lit(1)).over(of_user) >= _MIN_BASKETS
    part = F.when(enough & (left == 1), "test").when(enough & (left == 2), "validation").otherwise("train")
    return placed.select(
        "split",
        "domain",
        "bucket",
        F.col("user_index").alias("user"),
        F.col("number").cast("int").alias("basket"),
        F.col("events")[0]["time"].alias("time"),
        part.alias("part"),
        F.transform("events", lambda event: event["index"]).alias("items"),
    )


def _in(number: int) -> Column:
    return F.col("bits").bitwiseAND(F.lit(1 << number).cast("long")) != 0


def _cut(events: DataFrame, sequences: DataFrame, split: SplitConfig) -> DataFrame:
    held = sequences.where((F.col("split") == split.name) & (F.col("domain") == split.causal_target))
    held = held.where("valid_start < end")
    first = held.select(F.col("user").alias("user_index"), F.col("times")[F.col("valid_start")].alias("_cut"))
    other = (F.col("split") == split.name) & (F.col("domain") != split.causal_target)
    joined = events.join(first, "user_index", "left")
    return joined.where(~other | F.col("_cut").isNull() | (F.col("time") < F.col("_cut"))).drop("_cut")


def run(run: Run) -> Outcome:
    frame = transform(
        run.read(INTERACTIONS),
        run.read(USERS),
        run.read(ITEMS),
        run.read(DOMAINS),
        run.read(SEQUENCES),
        names=names_of(run.config.domains),
        splits=run.config.splits,
    )
    return run.commit(frame)


JOB = Job(
    BASKETS,
    run,
    reads=(INTERACTIONS, USERS, ITEMS, DOMAINS, SEQUENCES),
    settings=settings,
)
