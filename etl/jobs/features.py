"""Vectors of items, users and entities: the checks before a commit, and the record of what made them (survey 2).

An encoder's vectors of one kind of thing and one split are a partition of FEATURES, written whole, or appended to where
none of its rows has changed. Encoders lie elsewhere (`trainer`): this module takes what they give, as a Spark frame or
as arrays. It is no job of `python -m etl all`, since it doesn't know when an encoder should run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.lake import spark_io
from etl.lake.encodings import Encoding, encodings, recorded
from etl.lake.snapshots import local_path, make_folder, table_filesystem, table_uri
from etl.session import user_errors
from etl.settings import GraftrecError
from etl.tables import FEATURES

MAX_SHARED = 0.01  # of the things with a vector: how many may have the same one
_THINGS = {"item": "items", "user": "users", "entity": "entities"}
LEAST_SHARED = 3  # two editions of one film are no placeholder, in however small a catalogue
ROWS = "id string, index int, vector array<float>, source_hash bigint"
_SUMMARY = "digest bigint, id string, width int, fault string"
_WRITE_ROWS = 16_384


class FeatureError(GraftrecError):
    """Vectors that must not be committed, or an encoder that isn't the one that made the others."""


def check_weights(lake: str, encoding: Encoding) -> Encoding | None:
    """What the table holds of this partition already. Raises FeatureError where other weights made it: new vectors
    beside them would mean something else."""
    found = encodings(lake).get(encoding.name)
    if found is not None and found.weights != encoding.weights:
        raise FeatureError(
            f"features {encoding.name}: expected the encoder's weights that made the vectors in {lake} (SHA-256 "
            f"{found.weights[:12]}…), found others ({encoding.weights[:12]}…); install those again, or name the new "
            "encoder otherwise: --name"
        )
    return found


def write_frame(
    spark: SparkSession,
    lake: str,
    frame: DataFrame,
    encoding: Encoding,
    *,
    append: bool = False,
    max_shared: float = MAX_SHARED,
) -> spark_io.Written:
    """Write the rows (id, index, vector, source_hash) of one encoder: all of them, or, with `append`, more of them.

    The frame is read twice: to be checked, and to be written. Raises FeatureError; nothing is written then.
    """
    check_frame(frame, encoding, max_shared=max_shared)
    labels = {"kind": encoding.kind, "encoder": encoding.encoder, "split": encoding.split or None}
    given = [F.lit(value).cast("string").alias(name) for name, value in labels.items()]
    rows = frame.select(*given, "id", F.col("index").cast("int"), "vector", "source_hash")
    return spark_io.write(
        spark, rows.select(*FEATURES.schema.names), lake, FEATURES, _commit(lake, encoding, append=append)
    )


def write_arrays(
    lake: str,
    ids: Sequence[str],
    index: npt.NDArray[Any],
    vectors_NF: npt.NDArray[np.float32],
    encoding: Encoding,
    *,
    max_shared: float = MAX_SHARED,
) -> spark_io.Written:
    """As write_frame, all rows of one encoder, from this process's memory, without Spark: raw ids [N], global indices
    [N], vectors [N, F]. Raises FeatureError; nothing is written then."""
    order = np.argsort(index, kind="stable")
    flat = pa.array(np.ascontiguousarray(vectors_NF[order], dtype=np.float32).ravel())
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int64) * vectors_NF.shape[1])
    columns = {
        "id": pa.array(ids, pa.string()).take(pa.array(order)),
        "index": pa.array(index[order].astype(np.int32)),
        "vector": pa.LargeListArray.from_arrays(offsets, flat),
        "source_hash": pa.nulls(len(ids), pa.int64()),
    }
    batch = pa.RecordBatch.from_pydict(columns)
    _check(_grouped(list(_summaries(iter([batch])))), encoding, max_shared)
    if local_path(lake) is not None:
        make_folder(Path(table_uri(lake, FEATURES)))
    key = (encoding.kind, encoding.encoder, encoding.split or None)
    writer = spark_io.FileWriter(table_filesystem(lake, FEATURES), FEATURES, key)
    for start in range(0, batch.num_rows, _WRITE_ROWS):
        part = batch.slice(start, _WRITE_ROWS)
        writer.add(part.set_column(2, "vector", part.column("vector").cast(pa.list_(pa.float32()))))
    files = spark_io.data_files(writer.close().column("file").to_pylist())
    return spark_io.commit_files(lake, FEATURES, files, _commit(lake, encoding, append=False))


