"""Vectors are checked before they are committed, and a commit says what made them."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from etl.jobs import features, releases
from etl.jobs.features import FeatureError
from etl.lake import spark_io
from etl.lake.encodings import Encoding, encodings
from etl.tables import FEATURES, RELEASES

ENCODING = Encoding(kind="item", encoder="text", width=2, weights="w", template="{title}", inputs={"items": 3})


def rows_of(lake: Path) -> dict[tuple[Any, ...], list[float]]:
    found = pl.read_delta(str(lake / "features"))
    return {(row["kind"], row["encoder"], row["split"], row["id"]): row["vector"] for row in found.to_dicts()}


def frame(spark: SparkSession, vectors: dict[str, list[float]]) -> Any:
    rows = [(name, 5 + place, list(map(float, vector)), place) for place, (name, vector) in enumerate(vectors.items())]
    return spark.createDataFrame(rows, features.ROWS)


def test_a_partition_is_replaced_or_gains_rows_and_others_stay(spark: SparkSession, tmp_path: Path) -> None:
    lake = str(tmp_path)
    features.write_frame(spark, lake, frame(spark, {"a": [1, 0], "b": [0, 1]}), ENCODING)
    graph = Encoding(kind="item", encoder="graph", split="last-5", width=1, inputs={"sequences": 7})
    features.write_arrays(lake, ["b", "a"], np.array([6, 5]), np.array([[2], [1]], np.float32), graph)
    features.write_frame(spark, lake, frame(spark, {"c": [1, 1]}), ENCODING, append=True)
    written = {("item", "text", None, "a"): [1, 0], ("item", "text", None, "b"): [0, 1]}
    of_graph = {("item", "graph", "last-5", "a"): [1], ("item", "graph", "last-5", "b"): [2]}
    assert rows_of(tmp_path) == written | of_graph | {("item", "text", None, "c"): [1, 1]}
    assert encodings(lake) == {"item/text": ENCODING, "item/graph/last-5": graph}
    features.write_frame(spark, lake, frame(spark, {"d": [3, 1]}), ENCODING)
    assert rows_of(tmp_path) == of_graph | {("item", "text", None, "d"): [3, 1]}
    assert encodings(lake, 2) == {"item/text": ENCODING, "item/graph/last-5": graph}  # as it was then
    read = spark_io.read(spark, lake, FEATURES, partitions=graph.partition)
    assert sorted((row["id"], row["split"]) for row in read.collect()) == [("a", "last-5"), ("b", "last-5")]


MANY = {str(place): [1.0, place] for place in range(300)}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "expected a vector of one item at least, found none"),
        ({"a": [1, 2], "b": [1]}, "expected vectors of 2 numbers, found 1 to 2"),
        ({"a": [1, 2, 3]}, "expected vectors of 2 numbers, found 3"),
        ({"a": [1, 2], "b": [0, 0]}, "found that of 'b', which is zero"),
        ({"a": [1, float("nan")]}, "found that of 'a', which is not finite"),
        ({"a": [1, float("-inf")]}, "found that of 'a', which is not finite"),
        (MANY | {"x": [7, 7], "y": [7, 7], "z": [7, 7], "zz": [7, 7]}, "1% of 304 items at most, found 4 that share"),
    ],
)
@pytest.mark.parametrize("how", ["frame", "arrays"])
def test_vectors_that_must_not_be_committed(
    spark: SparkSession, tmp_path: Path, vectors: dict[str, list[float]], message: str, how: str
) -> None:
    lake = str(tmp_path)
    features.write_arrays(lake, ["a"], np.array([5]), np.ones((1, 2), np.float32), ENCODING)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    if how == "frame":
        write = partial(features.write_frame, spark, lake, frame(spark, vectors), ENCODING)
    else:
        if len({len(vector) for vector in vectors.values()}) > 1:
            pytest.skip("an array has one width")
        whole = np.array(list(vectors.values()), np.float32).reshape(len(vectors), len(vectors.get("a", (0, 0))))
        write = partial(features.write_arrays, lake, list(vectors), np.arange(len(vectors)), whole, ENCODING)
    with pytest.raises(FeatureError, match=message) as raised:
        write()
    assert str(raised.value).startswith("features item/text: ")
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_one_hundredth_may_share_a_vector_and_two_editions_always(tmp_path: Path) -> None:
    def write(vectors: dict[str, list[float]], max_shared: float = 0.01) -> None:
        whole = np.array(list(vectors.values()), np.float32)
        features.write_arrays(
            str(tmp_path), list(vectors), np.arange(len(vectors)), whole, ENCODING, max_shared=max_shared
        )

    write(MANY | {"x": [7, 7], "y": [7, 7], "z": [7, 7]})  # 3 of 303
    write({"x": [7, 7], "y": [7, 7]})
    with pytest.raises(FeatureError):
        write({"x": [7, 7], "y": [7, 7], "z": [7, 7]})
    write({"x": [7, 7], "y": [7, 7], "z": [7, 7]}, max_shared=1)


def test_digests_differ_where_any_bit_does() -> None:
    vectors = np.random.default_rng(0).normal(size=(2_000, 64)).astype(np.float32)
    other = vectors.copy()
    other[np.arange(2_000), np.arange(2_000) % 64] *= np.float32(1 + 2e-7)
    both = np.concatenate([vectors, other, vectors[:, ::-1]])
    assert len(np.unique(features._digests(both))) == len(np.unique(both, axis=0)) == 6_000
    assert (features._digests(vectors) == features._digests(vectors.copy())).all()


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    lake = str(tmp_path)
    features.write_arrays(lake, ["a"], np.array([5]), np.ones((1, 2), np.float32), ENCODING)
    other = Encoding(kind="item", encoder="text", width=2, weights="x" * 64)
    with pytest.raises(FeatureError, match=r"features item/text: expected the encoder's weights .* \(xxxxxxxxxxxx"):
        features.check_weights(lake, other)
    assert features.check_weights(lake, ENCODING) == ENCODING
    assert features.check_weights(lake, Encoding(kind="user", encoder="text", width=2, weights="x")) is None


def test_a_release_gains_the_table_once(tiny_lake: str, tmp_path: Path) -> None:
    import shutil

    lake = str(tmp_path / "lake")
    shutil.copytree(tiny_lake, lake)
    features.write_arrays(lake, ["i05"], np.array([5]), np.ones((1, 2), np.float32), ENCODING)
    with spark_io.writing(lake, FEATURES):
        version = spark_io.current_version(lake, FEATURES)
        assert version is not None
        assert releases.release_with(lake, {"features": version}) == (2, True)
        assert releases.release_with(lake, {"features": version}) == (2, False)
    found = pl.read_delta(f"{lake}/releases").sort("release").to_dicts()
    assert [row["release"] for row in found] == [1, 2]
    tables = [{entry["table"]: entry["version"] for entry in row["tables"]} for row in found]
    assert tables[1] == tables[0] | {"features": version}
    assert found[1]["config"] == found[0]["config"]
    assert found[1]["created"] > found[0]["created"]
    assert set(spark_io.last_commit(lake, RELEASES)) >= {"versions", "digests", "release"}


def test_a_lake_without_a_release_has_none_to_be_added_to(tmp_path: Path) -> None:
    features.write_arrays(str(tmp_path), ["a"], np.array([5]), np.ones((1, 2), np.float32), ENCODING)
    with pytest.raises(spark_io.LakeError):
        releases.release_with(str(tmp_path), {"features": 1})


def test_arrays_of_many_rows_keep_their_order(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    vectors, index = random.normal(size=(40_000, 3)).astype(np.float32), random.permutation(40_000)
    encoding = Encoding(kind="entity", encoder="graph", width=3)
    features.write_arrays(str(tmp_path), [f"e{number}" for number in index], index, vectors, encoding)
    table = pl.read_delta(str(tmp_path / "features"))
    assert table["index"].to_list() == list(range(40_000))
    assert table["id"].to_list() == [f"e{number}" for number in range(40_000)]
    found = np.stack(table["vector"].to_numpy())
    assert (found[index] == vectors).all()
    assert table.schema["vector"] == pl.List(pl.Float32)
    assert pa.schema(FEATURES.schema).field("split").nullable
