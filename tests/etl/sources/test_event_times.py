"""Strays among a log's times, and the same tables whatever the machine's zone, language and folder."""

import datetime as dt
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import etl
from etl.jobs.event_times import DAY, Span, bulk

CODE = Path(etl.__file__).parent


def test_bulk_is_the_most_rows_without_a_gap() -> None:
    year = 366 * DAY
    spans = [
        Span(30 * year, 31 * year, 5),
        Span(0, DAY, 4),
        Span(39 * year, 39 * year, 1),
        Span(52 * year, 52 * year, 2),
    ]
    assert bulk(spans, gap_years=10) == Span(30 * year, 39 * year, 6)
    assert bulk(spans, gap_years=None) == Span(0, 52 * year, 12)
    assert bulk([], gap_years=10) is None


def _log(folder: Path, rows: int, *, stray: bool) -> None:
    lines = ["user,item,time"]
    lines += [f"u{n % 9},i{n % 7},2015-{1 + n % 12:02}-01 0{n % 8}:30:00" for n in range(rows)]
    lines += ["u1,i1,1971-01-01 00:00:05"] * stray
    (folder / f"day{rows}.csv").write_text("\n".join(lines))


# Column of the log -> settings of its times, and its first and last time in UTC.
_STAMPS: dict[str, tuple[dict[str, str | None], str, str]] = {
    "seconds": ({"time_unit": "s"}, "2015-10-25 00:30:00.500000", "2015-10-25 02:30:00"),
    "iso": ({"time_unit": None, "timezone": "Europe/Rome"}, "2015-10-25 00:30:00", "2015-10-25 12:30:00"),
    # Twice that night, when clocks went back: the first is meant.
    "day": ({"time_format": "%d.%m.%Y %H:%M", "timezone": "Europe/Rome"}, "2015-03-29 00:59:00", "2015-10-25 00:30:00"),
    "month": (
        {"time_format": "%b %d, %Y %I:%M %p", "timezone": "America/New_York"},
        "2015-03-08 06:30:00",
        "2015-03-08 17:00:00",
    ),
    "offset": ({"time_format": "%d/%b/%Y:%H:%M:%S %z"}, "2015-01-01 02:00:00", "2015-01-01 15:00:00"),
    "typed": ({"time_unit": None, "timezone": "Asia/Kolkata"}, "2015-01-01 06:30:00", "2015-01-01 13:00:00"),
    "aware": ({"time_unit": None, "timezone": "Asia/Kolkata"}, "2015-01-01 12:00:00", "2015-01-01 18:30:00"),
}
_SEVERAL_RUNS = "import sys; from etl.__main__ import main; sys.exit(max(main(a.split(chr(10))) for a in sys.argv[1:]))"


def _stamps(folder: Path) -> None:
    local = [dt.datetime(2015, 1, 1, 12), dt.datetime(2015, 1, 1, 18, 30)]
    columns = {
        "user": ["é", "ü"],
        "item": ["i", "ı"],
        "seconds": ["1445733000.5", "1445740200"],
        "iso": ["2015-10-25T02:30:00", "2015-10-25 07:30:00-05:00"],
        "day": ["25.10.2015 02:30", "29.3.2015 01:59"],
        "month": ["Mar 08, 2015 01:30 AM", "Mar 8, 2015 01:00 PM"],
        "offset": ["01/Jan/2015:10:00:00 -0500", "01/Jan/2015:12:00:00 +1000"],
        "typed": pa.array(local, pa.timestamp("ms")),
        "aware": pa.array(local, pa.timestamp("us", "UTC")),
    }
    pq.write_table(pa.table(columns), folder / "jours d'été.parquet")


def _run(lake: Path, config: Path, *, code: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "etl", "all", "--config", str(config), "--lake", str(lake)]
    return _python(command, code=code, cwd=cwd, **env)


def _python(command: list[str], *, code: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(code), **env},
        capture_output=True,
        text=True,
        check=False,
    )


