"""Rows that have left the log: what goes from the interactions, and then from the vocabularies.

The tables are then those of a log that never had these rows, but for indices: the ids that remain keep theirs, and an
index that was given once is never given again, for old models know it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.jobs.job import Run
from etl.lake import spark_io
from etl.tables import FIRST_INDEX, INTERACTIONS, Table

COUNT = "retractions"  # in a commit's metadata: how many runs have taken rows back
_NEXT = "next_index"


def less(rows: DataFrame, others: DataFrame, *, also: Sequence[str] = ()) -> DataFrame:
    """The rows of INTERACTIONS that `others` lacks; `source_order` aside, unless `also` names it."""
    return _joined(rows, others, [*INTERACTIONS.key, *also], "left_anti")


def common(rows: DataFrame, others: DataFrame) -> DataFrame:
    """The rows of INTERACTIONS that `others` has too; `source_order` aside."""
    return _joined(rows, others, INTERACTIONS.key, "left_semi")


def _joined(rows: DataFrame, others: DataFrame, names: Sequence[str], how: str) -> DataFrame:
    renamed = others.select(*(F.col(name).alias(f"_{name}") for name in names))
    same = [F.col(name).eqNullSafe(F.col(f"_{name}")) for name in names]
    return rows.join(renamed, same, how)


def retracted(interactions: DataFrame, gone: DataFrame, new: DataFrame) -> tuple[DataFrame, list[int]]:
    """What remains without `gone` of the buckets that rows of `gone` or `new` belong to, and these buckets. All frames
    are of INTERACTIONS."""
    found = gone.select("bucket").unionByName(new.select("bucket")).distinct().collect()
    buckets = sorted(row["bucket"] for row in found)
    return less(interactions.where(F.col("bucket").isin(buckets)), gone), buckets


@dataclass(frozen=True)
class Past:
    """A vocabulary as it was, less the ids that have left. `first`: the index of the next new id, None where no id
    has ever left; `metadata` of the commit."""

    old: DataFrame | None
    first: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def past(run: Run, log: Table, column: str, named: Sequence[DataFrame | None]) -> Past:
    """The run's own vocabulary as it was. Where rows have left `log` since, only ids that a frame of `named` holds
    stay in it."""
    old, recorded = run.own(), run.last.get(_NEXT)
    count = spark_io.last_commit(run.lake, log, run.inputs[log.name]).get(COUNT, "0")
    if old is None or (count == run.last.get(COUNT, "0") and recorded is None):
        return Past(old, None, {COUNT: count})
    highest = old.agg(F.max("index")).first()
    assert highest is not None
    first = max(int(recorded or FIRST_INDEX), int(highest[0] or 0) + 1)
    if count != run.last.get(COUNT, "0"):
        ids = [frame.select(column) for frame in named if frame is not None]
        stays = functools.reduce(DataFrame.unionByName, ids)
        before = old.count()
        old = old.join(stays.distinct(), column, "left_semi")
        run.notes.append(f"{before - old.count():,} ids left with their rows")
    return Past(old, first, {COUNT: count, _NEXT: str(first)})
