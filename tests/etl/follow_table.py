"""`python -m tests.etl.follow_table FOLDER`: lakes on Sail that follow a Delta table, version by version.

`followed`: of a table that gains rows, loses some by a vector and some with a file, and gains again. `never`: of one
that never had the rows that are lost. `next`: of the table `interactions` of the lake `followed`.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from etl.__main__ import main
from tests.etl.delta_tables import ForeignTable

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.int64()), ("time", pa.int64()), ("day", pa.string())])
SINCE = 1_600_000_000  # seconds
LOST_FIRST = [*range(8), 11]  # rows of the first file: all of one user's, and one of another's


def events(users: Iterable[int], start: int, *, lost: Iterable[int] = ()) -> pa.Table:
    rows = [(f"u{user}", (user * 3 + k) % 17, SINCE + start + user * 100 + k) for user in users for k in range(8)]
    kept = [row for place, row in enumerate(rows) if place not in set(lost)]
    return pa.table(dict(zip(("user", "item", "time"), map(list, zip(*kept, strict=True)), strict=True)))


def settings(folder: Path, *, lake: str, events: dict[str, Any]) -> Path:
    people = folder / "people.csv"
    people.write_text("id,director\n" + "".join(f"{item},d{item}\n" for item in range(17)))
    config = {
        "lake": str(folder / lake),
        "source": {"kind": "log", "root": str(folder), "events": events},
        "knowledge": {
            "root": str(folder),
            "files": [
                {"name": "people", "path": people.name, "by": "id", "id": "id", "relations": {"director": ["director"]}}
            ],
        },
        "kcore": {"min_user": 2, "min_item": 1},
        "splits": [{"name": "last-2", "validation": 1, "test": 1}],
        "spark": {"engine": "sail", "master": "local[2]"},
    }
    path = folder / f"{lake}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(config: Path) -> None:
    assert main(["all", "--config", str(config)]) == 0


def steps(folder: Path) -> None:
    table = ForeignTable(folder / "log", SCHEMA, mapping="name", partition_by=["day"])
    columns = {"user": "user", "item": "item", "time": "time", "event_type": "day"}
    config = settings(folder, lake="followed", events={"path": "log", "format": "delta", "columns": columns})
    first = table.append(events(range(6), 1_000), {"day": "1"})
    run(config)
    second = table.append(events(range(6, 9), 9_000), {"day": "2"})
    run(config)
    table.delete(first, LOST_FIRST)
    table.commit(table.remove(second))
    run(config)
    table.append(events(range(5, 7), 20_000), {"day": "3"})
    run(config)

    never = ForeignTable(folder / "never-log", SCHEMA, partition_by=["day"])
    never.append(events(range(6), 1_000, lost=LOST_FIRST), {"day": "1"})
    never.append(events(range(5, 7), 20_000), {"day": "3"})
    run(settings(folder, lake="never", events={"path": "never-log", "format": "delta", "columns": columns}))

    own = {**columns, "event_type": "event_type"}
    source = {"path": "followed/interactions", "format": "delta", "columns": own, "time_unit": "us"}
    run(settings(folder, lake="next", events=source))


if __name__ == "__main__":
    work: Callable[[Path], None] = steps
    work(Path(sys.argv[1]))
