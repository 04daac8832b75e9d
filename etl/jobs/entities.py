"""The vocabulary of entities: whoever and whatever the knowledge about items names."""

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.config import EtlConfig, GeneratorSource
from etl.jobs import quarantine
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.retraction import past
from etl.jobs.vocabulary import described_by, with_index
from etl.sources.metadata import knowledge, knowledge_fingerprint
from etl.sources.schema import ENTITY_PREFIX, OTHER_END, Source
from etl.sources.triples import triple_rows
from etl.tables import ENTITIES, ITEMS

_PEOPLE = ("director", "actor", "writer", "producer", "composer", "author", "artist", "person")  # relations to persons


def transform(facts: DataFrame, old: DataFrame | None, *, first: int | None = None) -> DataFrame:
    """ENTITIES named by `facts` (relation, name, key), and those of `old`, the table as it was."""
    named = (
        _ends(facts)
        .groupBy("entity")
        .agg(
            F.min("kind").alias("kind"),
            F.min("name").alias("name"),  # of several spellings the first by its bytes
        )
    )
    frame = with_index(named, old, column="entity", first=first)
    if old is None:
        return frame.join(named, "entity").select(*ENTITIES.schema.names)
    before = old.select("entity", F.col("kind").alias("_kind"), F.col("name").alias("_name"))
    frame = frame.join(named, "entity", "left").join(before, "entity", "left")
    kept = [F.coalesce(name, f"_{name}").alias(name) for name in ("kind", "name")]
    return frame.select("entity", "index", *kept).select(*ENTITIES.schema.names)


def _ends(facts: DataFrame) -> DataFrame:
    """entity, kind, name of the ends of facts that are entities."""
    tails = facts.where(~is_other("key")).select(entity().alias("entity"), kind().alias("kind"), "name")
    head = F.expr(f"substring(item, {len(OTHER_END) + 1})")
    name = F.expr(f"substring(item, {len(OTHER_END + ENTITY_PREFIX) + 1})")
    heads = facts.where(is_other("item")).select(
        head.alias("entity"), F.lit(ENTITY_PREFIX[:-1]).alias("kind"), name.alias("name")
    )
    return tails.unionByName(heads)


def is_other(column: str) -> Column:
    """Whether a fact's `item` is an entity, or its `key` an item."""
    return F.col(column).startswith(OTHER_END)


def kind() -> Column:
    """The kind of thing that a relation leads to."""
    return (
        F.when(_of_graph(), F.lit(ENTITY_PREFIX[:-1]))
        .when(F.col("relation").isin(*_PEOPLE), F.lit("person"))
        .otherwise(F.col("relation"))
    )


def entity() -> Column:
    """Raw id of the entity that a row (relation, key) names."""
    return F.when(_of_graph(), F.col("key")).otherwise(F.concat(kind(), F.lit(":"), F.col("key")))


def _of_graph() -> Column:
    return F.col("key").startswith(ENTITY_PREFIX)


def facts(run: Run) -> DataFrame:
    """item, relation, rank, name, key, source: what the source itself tells, then what the knowledge files add."""
    own = run.engine.raw("people")
    items = run.read(ITEMS).select("item", "title", "year")
    if own is None:
        return knowledge(run.spark, run.config.knowledge, items, keep=run.engine.kept)
    own = own.withColumn("source", F.lit(run.config.source.kind))
    if not run.config.knowledge.files:
        return own
    beside = knowledge(run.spark, run.config.knowledge, items, keep=run.engine.kept)
    lacking = beside.join(own.select("item", "relation").distinct(), ["item", "relation"], "left_anti")
    return own.unionByName(lacking)


def settings(config: EtlConfig) -> object:
    """What of the configuration decides which knowledge there is."""
    files = [file.model_dump(exclude={"path": True, "link": {"path"}}) for file in config.knowledge.files]
    return [described_by(config, "items"), files]


def fingerprint(source: Source, config: EtlConfig) -> str:
    """The content of the files that knowledge comes from."""
    people = isinstance(config.source, GeneratorSource) or config.source.kind == "log"
    return (source.fingerprint(["items"]) if people else "") + knowledge_fingerprint(config.knowledge)


def run(run: Run) -> Outcome:
    named = run.engine.kept("facts", lambda: facts(run))
    rows = triple_rows(run.spark, run.config.knowledge, run.read(ITEMS), keep=run.engine.kept)
    if rows is not None:
        quarantine.set_aside_triples(run, rows)
    then = past(run, ITEMS, "entity", [_ends(named)])
    return run.commit(transform(named, then.old, first=then.first), metadata=then.metadata)


JOB = Job(ENTITIES, run, reads=(ITEMS,), settings=settings, files=fingerprint, needs_source=True)
