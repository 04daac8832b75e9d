"""Small lakes of the tables that histories are made from, written with pyarrow and committed without Spark."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from etl.lake.commit import Commit, Written, commit_files
from etl.lake.snapshots import table_filesystem
from etl.lake.spark_io import FileWriter, Mode, data_files
from etl.tables import DOMAINS, FIRST_INDEX, INTERACTIONS, ITEMS, TIME_ORDINAL, USERS, Table, bucket_of

BUCKETS = 4


def write_table(
    lake: Path, table: Table, rows: Sequence[Mapping[str, Any]], *, mode: Mode = "overwrite", files: int = 1
) -> Written:
    """Commit `rows`, in `files` files a partition, to which they are dealt out in turn. Times are mere order."""
    table = table.of(TIME_ORDINAL)
    (lake / table.name).mkdir(parents=True, exist_ok=True)
    by_partition: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_partition.setdefault(tuple(row[column] for column in table.partition_by), []).append(row)
    entries: list[str] = []
    for key, of_partition in by_partition.items():
        for number in range(min(files, len(of_partition))):
            writer = FileWriter(table_filesystem(str(lake), table), table, key)
            dealt = pa.Table.from_pylist([dict(row) for row in of_partition[number::files]], schema=table.schema)
            writer.add(dealt.to_batches()[0])
            entries += writer.close()["file"].to_pylist()
    metadata = {"buckets": str(BUCKETS), "time": TIME_ORDINAL}
    return commit_files(
        str(lake), table, data_files(entries), Commit(mode=mode, app=uuid.uuid4().hex, app_version=0, metadata=metadata)
    )


def events(rows: Sequence[tuple[Any, ...]], *, first: int = 0) -> list[dict[str, Any]]:
    """INTERACTIONS of (user, item, time[, event_type, value, basket]); `source_order`: place in the list + `first`."""
    filled = ((*row, None, None, None)[:6] for row in rows)
    return [
        {"bucket": bucket_of(row[0], BUCKETS), "source_order": place, **dict(zip(_GIVEN, row, strict=True))}
        for place, row in enumerate(filled, first)
    ]


_GIVEN = ("user", "item", "time", "event_type", "value", "basket")


def vocabulary(column: str, kept: Mapping[str, bool], degree: Mapping[str, int]) -> list[dict[str, Any]]:
    """ITEMS or USERS of ids in the order given."""
    rest = {"attributes": [], **({"categories": []} if column == "item" else {})}
    return [
        {column: name, "index": FIRST_INDEX + place, "kept": keep, "degree": degree.get(name, 0), **rest}
        for place, (name, keep) in enumerate(kept.items())
    ]


def write_lake(
    lake: Path,
    log: Sequence[tuple[Any, ...]],
    *,
    users: Mapping[str, bool],
    items: Mapping[str, bool],
    domains: Mapping[str, Sequence[str]],
    files: int = 1,
) -> dict[str, int]:
    """INTERACTIONS, USERS, ITEMS and DOMAINS; their versions. `users`, `items`: raw id -> kept."""
    degree = {name: sum(row[0] == name for row in log) for name in users}
    place = {name: FIRST_INDEX + number for number, name in enumerate(items)}
    members = [
        {"domain": domain, "item": item, "index": place[item], "rule": domain}
        for domain, inside in domains.items()
        for item in inside
    ]
    written = {
        INTERACTIONS: write_table(lake, INTERACTIONS, events(log), files=files),
        USERS: write_table(lake, USERS, vocabulary("user", users, degree)),
        ITEMS: write_table(lake, ITEMS, vocabulary("item", items, {})),
        DOMAINS: write_table(lake, DOMAINS, members),
    }
    return {table.name: done.version for table, done in written.items()}
