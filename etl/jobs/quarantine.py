"""Rejected rows, with file, line and reason: written by the jobs that read raw files, before their own tables.

A file's rows are replaced when the file is read again, so a run that was killed and made again leaves each row once.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl import delta
from etl.config import GraftrecError
from etl.jobs.job import Run
from etl.tables import QUARANTINE


class TooManyRejected(GraftrecError):
    """A larger share of a file kind's rows can't be used than `cleaning.max_quarantine_share` allows."""


def transform(raw: DataFrame) -> DataFrame:
    """QUARANTINE of raw rows (RAW_EVENTS, RAW_ITEMS, RAW_USERS or RAW_EDGES)."""
    return raw.where(F.col("reason").isNotNull()).select(*QUARANTINE.schema.names)


def set_aside(run: Run, raw: DataFrame, *, kind: str, files: Sequence[str] | None = None) -> int:
    """Count the rows of `raw` (persisted by the caller) and write the rejected ones; gives the number of good rows.

    `files` are the names of the files that `raw` holds, None where these are all of `kind`. Raises TooManyRejected
    before anything is written.
    """
    counts = raw.agg(F.count(F.lit(1)), F.count("reason")).first()
    assert counts is not None
    read, rejected = int(counts[0]), int(counts[1])
    most = run.config.cleaning.max_quarantine_share
    if rejected > most * read:
        raise TooManyRejected(
            f"{kind}: expected at most {most:.2%} of rows rejected (cleaning.max_quarantine_share), found {rejected:,} "
            f"of {read:,} ({rejected / read:.2%}): {_examples(raw)}; mend the files or raise the share; nothing was "
            f"written"
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
    if run.engine.source.flawless:
        _clear(run, {"kind": [kind]})
    else:
        set_aside(run, raw, kind=kind)


def _replace(run: Run, rows: DataFrame, scope: dict[str, Sequence[Any]]) -> None:
    delta.write(
        run.spark,
        rows,
        run.lake,
        QUARANTINE,
        mode="partitions",
        app=f"quarantine/{uuid.uuid4().hex}",
        app_version=0,
        metadata=run.provenance,
        partition_scope=scope,
    )


def _clear(run: Run, scope: dict[str, Sequence[Any]]) -> None:
    """Drop what an earlier reading of these files left, and make the table where there is none; without Spark."""
    exists = delta.current_version(run.lake, QUARANTINE) is not None
    if exists and not delta.snapshot_files(run.lake, QUARANTINE, partitions=scope):
        return
    delta.commit_files(
        run.lake,
        QUARANTINE,
        [],
        mode="partitions",
        app=f"quarantine/{uuid.uuid4().hex}",
        app_version=0,
        metadata=run.provenance,
        partition_scope=scope,
    )


def _examples(raw: DataFrame) -> str:
    reasons = (
        raw.where(F.col("reason").isNotNull())
        .groupBy("reason")
        .agg(F.count(F.lit(1)).alias("rows"), F.min(F.struct("file", "line")).alias("first"))
        .orderBy(F.desc("rows"), "reason")
        .limit(3)
        .collect()
    )
    return ", ".join(
        f"{row['reason']} ({row['rows']:,}, first in {row['first'][0]} line {row['first'][1]})" for row in reasons
    )
