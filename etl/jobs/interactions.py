"""The cleaned log: unreadable rows, events of unknown items and exact duplicates left out; appended to, day by day.

A file is delivered once, known by its content whatever its name: the digest is an application transaction of the commit
that holds its events. New files append, and their lines come after all earlier ones in `source_order`. Other settings
read everything anew, and so does other code, unless files that were delivered are gone.

A Delta table is delivered version by version, known by (table id, version): what later versions only add is appended.
Where they deleted or changed rows, the table is compared with what the lake holds: rows that it lacks are retracted.
"""

from collections.abc import Sequence
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.config import EtlConfig, GeneratorSource, LogSource, MovielensSource
from etl.jobs import event_times, quarantine, retraction
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.kcore import broadcast
from etl.lake import spark_io
from etl.session import held
from etl.settings import GraftrecError
from etl.sources.delta_table import SourceTable
from etl.sources.movielens import described
from etl.sources.spark_table import SparkTable
from etl.tables import INTERACTIONS, PROPERTY_BUCKETS, PROPERTY_TIME

_IDENTITY = INTERACTIONS.key
_DIGITS = 16  # of a content's digest in its transaction's name


class LostDeliveries(GraftrecError):
    """The log is to be read anew, but files that were delivered are no longer there."""


def transform(events: DataFrame, old: DataFrame | None, *, buckets: int) -> DataFrame:
    """INTERACTIONS of raw events (RAW_EVENTS), less those that `old`, the table so far, has already.

    Of `old` only rows of these users are looked at, and, where the caller read no others, of these times.
    """
    good = events.where(F.col("reason").isNull())
    bucket = spark_io.bucket_of(buckets).alias("bucket")
    unique = good.groupBy(bucket, *_IDENTITY).agg(F.min("source_order").alias("source_order"))
    if old is not None:
        users = good.select("user").distinct()
        users = broadcast(users, users.count())
        known = old.join(users, "user", "left_semi").select(*(F.col(name).alias(f"_{name}") for name in _IDENTITY))
        same = [F.col(name).eqNullSafe(F.col(f"_{name}")) for name in _IDENTITY]
        unique = unique.join(known, same, "left_anti")
    return unique.select(*INTERACTIONS.schema.names)


def reject_unknown(events: DataFrame, known: DataFrame) -> DataFrame:
    """Give events (RAW_EVENTS) of items that `known` (item) lacks a reason, and their content as raw text."""
    known = broadcast(known.select("item", F.lit(True).alias("_known")), known.count())
    marked = _reject(events.join(known, "item", "left"), F.col("_known").isNull(), quarantine.UNKNOWN_ITEM)
    return marked.select(*events.columns)


def reject_strays(events: DataFrame, bulk: event_times.Span) -> DataFrame:
    """Give events (RAW_EVENTS) outside the bulk of the log's times a reason, and their content as raw text."""
    return _reject(events, ~F.col("time").between(bulk.first, bulk.last), quarantine.STRAY_TIME)


def _reject(events: DataFrame, failed: Column, reason: str) -> DataFrame:
    content = F.to_json(F.struct("user", "item", "time", "event_type", "value", "basket"))
    failed = F.col("reason").isNull() & failed
    marked = events.withColumn("raw", F.when(failed, content).otherwise(F.col("raw")))
    return marked.withColumn("reason", F.when(failed, F.lit(reason)).otherwise(F.col("reason")))


def run(run: Run) -> Outcome:
    table = run.engine.source.table()
    found = {} if table is not None else run.engine.source.deliveries()
    lost = _lost(run, found, table)
    same_settings = "generation" in run.last and run.last["config_hash"] == run.provenance["config_hash"]
    if table is not None and same_settings and run.same_rules and not lost:
        return _follow(run, table)
    if table is None and same_settings and (lost or run.same_rules):
        if not run.same_rules:
            run.notes.append(f"the code has changed, but {lost} delivered file(s) are gone, so nothing is read anew")
        return _append(run, found)
    if lost and table is not None and "table_id" in run.last:
        raise LostDeliveries(
            f"source.events.path: expected the Delta table {run.last['table_id']}, whose events the lake {run.lake} "
            f"holds, found {table.id} at {table.root}; name that table, or use another --lake"
        )
    if lost:
        raise LostDeliveries(
            f"the log's settings have changed, so it is to be read anew, but {lost} of {run.last['deliveries']} files "
            f"whose events the lake {run.lake} holds are not among the source's; put them back, or use another --lake"
        )
    generation = f"{run.provenance['config_hash']}-{run.provenance['code_version']}-{(run.base or 0) + 1}"
    if table is not None:
        return _deliver(run, [file.name for file in table.files()], None, before=0, generation=generation, table=table)
    return _deliver(run, list(found.values()), None, before=0, generation=generation, new=found)


