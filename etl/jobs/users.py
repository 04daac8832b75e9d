"""The vocabulary of users: index, attributes, degree, and whether k-core keeps the user."""

from pyspark.sql import DataFrame

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.vocabulary import described_by, first_described, vocabulary
from etl.tables import INTERACTIONS, ITEMS, USERS

_TYPES = {"attributes": "array<struct<name: string, value: string>>"}


def transform(
    interactions: DataFrame, items: DataFrame, described: DataFrame | None, old: DataFrame | None, config: KCoreConfig
) -> DataFrame:
    """USERS. `items`: item, kept; `described`: user, attributes (one row a user); `old`: the table as it was."""
    kept = kcore.kept_users(interactions, items.where("kept"), config) if config.iterate else config.min_user
    return vocabulary(interactions, described, old, column="user", kept=kept, types=_TYPES).select(*USERS.schema.names)


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
