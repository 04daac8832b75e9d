"""The vocabulary of items: index, title, year, categories, attributes, degree, and whether k-core keeps the item.

It holds every item of the log and of the item file. An item that a delivery describes is described anew; what a
delivery doesn't mention keeps its description.
"""

from pyspark.sql import DataFrame

from etl.config import KCoreConfig
from etl.jobs import kcore, quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.vocabulary import described_by, first_described, vocabulary
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
    kept = kcore.kept_items(interactions, config) if config.iterate else config.min_item
    return vocabulary(interactions, described, old, column="item", kept=kept, types=_TYPES).select(*ITEMS.schema.names)


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
