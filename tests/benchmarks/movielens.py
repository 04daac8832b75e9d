"""MovieLens-1M, or a log of its shape: as a lake of ours, and as plain Parquet for peers. Made once, kept.

The log is ``[users, items, offsets]`` of users' whole histories, oldest first, both sides k-cored; leave-one-out holds
back the last item (test) and the one before it (validation), all that stands before is trained on.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from etl import tables
from etl.lake.commit import Commit, commit_files
from etl.lake.datafile import DataFile, file_schema
from etl.tables import FIRST_INDEX, Table

Ints = npt.NDArray[np.int64]
SPLIT = "leave-one-out"
CORE = 5
BUCKETS = 4
USERS, ITEMS = 6_040, 3_416
MEAN_LENGTH, MEDIAN_LENGTH, LEAST, MOST = 165.5, 96.0, 20, 2_314  # of MovieLens-1M's users


@dataclass(frozen=True)
class MovieLens:
    """Where it lies: `train`, a Parquet file of (user, item, time) int64, sorted by user and time, the training part
    only; `lake`, ours of the whole. `name` says which log it is."""

    name: str
    train: Path
    lake: Path


def movielens(data: Path | None, work: Path) -> MovieLens:
    """`data`: a folder with ratings.dat (or order.parquet: user_id, movie_id, position), or None: a generated log.

    Files go to `work`.
    """
    name = "MovieLens-1M" if data else "a generated log of MovieLens-1M's shape"
    folder = work / ("movielens" if data else "movielens-like")
    found = MovieLens(name, folder / "train.parquet", folder / "lake")
    if not found.train.exists():
        folder.mkdir(parents=True, exist_ok=True)
        items, offsets = _core(*(_read(data) if data else _generated()))
        _write_lake(found.lake, items, offsets)
        _write_train(found.train, items, offsets)
    return found


def _read(folder: Path) -> tuple[Ints, Ints]:
    if (folder / "ratings.dat").exists():
        table = pcsv.read_csv(
            io.BytesIO((folder / "ratings.dat").read_bytes().replace(b"::", b",")),
            read_options=pcsv.ReadOptions(column_names=["user_id", "movie_id", "rating", "position"]),
        )
    else:
        table = pq.read_table(folder / "order.parquet")
    user, item, time = (table[name].to_numpy() for name in ("user_id", "movie_id", "position"))
    lengths = np.unique(user, return_counts=True)[1]
    return item[np.lexsort((np.arange(len(user)), time, user))], np.concatenate([[0], np.cumsum(lengths)])


def _generated(seed: int = 0) -> tuple[Ints, Ints]:
    """Log-normal lengths, Zipf-like popularity, no item twice: draws without replacement by Gumbel's trick."""
    random = np.random.default_rng(seed)
    sigma = np.sqrt(2 * np.log(MEAN_LENGTH / MEDIAN_LENGTH))
    lengths = np.clip(random.lognormal(np.log(MEDIAN_LENGTH), sigma, USERS), LEAST, MOST).astype(np.int64)
    logits = np.log(random.permutation((np.arange(ITEMS) + 20.0) ** -0.9))
    chosen = [np.argsort(-(logits + random.gumbel(size=ITEMS)))[:length] for length in lengths]
    return np.concatenate([random.permutation(items) for items in chosen]), np.concatenate([[0], np.cumsum(lengths)])


def _core(items: Ints, offsets: Ints) -> tuple[Ints, Ints]:
    """Until no user and no item has fewer than CORE events; items numbered from 0."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    while True:
        kept = (np.bincount(items)[items] >= CORE) & (np.bincount(users)[users] >= CORE)
        if kept.all():
            break
        items, users = items[kept], users[kept]
    lengths = np.unique(users, return_counts=True)[1]
    return np.unique(items, return_inverse=True)[1], np.concatenate([[0], np.cumsum(lengths)])


def _write_train(path: Path, items: Ints, offsets: Ints) -> None:
    lengths = np.diff(offsets)
    position = np.arange(len(items)) - np.repeat(offsets[:-1], lengths)
    user = np.repeat(np.arange(len(lengths)), lengths)
    trained = position < np.repeat(lengths - 2, lengths)
    columns = {"user": user[trained], "item": items[trained], "time": position[trained]}
    unfinished = path.with_suffix(".new")
    pq.write_table(pa.table(columns), unfinished)
    unfinished.rename(path)


def _write_lake(lake: Path, items: Ints, offsets: Ints) -> None:
    lengths = np.diff(offsets)
    item, user = np.arange(items.max() + 1), np.arange(len(lengths))
    names = pa.array([f"i{n}" for n in item])
    index = pa.array(FIRST_INDEX + item, pa.int32())
    empty = pa.array([[]] * len(item), pa.list_(pa.string()))
    attributes = pa.array([[]] * max(len(item), len(user)), tables.ITEMS.schema.field("attributes").type)
    versions = {
        "items": _commit(
            lake,
            tables.ITEMS,
            {},
            {
                "item": names,
                "index": index,
                "kept": [True] * len(item),
                "degree": np.bincount(items),
                "title": names,
                "year": [None] * len(item),
                "categories": empty,
                "attributes": attributes[: len(item)],
            },
        ),
        "users": _commit(
            lake,
            tables.USERS,
            {},
            {
                "user": [f"u{n}" for n in user],
                "index": FIRST_INDEX + user,
                "kept": [True] * len(user),
                "degree": lengths,
                "attributes": attributes[: len(user)],
            },
        ),
        "domains": _commit(
            lake,
            tables.DOMAINS,
            {"domain": tables.DOMAIN_ALL},
            {
                "item": names,
                "index": index,
                "rule": ["all"] * len(item),
            },
        ),
    }
    for bucket in range(BUCKETS):
        mine = np.flatnonzero(user % BUCKETS == bucket)
        lists = [FIRST_INDEX + items[offsets[n] : offsets[n + 1]] for n in mine]
        parts = {"split": SPLIT, "domain": tables.DOMAIN_ALL, "bucket": str(bucket)}
        versions["sequences"] = _commit(
            lake,
            tables.SEQUENCES,
            parts,
            {
                "user": FIRST_INDEX + mine,
                "items": lists,
                "times": [np.arange(len(one)) for one in lists],
                "event_types": [None] * len(mine),
                "values": [None] * len(mine),
                "valid_start": lengths[mine] - 2,
                "test_start": lengths[mine] - 1,
                "end": lengths[mine],
            },
        )
    released = [{"table": table, "version": version} for table, version in versions.items()]
    _commit(
        lake,
        tables.RELEASES,
        {},
        {
            "release": [1],
            "created": [0],
            "tables": [released],
            "config": ["{}"],
            "config_hash": [""],
            "code_version": [""],
            "removed": [None],
        },
    )


def _commit(lake: Path, table: Table, partition: dict[str, str], columns: dict[str, object]) -> int:
    """Append one data file of these columns; the table's version."""
    table = table if table.name == tables.RELEASES.name else table.of(tables.TIME_ORDINAL)
    schema = file_schema(table)
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    name = "/".join([*(f"{column}={value}" for column, value in partition.items()), "part-0.parquet"])
    path = lake / table.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, schema=schema), path, compression="zstd")
    written = commit_files(
        str(lake),
        table,
        [DataFile(name, partition, path.stat().st_size)],
        Commit(
            mode="append",
            app=f"bench-{name}",
            app_version=1,
            metadata={},
            properties={tables.PROPERTY_BUCKETS: str(BUCKETS)},
        ),
    )
    return written.version
