"""The cleaned log: unreadable rows, events of unknown items and exact duplicates left out; appended to, day by day.

A file is delivered once, known by its content whatever its name: the digest is an application transaction of the commit
that holds its events. New files append, and their lines come after all earlier ones in `source_order`; those of a
mended file take the places they would have had. Other settings read everything anew, and so does other code, unless
files that were delivered are gone.

A Delta table is delivered version by version, known by (table id, version): what later versions only add is appended.
Where they deleted or changed rows, the table is compared with what the lake holds: rows that it lacks are retracted.
"""

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import EtlConfig, GeneratorSource, LogSource, MovielensSource
from etl.jobs import deliveries, event_times, quarantine, retraction
from etl.jobs.deliveries import Delivery, LostDeliveries
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.kcore import broadcast
from etl.jobs.suppressed import without_forgotten
from etl.lake import spark_io
from etl.session import held
from etl.settings import GraftrecError
from etl.sources.delta_table import SourceTable
from etl.sources.found_events import filled
from etl.sources.movielens import described
from etl.sources.spark_table import SparkTable
from etl.tables import INTERACTIONS, PROPERTY_BUCKETS, PROPERTY_TIME

_IDENTITY = INTERACTIONS.key
_ITEMS = "items"  # in a commit's metadata: the files that say which items are known


def transform(events: DataFrame, old: DataFrame | None, *, buckets: int) -> DataFrame:
    """INTERACTIONS of raw events (RAW_EVENTS, of EXTRAS what the log has), less those that `old`, the table so far, has
    already.

    Of `old` only rows of these users are looked at, and, where the caller read no others, of these times.
    """
    good = events.where(F.col("rejected").isNull())
    given = [name for name in _IDENTITY if name in events.columns]
    good = good.select(spark_io.bucket_of(buckets).alias("bucket"), *given, "source_order")
    if old is None:
        good = good.repartition("bucket")  # which is how the table is written: equal rows meet without another shuffle
    unique = filled(good.groupBy("bucket", *given).agg(F.min("source_order").alias("source_order")))
    if old is not None:
        users = good.select("user").distinct()
        users = broadcast(users, users.count())
        known = old.join(users, "user", "left_semi").select(*(F.col(name).alias(f"_{name}") for name in _IDENTITY))
        same = [F.col(name).eqNullSafe(F.col(f"_{name}")) for name in _IDENTITY]
        unique = unique.join(known, same, "left_anti")
    return unique.select(*INTERACTIONS.schema.names)


def run(run: Run) -> Outcome:
    table = run.engine.source.table()
    found = {} if table is not None else run.engine.source.deliveries()
    lost = deliveries.lost(run, found, table)
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
            f"whose events the lake {run.lake} holds are not among the source's; put them back (of mended files, run "
            "with the earlier settings first), or use another --lake"
        )
    return _anew(run, found, table)


def _anew(run: Run, found: dict[str, str], table: SourceTable | SparkTable | None) -> Outcome:
    """Read the whole log."""
    generation = f"{run.provenance['config_hash']}-{run.provenance['code_version']}-{(run.base or 0) + 1}"
    if table is not None:
        places = deliveries.whole([file.name for file in table.files()])
        new = Delivery(places, len(places), deliveries.of_table(generation, table))
    else:
        places = deliveries.whole(list(found.values()))
        transacted = deliveries.transactions(generation, found, places)
        new = Delivery(places, len(places), transacted, digests=deliveries.digests_of(found))
    return _deliver(run, new, None, generation=generation, table=table)


def _append(run: Run, found: dict[str, str]) -> Outcome:
    generation, before = run.last["generation"], int(run.last["deliveries"])
    unknown = quarantine.files_of_unknown_items(run.lake) if run.last.get(_ITEMS) != _known(run) else set()
    new = deliveries.new_files(run, found, generation, before=before, again=unknown)
    if not new.places:
        return Outcome(int(run.last["version"]), int(run.last["rows"]), False, ("no new file", *run.notes))
    added, mended = len(new.places) - len(new.mended) - len(new.again), len(new.mended)
    run.notes += [f"{added} new file(s)"] * (added > 0) + [f"{mended} mended file(s)"] * (mended > 0)
    if new.again:
        run.notes.append(f"known items have changed, so {len(new.again)} file(s) with unknown ones are read again")
    if new.mended:
        gone, moved = deliveries.compared(run, new)
        if moved and not gone and deliveries.lost(run, found, None) == len(new.mended):
            run.notes.append(f"lines have moved in {', '.join(new.mended)}, so all files are read anew")
            return _anew(run, found, None)
        if moved:
            names = ", ".join(new.mended)
            run.notes.append(
                f"{gone:,} rows that {names} held before are no longer there; they stay"
                if gone
                else f"lines have moved in {names}, and other files are gone, so new rows come last"
            )
            new = deliveries.appended(new, found, generation)
    return _deliver(run, new, run.own(), generation=generation)


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
    places = deliveries.whole([file.name for file in added], before)
    new = Delivery(places, before + len(places), deliveries.of_table(generation, table))
    return _deliver(run, new, run.own(), generation=generation, table=table)


