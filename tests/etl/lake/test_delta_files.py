"""What `deltalake` lets through and must not be committed: it is refused, and the table is as it was for any reader."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.lake.commit import Commit, commit_files
from etl.lake.datafile import DataFile, InvalidFile, check_path, data_schema, partition_text, partition_value
from etl.lake.snapshots import LakeError, UnsupportedFeature, active_files, existing_table
from etl.settings import GraftrecError
from etl.tables import Table
from tests.fixtures.shows import SHOWS, commit, file_of, users_of

replace = dataclasses.replace


def rows_with(**columns: pa.Array | None) -> pa.Table:
    """Two rows of SHOWS in which some columns are others; None: left out."""
    rows = {
        "user": pa.array([8, 9], pa.int64()),
        "items": pa.array([[1], [2]], pa.list_(pa.int32())),
        "title": pa.array(["x", None]),
        "score": pa.array([1.0, 2.0], pa.float32()),
    }
    return pa.table({name: column for name, column in (rows | columns).items() if column is not None})


def shortened(lake: Path) -> DataFile:
    file = file_of(lake, [8])
    path = lake / "shows" / file.path
    path.write_bytes(path.read_bytes()[:-20])
    return replace(file, size=None)


def headless(lake: Path) -> DataFile:
    """A whole footer, its data cut away: offsets lead past the file's end."""
    file = file_of(lake, range(5_000))
    path = lake / "shows" / file.path
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little") + 8
    path.write_bytes(b"PAR1" + content[-length:])
    return replace(file, size=None)


def garbage(lake: Path) -> DataFile:
    file = file_of(lake, [8])
    (lake / "shows" / file.path).write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    return replace(file, size=None)


def partition(**values: str | None) -> Callable[[Path], DataFile]:
    return lambda lake: replace(file_of(lake, [8]), partition=values)


def at(path: str) -> Callable[[Path], DataFile]:
    return lambda lake: replace(file_of(lake, [8]), path=path, size=None)


def with_rows(**columns: pa.Array | None) -> Callable[[Path], DataFile]:
    return lambda lake: file_of(lake, [], rows=rows_with(**columns))


def linked(lake: Path) -> DataFile:
    outside = lake.parent / "outside.parquet"
    file = file_of(lake, [8])
    os.rename(lake / "shows" / file.path, outside)
    (lake / "shows" / file.path).symlink_to(outside)
    return file


