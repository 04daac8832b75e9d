"""Strays among a log's times, and the same tables whatever the machine's zone, language and folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
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


def _run(lake: Path, config: Path, *, code: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "etl", "all", "--config", str(config), "--lake", str(lake)]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(code), **env},
        capture_output=True,
        text=True,
        check=False,
    )


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
    copy = tmp_path / "another checkout"
    shutil.copytree(CODE, copy / "etl", ignore=shutil.ignore_patterns("__pycache__"))
    runs = {"a": (CODE.parent, tmp_path, {"TZ": "UTC"}), "b": (copy, copy, {"TZ": "America/New_York", "LC_ALL": "C"})}
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
