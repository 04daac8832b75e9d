"""Lakes of cleaned tables of any size for benchmarks, by numpy: interactions, items, users and domains."""

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from etl.lake.commit import Commit, commit_files
from etl.lake.snapshots import table_filesystem
from etl.lake.spark_io import ROW_GROUP_ROWS, FileWriter, data_files
from etl.tables import DOMAIN_ALL, DOMAINS, FIRST_INDEX, INTERACTIONS, ITEMS, TIME_TIMESTAMP, USERS, Table
from tests.benchmarks.logs import START, ids

SPAN = 1_000 * 86_400  # seconds
_MADE = "made.json"


def write_lake(lake: Path, *, events: int, users: int, items: int, buckets: int, seed: int = 0, heavy: int = 0) -> Path:
    """A lake of the four tables, once: log-normal activity, Zipf-like items, whole seconds, one domain, all kept.

    `heavy`: further events, of one user, who is the last.
    """
    settings = {"events": events, "users": users, "items": items, "buckets": buckets, "seed": seed, "heavy": heavy}
    note = lake / _MADE
    if note.exists() and json.loads(note.read_text()) == settings:
        return lake
    shutil.rmtree(lake, ignore_errors=True)
    random = np.random.default_rng([seed, events, users, items])
    num_users = users + bool(heavy)
    names = ids("u", np.arange(num_users))
    bucket = np.array([zlib.crc32(name.encode()) % buckets for name in names.to_pylist()])
    activity = random.lognormal(0.0, 0.8, users)
    degree = random.multinomial(events, activity / activity.sum())
    if heavy:
        degree = np.append(degree, heavy)
    popularity = random.permutation((np.arange(items) + 10.0) ** -0.9)
    entries, first = [], 0
    for number in range(buckets):
        own = np.flatnonzero(bucket == number)
        rows = random.permutation(np.repeat(own, degree[own]))
        entries += _write_bucket(lake, number, rows, names, ids("i", np.arange(items)), popularity, first, random)
        first += len(rows)
    _commit(lake, INTERACTIONS, entries, buckets)
    place = pa.array(np.arange(num_users) + FIRST_INDEX, pa.int32())
    vocabulary = {"user": names, "index": place, "kept": pa.repeat(True, num_users), "degree": pa.array(degree)}
    _write(lake, USERS, {**vocabulary, "attributes": _empty(USERS, "attributes", num_users)}, (), buckets)
    names, place = ids("i", np.arange(items)), pa.array(np.arange(items) + FIRST_INDEX, pa.int32())
    catalogue = {"item": names, "index": place, "kept": pa.repeat(True, items), "degree": pa.repeat(5, items)}
    empty = {column: _empty(ITEMS, column, items) for column in ("categories", "attributes")}
    nulls = {"title": pa.nulls(items, pa.string()), "year": pa.nulls(items, pa.int32())}
    _write(lake, ITEMS, {**catalogue, **nulls, **empty}, (), buckets)
    members = {"item": names, "index": place, "rule": pa.repeat("every item", items)}
    _write(lake, DOMAINS, members, (DOMAIN_ALL,), buckets)
    note.write_text(json.dumps(settings))
    return lake


def _write_bucket(
    lake: Path,
    bucket: int,
    user: np.ndarray,
    users: pa.Array,
    items: pa.Array,
    popularity: np.ndarray,
    first: int,
    random: np.random.Generator,
) -> list[str]:
    (lake / INTERACTIONS.name).mkdir(parents=True, exist_ok=True)
    writer = FileWriter(table_filesystem(str(lake), INTERACTIONS), INTERACTIONS, (bucket,))
    chances = np.cumsum(popularity)
    source_order = first + random.permutation(len(user))
    for begin in range(0, len(user), ROW_GROUP_ROWS):
        of_group = user[begin : begin + ROW_GROUP_ROWS]
        size = len(of_group)
        item = np.searchsorted(chances, random.random(size) * chances[-1])
        columns = {
            "user": users.take(pa.array(of_group)),
            "item": items.take(pa.array(item)),
            "time": pa.array(START + random.integers(0, SPAN, size) * 1_000_000),
            "event_type": pa.nulls(size, pa.string()),
            "value": pa.nulls(size, pa.float64()),
            "basket": pa.nulls(size, pa.string()),
            "source_order": pa.array(source_order[begin : begin + size]),
        }
        writer.add(pa.RecordBatch.from_pydict(columns))
    return list(writer.close()["file"].to_pylist())


def _write(lake: Path, table: Table, columns: dict[str, pa.Array], key: tuple[str, ...], buckets: int) -> None:
    (lake / table.name).mkdir(parents=True, exist_ok=True)
    writer = FileWriter(table_filesystem(str(lake), table), table, key)
    for batch in pa.table(columns).to_batches(ROW_GROUP_ROWS):
        writer.add(batch)
    _commit(lake, table, writer.close()["file"].to_pylist(), buckets)


def _commit(lake: Path, table: Table, entries: Sequence[str], buckets: int) -> None:
    metadata = {"buckets": str(buckets), "time": TIME_TIMESTAMP}
    files = data_files(entries)
    commit_files(str(lake), table, files, Commit(mode="overwrite", app="benchmark", app_version=0, metadata=metadata))


def _empty(table: Table, column: str, rows: int) -> pa.Array:
    return pa.array([[]] * rows, table.schema.field(column).type)