def check_frame(frame: DataFrame, encoding: Encoding, *, max_shared: float = MAX_SHARED) -> None:
    """Raise FeatureError unless the vectors are all of one width, finite, none zero, and hardly any shared."""
    with user_errors():
        rows = frame.select("id", "vector").mapInArrow(_summaries, _SUMMARY)
        grouped = rows.groupBy("digest").agg(
            F.count(F.lit(1)).alias("count"),
            F.min("id").alias("id"),
            F.min("width").alias("least"),
            F.max("width").alias("most"),
            F.min("fault").alias("fault"),
        )
        found = grouped.agg(
            F.sum("count").alias("rows"),
            F.min("least").alias("least"),
            F.max("most").alias("most"),
            F.min("fault").alias("fault"),
            F.max(F.struct("count", "id")).alias("shared"),
        ).first()
    assert found is not None
    shared = found["shared"] or (0, "")
    _check(Found(found["rows"] or 0, found["least"], found["most"], found["fault"], *shared), encoding, max_shared)


@dataclass(frozen=True)
class Found:
    """What was found among vectors: their number and widths, a row that can't be written and why, and how many share
    the vector that most have, with the id of one."""

    rows: int
    least: int
    most: int
    fault: str | None
    shared: int
    example: str


def _check(found: Found, encoding: Encoding, max_shared: float) -> None:
    name = f"features {encoding.name}"
    if found.rows == 0:
        raise FeatureError(
            f"{name}: expected a vector of one {encoding.kind} at least, found none; read columns that hold something"
        )
    if (found.least, found.most) != (encoding.width, encoding.width):
        widths = f"{found.least}" if found.least == found.most else f"{found.least} to {found.most}"
        raise FeatureError(f"{name}: expected vectors of {encoding.width} numbers, found {widths}; mend the encoder")
    if found.fault is not None:
        raise FeatureError(f"{name}: expected finite vectors, none zero, found {found.fault}; mend the encoder")
    if found.shared >= LEAST_SHARED and found.shared > max_shared * found.rows:
        raise FeatureError(
            f"{name}: expected each vector of {max_shared:.0%} of {found.rows:,} {_THINGS[encoding.kind]} at most, "
            f"found {found.shared:,} that share that of {found.example!r}, a placeholder as it seems; leave them out, "
            "or raise --max_shared"
        )


def _summaries(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Of each row: a digest of its vector, its id and width, and what is wrong with it."""
    for batch in batches:
        column, ids = batch.column("vector"), batch.column("id")
        lengths = pc.list_value_length(column).cast(pa.int32())  # of a large list: int64
        widths = lengths.fill_null(0).to_numpy(zero_copy_only=False)
        values = column.flatten().fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
        starts = np.cumsum(widths) - widths
        digests = np.zeros(len(batch), dtype=np.int64)
        finite, zero = np.ones(len(batch), bool), np.ones(len(batch), bool)
        for width in np.unique(widths[widths > 0]):
            rows = np.flatnonzero(widths == width)
            vectors = values[starts[rows][:, None] + np.arange(width)]
            digests[rows] = _digests(vectors)
            finite[rows], zero[rows] = np.isfinite(vectors).all(1), ~vectors.any(1)
        faults = pa.array([None] * len(batch), pa.string())
        if zero.any() or not finite.all():
            kinds = np.where(~finite, "is not finite", np.where(zero, "is zero", ""))
            texts = zip(ids.to_pylist(), kinds, strict=True)
            faults = pa.array([f"that of {id!r}, which {kind}" if kind else None for id, kind in texts], pa.string())
        yield pa.RecordBatch.from_arrays(
            [pa.array(digests), ids.cast(pa.string()), pa.array(widths, pa.int32()), faults],
            names=["digest", "id", "width", "fault"],
        )


def _digests(vectors_NF: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """[N] sums of the numbers' bits, each times an odd constant of its place: the same for equal vectors,
    and hardly ever for others."""
    bits = np.ascontiguousarray(vectors_NF).view(np.uint32).astype(np.uint64)
    constants = np.random.default_rng(0).integers(1 << 63, size=bits.shape[1], dtype=np.uint64) | np.uint64(1)
    digests: npt.NDArray[np.int64] = (bits * constants).sum(1, dtype=np.uint64).view(np.int64)
    return digests


def _grouped(batches: Sequence[pa.RecordBatch]) -> Found:
    """As check_frame's query."""
    rows = pa.Table.from_batches(batches)
    if not len(rows):
        return Found(0, 0, 0, None, 0, "")
    groups = rows.group_by("digest").aggregate([("id", "count"), ("id", "min")])
    most = groups.sort_by([("id_count", "descending")]).slice(0, 1).to_pylist()[0]
    widths = pc.min_max(rows["width"]).as_py()
    fault = pc.min(rows["fault"]).as_py()
    return Found(len(rows), widths["min"], widths["max"], fault, most["id_count"], most["id_min"])


def _commit(lake: str, encoding: Encoding, *, append: bool) -> spark_io.Commit:
    app = f"features/{encoding.name}"
    last = spark_io.transactions(lake, FEATURES, [app]).get(app, 0)
    known = encodings(lake) | {encoding.name: encoding}
    return spark_io.Commit(
        mode="append" if append else "partitions",
        app=app,
        app_version=last + 1,
        metadata={"job": "features", "encodings": recorded(known)},
        partition_scope=None if append else encoding.partition,
    )