Machine = tuple[Path, Path, dict[str, str]]  # checkout, working folder, environment


def _machines(folder: Path) -> dict[str, Machine]:
    """Two that differ in time zone, language, working folder and the checkout's path."""
    copy = folder / "another checkout"
    shutil.copytree(CODE, copy / "etl", ignore=shutil.ignore_patterns("__pycache__"))
    return {"a": (CODE.parent, folder, {"TZ": "UTC"}), "b": (copy, copy, {"TZ": "America/New_York", "LC_ALL": "C"})}


@pytest.mark.slow
def test_tables_are_the_same_in_any_zone_language_and_folder(tmp_path: Path) -> None:
    pytest.importorskip("pysail")
    (tmp_path / "log").mkdir()
    _log(tmp_path / "log", 400, stray=True)
    events = {"path": "log", "columns": {"user": "user", "item": "item", "time": "time"}, "time_unit": None}
    events["timezone"] = "Europe/Rome"
    config = {"source": {"kind": "log", "root": str(tmp_path), "events": events}, "spark": {"engine": "sail"}}
    config["kcore"] = {"min_user": 1, "min_item": 1}
    (tmp_path / "etl.yaml").write_text(yaml.safe_dump(config))
    runs = _machines(tmp_path)
    tables: dict[str, dict[str, pl.DataFrame]] = {}
    for name, (code, cwd, env) in runs.items():
        done = _run(tmp_path / name, tmp_path / "etl.yaml", code=code, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        for line in ("times 2014-12-31 23:30:00 to 2015-12-01", "UTC; 1 rows (0.25%) have times far from these"):
            assert line in done.stdout
        assert "UTC; 1 rows (0.25%) rejected for theirs; events by 12 days:\n  2014-12-31 " in done.stdout
        found = [path for path in sorted((tmp_path / name).iterdir()) if path.is_dir() and path.name != "releases"]
        tables[name] = {path.name: pl.read_delta(str(path)) for path in found}
    assert tables["a"].keys() == tables["b"].keys() >= {"interactions", "sequences", "quarantine"}
    for name, table in tables["a"].items():
        rows, others = (sorted(map(repr, one.rows())) for one in (table, tables["b"][name]))
        assert rows == others, name

    # A later day is held against the times of the whole log, not its own.
    (tmp_path / "log" / "late.csv").write_text("user,item,time\nu1,i1,1980-01-01 00:00:00\n")
    done = _run(tmp_path / "a", tmp_path / "etl.yaml", code=CODE.parent, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 rows of interactions quarantined" in done.stdout


@pytest.mark.slow
def test_times_of_every_format_are_the_same_on_every_machine(tmp_path: Path) -> None:
    pytest.importorskip("pysail")
    (tmp_path / "log").mkdir()
    _stamps(tmp_path / "log")
    events = {"path": "log", "format": "parquet"}
    for column, (settings, _, _) in _STAMPS.items():
        found = {**events, **settings, "columns": {"user": "user", "item": "item", "time": column}}
        config = {"source": {"kind": "log", "root": str(tmp_path), "events": found}, "spark": {"engine": "sail"}}
        (tmp_path / f"{column}.yaml").write_text(yaml.safe_dump(config))
    for name, (code, cwd, env) in _machines(tmp_path).items():
        words = [
            ["interactions", "--config", str(tmp_path / f"{one}.yaml"), "--lake", str(tmp_path / name / one)]
            for one in _STAMPS
        ]
        done = _python(["-c", _SEVERAL_RUNS, *map("\n".join, words)], code=code, cwd=cwd, **env)
        assert done.returncode == 0, done.stderr
        for column, (_, first, last) in _STAMPS.items():
            table = pl.read_delta(str(tmp_path / name / column / "interactions"))
            times = [str(time) for time in table["time"].sort().dt.replace_time_zone(None)]
            assert times == [first, last], (name, column)
            assert sorted(table["user"]) == ["é", "ü"], (name, column)
