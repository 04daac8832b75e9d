"""One row per split, domain and user: the user's kept items in time order, and where its hold-out begins.

A user's events meet once, sorted by (time, source_order), with each item's domains as bits; every domain and split is
then cut from that row, so that neither multiplies the shuffle. A user's events must fit into one row of Spark: about
ten million of them.
"""

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl import delta
from etl.config import ConfigError, EtlConfig, SplitConfig
from etl.jobs.domains import names_of
from etl.jobs.job import Job, Outcome, Run
from etl.tables import DOMAIN_ALL, DOMAINS, INTERACTIONS, ITEMS, PROPERTY_BUCKETS, PROPERTY_TIME, SEQUENCES, USERS


def transform(
    interactions: DataFrame,
    users: DataFrame,
    items: DataFrame,
    domains: DataFrame,
    *,
    names: Sequence[str],
    splits: Sequence[SplitConfig],
) -> DataFrame:
    """SEQUENCES. `names`: the domains, the same as in the frame `domains`."""
    event = F.struct("time", "source_order", "index", "bits", "event_type", "value")
    histories = (
        kept_events(interactions, items, domains, names)
        .groupBy("bucket", "user")
        .agg(F.sort_array(F.collect_list(event)).alias("events"))
        .join(users.where("kept").select("user", F.col("index").alias("user_index")), "user")
    )
    for number, split in enumerate(splits):
        histories = histories.withColumn(f"cut{number}", _cut(split, names))
    rows = []
    for name in names:
        cuts = [F.lit(None) if split.causal_target == name else F.col(f"cut{n}") for n, split in enumerate(splits)]
        rows.append(F.struct(F.lit(name).alias("domain"), _of_domain(name, names).alias("events"), *_named(cuts)))
    by_domain = histories.select("bucket", "user_index", F.explode(F.array(*rows)).alias("row"))
    by_domain = by_domain.select("bucket", "user_index", "row.*").where(F.size("events") > 0)
    parts = F.explode(F.array(*(_parts(split, F.col(f"cut{n}")) for n, split in enumerate(splits)))).alias("part")
    listed = by_domain.select("domain", "bucket", F.col("user_index").alias("user"), *_lists(), parts)
    return listed.select("*", "part.*").select(*SEQUENCES.schema.names)


def kept_events(interactions: DataFrame, items: DataFrame, domains: DataFrame, names: Sequence[str]) -> DataFrame:
    """The interactions with kept items, with the item's `index` and its domains' `bits` (bit k: names[k])."""
    number = F.create_map(*(F.lit(part) for k, name in enumerate(names) for part in (name, 1 << k)))
    member = domains.select("item", number[F.col("domain")].cast("long").alias("bit"))
    bits = member.where("bit is not null").groupBy("item").agg(F.bit_or("bit").alias("bits"))
    catalogue = items.where("kept").select("item", "index").join(bits, "item")
    return interactions.join(catalogue, "item")


def _of_domain(name: str, names: Sequence[str]) -> Column:
    if name == DOMAIN_ALL:
        return F.col("events")
    bit = F.lit(1 << list(names).index(name)).cast("long")
    return F.filter("events", lambda event: event["bits"].bitwiseAND(bit) != 0)


def _cut(split: SplitConfig, names: Sequence[str]) -> Column:
    """(time, source_order) of the user's first held-out item of the split's causal target; null: nothing to cut."""
    if split.causal_target is None:
        return F.lit(None).cast("struct<time: bigint, source_order: bigint>")
    target = _of_domain(split.causal_target, names)
    at = F.size(target) - (split.validation + split.test)
    first = F.get(target, F.when(_enough(F.size(target), split), at))
    return F.when(first.isNotNull(), F.struct(first["time"].alias("time"), first["source_order"].alias("source_order")))


def _named(cuts: Sequence[Column]) -> list[Column]:
    kind = "struct<time: bigint, source_order: bigint>"
    return [cut.cast(kind).alias(f"cut{number}") for number, cut in enumerate(cuts)]


def _parts(split: SplitConfig, cut: Column) -> Column:
    """split, valid_start, test_start, end of the events of a user and domain."""
    end = F.size("events")
    if split.causal_target is not None:
        before = F.filter("events", lambda event: F.struct(event["time"], event["source_order"]) < cut)
        end = F.when(cut.isNull(), end).otherwise(F.size(before))
    enough = _enough(end, split)
    valid_start = F.when(enough, end - (split.validation + split.test)).otherwise(end)
    test_start = F.when(enough, end - split.test).otherwise(end)
    return F.struct(
        F.lit(split.name).alias("split"),
        valid_start.cast("int").alias("valid_start"),
        test_start.cast("int").alias("test_start"),
        end.cast("int").alias("end"),
    )


def _enough(size: Column, split: SplitConfig) -> Column:
    return size >= F.lit(split.min_train + split.validation + split.test)


def _lists() -> list[Column]:
    """The parallel lists; event types and values only where the user has any."""

    def listed(name: str) -> Column:
        return F.transform("events", lambda event: event[name])

    def given(name: str) -> Column:
        return F.exists("events", lambda event: event[name].isNotNull())

    return [
        listed("index").alias("items"),
        listed("time").alias("times"),
        F.when(given("event_type"), listed("event_type")).alias("event_types"),
        F.when(given("value"), listed("value").cast("array<float>")).alias("values"),
    ]


def settings(config: EtlConfig) -> object:
    """What of the configuration decides how histories are cut."""
    return [[split.model_dump() for split in config.splits], [domain.name for domain in config.domains]]


def check(config: EtlConfig) -> None:
    """Raise ConfigError for splits that can't be made."""
    names = [split.name for split in config.splits]
    if not names:
        raise ConfigError("splits: expected at least one, found none; leave the setting out for last-5")
    if len(set(names)) < len(names):
        raise ConfigError(f"splits: expected different names, found {', '.join(names)}; rename one")
    known = names_of(config.domains)
    for split in config.splits:
        if split.causal_target is not None and split.causal_target not in known:
            raise ConfigError(
                f"splits.{split.name}.causal_target: expected a domain ({', '.join(known)}), "
                f"found {split.causal_target!r}; mend the name"
            )


def run(run: Run) -> Outcome:
    check(run.config)
    frame = transform(
        run.read(INTERACTIONS),
        run.read(USERS),
        run.read(ITEMS),
        run.read(DOMAINS),
        names=names_of(run.config.domains),
        splits=run.config.splits,
    )
    log = delta.last_commit(run.lake, INTERACTIONS)
    return run.commit(frame, properties={PROPERTY_BUCKETS: log["buckets"], PROPERTY_TIME: log["time"]})


JOB = Job(
    SEQUENCES,
    run,
    reads=(INTERACTIONS, USERS, ITEMS, DOMAINS),
    settings=settings,
)
