"""The vocabulary of users: index, attributes, degree, and whether k-core keeps the user."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.retraction import past
from etl.jobs.vocabulary import described_by, first_described, grown, mark_kept, vocabulary
from etl.session import held
from etl.tables import INTERACTIONS, ITEMS, USERS

_TYPES = {"attributes": "map<string, string>"}


def transform(
    interactions: DataFrame,
    items: DataFrame,
    described: DataFrame | None,
    old: DataFrame | None,
    config: KCoreConfig,
    *,
    first: int | None = None,
) -> DataFrame:
    """USERS. `items`: item, kept; `described`: user, attributes (one row a user); `old`: the table as it was."""
    counted = interactions
    core = F.count(F.lit(1))
    if config.iterate:
        gone = items.where("not kept").select("item", F.lit(1).alias("_gone"))
        counted = counted.join(kcore.broadcast(gone, gone.count()), "item", "left")
        core = core - F.count("_gone")
    counts = counted.groupBy("user").agg(F.count(F.lit(1)).alias("degree"), core.alias("core"))
    found = held(counts.select("user", "degree", (F.col("core") >= config.min_user).alias("kept")))
    return vocabulary(found, described, old, column="user", types=_TYPES, first=first).select(*USERS.schema.names)


def grow(
    grown_log: kcore.GrownLog,
    items: DataFrame,
    described: DataFrame | None,
    old: DataFrame,
    config: KCoreConfig,
    *,
    first: int | None = None,
) -> DataFrame:
    """USERS as `transform` gives them for a grown log, up to the order of indices.

    `items`: item, kept, as they are now; `old`: USERS as the log before gave them.
    """
    log, appended = grown_log.log, grown_log.appended
    found = grown(old, appended, "user")
    if config.iterate:
        kept = kcore.grown_users(log, appended, items.where("kept"), found, config, buckets=grown_log.buckets)
    else:
        kept = found.where(F.col("degree") >= config.min_user)
    found = mark_kept(found, kept, "user")
    return vocabulary(found, described, old, column="user", types=_TYPES, first=first).select(*USERS.schema.names)


def run(run: Run) -> Outcome:
    raw = run.engine.raw("users")
    described = None
    if raw is not None:
        quarantine.set_aside_if_any(run, raw, kind="users")
        described = first_described(raw, "user")
    appended, items, config = run.appended(INTERACTIONS), run.read(ITEMS), run.config.kcore
    then = past(run, INTERACTIONS, "user", [run.read(INTERACTIONS), described])
    old, first = then.old, then.first
    if appended is None or old is None:
        frame = transform(run.read(INTERACTIONS), items, described, old, config, first=first)
    else:
        grown_log = kcore.GrownLog(run.read_before(INTERACTIONS), appended, run.config.buckets)
        frame = grow(grown_log, items, described, old, config, first=first)
    return run.commit(frame, metadata={"kcore": kcore.rules(config), **then.metadata})


JOB = Job(
    USERS,
    run,
    reads=(INTERACTIONS, ITEMS),
    settings=lambda config: [described_by(config, "users"), config.kcore.model_dump()],
    files=lambda source, config: source.fingerprint(["users"]),
    needs_source=True,
)
