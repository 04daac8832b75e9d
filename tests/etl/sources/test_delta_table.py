"""A Delta table as a source: its rows as of a version, whatever its writer's features, and what later versions add."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from etl.file_config import FileConfig
from etl.settings import GraftrecError
from etl.sources.delta_table import SourceTable
from etl.sources.files import find_files
from etl.sources.rows import RawRows, read_range
from tests.fixtures.delta_tables import ForeignTable
from tests.fixtures.object_store import BUCKET, copy_lake, seaweed, settings, variables

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.int64()), ("day", pa.string())])
WANTED = ["user", "item", "day"]


def _rows(
    root: Path, *, wanted: list[str | int] | None = None, path: str = "log", **settings: Any
) -> list[tuple[Any, ...]]:
    config = FileConfig.model_validate({"path": path, "format": "delta", **settings})
    rows = RawRows(config, str(root), wanted or list(WANTED), setting="source.events.path")
    chunks = [chunk for part in rows._plan() for chunk in read_range(part, config)]
    found = [
        zip(chunk.line.to_pylist(), *(column.to_pylist() for column in chunk.columns), strict=True) for chunk in chunks
    ]
    return sorted(row for rows in found for row in rows)


def _part(start: int, size: int = 8) -> pa.Table:
    return pa.table({"user": [f"u{k}" for k in range(start, start + size)], "item": list(range(start, start + size))})


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("mapping", ["none", "name", "id"])
def test_rows_that_a_vector_deletes_stay_away_under_each_mapping(tmp_path: Path, mapping: str, inline: bool) -> None:
    table = ForeignTable(tmp_path / "log", SCHEMA, mapping=mapping, partition_by=["day"])
    first = table.append(_part(0), {"day": "é 1"})
    table.append(_part(8), {"day": "2"})
    table.delete(first, [0, 3, 7], inline=inline)
    kept = [(k + 1, f"u{k}", k, "é 1") for k in (1, 2, 4, 5, 6)]
    assert _rows(tmp_path) == sorted(kept + [(k - 7, f"u{k}", k, "2") for k in range(8, 16)])
    assert len(_rows(tmp_path, version=2)) == 16


def test_a_column_added_later_is_null_before_and_positions_are_the_schemas(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "log", _part(0))
    write_deltalake(
        tmp_path / "log", _part(8).append_column("day", pa.array(["d"] * 8)), mode="append", schema_mode="merge"
    )
    assert [row[3] for row in _rows(tmp_path)].count(None) == 8
    assert _rows(tmp_path, wanted=[0, 1, 2]) == _rows(tmp_path)


def test_fields_inside_a_column_are_named_with_dots(tmp_path: Path) -> None:
    nested = pa.table({"user": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}], "item": [1, 2]})
    write_deltalake(tmp_path / "log", nested)
    assert _rows(tmp_path, wanted=["user.id", "item"]) == [(1, 7, 1), (2, 8, 2)]
    with pytest.raises(GraftrecError, match=r"expected a column 'user.key' of the table .*found user, item; mend"):
        _rows(tmp_path, wanted=["user.key"])


def test_features_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    ForeignTable(tmp_path / "log", SCHEMA, features=["deletionVectors", "typeWidening"]).append(
        _part(0).append_column("day", pa.array(["d"] * 8))
    )
    with pytest.raises(GraftrecError, match=r"source.events.path: .*found typeWidening at .*; rewrite"):
        _rows(tmp_path)


@pytest.mark.parametrize("path", ["log", "log/*.parquet", "log/day=1", "log/**/*.parquet"])
@pytest.mark.parametrize("found", ["parquet", "delimited", "json"])
def test_a_tables_folder_is_refused_under_other_formats(tmp_path: Path, path: str, found: str) -> None:
    table = _part(0).append_column("day", pa.array(["1"] * 8))
    write_deltalake(tmp_path / "log", table, partition_by=["day"])
    write_deltalake(tmp_path / "log", _part(8).append_column("day", pa.array(["2"] * 8)), mode="append")
    (tmp_path / "log" / "part-0.parquet").write_bytes(b"")
    with pytest.raises(GraftrecError, match=r"found a table, .*/log; read it by format: delta"):
        find_files(str(tmp_path), path, what="source.events.path")


def test_no_table_and_no_version_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(GraftrecError, match=r"expected a Delta table at .*; mend path or version"):
        _rows(tmp_path)
    write_deltalake(tmp_path / "log", _part(0))
    with pytest.raises(GraftrecError, match=r"expected a Delta table at version 7 at .*; mend path or version"):
        _rows(tmp_path, version=7)


def _added(root: Path, since: int) -> list[str] | None:
    table = SourceTable(str(root), FileConfig(path="log", format="delta"), setting="source.events.path")
    found = table.added_since(since)
    return None if found is None else [Path(file.path).name for file in found]


def test_added_since_names_new_files_and_nothing_where_rows_may_have_gone(tmp_path: Path) -> None:
    table = ForeignTable(tmp_path / "log", SCHEMA, partition_by=["day"])
    names = [table.append(_part(8 * day), {"day": str(day)}) for day in range(3)]
    assert _added(tmp_path, 1) == names[1:]
    assert _added(tmp_path, 3) == []
    table.commit({"txn": {"appId": "a", "version": 1}})
    assert _added(tmp_path, 3) == []
    compacted = _part(0, 16).append_column("day", pa.array(["0"] * 16))
    table.commit(table.remove(names[0], data_change=False))
    assert _added(tmp_path, 3) == []
    table.delete(names[1], [2])
    assert _added(tmp_path, 3) is None
    assert _added(tmp_path, table.version + 1) is None  # an older version is pinned now
    table.append(compacted, {"day": "3"})
    assert _added(tmp_path, table.version - 1) is not None
    (tmp_path / "log" / "_delta_log" / f"{1:020d}.json").rename(tmp_path / "gone")
    with pytest.raises(GraftrecError, match=r"expected a Delta table"):
        _added(tmp_path, 0)


def test_a_compaction_between_two_runs_gives_no_row_twice(tmp_path: Path) -> None:
    for start in (0, 8):
        write_deltalake(tmp_path / "log", _part(start), mode="append")
    DeltaTable(tmp_path / "log").optimize.compact()
    assert _added(tmp_path, 1) == []
    assert _added(tmp_path, 0) is None  # the file of version 1 is part of a larger one now


def test_a_table_in_an_object_store_is_read_as_on_a_disk(tmp_path: Path) -> None:
    table = ForeignTable(tmp_path / "log", SCHEMA, mapping="name", partition_by=["day"])
    first = table.append(_part(0), {"day": "1 é"})
    table.delete(first, [1, 2])
    table.append(_part(8), {"day": "2"})
    with seaweed(tmp_path / "store") as endpoint, variables(settings(endpoint)):
        copy_lake(str(tmp_path / "log"), f"s3://{BUCKET}/lakes/log")
        assert _rows(Path("unused"), path=f"s3://{BUCKET}/lakes/log") == _rows(tmp_path)
        config = FileConfig(path="log", format="delta")
        source = SourceTable(f"s3://{BUCKET}/lakes", config, setting="source.events.path")
        assert len(source.added_since(2) or []) == 1
        with pytest.raises(GraftrecError, match=f"expected a Delta table at s3://{BUCKET}/none, found"):
            _rows(Path("unused"), path=f"s3://{BUCKET}/none")
