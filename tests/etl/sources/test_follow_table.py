"""A lake follows a Delta table: what later versions add is appended, what they delete leaves every table."""

import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

TABLES = ("interactions", "users", "items", "domains", "entities", "knowledge", "sequences", "quarantine")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of tests.fixtures.follow_table, and what it printed."""
    folder = tmp_path_factory.mktemp("follow")
    command = [sys.executable, "-m", "tests.fixtures.follow_table", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def _table(lake: Path, name: str) -> pl.DataFrame:
    return pl.read_delta(str(lake / name))


def _without_indices(lake: Path) -> dict[str, pl.DataFrame]:
    """The tables with raw ids in the place of indices, in an order that doesn't depend on files."""
    items, users = _table(lake, "items"), _table(lake, "users")
    raw_item = pl.col("items").list.eval(pl.element().replace_strict(items["index"], items["item"]))
    found = {name: _table(lake, name) for name in TABLES}
    user = pl.col("user").replace_strict(users["index"], users["user"])
    found["sequences"] = found["sequences"].with_columns(user, raw_item)
    aside = ["index", "source_order", "head_index", "tail_index", "file"]
    kept = {name: table.drop(aside, strict=False) for name, table in found.items()}
    return {
        name: table.sort([c for c in table.columns if not table[c].dtype.is_nested()]) for name, table in kept.items()
    }


def test_rows_deleted_upstream_leave_every_table(followed: tuple[Path, str]) -> None:
    lake, never = (_without_indices(followed[0] / name) for name in ("followed", "never"))
    for name in TABLES:
        assert lake[name].equals(never[name]), name
    assert lake["interactions"].height == 6 * 8 - 9 + 2 * 8
    assert "u0" not in lake["users"]["user"]
    assert "2" not in lake["interactions"]["event_type"]


def test_an_index_is_never_given_to_another_id(followed: tuple[Path, str]) -> None:
    lake = followed[0] / "followed"
    index = {row["user"]: row["index"] for row in _table(lake, "users").to_dicts()}
    assert {user: index[user] for user in ("u1", "u2", "u3", "u4", "u5")} == {
        "u1": 6,
        "u2": 7,
        "u3": 8,
        "u4": 9,
        "u5": 10,
    }
    assert index["u6"] == 14  # 5 and 11 to 13 were those of users who have left


def test_only_what_a_version_adds_is_read(followed: tuple[Path, str]) -> None:
    output = re.sub(r"times [^;\n]* UTC; ", "", followed[1])
    lines = re.findall(r"interactions +([\d,]+) rows .*?; (.*)", output)
    assert lines[1] == ("24", "1 new file(s) of versions 2 to 2; 0 exact duplicates dropped")
    assert lines[2][1] == "version 4: 33 rows retracted, 0 added"
    assert lines[3] == ("16", "1 new file(s) of versions 5 to 5; 0 exact duplicates dropped")


def test_a_lakes_own_interactions_feed_another_lake(followed: tuple[Path, str]) -> None:
    key = ["user", "item", "time", "event_type"]
    seconds = pl.col("time")
    before, after = (
        _table(followed[0] / name, "interactions").select(*key[:2], seconds, "event_type").sort(key)
        for name in ("followed", "next")
    )
    assert before.equals(after)