def _compare(run: Run, table: SourceTable | SparkTable, *, before: int, generation: str) -> Outcome:
    """Retract the rows of the lake that the table lacks, and add those that the lake lacks."""
    own = run.own()
    assert own is not None
    places = deliveries.whole([file.name for file in table.files()], before)
    raw = _events(run, places)
    events, counted, bulk, _ = _without_strays(run, raw, places, None)
    good = quarantine.reject_rows(run, quarantine.rejected_events(events), kind="interactions", counted=counted)
    if good == 0:
        raise GraftrecError("the log: expected at least one row that can be used, found none; see source.events")
    current = held(transform(events, None, buckets=run.config.buckets))
    gone, new = held(retraction.less(own, current)), held(retraction.less(current, own))
    num_gone, num_new = gone.count(), new.count()
    run.notes.append(f"version {table.version}: {num_gone:,} rows retracted, {num_new:,} added")
    num_places = before + len(places)
    delivered = Delivery(places, num_places, {}).recorded(table)
    metadata = _metadata(run, num_places=num_places, good=good, generation=generation, table=table, bulk=bulk)
    metadata[deliveries.RECORDED] = delivered
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
        transactions=deliveries.of_table(generation, table),
    )
    raw.unpersist()
    return outcome


def _events(run: Run, places: Mapping[str, int], old: DataFrame | None = None) -> DataFrame:
    """The raw events of these files of the source, those of items that neither the source nor `old` knows rejected."""
    source = run.engine.source
    events = without_forgotten(run.lake, source.events(run.spark, only=places))
    known = source.known_items(run.spark)
    if known is not None:
        if old is not None:
            known = known.unionByName(old.select("item")).distinct()
        found_in = source.found_in(places)
        events = quarantine.reject_unknown(events, known, found_in=found_in, column=_column(run.config, "item"))
    return events.persist()


def _known(run: Run) -> str:
    """The content of the files that say which items are known; empty where none does."""
    return run.engine.source.fingerprint(["items"]) if "items" in _kinds(run.config) else ""


def _kinds(config: EtlConfig) -> list[str]:
    """Kinds of files that decide which events count."""
    log = _log(config)
    return ["events", "items"] if log is not None and log.require_known_items and log.items is not None else ["events"]


def _column(config: EtlConfig, role: str) -> str:
    log = _log(config)
    return role if log is None else log.events.column(role)


def _log(config: EtlConfig) -> LogSource | None:
    """The log that the settings describe, None for a generated one."""
    source = config.source
    if isinstance(source, GeneratorSource):
        return None
    return described(source.root) if isinstance(source, MovielensSource) else source


def _deliver(
    run: Run,
    new: Delivery,
    old: DataFrame | None,
    *,
    generation: str,
    table: SourceTable | SparkTable | None = None,
) -> Outcome:
    """Commit the events of new files, or of files of a version of `table`."""
    source = run.engine.source
    twice = [*new.mended, *new.again]
    raw = _events(run, new.places, old if twice else None)
    events, counted, bulk, times = _without_strays(run, raw, new.places, old)
    files = None if old is None else list(new.places)
    rejected = quarantine.rejected_events(events)
    good = quarantine.reject_rows(run, rejected, kind="interactions", files=files, counted=counted)
    if good == 0 and old is None:
        raise GraftrecError("the log: expected at least one row that can be used, found none; see source.events")
    if old is not None and twice:  # rows that were counted when they first came
        places = [new.places[name] for name in twice]
        again = deliveries.of_places(events.where(F.col("rejected").isNull()), places)
        good -= retraction.common(filled(again), deliveries.of_places(old, places)).count()
    properties = {PROPERTY_BUCKETS: str(run.config.buckets), PROPERTY_TIME: source.time}
    outcome = run.commit(
        transform(events, None if old is None else run.own(times), buckets=run.config.buckets),
        mode="overwrite" if old is None else "append",
        partitioned=old is None,
        metadata={deliveries.RECORDED: new.recorded(table)}
        | _metadata(
            run,
            num_places=new.num_places,
            good=good + (0 if old is None else int(run.last["good"])),
            generation=generation,
            table=table,
            bulk=bulk,
            anew=old is None,
        ),
        properties=properties,
        transactions=new.transactions,
    )
    raw.unpersist()
    notes = (*outcome.notes, f"{good - outcome.rows:,} exact duplicates dropped")
    return Outcome(outcome.version, outcome.rows, outcome.committed, notes)


def _metadata(
    run: Run,
    *,
    num_places: int,
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
        "deliveries": str(num_places),
        "kind": run.config.source.kind,
        "good": str(good),
        "buckets": str(run.config.buckets),
        "time": run.engine.source.time,
        retraction.COUNT: str(retractions),
        _ITEMS: _known(run),
        **found,
        **({} if bulk is None else {"first_time": str(bulk.first), "last_time": str(bulk.last)}),
    }


def _without_strays(
    run: Run, events: DataFrame, places: Mapping[str, int], old: DataFrame | None
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
        found_in = run.engine.source.found_in(places)
        events = quarantine.reject_strays(events, bulk, found_in=found_in, column=_column(run.config, "time"))
    times = (min(day.first for day in inside), max(day.last for day in inside)) if inside else None
    return events, (counts.read, counts.rejected + strays), bulk, times


def _settings(config: EtlConfig) -> Any:
    """All that decides what a row of the log becomes. Where files lie doesn't, and neither do the other files."""
    log = _log(config)
    if log is None:
        rules: Any = config.source.model_dump()
    else:
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
    files=lambda source, config: source.fingerprint(_kinds(config)),
    needs_source=True,
)