def _append(run: Run, found: dict[str, str]) -> Outcome:
    generation = run.last["generation"]
    known = spark_io.transactions(run.lake, INTERACTIONS, [_transaction(generation, content) for content in found])
    new = {content: name for content, name in found.items() if _transaction(generation, content) not in known}
    if not new:
        return Outcome(int(run.last["version"]), int(run.last["rows"]), False, ("no new file", *run.notes))
    run.notes.append(f"{len(new)} new file(s)")
    before = int(run.last["deliveries"])
    return _deliver(run, list(new.values()), run.own(), before=before, generation=generation, new=new)


def _follow(run: Run, table: SourceTable | SparkTable) -> Outcome:
    """Bring the lake from the version of the table that it holds to the one that is there now."""
    since = int(run.last["table_version"])
    added = table.added_since(since)
    generation, before = run.last["generation"], int(run.last["deliveries"])
    if added is None:
        return _compare(run, table, before=before, generation=generation)
    if not added:
        return Outcome(int(run.last["version"]), int(run.last["rows"]), False, ("no new row", *run.notes))
    run.notes.append(f"{len(added)} new file(s) of versions {since + 1} to {table.version}")
    names = [file.name for file in added]
    return _deliver(run, names, run.own(), before=before, generation=generation, table=table)


def _compare(run: Run, table: SourceTable | SparkTable, *, before: int, generation: str) -> Outcome:
    """Retract the rows of the lake that the table lacks, and add those that the lake lacks."""
    own = run.own()
    assert own is not None
    names = [file.name for file in table.files()]
    raw = _events(run, names, before)
    events, counted, bulk, _ = _without_strays(run, raw, None)
    good = quarantine.reject_rows(run, events, kind="interactions", counted=counted)
    if good == 0:
        raise GraftrecError("the log: expected at least one row that can be used, found none; see source.events")
    current = held(transform(events, None, buckets=run.config.buckets))
    gone, new = held(retraction.less(own, current)), held(retraction.less(current, own))
    num_gone, num_new = gone.count(), new.count()
    run.notes.append(f"version {table.version}: {num_gone:,} rows retracted, {num_new:,} added")
    metadata = _metadata(run, before=before, new=len(names), good=good, generation=generation, table=table, bulk=bulk)
    if num_gone:
        metadata[retraction.COUNT] = str(int(metadata[retraction.COUNT]) + 1)
        kept, buckets = retraction.retracted(own, gone, new)
        new = kept.unionByName(new)
    outcome = run.commit(
        new,
        mode="partitions" if num_gone else "append",
        partition_scope={"bucket": buckets} if num_gone else None,
        metadata=metadata,
        properties={PROPERTY_BUCKETS: str(run.config.buckets), PROPERTY_TIME: run.engine.source.time},
        transactions=_table_transaction(generation, table),
    )
    raw.unpersist()
    return outcome


def _events(run: Run, names: Sequence[str], before: int) -> DataFrame:
    """The raw events of these files of the source, those of unknown items rejected."""
    source = run.engine.source
    events = source.events(run.spark, only=names, before=before)
    known = source.known_items(run.spark)
    return (events if known is None else reject_unknown(events, known)).persist()


def _deliver(
    run: Run,
    names: Sequence[str],
    old: DataFrame | None,
    *,
    before: int,
    generation: str,
    new: dict[str, str] | None = None,
    table: SourceTable | SparkTable | None = None,
) -> Outcome:
    """Commit the events of the files `names`: files that are `new` (content -> name), or of a version of `table`."""
    source = run.engine.source
    raw = _events(run, names, before)
    events, counted, bulk, times = _without_strays(run, raw, old)
    files = None if old is None else list(names)
    good = quarantine.reject_rows(run, events, kind="interactions", files=files, counted=counted)
    if good == 0 and old is None:
        raise GraftrecError("the log: expected at least one row that can be used, found none; see source.events")
    properties = {PROPERTY_BUCKETS: str(run.config.buckets), PROPERTY_TIME: source.time}
    outcome = run.commit(
        transform(events, None if old is None else run.own(times), buckets=run.config.buckets),
        mode="overwrite" if old is None else "append",
        metadata=_metadata(
            run,
            before=before,
            new=len(names),
            good=good + (0 if old is None else int(run.last["good"])),
            generation=generation,
            table=table,
            bulk=bulk,
            anew=old is None,
        ),
        properties=properties,
        transactions=_table_transaction(generation, table)
        if table is not None
        else {_transaction(generation, content): 0 for content in new or {}},
    )
    raw.unpersist()
    notes = (*outcome.notes, f"{good - outcome.rows:,} exact duplicates dropped")
    return Outcome(outcome.version, outcome.rows, outcome.committed, notes)


