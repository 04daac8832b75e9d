"""The table `deliveries`: a row for each file that was read, with what it brought."""

from pathlib import Path

import pytest

from etl.sources.columns import FILE_SHIFT
from tests.fixtures.daily_log import DAY, START, etl, events_of, rows_of, user, write_day, write_log

pytest.importorskip("pysail")


def deliveries(folder: Path) -> list[dict[str, object]]:
    return sorted(rows_of(folder / "lake", "deliveries"), key=lambda row: (row["interactions"], row["place"]))


def test_each_file_has_a_row_with_what_it_brought(tmp_path: Path) -> None:
    write_log(tmp_path)
    etl(tmp_path)
    (first,) = deliveries(tmp_path)
    events = rows_of(tmp_path / "lake", "interactions")
    assert (first["path"], first["place"], first["rows"], first["rejects"]) == ("days/day-01.csv", 0, len(events), 2)
    times = [int(row["time"].timestamp()) for row in events]
    assert [int(str(first[name])) for name in ("first_time", "last_time")] == [10**6 * min(times), 10**6 * max(times)]
    rows = events_of([1, 2], 2)
    write_day(tmp_path, 2, [*rows, rows[0], "who,knows"])
    write_day(tmp_path, 3, events_of([3], 3, seed=2))
    etl(tmp_path)
    _, second, third = deliveries(tmp_path)
    assert [(row["path"], row["place"], row["rows"], row["rejects"]) for row in (second, third)] == [
        ("days/day-02.csv", 1, 8, 1),
        ("days/day-03.csv", 2, 4, 0),
    ]
    assert second["interactions"] == third["interactions"] != first["interactions"]
    assert START + 2 * DAY <= int(str(second["first_time"])) // 10**6 < START + 3 * DAY
    assert len({row["digest"] for row in deliveries(tmp_path)}) == 3
    assert second["delivered"] > first["delivered"]
    by_place = {row["source_order"] >> FILE_SHIFT for row in rows_of(tmp_path / "lake", "interactions")}
    assert by_place == {0, 1, 2}
    assert "deliveries   unchanged" in etl(tmp_path).stdout
    assert len(deliveries(tmp_path)) == 3


def test_a_mended_file_gets_another_row_at_its_place(tmp_path: Path) -> None:
    write_log(tmp_path)
    rows = events_of([1, 2], 2)
    write_day(tmp_path, 2, [*rows[:-1], f"{user(9)},item001,broken"])
    etl(tmp_path)
    write_day(tmp_path, 2, [*rows[:-1], f"{user(9)},item001,{START + 2 * DAY}"])
    etl(tmp_path)
    found = [(row["path"], row["place"], row["rows"], row["rejects"]) for row in deliveries(tmp_path)]
    assert found[1:] == [("days/day-02.csv", 1, 7, 1), ("days/day-02.csv", 1, 1, 0)]


def test_a_version_of_a_delta_table_is_named(tmp_path: Path) -> None:
    import yaml

    write_log(tmp_path)
    etl(tmp_path)
    config = yaml.safe_load((tmp_path / "etl.yaml").read_text())
    config["lake"] = str(tmp_path / "other")
    config["source"] = {
        "kind": "log",
        "root": str(tmp_path),
        "events": {
            "path": str(tmp_path / "lake" / "interactions"),
            "format": "delta",
            "columns": {"user": "user", "item": "item", "time": "time"},
            "time_unit": "us",
        },
    }
    config["domains"] = []
    (tmp_path / "etl.yaml").write_text(yaml.safe_dump(config))
    etl(tmp_path)
    found = rows_of(tmp_path / "other", "deliveries")
    assert {row["table_version"] for row in found} == {1}
    assert len({row["digest"] for row in found}) == 1
    assert sum(int(str(row["rows"])) for row in found) == len(rows_of(tmp_path / "other", "interactions"))
