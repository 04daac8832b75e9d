"""A lake of format 1 that is migrated is the lake that the same log makes today, and goes on as such."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.__main__ import main
from etl.pipeline.run import JOBS
from etl.tables import TABLES
from tests.fixtures.old_lakes import in_format_1


def _day(day: int, users: range) -> str:
    start = 1_600_000_000 + 86_400 * day
    rows = [
        f"u{user},i{(user + number) % 8},{start + 10 * number}.25,{'buy' if number % 2 else ''},b{number // 2}"
        for user in users
        for number in range(6)
    ]
    return "\n".join(["user,item,at,what,basket", *rows]) + "\n"


def _configure(folder: Path, time_unit: str) -> Path:
    columns = {"user": "user", "item": "item", "time": "at", "event_type": "what", "basket": "basket"}
    if time_unit == "ordinal":
        del columns["time"]
    config = {
        "lake": "set by the command",
        "source": {
            "kind": "log",
            "root": str(folder),
            "events": {"path": "days", "columns": columns, "time_unit": time_unit},
            "items": {"path": "items.csv", "id": "id", "attributes": {"studio": "studio", "year": "year"}},
            "users": {"path": "users.csv", "id": "id", "attributes": {"age": "age"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "domains": [{"name": "odd", "attribute": "studio", "any_of": ["s1"]}],
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
        "buckets": 2,
    }
    path = folder / "etl.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _rows(lake: Path) -> dict[str, list[Any]]:
    """Table -> its rows, in any order; releases have times of their own."""
    found = {name: pl.read_delta(str(lake / name)) for name in TABLES if (lake / name).is_dir() and name != "releases"}
    return {name: sorted(map(repr, table.select(TABLES[name].schema.names).rows())) for name, table in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("time_unit", ["s", "ordinal"])
def test_a_migrated_lake_is_the_one_made_today_and_takes_a_new_day(
    time_unit: str, tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "1.csv").write_text(_day(1, range(12)))
    items = [f"i{n},s{n % 2},{1990 + n if n else ''}" for n in range(8)]
    (tmp_path / "items.csv").write_text("\n".join(["id,studio,year", *items]) + "\n")
    (tmp_path / "users.csv").write_text("\n".join(["id,age", *(f"u{n},{20 + n}" for n in range(9))]) + "\n")
    config, today = _configure(tmp_path, time_unit), tmp_path / "today"

    def run(lake: Path, command: str = "all") -> int:
        return main([command, "--config", str(config), "--lake", str(lake)])

    assert run(today) == 0
    old = in_format_1(today, tmp_path / "old")
    capsys.readouterr()
    assert run(old) == 2
    assert run(old, "interactions") == 2
    assert capsys.readouterr().err.count("run `python -m etl migrate --lake") == 2
    assert run(old, "migrate") == 0
    assert _rows(old) == _rows(today)
    capsys.readouterr()
    assert run(old) == 0  # what the migration recorded is what the jobs would
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == len(JOBS)
    assert "release 2 (unchanged)" in said
    (tmp_path / "days" / "2.csv").write_text(_day(2, range(10, 14)))
    for lake in (today, old):
        assert run(lake) == 0
        assert "1 new file(s)" in capsys.readouterr().out
    assert _rows(old) == _rows(today)
    kind = pl.read_delta(str(old / "interactions"))["time"].dtype
    assert kind == (pl.Int64 if time_unit == "ordinal" else pl.Datetime("us", "UTC"))