BAD: dict[str, tuple[Callable[[Path], DataFile], str]] = {
    "missing": (at("part-nowhere.parquet"), "found none"),
    "a folder": (lambda lake: [(lake / "shows" / "part-x").mkdir(), at("part-x")(lake)][1], "found none"),
    "torn": (shortened, "no whole Parquet file"),
    "no Parquet": (garbage, "no whole Parquet file"),
    "data cut away": (headless, "doesn't fit"),
    "wrong size": (lambda lake: replace(file_of(lake, [8]), size=7), "should have 7 bytes"),
    "unknown partition column": (partition(domain="a", bucket="0", month="1"), "found ['bucket', 'domain', 'month']"),
    "missing partition column": (partition(domain="a"), "found ['domain']"),
    "partition value of another type": (partition(domain="a", bucket="one"), "column bucket is int32"),
    "partition value out of range": (partition(domain="a", bucket=str(2**31)), "column bucket is int32"),
    "partition value spelled otherwise": (partition(domain="a", bucket="007"), "'007' is no int32"),
    "partition value that is no text": (partition(domain="a", bucket=7), "not text"),  # type: ignore[arg-type]
    "null in a partition column without nulls": (partition(domain="a", bucket=None), "has no nulls"),
    "empty partition value": (partition(domain="", bucket="0"), "'' is no string"),
    "column missing": (with_rows(title=None), "lacks the columns ['title']"),
    "column too many": (with_rows(extra=pa.array([1, 2])), "has the columns ['extra']"),
    "partition column in the data": (with_rows(bucket=pa.array([0, 0], pa.int32())), "has the columns ['bucket']"),
    "integer too narrow": (with_rows(user=pa.array([8, 9], pa.int32())), "user should be int64, found int32"),
    "text for a number": (with_rows(user=pa.array(["8", "9"])), "user should be int64"),
    "double for a float": (with_rows(score=pa.array([1.0, 2.0])), "score should be float, found double"),
    "list of another type": (with_rows(items=pa.array([[1], [2]])), "items should be list"),
    "null where none may be": (with_rows(user=pa.array([8, None], pa.int64())), "column user may not be null, found 1"),
    "null list": (with_rows(items=pa.array([None, []], pa.list_(pa.int32()))), "items may not be null, found 1"),
    "path outside": (at("../part-x.parquet"), "relative to its table"),
    "path outside, inside": (at("a/../../shows/part-x.parquet"), "relative to its table"),
    "absolute path": (at("/etc/passwd"), "relative to its table"),
    "file URI": (at("file:///etc/passwd"), "relative to its table"),
    "object-store URI": (at("s3://bucket/part-x.parquet"), "relative to its table"),
    "path not normalised": (at("a//part-x.parquet"), "relative to its table"),
    "hidden path": (at("_delta_log/00000000000000000009.json"), "relative to its table"),
    "empty path": (at(""), "relative to its table"),
    "link that leads out": (linked, "leads out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_and_table_as_it_was(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    lake = tmp_path / "lake"
    before = commit(lake, [file_of(lake, [1, 2])])
    good = file_of(lake, [3])
    with pytest.raises(InvalidFile) as refused:
        commit(lake, [good, make(lake)], app="bad")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    table = existing_table(str(lake), SHOWS)
    assert table.version() == before.version
    assert table.transaction_version("bad") is None
    assert users_of(lake) == [1, 2]
    commit(lake, [good], app="bad")  # and a retry without it works
    assert users_of(lake) == [1, 2, 3]


def test_same_path_twice_is_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path, [1])
    with pytest.raises(InvalidFile, match="twice"):
        commit(tmp_path, [file, file])
    commit(tmp_path, [file])
    with pytest.raises(InvalidFile, match="twice"):
        commit(tmp_path, [file_of(tmp_path, [2]), file])
    assert users_of(tmp_path) == [1]


def test_file_outside_the_replaced_partitions_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1], "a", 0), file_of(tmp_path, [2], "b", 0)])
    with pytest.raises(InvalidFile, match="outside the partitions"):
        commit(tmp_path, [file_of(tmp_path, [3], "b", 0)], "partitions", partition_scope={"domain": ["a"]})
    assert users_of(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        ({"month": ["1"]}, "found month"),
        ({"bucket": ["x"]}, "bucket"),
        ({"bucket": [None]}, "has no nulls"),
        ({}, "none"),
    ],
)
def test_bad_partition_scope_is_refused(scope: dict[str, list[str]], reason: str, tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])])
    with pytest.raises(LakeError, match=reason):
        commit(tmp_path, [], "partitions", partition_scope=scope)
    assert users_of(tmp_path) == [1]


def test_statistics_are_computed_from_the_footer(tmp_path: Path) -> None:
    """Nobody can hand in others: a DataFile has no place for them."""
    rows = rows_with(title=pa.array(["b", None]), score=pa.array([math.nan, 1.0], pa.float32()))
    commit(tmp_path, [file_of(tmp_path, [], rows=rows)])
    entry = (tmp_path / "shows" / "_delta_log" / f"{1:020d}.json").read_text()
    (added,) = [json.loads(line)["add"] for line in entry.splitlines() if line.startswith('{"add"')]
    assert json.loads(added["stats"]) == {
        "numRecords": 2,
        "minValues": {"user": 8, "title": "b"},
        "maxValues": {"user": 9, "title": "b"},
        "nullCount": {"user": 0, "title": 1, "score": 0},
    }
    assert DeltaTable(tmp_path / "shows").count() == 2


def test_long_strings_get_no_bounds(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [], rows=rows_with(title=pa.array(["é" * 5_000, "a"])))])
    (action,) = pa.table(existing_table(str(tmp_path), SHOWS).get_add_actions()).to_pylist()
    assert action["min"]["user"] == 8
    assert action["min"].get("title") is None


