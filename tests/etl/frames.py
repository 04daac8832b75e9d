"""Tiny frames of the contract's tables, written as tuples."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from etl.lake.spark_io import spark_schema
from etl.sources.schema import RAW_EVENTS
from etl.sources.schema import spark_schema as ddl
from etl.tables import INTERACTIONS, bucket_of

BUCKETS = 4


def frame(spark: SparkSession, rows: Sequence[tuple[Any, ...]], schema: str) -> DataFrame:
    return spark.createDataFrame(list(rows), schema)


def raw_events(spark: SparkSession, rows: Sequence[dict[str, Any]]) -> DataFrame:
    """RAW_EVENTS; what a row doesn't give is null, `source_order` its place, `line` the same."""
    filled = [
        {"kind": "interactions", "file": "log", "line": place, "source_order": place} | row
        for place, row in enumerate(rows, 1)
    ]
    table = pa.Table.from_pylist(filled, schema=RAW_EVENTS)
    return spark.createDataFrame(table, ddl(RAW_EVENTS))


def interactions(spark: SparkSession, rows: Sequence[tuple[Any, ...]]) -> DataFrame:
    """INTERACTIONS of (user, item, time[, event_type, value, basket]); `source_order` is the place in the list."""
    filled = []
    for place, row in enumerate(rows):
        user, item, time, event_type, value, basket = (*row, None, None, None)[:6]
        filled.append((bucket_of(user, BUCKETS), user, item, time, event_type, value, basket, place))
    return spark.createDataFrame(filled, spark_schema(INTERACTIONS))
