"""Rejected rows, with file, line and reason: written by the jobs that read raw files, before their own tables.

A file's rows are replaced when the file is read again, so a run that was killed and made again leaves each row once.
"""

import re
import uuid
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import LogSource
from etl.jobs.job import Run
from etl.lake import spark_io
from etl.settings import GraftrecError
from etl.tables import QUARANTINE

UNKNOWN_ITEM = "unknown item"
STRAY_TIME = "time is too far from the log's other times"
_SECTIONS = {"interactions": "events"}  # kinds whose section of `source` has another name
_SETTINGS = {  # a reason -> the settings of the file's section that decide on it
    r"expected \d+ fields|malformed quoting|a quote that": "separator, quote, escape and multiline",
    r"expected as many|more than|item ends with": "explode",
    r"not (?!a |finite)": "encoding",
    r"not a (JSON|Python)": "format",
    r"\w+ is missing": "columns and null_values",
    r"time can't be read": "time_unit and time_format",
    r"time fits ": "time_unit",
    r"\w+ is not a number": "columns and decimal",
    r"\w+ is not finite": "null_values",
}
_SHOWN_CHARACTERS = 80  # of a rejected row, in a message


class TooManyRejected(GraftrecError):
    """A larger share of a file kind's rows can't be used than `cleaning.max_quarantine_share` allows."""


def transform(raw: DataFrame) -> DataFrame:
    """QUARANTINE of raw rows (RAW_EVENTS, RAW_ITEMS, RAW_USERS or RAW_EDGES)."""
    return raw.where(F.col("reason").isNotNull()).select(*QUARANTINE.schema.names)


def reject_rows(
    run: Run, raw: DataFrame, *, kind: str, files: Sequence[str] | None = None, counted: tuple[int, int] | None = None
) -> int:
    """Count the rows of `raw` (persisted by the caller) and write the rejected ones; gives the number of good rows.

    `files` are the names of the files that `raw` holds, None where these are all of `kind`. Fewer than
    `cleaning.min_rows` rejected rows that are appended count as a share of the whole log. Raises TooManyRejected before
    anything is written. `counted`: rows of `raw` and rejected ones, where they are known.
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
    if rejected:
        run.notes.append(f"{rejected:,} of {read:,} rows of {kind} quarantined")
        _replace(run, transform(raw), scope)
    else:
        _clear(run, scope)
    return read - rejected


def set_aside_if_any(run: Run, raw: DataFrame, *, kind: str) -> None:
    """As set_aside, of a kind whose good rows nobody counts: a source that rejects nothing is spared the count."""
    if run.engine.source.never_rejects:
        _clear(run, {"kind": [kind]})
    else:
        reject_rows(run, raw, kind=kind)


def _replace(run: Run, rows: DataFrame, scope: dict[str, Sequence[Any]]) -> None:
    spark_io.write(
        run.spark,
        rows,
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
    reasons = (
        raw.where(F.col("reason").isNotNull())
        .groupBy("reason")
        .agg(F.count(F.lit(1)).alias("rows"), F.min(F.struct("file", "line", "raw")).alias("first"))
        .orderBy(F.desc("rows"), "reason")
        .limit(3)
        .collect()
    )
    return ", ".join(
        f"{row['reason']} ({row['rows']:,}, first in {row['first'][0]} line {row['first'][1]}{_shown(row['first'][2])}"
        f"{_known(run, raw, row['first']) if row['reason'] == UNKNOWN_ITEM else _setting(run, row['reason'], kind)})"
        for row in reasons
    )


def _shown(raw: str | None) -> str:
    if raw is None:
        return ""
    return f": {raw[:_SHOWN_CHARACTERS]!r}{'…' if len(raw) > _SHOWN_CHARACTERS else ''}"


def _setting(run: Run, reason: str, kind: str) -> str:
    if reason == STRAY_TIME:
        return "; see cleaning.max_gap_years"
    settings = next((found for pattern, found in _SETTINGS.items() if re.match(pattern, reason)), None)
    if settings is None or not isinstance(run.config.source, LogSource):
        return ""
    return f"; see {settings} of source.{_SECTIONS.get(kind, kind)}"


def _known(run: Run, raw: DataFrame, first: Any) -> str:
    """The item of an event of an unknown item, and known ones: those that differ in case and leading zeros first."""
    known = run.engine.source.known_items(run.spark)
    row = raw.where((F.col("file") == first[0]) & (F.col("line") == first[1])).select("item").first()
    if known is None or row is None:
        return ""
    plain = F.lower(F.regexp_replace("item", r"^0+", ""))
    other = re.sub(r"^0+", "", row[0]).lower()
    near = known.orderBy((plain != other).cast("int"), "item").limit(3).collect()
    names = ", ".join(repr(one[0]) for one in near)
    return f"; item {row[0]!r}, known are {names}…; see source.items.path and source.require_known_items"
