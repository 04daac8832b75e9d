"""Where a recommendation came from, from its row back to the lines of raw files."""

import csv
import json
from pathlib import Path

import pytest

from tests.fixtures.daily_log import command, etl, events_of, rows_of, user, write_day
from tests.fixtures.daily_run import build
from trainer.inference.model_folder import model_hash

pytest.importorskip("pysail")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("explain"))


def explain(place: Path, who: str, item: str, *more: str, code: int = 0):  # type: ignore[no-untyped-def]
    words = ["trainer", "explain", "--user", who, "--item", item, "--lake", str(place / "lake"), *more]
    return command(*words, cwd=place, code=code)


def lines_of(place: Path, who: str) -> set[tuple[str, str, int]]:
    """(item, file, line) of a user's rows that can be read, from the raw files themselves."""
    found = set()
    for path in (place / "days").glob("*.csv"):
        for line, row in enumerate(csv.reader(path.read_text().splitlines()), 1):
            if row[0] == who and len(row) == 3 and row[2].isdigit():
                found.add((row[1], f"days/{path.name}", line))
    return found


def test_each_step_is_named_back_to_file_and_line(place: Path) -> None:
    row = next(row for row in rows_of(place / "lake", "recommendations") if row["user"] == user(7) and row["rank"] == 2)
    found = json.loads(explain(place, user(7), str(row["item"]), "--output", "json").stdout.splitlines()[-1])
    assert {name: found["row"][name] for name in ("item", "rank", "model_version", "release")} == {
        name: row[name] for name in ("item", "rank", "model_version", "release")
    }
    assert found["of"] == 5
    assert found["model"]["version"] == "graftrec/1"
    assert found["model"]["aliases"] == ["champion"]
    assert found["model"]["hash"] == model_hash(place / "runs" / "first" / "model")
    assert found["run"]["name"] == "first"
    assert len(found["run"]["id"]) == 32
    assert (found["trained_on"]["release"], found["read"]["release"]) == (1, 1)
    assert {(one["item"], one["path"], one["line"]) for one in found["events"]} == lines_of(place, user(7))
    (delivery,) = found["deliveries"]
    assert (delivery["path"], delivery["events"]) == ("days/day-01.csv", len(found["events"]))
    said = explain(place, user(7), str(row["item"])).stdout
    assert f"recommended   {row['item']} to {user(7)} in music: rank 2 of 5" in said
    assert "model         graftrec/1 @champion" in said
    assert "note" not in said


def test_a_later_day_has_its_own_delivery(place: Path) -> None:
    write_day(place, 2, events_of([7, 8], 2))
    etl(place)
    row = next(row for row in rows_of(place / "lake", "recommendations") if row["user"] == user(7))
    before = json.loads(explain(place, user(7), str(row["item"]), "--output", "json").stdout.splitlines()[-1])
    assert {one["path"] for one in before["deliveries"]} == {"days/day-01.csv"}, "of the release that was read"
    from tests.fixtures.daily_run import RECOMMEND

    command(*RECOMMEND, cwd=place)
    row = next(row for row in rows_of(place / "lake", "recommendations") if row["user"] == user(7))
    after = json.loads(explain(place, user(7), str(row["item"]), "--output", "json").stdout.splitlines()[-1])
    assert (after["trained_on"]["release"], after["read"]["release"]) == (1, 2)
    assert [(one["path"], one["events"]) for one in after["deliveries"]][1] == ("days/day-02.csv", 4)
    assert {(one["item"], one["path"], one["line"]) for one in after["events"]} == lines_of(place, user(7))


def test_what_is_not_recommended_is_said_in_one_line(place: Path) -> None:
    nobody = explain(place, "nobody", "item001", code=2).stderr
    assert "expected one with recommendations" in nobody
    assert "found none for 'nobody'" in nobody
    nothing = explain(place, user(7), "item999", code=2).stderr
    assert f"expected one that is recommended to '{user(7)}' (item" in nothing
    assert nothing.count("\n") == 1


def test_without_the_store_the_rest_is_said(place: Path, tmp_path: Path) -> None:
    row = next(row for row in rows_of(place / "lake", "recommendations") if row["user"] == user(9))
    words = ["--user", user(9), "--item", str(row["item"]), "--lake", str(place / "lake")]
    said = command("trainer", "explain", *words, cwd=tmp_path).stdout
    assert "no MLflow store here" in said
    assert "days/day-01.csv line" in said
    assert not (tmp_path / "mlflow.db").exists()
