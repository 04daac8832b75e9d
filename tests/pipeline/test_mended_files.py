"""Rejected rows that are mended and delivered again, and what quarantine says of each."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.__main__ import main
from etl.lake import spark_io
from etl.pipeline.report import rejected_rows
from etl.tables import QUARANTINE
from tests.fixtures.written_lakes import write_table

HEADER = "user,items,time,value"
GOOD = ["a,x,100,1", "a,y,101,1", "b,x,100,2", "b,y z,102,2", "c,z x,103,3"]
TORN = ["a,x,100,1", "a,y,soon,1", "b,x,100,2", "b,y z,102,2,5", "c,z x,103,lots"]
COLUMNS = ["user", "item", "time", "value", "source_order"]


def _configure(folder: Path, **source: Any) -> list[str]:
    columns = {"user": "user", "time": "time", "value": "value"}
    explode = [{"columns": {"item": "items"}, "separator": " "}]
    events = {"path": "log", "columns": columns, "explode": explode}
    config = {
        "source": {"kind": "log", "root": str(folder), "events": events, **source},
        "cleaning": {"max_quarantine_share": 1},
        "kcore": {"min_user": 1, "min_item": 1},
    }
    (folder / "etl.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "etl.yaml")]


def _write(folder: Path, **files: list[str]) -> None:
    (folder / "log").mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / "log" / f"{name}.csv").write_text("\n".join([HEADER, *lines]))


def _rows(lake: Path, *names: str) -> list[tuple[Any, ...]]:
    return pl.read_delta(str(lake / "interactions")).select(names or COLUMNS).sort(names or COLUMNS).rows()


def _rejected(lake: Path) -> list[tuple[Any, ...]]:
    found = pl.read_delta(str(lake / "quarantine"))
    assert found.select(QUARANTINE.key).is_duplicated().sum() == 0
    return found.sort(QUARANTINE.key).select("line", "place", "reason", "column", "found", "setting").rows()


def test_mended_lines_take_the_places_they_would_have_had(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, right = tmp_path / "bad", tmp_path / "right"
    for folder in (bad, right):
        folder.mkdir()
        _configure(folder)
    _write(bad, day1=["d,x,90,1"], day2=TORN)
    _write(right, day1=["d,x,90,1"], day2=GOOD)
    run = ["interactions", *_configure(bad), "--lake", str(bad / "lake")]
    assert main(run) == 0
    assert _rejected(bad / "lake") == [
        (3, 0, "time can't be read", "time", "soon", "time_unit and time_format of source.events"),
        (5, 0, "expected 4 fields, found 5", None, None, "separator, quote, escape and multiline of source.events"),
        (6, 0, "value is not a number", "value", "lots", "columns and decimal of source.events"),
        (6, 1, "value is not a number", "value", "lots", "columns and decimal of source.events"),
    ]
    _write(bad, day2=GOOD)
    assert main(run) == 0
    assert "1 mended file(s)" in capsys.readouterr().out
    assert main(["interactions", *_configure(right), "--lake", str(right / "lake")]) == 0
    assert "0 exact duplicates dropped" in capsys.readouterr().out
    assert _rows(bad / "lake") == _rows(right / "lake")
    assert len(_rows(bad / "lake")) == 8
    assert _rejected(bad / "lake") == []


@pytest.mark.slow
def test_a_file_that_grows_whose_lines_move_or_that_is_overwritten(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["interactions", *_configure(tmp_path), "--lake", str(tmp_path / "lake")]
    _write(tmp_path, day1=["d,x,90,1"], day2=GOOD)
    assert main(run) == 0
    _write(tmp_path, day2=[*GOOD, "e,x,110,1"])
    assert main(run) == 0
    _write(tmp_path, day1=["d,y,89,1", "d,x,90,1"])
    assert main(run) == 0
    assert "lines have moved in log/day1.csv, so all files are read anew" in capsys.readouterr().out
    assert main([*run[:-1], str(tmp_path / "right")]) == 0
    assert _rows(tmp_path / "lake") == _rows(tmp_path / "right")
    _write(tmp_path, day1=["f,x,200,1"])
    assert main(run) == 0
    assert "2 rows that log/day1.csv held before are no longer there; they stay" in capsys.readouterr().out
    rows = _rows(tmp_path / "lake", "user", "item", "source_order")
    assert [row[:2] for row in rows if row[0] in "df"] == [("d", "x"), ("d", "y"), ("f", "x")]
    assert max(rows, key=lambda row: row[2])[0] == "f"
    assert main([*run, "--source.events.time_unit", "ms"]) == 2
    assert "1 of 3 files" in capsys.readouterr().err


@pytest.mark.slow
def test_events_of_unknown_items_are_taken_once_these_are_known(
    tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    items = {"path": "items.csv", "id": "item"}
    run = ["interactions", *_configure(tmp_path, items=items), "--lake", str(tmp_path / "lake")]
    _write(tmp_path, day1=["d,x,90,1"], day2=GOOD)
    (tmp_path / "items.csv").write_text("item\nx\ny\n")
    assert main(run) == 0
    unknown = [(line, place, "unknown item") for line, place in ((5, 1), (6, 0))]
    assert [row[:3] for row in _rejected(tmp_path / "lake")] == unknown
    # The new item is known from now on, and one whose events were taken already is no longer in the file.
    (tmp_path / "items.csv").write_text("item\nx\nz\n")
    assert main(run) == 0
    assert "known items have changed, so 1 file(s) with unknown ones are read again" in capsys.readouterr().out
    assert _rejected(tmp_path / "lake") == []
    rows = _rows(tmp_path / "lake")
    assert len(rows) == 8
    assert main(run) == 0
    assert "unchanged, skipped" in capsys.readouterr().out
    (tmp_path / "items.csv").write_text("item\nx\ny\nz\n")
    assert main([*run[:-1], str(tmp_path / "right")]) == 0
    assert _rows(tmp_path / "right") == rows


def test_a_quarantine_of_an_earlier_version_gains_the_new_columns(tmp_path: Path, spark: SparkSession) -> None:
    _write(tmp_path, day1=["d,x,90,1"], day2=TORN)
    lake = tmp_path / "lake"
    earlier = dataclasses.replace(QUARANTINE, schema=pa.schema(list(QUARANTINE.schema)[:5]))
    row = {"kind": "users", "file": "users.csv", "line": 3, "reason": "user is missing", "raw": ",5"}
    write_table(lake, earlier, [row])
    assert main(["interactions", *_configure(tmp_path), "--lake", str(lake)]) == 0
    found = pl.read_delta(str(lake / "quarantine")).sort("kind", "line", "place")
    assert found.columns == QUARANTINE.schema.names
    assert found["column"].to_list() == ["time", None, "value", "value", None]
    assert found.row(4, named=True) == dict.fromkeys(QUARANTINE.schema.names) | row
    version = spark_io.current_version(str(lake), QUARANTINE)
    _, examples = rejected_rows(str(lake), {QUARANTINE.name: version})
    assert all(example.keys() == set(QUARANTINE.schema.names) for example in examples.values())


@pytest.mark.slow
def test_a_mended_log_gives_the_tables_of_a_right_one(tmp_path: Path) -> None:
    pytest.importorskip("pysail")
    items = {"path": "items.csv", "id": "item", "title": "title", "year": "year"}
    tables = {}
    for name, steps in (("mended", [TORN, GOOD]), ("right", [GOOD])):
        folder = tmp_path / name
        folder.mkdir()
        for number, lines in enumerate(steps):
            _write(folder, day1=["c,x,80,1", "d,x,90,1"], day2=lines)  # who is new with mended rows has a later index
            last = "z,Z,2000" if number + 1 == len(steps) else ",Z,2000"
            (folder / "items.csv").write_text(f"item,title,year\nx,X,1990\ny,Y,1991\n{last}\n")
            options = _configure(folder, items=items, require_known_items=False)
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "etl",
                    "all",
                    *options,
                    "--lake",
                    str(folder / "lake"),
                    "--spark.engine",
                    "sail",
                ],
                env=dict(os.environ),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        found = [path for path in sorted((folder / "lake").iterdir()) if path.is_dir() and path.name != "releases"]
        tables[name] = {path.name: sorted(map(repr, pl.read_delta(str(path)).rows())) for path in found}
    assert tables["mended"] == tables["right"]
    assert {"interactions", "items", "sequences", "quarantine"} <= tables["right"].keys()
    assert spark_io.current_version(str(tmp_path / "mended" / "lake"), QUARANTINE) is not None