def test_bounds_over_row_groups_and_empty_lists(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "user": pa.array([5, 3, 9, -1], pa.int64()),
            "items": pa.array([[], [1, None], [], [2]], pa.list_(pa.int32())),
            "title": pa.array([None, None, "m", "z"]),
            "score": pa.array([None] * 4, pa.float32()),
        },
        schema=data_schema(SHOWS),
    )
    file = file_of(tmp_path, [1])
    pq.write_table(rows, tmp_path / "shows" / file.path, row_group_size=1)
    commit(tmp_path, [replace(file, size=None)])
    (action,) = pa.table(existing_table(str(tmp_path), SHOWS).get_add_actions()).to_pylist()
    assert action["num_records"] == 4
    assert action["min"] == {"user": -1, "title": "m", "score": None}
    assert action["max"] == {"user": 9, "title": "z", "score": None}
    assert action["null_count"] == {"user": 0, "items": None, "title": 2, "score": 4}
    assert users_of(tmp_path) == [-1, 3, 5, 9]


def test_large_and_dictionary_arrow_types_are_the_same_in_parquet(tmp_path: Path) -> None:
    rows = rows_with(
        title=pa.array(["x", "y"], pa.large_string()), items=pa.array([[1], []], pa.large_list(pa.int32()))
    )
    commit(tmp_path, [file_of(tmp_path, [], rows=rows)])
    commit(tmp_path, [file_of(tmp_path, [], rows=rows_with(title=pa.array(["x", "x"]).dictionary_encode()))])
    assert users_of(tmp_path) == [8, 8, 9, 9]


def test_table_with_a_check_constraint_is_not_written(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])])
    DeltaTable(tmp_path / "shows").alter.add_constraint({"positive": '"user" > 0'})
    version = existing_table(str(tmp_path), SHOWS).version()
    with pytest.raises(UnsupportedFeature, match="positive"):
        commit(tmp_path, [file_of(tmp_path, [-5])])
    assert existing_table(str(tmp_path), SHOWS).version() == version
    assert users_of(tmp_path) == [1]


def test_append_only_table_is_not_replaced(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])], properties={"delta.appendOnly": "true"})
    for mode, scope in (("overwrite", None), ("partitions", {"domain": ["a"]})):
        with pytest.raises(LakeError, match="appendOnly"):
            commit(tmp_path, [], mode, partition_scope=scope)
    commit(tmp_path, [file_of(tmp_path, [2])])
    assert users_of(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        replace(SHOWS, schema=SHOWS.schema.append(pa.field("extra", pa.string(), nullable=False))),
        replace(SHOWS, schema=SHOWS.schema.set(2, pa.field("user", pa.int64()))),
        replace(SHOWS, partition_by=("domain",)),
    ],
)
def test_table_of_another_contract_is_not_written(other: Table, tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])])
    with pytest.raises(LakeError, match=r"etl/tables\.py"):
        commit_files(str(tmp_path), other, [], Commit(mode="append", app="x", app_version=1, metadata={}))
    assert users_of(tmp_path) == [1]


@settings(deadline=None)
@given(st.one_of(st.integers(-(2**31), 2**31 - 1), st.none()))
def test_partition_integers_round_trip(value: int | None) -> None:
    assert partition_value(partition_text(value), pa.field("x", pa.int32())) == value


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_partition_strings_round_trip(value: str) -> None:
    assert partition_value(partition_text(value), pa.field("x", pa.string())) == (value or None)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "..", ".", "", "b=1", "_x", ".y", "c%2F", "é", "\\", "file:", "\n"]), max_size=4))
def test_accepted_paths_stay_under_the_table(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        check_path(path)
    except GraftrecError:
        return
    assert os.path.normpath(os.path.join("/table", path)) == f"/table/{path}"


def test_files_in_partitions_with_odd_names_are_found_again(tmp_path: Path) -> None:
    for number, domain in enumerate(["Children's & Co/50%", "%2F", "a=b/c", "é ü", None, "#?*[x]{y}", "007"]):
        commit(tmp_path, [file_of(tmp_path, [number], domain, 1)])
    files = active_files(existing_table(str(tmp_path), SHOWS), SHOWS)
    assert {file.partition["domain"] for file in files} == {
        "Children's & Co/50%",
        "%2F",
        "a=b/c",
        "é ü",
        None,
        "#?*[x]{y}",
        "007",
    }
    assert users_of(tmp_path) == list(range(7))
    for domain in ("Children's & Co/50%", "%2F", None):
        commit(tmp_path, [], "partitions", partition_scope={"domain": [domain]})
    assert users_of(tmp_path) == [2, 3, 5, 6]
