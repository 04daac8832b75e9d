"""When a log's events took place: their days, and events too far from the bulk of the log, which are rejected."""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

DAY = 86_400_000_000  # microseconds
_YEAR = 365.25 * DAY


@dataclass(frozen=True)
class Span:
    """Good events between two times (microseconds, both included)."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Counts:
    """Rows of raw events, and the good ones by day, where they have times. `times`: the first and the last of the good
    ones, or the order of these."""

    read: int
    rejected: int
    days: tuple[Span, ...]
    times: tuple[int, int] | None


def count(events: DataFrame, *, timed: bool) -> Counts:
    """One pass over raw events (RAW_EVENTS); `timed`: their times are no mere order."""
    good = F.col("rejected").isNull()
    day = F.when(good, F.floor(F.col("time") / DAY) if timed else F.lit(0))
    rows = events.groupBy(day.alias("day")).agg(F.count(F.lit(1)), F.min("time"), F.max("time")).collect()
    read, accepted = sum(row[1] for row in rows), [row for row in rows if row[0] is not None]
    days = tuple(Span(row[2], row[3], row[1]) for row in accepted) if timed else ()
    times = (min(row[2] for row in accepted), max(row[3] for row in accepted)) if accepted else None
    return Counts(read, read - sum(row[1] for row in accepted), days, times)


def bulk(spans: Sequence[Span], *, gap_years: float | None) -> Span | None:
    """The most rows that no gap of more than `gap_years` parts, the later ones of as many; None where there is none."""
    groups: list[Span] = []
    for span in sorted(spans, key=lambda span: span.first):
        if groups and (gap_years is None or span.first - groups[-1].last <= gap_years * _YEAR):
            before = groups.pop()
            span = Span(before.first, max(before.last, span.last), before.rows + span.rows)
        groups.append(span)
    return max(groups, key=lambda group: (group.rows, group.last), default=None)


def written(time: int) -> str:
    """Microseconds as ISO 8601, UTC, to the second."""
    moment = dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=time)
    return moment.isoformat(sep=" ", timespec="seconds")
