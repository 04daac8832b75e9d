"""Append-only dense indices: a raw id gets its index once and keeps it for ever.

New ids are numbered in the order of their bytes, after the old ones. They are cut into ranges at ids drawn from them
and each range is numbered by itself, so that no task holds them all; how they are cut changes nothing.
"""

import itertools
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from etl.config import EtlConfig, GeneratorSource, LogSource, MovielensSource
from etl.session import held
from etl.settings import GraftrecError
from etl.sources.movielens import described
from etl.sources.schema import FOUND
from etl.tables import FIRST_INDEX

RANGE_IDS = 1_000_000  # ids that a task sorts
_SAMPLE = 20  # ids drawn for each range
_MOST = 2**31 - 1


def with_index(
    ids: DataFrame, old: DataFrame | None, *, column: str, first: int | None = None, range_ids: int = RANGE_IDS
) -> DataFrame:
    """`column`, `index` of all old ids and of those in `ids` (any frame that holds `column`; repeated ids are one).

    `old` holds `column` and `index`. `first`: the index of the next new id, where ids have left.
    Raises GraftrecError beyond 2^31 ids.
    """
    new = ids.select(column).distinct()
    start = FIRST_INDEX
    if old is not None:
        new = new.join(old.select(column), column, "left_anti")
        start = start + old.count() if first is None else first
    new = held(new)
    size = new.count()
    if start + size > _MOST:
        raise GraftrecError(f"{column}: expected fewer than 2^31 different ids, found more; drop or merge some")
    part = _range(new, size, column, range_ids)
    several = size > range_ids
    sizes = {row[0]: row[1] for row in new.groupBy(part.alias("part")).count().collect()} if several else {0: size}
    starts = itertools.accumulate((sizes.get(number, 0) for number in range(max(sizes, default=0))), initial=start)
    first = F.element_at(F.array([F.lit(at) for at in starts]), F.col("_part") + 1)
    place = F.row_number().over(Window.partitionBy("_part").orderBy(column)) - 1
    numbered = new.withColumn("_part", part).select(column, (first + place).cast("int").alias("index"))
    return numbered if old is None else old.select(column, "index").unionByName(numbered)


def _range(ids: DataFrame, size: int, column: str, range_ids: int) -> Column:
    """The number of the range that an id falls into, of about `range_ids` ids each."""
    num_ranges = -(-size // range_ids)
    if num_ranges < 2:
        return F.lit(0)
    drawn = ids.where(F.pmod(F.xxhash64(column), F.lit(max(range_ids // _SAMPLE, 1))) == 0)
    sample = sorted((row[0] for row in drawn.collect()), key=str.encode)
    cuts = sorted({sample[len(sample) * number // num_ranges] for number in range(1, num_ranges)} if sample else set())
    return sum((F.when(F.col(column) >= F.lit(cut), 1).otherwise(0) for cut in cuts), F.lit(0)).cast("int")


def grown(old: DataFrame, appended: DataFrame, column: str) -> DataFrame:
    """`column`, degree, more (of it, in `appended`) and kept, as it was, of the ids of `old` and of `appended`."""
    counts = appended.groupBy(column).agg(F.count(F.lit(1)).alias("more"))
    both = old.select(column, F.col("degree").alias("_degree"), "kept").join(counts, column, "full_outer")
    more = F.coalesce("more", F.lit(0))
    degree = (F.coalesce("_degree", F.lit(0)) + more).alias("degree")
    return held(both.select(column, degree, more.alias("more"), F.coalesce("kept", F.lit(False)).alias("kept")))


def vocabulary(
    found: DataFrame,
    described: DataFrame | None,
    old: DataFrame | None,
    *,
    column: str,
    types: dict[str, str],
    first: int | None = None,
) -> DataFrame:
    """`column`, index, degree, kept and the columns `types` of every id of `found`, of `described`, and of `old`.

    `found`: `column`, degree, kept of the log's ids, held; `described`: one row an id; `old`: the table as it was;
    `first`: see with_index.
    """
    ids = found.select(column) if described is None else found.select(column).unionByName(described.select(column))
    frame = with_index(ids, old, column=column, first=first).join(
        found.select(column, "degree", "kept"), column, "left"
    )
    frame = frame.withColumn("degree", F.coalesce("degree", F.lit(0)).cast("long"))
    frame = frame.withColumn("kept", F.coalesce("kept", F.lit(False)))
    return _describe(frame, described, old, key=column, types=types)


def mark_kept(found: DataFrame, kept: DataFrame, column: str) -> DataFrame:
    """`found`, `kept` (frame of `column`) being kept besides those it calls so."""
    marked = found.join(kept.select(column, F.lit(True).alias("_kept")), column, "left")
    return held(marked.select(column, "degree", (F.col("kept") | F.coalesce("_kept", F.lit(False))).alias("kept")))


def _describe(
    frame: DataFrame, described: DataFrame | None, old: DataFrame | None, *, key: str, types: dict[str, str]
) -> DataFrame:
    """Add the columns `types`: from the new description where the id has one, else the old; empty lists and maps for
    none."""
    for number, table in enumerate([described, old]):
        if table is not None:
            columns = [F.col(name).cast(kind).alias(f"_{name}{number}") for name, kind in types.items()]
            frame = frame.join(table.select(key, *columns, F.lit(True).alias(f"_described{number}")), key, "left")
    for name, kind in types.items():
        value = F.lit(None).cast(kind)
        for number, table in reversed(list(enumerate([described, old]))):
            if table is not None:
                value = F.when(F.col(f"_described{number}"), F.col(f"_{name}{number}")).otherwise(value)
        empty = {"array": F.array(), "map": F.create_map()}.get(kind.partition("<")[0])
        frame = frame.withColumn(name, value if empty is None else F.coalesce(value, empty.cast(kind)))
    return frame


def first_described(rows: DataFrame, column: str) -> DataFrame:
    """One row per id where a description file has several: the first by file and line. Rejected rows are left out."""
    described = [name for name in rows.columns if name not in (column, *FOUND)]
    place = F.row_number().over(Window.partitionBy(column).orderBy("file", "line"))
    numbered = rows.where(F.col("reason").isNull()).select(column, *described, place.alias("_place"))
    return numbered.where("_place = 1").select(column, *described)


def described_by(config: EtlConfig, kind: str) -> Any:
    """The settings that decide what a row of the source's items, users or edges becomes; where files lie doesn't."""
    source = config.source
    if isinstance(source, GeneratorSource):
        return source.model_dump()
    log: LogSource = described(source.root) if isinstance(source, MovielensSource) else source
    part = getattr(log, kind)
    return None if part is None else part.model_dump(exclude={"path"})
