"""Append-only dense indices: a raw id gets its index once and keeps it for ever.

New ids are numbered in the order of their bytes, after the old ones, from a range partitioning and the partitions'
sizes: no single partition, nothing collected but one count per partition. The result doesn't depend on the
partitioning.
"""

from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import EtlConfig, GeneratorSource, GraftrecError, LogSource, MovielensSource
from etl.sources.movielens import described
from etl.tables import FIRST_INDEX

_RECORD_BITS = 33  # monotonically_increasing_id: partition number above, record number within the partition below
_MOST = 2**31 - 1


def with_index(ids: DataFrame, old: DataFrame | None, *, column: str) -> DataFrame:
    """`column`, `index` of all old ids and of those in `ids` (any frame that holds `column`; repeated ids are one).

    `old` holds `column` and `index`. Runs one action. Raises GraftrecError beyond 2^31 ids.
    """
    new = ids.select(column).distinct()
    start = FIRST_INDEX
    if old is not None:
        new = new.join(old.select(column), column, "left_anti")
        start += old.count()
    placed = (
        new.repartitionByRange(column)
        .sortWithinPartitions(column)
        .withColumn("_at", F.monotonically_increasing_id())
        .persist()
    )
    part = F.shiftright("_at", _RECORD_BITS)
    sizes = {row[0]: row[1] for row in placed.groupBy(part).count().collect()}
    if start + sum(sizes.values()) > _MOST:
        raise GraftrecError(f"{column}: expected fewer than 2^31 different ids, found more; drop or merge some")
    starts, at = [], start
    for number in range(max(sizes, default=-1) + 1):
        starts.append(at)
        at += sizes.get(number, 0)
    if not sizes:
        numbered = placed.select(column, F.lit(0).alias("index"))
    else:
        first = F.element_at(F.array([F.lit(s) for s in starts]), (part + 1).cast("int"))
        within = F.col("_at").bitwiseAND(F.lit((1 << _RECORD_BITS) - 1))
        numbered = placed.select(column, (first + within).cast("int").alias("index"))
    return numbered if old is None else old.select(column, "index").unionByName(numbered)


def vocabulary(
    interactions: DataFrame,
    described: DataFrame | None,
    old: DataFrame | None,
    *,
    column: str,
    kept: DataFrame | int,
    types: dict[str, str],
) -> DataFrame:
    """`column`, index, degree, kept and the columns `types` of every id of the log, of `described`, and of `old`.

    `described`: one row an id; `old`: the table as it was. `kept`: the ids that k-core keeps, or the least degree.
    """
    degree = interactions.groupBy(column).agg(F.count(F.lit(1)).alias("degree"))
    ids = degree.select(column) if described is None else degree.select(column).unionByName(described.select(column))
    frame = with_index(ids, old, column=column).join(degree, column, "left")
    if isinstance(kept, int):  # the degree is at hand
        frame = frame.withColumn("kept", F.coalesce(F.col("degree") >= kept, F.lit(False)))
    else:
        frame = frame.join(kept.withColumn("kept", F.lit(True)), column, "left")
        frame = frame.withColumn("kept", F.coalesce("kept", F.lit(False)))
    frame = frame.withColumn("degree", F.coalesce("degree", F.lit(0)).cast("long"))
    return _describe(frame, described, old, key=column, types=types)


def _describe(
    frame: DataFrame, described: DataFrame | None, old: DataFrame | None, *, key: str, types: dict[str, str]
) -> DataFrame:
    """Add the columns `types`: from the new description where the id has one, else the old; empty lists for none."""
    for number, told in enumerate([described, old]):
        if told is not None:
            columns = [F.col(name).cast(kind).alias(f"_{name}{number}") for name, kind in types.items()]
            frame = frame.join(told.select(key, *columns, F.lit(True).alias(f"_told{number}")), key, "left")
    for name, kind in types.items():
        value = F.lit(None).cast(kind)
        for number, told in reversed(list(enumerate([described, old]))):
            if told is not None:
                value = F.when(F.col(f"_told{number}"), F.col(f"_{name}{number}")).otherwise(value)
        frame = frame.withColumn(name, F.coalesce(value, F.array().cast(kind)) if kind.startswith("array") else value)
    return frame


def first_described(rows: DataFrame, column: str) -> DataFrame:
    """One row per id where a description file has several: the first by file and line. Rejected rows are left out."""
    described = [name for name in rows.columns if name not in (column, "kind", "file", "line", "reason", "raw")]
    good = rows.where(F.col("reason").isNull())
    chosen = good.groupBy(column).agg(F.min_by(F.struct(*described), F.struct("file", "line")).alias("_first"))
    return chosen.select(column, *[F.col(f"_first.{name}").alias(name) for name in described])


def described_by(config: EtlConfig, kind: str) -> Any:
    """The settings that decide what a row of the source's items, users or edges becomes; where files lie doesn't."""
    source = config.source
    if isinstance(source, GeneratorSource):
        return source.model_dump()
    log: LogSource = described(source.root) if isinstance(source, MovielensSource) else source
    part = getattr(log, kind)
    return None if part is None else part.model_dump(exclude={"path"})
