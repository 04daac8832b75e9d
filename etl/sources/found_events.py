"""Where events were found, and why some are rejected: in one column of the rejected ones (see `schema`)."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from etl.sources.columns import FILE_SHIFT
from etl.sources.reshape import PLACE_BITS
from etl.sources.schema import EXTRAS, FOUND, RAW_EVENTS

_REJECTED = RAW_EVENTS.field("rejected").type


def pack(events: pa.Table) -> pa.Table:
    """RAW_EVENTS of FOUND_EVENTS."""
    failed = pc.is_valid(events.column("reason")).combine_chunks()
    rejected = pa.nulls(len(events), _REJECTED)
    if pc.any(failed).as_py():
        texts = [events.column(name).cast(pa.string()).filter(failed).to_pylist() for name in FOUND]
        rows = zip(*texts, strict=True)
        rejected = pa.array([list(next(rows)) if one else None for one in failed.to_pylist()], _REJECTED)
    return events.drop_columns(list(FOUND)).append_column("rejected", rejected)


def filled(events: DataFrame) -> DataFrame:
    """Events with nulls in the columns (EXTRAS) that their log lacks."""
    kinds = {name: "double" if name == "value" else "string" for name in EXTRAS if name not in events.columns}
    for name, kind in kinds.items():  # withColumns of none fails on Connect
        events = events.withColumn(name, F.lit(None).cast(kind))
    return events


def rejected(values: Mapping[str, Column]) -> Column:
    """The column `rejected` of an event of which FOUND is this."""
    return F.array(*(values[name].cast("string") for name in FOUND))


def found(rejected: Column) -> list[Column]:
    """FOUND of a column `rejected`."""
    numbers = ("line", "place")
    return [
        rejected.getItem(index).cast("bigint" if name in numbers else "string").alias(name)
        for index, name in enumerate(FOUND)
    ]


def found_in(places: Mapping[str, int], *, several: bool) -> dict[str, Column]:
    """See Source.found_in. `several`: whether a line may give several rows."""
    order = F.col("source_order")
    within = order.bitwiseAND((1 << FILE_SHIFT) - 1)
    first = min(places.values(), default=0)
    names: list[str | None] = [None] * (max(places.values(), default=0) - first + 1)
    for name, place in places.items():
        names[place - first] = name
    by_place = F.array(*(F.lit(name).cast("string") for name in names))
    return {
        "file": F.get(by_place, (F.shiftright(order, FILE_SHIFT) - first).cast("int")),
        "line": F.shiftright(within, PLACE_BITS) if several else within,
        "place": within.bitwiseAND((1 << PLACE_BITS) - 1) if several else F.lit(None),
    }
