"""Rejected rows, with file, line and reason: written by the jobs that read raw files, before their own tables.

A file's rows are replaced when the file is read again, so a run that was killed and made again leaves each row once.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.config import LogSource
from etl.jobs.event_times import Span
from etl.jobs.job import Run
from etl.jobs.kcore import broadcast
from etl.jobs.suppressed import without_texts
from etl.lake import spark_io
from etl.lake.file_reader import open_parquet
from etl.settings import GraftrecError
from etl.sources import found_events
from etl.sources.schema import EXTRAS
from etl.tables import QUARANTINE

UNKNOWN_ITEM = "unknown item"
STRAY_TIME = "time is too far from the log's other times"
_SECTIONS = {"interactions": "events"}  # kinds whose section of `source` has another name
_SETTINGS = {  # how a reason begins -> the settings of the file's section that decide on it; the first that fits
    r"expected \d+ fields|malformed quoting|a quote that": "separator, quote, escape and multiline",
    r"expected as many|more than|item ends with": "explode",
    r"not a (JSON|Python)": "format",
    r"not ": "encoding",
    r"the header again": "header",
    r"(head|relation|tail) (is|stands)": "id, triples and link",
    r"\w+ is missing": "columns and null_values",
    r"\w+ is (a float|in scientific|an object)|user and friend": "columns",
    r"time can't be read": "time_unit and time_format",
    r"time fits ": "time_unit",
    r"\w+ is not a number": "columns and decimal",
    r"\w+ is not finite": "null_values",
}
_OTHER_SETTINGS = {  # a reason -> settings of other sections
    UNKNOWN_ITEM: "source.items.path and source.require_known_items",
    STRAY_TIME: "cleaning.max_gap_years",
    "time is before cleaning.min_time": "cleaning.min_time",
    "time is after cleaning.max_time": "cleaning.max_time",
}
_SHOWN_CHARACTERS = 80  # of a rejected row, in a message


class TooManyRejected(GraftrecError):
    """A larger share of a file kind's rows can't be used than `cleaning.max_quarantine_share` allows."""


def transform(raw: DataFrame, *, section: str | None) -> DataFrame:
    """QUARANTINE of raw rows (RAW_ITEMS, RAW_USERS or RAW_EDGES, or rejected_events). `section` of the configuration
    describes their files; None: they have no settings."""
    setting = F.lit(None).cast("string")
    for pattern, found in reversed(_SETTINGS.items() if section else ()):
        setting = F.when(F.col("reason").rlike(f"^({pattern})"), f"{found} of {section}").otherwise(setting)
    for reason, found in _OTHER_SETTINGS.items():
        setting = F.when(F.col("reason") == reason, found).otherwise(setting)
    rejected = raw.where(F.col("reason").isNotNull()).withColumn("setting", setting)
    return rejected.select(*QUARANTINE.schema.names)


def rejected_events(events: DataFrame) -> DataFrame:
    """Where and why (FOUND) the rejected ones of raw events (RAW_EVENTS) were."""
    rejected = F.col("rejected")
    return events.where(rejected.isNotNull()).select(*found_events.found(rejected))


def reject_unknown(
    events: DataFrame, known: DataFrame, *, found_in: dict[str, Column], column: str = "item"
) -> DataFrame:
    """Reject events (RAW_EVENTS) of items that `known` (item) lacks; their content is their raw text. `found_in`: see
    Source."""
    known = broadcast(known.select("item", F.lit(True).alias("_known")), known.count())
    joined, failed = events.join(known, "item", "left"), F.col("_known").isNull()
    why = {"reason": F.lit(UNKNOWN_ITEM), "column": F.lit(column), "found": F.col("item")}
    return _reject(joined, failed, found_in | why).select(*events.columns)


def reject_strays(events: DataFrame, bulk: Span, *, found_in: dict[str, Column], column: str = "time") -> DataFrame:
    """Reject events (RAW_EVENTS) outside the bulk of the log's times; their content is their raw text. `found_in`: see
    Source."""
    outside = ~F.col("time").between(bulk.first, bulk.last)
    why = {"reason": F.lit(STRAY_TIME), "column": F.lit(column), "found": F.col("time")}
    return _reject(events, outside, found_in | why)


def _reject(events: DataFrame, failed: Column, found: Mapping[str, Column]) -> DataFrame:
    content = F.to_json(F.struct(*(name for name in ("user", "item", "time", *EXTRAS) if name in events.columns)))
    rejected = found_events.rejected({"kind": F.lit("interactions"), "raw": content, **found})
    failed = F.col("rejected").isNull() & failed
    return events.withColumn("rejected", F.when(failed, rejected).otherwise(F.col("rejected")))


def reject_rows(
    run: Run, raw: DataFrame, *, kind: str, files: Sequence[str] | None = None, counted: tuple[int, int] | None = None
) -> int:
    """Count the rows of `raw` (persisted by the caller) and write the rejected ones; gives the number of good rows.

    `files` are the names of the files that `raw` holds, None where these are all of `kind`. Fewer than
    `cleaning.min_rows` rejected rows that are appended count as a share of the whole log. Raises TooManyRejected before
    anything is written. `counted`: rows read and rejected ones, where they are known: `raw` may then lack good rows.
    """
    counts = raw.agg(F.count(F.lit(1)), F.count("reason")).first() if counted is None else counted
    assert counts is not None
    read, rejected = int(counts[0]), int(counts[1])
    most = run.config.cleaning.max_quarantine_share
    few = files is not None and rejected < run.config.cleaning.min_rows
    if rejected > most * (read + (int(run.last["good"]) if few else 0)):
        raise TooManyRejected(
            f"{kind}: expected at most {most:.2%} of rows rejected (cleaning.max_quarantine_share), found {rejected:,} "
            f"of {read:,} ({rejected / read:.2%}): {_examples(run, raw, kind)}; mend the files or raise the "
            f"share; nothing was written"
        )
    scope: dict[str, Sequence[Any]] = {"kind": [kind]} if files is None else {"kind": [kind], "file": files}
    run.rejected += rejected
    if rejected:
        run.notes.append(f"{rejected:,} of {read:,} rows of {kind} quarantined")
        _replace(run, transform(raw, section=_section(run, kind)), scope)
    else:
        _clear(run, scope)
    return read - rejected


def files_of_unknown_items(lake: str) -> set[str]:
    """Names of the log's files that have events of unknown items here; without Spark."""
    if spark_io.current_version(lake, QUARANTINE) is None:
        return set()
    names = set()
    for file in spark_io.snapshot_files(lake, QUARANTINE, partitions={"kind": ["interactions"]}):
        with open_parquet(lake, QUARANTINE, file.path) as opened:
            if UNKNOWN_ITEM in opened.read(columns=["reason"]).column(0).unique().to_pylist():
                names.add(str(file.partition["file"]))
    return names