def _metadata(
    run: Run,
    *,
    before: int,
    new: int,
    good: int,
    generation: str,
    table: SourceTable | SparkTable | None,
    bulk: event_times.Span | None,
    anew: bool = False,
) -> dict[str, str]:
    """What a commit records. `anew`: the table replaces what was there, and rows may have left since."""
    retractions = int(run.last.get(retraction.COUNT, "0")) + (anew and table is not None and run.base is not None)
    found = {} if table is None else {"table_id": table.id, "table_version": str(table.version)}
    return {
        "generation": generation,
        "deliveries": str(before + new),
        "kind": run.config.source.kind,
        "good": str(good),
        "buckets": str(run.config.buckets),
        "time": run.engine.source.time,
        retraction.COUNT: str(retractions),
        **found,
        **({} if bulk is None else {"first_time": str(bulk.first), "last_time": str(bulk.last)}),
    }


def _table_transaction(generation: str, table: SourceTable | SparkTable) -> dict[str, int]:
    """The application transaction that delivers a version of a table: its id, its version."""
    return {f"delivery/{generation}/{table.id}": table.version}


def _without_strays(
    run: Run, events: DataFrame, old: DataFrame | None
) -> tuple[DataFrame, tuple[int, int], event_times.Span | None, tuple[int, int] | None]:
    """Events with strays rejected; (rows read, rows rejected); the log's times without strays, None: mere order; the
    first and the last time, or order, of the good events."""
    counts = event_times.count(events, timed=run.engine.source.time == "timestamp")
    log = []
    if old is not None and "first_time" in run.last:
        log = [event_times.Span(int(run.last["first_time"]), int(run.last["last_time"]), int(run.last["good"]))]
    bulk = event_times.bulk([*counts.days, *log], gap_years=run.config.cleaning.max_gap_years)
    if bulk is None:
        return events, (counts.read, counts.rejected), None, counts.times
    inside = [day for day in counts.days if bulk.first <= day.first and day.last <= bulk.last]
    strays = sum(day.rows for day in counts.days) - sum(day.rows for day in inside)
    if inside:
        first, last = min(day.first for day in inside), max(day.last for day in inside)
        outside = f"; {strays:,} rows ({strays / counts.read:.2%}) have times far from these" if strays else ""
        run.notes.append(f"times {event_times.written(first)} to {event_times.written(last)} UTC{outside}")
    if strays:
        events = reject_strays(events, bulk)
    times = (min(day.first for day in inside), max(day.last for day in inside)) if inside else None
    return events, (counts.read, counts.rejected + strays), bulk, times


def _transaction(generation: str, content: str) -> str:
    return f"delivery/{generation}/{content[:_DIGITS]}"


def _lost(run: Run, found: dict[str, str], table: SourceTable | SparkTable | None) -> int:
    """How many files that were delivered are no longer there. A generated log can always be made again."""
    if "generation" not in run.last or run.last["kind"] == "generator":
        return 0
    if table is not None and run.last.get("table_id") == table.id:
        return 0
    names = [_transaction(run.last["generation"], content) for content in found]
    return int(run.last["deliveries"]) - len(spark_io.transactions(run.lake, INTERACTIONS, names))


def _settings(config: EtlConfig) -> Any:
    """All that decides what a row of the log becomes. Where files lie doesn't, and neither do the other files."""
    source = config.source
    if isinstance(source, GeneratorSource):
        rules: Any = source.model_dump()
    else:
        log: LogSource = described(source.root) if isinstance(source, MovielensSource) else source
        rules = {
            **log.events.model_dump(exclude={"path", "version", "options"}),
            "known": log.require_known_items and log.items is not None,
        }
    cleaning = config.cleaning.model_dump(exclude={"max_quarantine_share", "min_rows"})
    return {"source": rules, "cleaning": cleaning, "buckets": config.buckets}


JOB = Job(
    INTERACTIONS,
    run,
    settings=_settings,
    files=lambda source, config: source.fingerprint(["events"]),
    needs_source=True,
)
