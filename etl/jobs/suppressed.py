"""Rows of users who were forgotten, left out of what raw files bring (`etl.lake.suppression`)."""

from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.lake.suppression import Suppression, suppression
from etl.session import held

_TEXTS = ("raw", "found")  # of a rejected row


def without_forgotten(lake: str, rows: DataFrame, columns: Sequence[str] = ("user",)) -> DataFrame:
    """`rows` without those that name a forgotten user in one of `columns`; they are read once more for it."""
    listed = suppression(lake)
    if not listed:
        return rows
    named = rows.select(F.col(columns[0]).alias("user"))
    for other in columns[1:]:
        named = named.unionByName(rows.select(F.col(other).alias("user")))
    users = held(named.distinct())
    found = [row["user"] for row in users.mapInArrow(partial(_forgotten, listed=listed), "user string").collect()]
    for column in columns if found else ():
        rows = rows.where(~F.coalesce(F.col(column).isin(found), F.lit(False)))
    return rows


def without_texts(lake: str, rejected: DataFrame) -> DataFrame:
    """Rejected rows (with `raw` and `found`), these texts emptied where they name a forgotten user."""
    listed = suppression(lake)
    return rejected.mapInArrow(partial(_emptied, listed=listed), rejected.schema) if listed else rejected


def _forgotten(batches: Iterator[pa.RecordBatch], *, listed: Suppression) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        found = [user for user in batch.column("user").to_pylist() if listed.holds(user)]
        yield pa.RecordBatch.from_pydict({"user": pa.array(found, pa.string())})


def _emptied(batches: Iterator[pa.RecordBatch], *, listed: Suppression) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        texts = [batch.column(name).to_pylist() for name in _TEXTS]
        named = [any(listed.named_in(text) for text in row) for row in zip(*texts, strict=True)]
        for name, values in zip(_TEXTS, texts, strict=True):
            place = batch.schema.get_field_index(name)
            left = [None if gone else text for text, gone in zip(values, named, strict=True)]
            batch = batch.set_column(place, batch.schema.field(place), pa.array(left, batch.schema.field(place).type))
        yield batch