def set_aside_triples(run: Run, rows: DataFrame) -> None:
    """Write the rejected ones of all rows of knowledge files of triples (FOUND, `source`). A graph may be about many
    more items than the log: there is no largest share. Raises GraftrecError for a file without a good row."""
    first = F.min(F.when(F.col("reason").isNotNull(), F.struct("file", "line", "reason", "found")))
    counts = rows.groupBy("source").agg(F.count(F.lit(1)), F.count("reason"), first).collect()
    for source, num_rows, rejected, one in counts:
        if rejected == num_rows:
            where = f"{one['file']} line {one['line']}: {one['reason']}{_shown(one['found'])}"
            raise GraftrecError(
                f"knowledge.files {source}: expected triples about items of the log, found none in {num_rows:,}; first "
                f"in {where}; correct id, triples or link of that file, or leave it out"
            )
    scope: dict[str, Sequence[Any]] = {"kind": ["knowledge"]}
    if num_rejected := sum(row[2] for row in counts):
        run.rejected += num_rejected
        run.notes.append(f"{num_rejected:,} of {sum(row[1] for row in counts):,} triples quarantined")
        _replace(run, transform(rows, section="knowledge.files"), scope)
    else:
        _clear(run, scope)


def set_aside_if_any(run: Run, raw: DataFrame, *, kind: str) -> None:
    """As set_aside, of a kind whose good rows nobody counts: a source that rejects nothing is spared the count."""
    if run.engine.source.never_rejects:
        _clear(run, {"kind": [kind]})
    else:
        reject_rows(run, raw, kind=kind)


def _replace(run: Run, rows: DataFrame, scope: dict[str, Sequence[Any]]) -> None:
    spark_io.write(
        run.spark,
        without_texts(run.lake, rows),
        run.lake,
        QUARANTINE,
        spark_io.Commit(
            mode="partitions",
            app=f"quarantine/{uuid.uuid4().hex}",
            app_version=0,
            metadata=run.provenance,
            partition_scope=scope,
        ),
    )


def _clear(run: Run, scope: dict[str, Sequence[Any]]) -> None:
    """Drop what an earlier reading of these files left, and make the table where there is none; without Spark."""
    exists = spark_io.current_version(run.lake, QUARANTINE) is not None
    if exists and not spark_io.snapshot_files(run.lake, QUARANTINE, partitions=scope):
        return
    spark_io.commit_files(
        run.lake,
        QUARANTINE,
        [],
        spark_io.Commit(
            mode="partitions",
            app=f"quarantine/{uuid.uuid4().hex}",
            app_version=0,
            metadata=run.provenance,
            partition_scope=scope,
        ),
    )


def _examples(run: Run, raw: DataFrame, kind: str) -> str:
    """The three most frequent reasons, each with its first row and the setting that decides on it."""
    first = F.struct("file", "line", "place", "column", "found", "raw")
    reasons = (
        transform(raw, section=_section(run, kind))
        .groupBy("reason", "setting")
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.min(first).alias("first"),
        )
        .orderBy(F.desc("rows"), "reason")
        .limit(3)
        .collect()
    )
    return ", ".join(
        f"{row['reason']} ({row['rows']:,}, first in {_where(row['first'])}"
        f"{_known(run, row['first']['found']) if row['reason'] == UNKNOWN_ITEM else ''}"
        f"{'' if row['setting'] is None else '; see ' + row['setting']})"
        for row in reasons
    )


def _section(run: Run, kind: str) -> str | None:
    return f"source.{_SECTIONS.get(kind, kind)}" if isinstance(run.config.source, LogSource) else None


def _where(first: Any) -> str:
    """File, line, column, what was found in it, and the row."""
    column = "" if first["column"] is None else f", column {first['column']}{_shown(first['found'])}"
    return f"{first['file']} line {first['line']}{column}{_shown(first['raw'], ': ')}"


def _shown(found: str | None, before: str = " ") -> str:
    if found is None:
        return ""
    return f"{before}{found[:_SHOWN_CHARACTERS]!r}{'…' if len(found) > _SHOWN_CHARACTERS else ''}"


def _known(run: Run, item: str) -> str:
    """Items that are known: those that differ from `item` in case and leading zeros first."""
    known = run.engine.source.known_items(run.spark)
    if known is None:
        return ""
    plain = F.lower(F.regexp_replace("item", r"^0+", ""))
    other = re.sub(r"^0+", "", item).lower()
    near = known.orderBy((plain != other).cast("int"), "item").limit(3).collect()
    return f"; known are {', '.join(repr(one[0]) for one in near)}…"
