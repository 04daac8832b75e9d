"""Delta to shuffled, padded, length-bucketed torch batches, beside a bare Arrow scan of the same files that only pads.

The table is as the ETL writes it: 500,000 users, 120 items on average, skewed popularity, zstd, row groups of 16 MB
before encoding, every column of the contract. Both read the same columns. Neither keeps anything from epoch to epoch.
Memory is that of one epoch with the default settings, over this table and one of ten times as many users.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from etl import tables
from etl.tables import DOMAIN_ALL, FIRST_INDEX, SEQUENCES, Table
from tests.benchmarks.harness import Case, Numbers, Report, alternate, median, run

USERS, MANY_USERS, ITEMS, MEAN_LENGTH, BUCKETS = 500_000, 5_000_000, 50_000, 120, 4
BATCH, LENGTH, EPOCHS = 256, 200, 3
SPLIT = "leave-one-out"
COLUMNS = ["user", "items", "valid_start"]
_MADE = "made.json"


def measure(report: Report, options: Any) -> None:
    few, many = (make_lake(options.work / "stream", users) for users in (USERS, MANY_USERS))
    scans = [
        Case("Arrow's scanner", "tests.benchmarks.stream:scanner", {"lake": few}),
        Case("ParquetFile.iter_batches", "tests.benchmarks.stream:iter_batches", {"lake": few}),
    ]
    ours = Case("Loader", "tests.benchmarks.stream:loader", {"lake": few})
    kept = Case("Loader, all in its cache", "tests.benchmarks.stream:loader", {"lake": few, "cache_bytes": 1 << 30})
    rounds = alternate([*scans, ours, kept])
    rows = [
        [name, *(median(found, key) for key in ("rows", "items")), median(found, "peak_bytes") / 2**20]
        for name, found in rounds.items()
    ]
    report.table(
        f"{USERS:,} sequences, mean length {MEAN_LENGTH}, batches of {BATCH} x {LENGTH} at most; one torch thread",
        ["", "rows/s", "items/s", "peak MB"],
        rows,
    )
    best = max(scans, key=lambda case: median(rounds[case.name], "items"))
    share = median(rounds[ours.name], "items") / median(rounds[best.name], "items")
    report.bar(f"stream: items/s of Loader / the faster bare scan ({best.name})", share, at_least=0.8)

    cases = [
        Case(f"{users:,}", "tests.benchmarks.stream:epoch", {"lake": place})
        for users, place in ((USERS, few), (MANY_USERS, many))
    ]
    peaks = alternate(cases)
    report.table(
        "One epoch with the default settings",
        ["users", "rows/s", "items/s", "peak MB"],
        [
            [name, *(median(found, key) for key in ("rows", "items")), median(found, "peak_bytes") / 2**20]
            for name, found in peaks.items()
        ],
    )
    small, large = (median(peaks[case.name], "peak_bytes") for case in cases)
    report.bar(f"stream: peak memory at {MANY_USERS:,} users / at {USERS:,}", large / small, at_most=1.1)


# --- the cases --------------------------------------------------------------------------------------------------------


def scanner(lake: str) -> Numbers:
    """Arrow's own scan, which decodes ahead on every core."""
    import pyarrow.dataset as pads

    def batches() -> Any:
        return pads.dataset(_files(lake), format="parquet").to_batches(columns=COLUMNS, batch_size=16_384)

    return _timed(lambda: _padded(batches()))


def iter_batches(lake: str) -> Numbers:
    """File by file, which has less overhead where the cores are busy."""
    import pyarrow.parquet as pq

    def batches() -> Any:
        for file in _files(lake):
            yield from pq.ParquetFile(file).iter_batches(batch_size=16_384, columns=COLUMNS)

    return _timed(lambda: _padded(batches()))


def loader(lake: str, cache_bytes: int = 0) -> Numbers:
    made = _loader(lake, cache_bytes=cache_bytes)

    def epoch() -> tuple[int, int]:
        rows = items = 0
        for batch in made:
            rows, items = rows + len(batch.items), items + batch.global_items
        return rows, items

    return _timed(epoch)


def epoch(lake: str) -> Numbers:
    """One epoch in a fresh process."""
    made = _loader(lake)
    begun, rows, items = time.perf_counter(), 0, 0
    for batch in made:
        rows, items = rows + len(batch.items), items + batch.global_items
    seconds = time.perf_counter() - begun
    return {"rows": rows / seconds, "items": items / seconds}


def _loader(lake: str, **settings: int) -> Any:
    import torch

    from trainer.config import DataConfig
    from trainer.data.catalogue import read_catalogue
    from trainer.data.loader import Loader
    from trainer.data.release import pin
    from trainer.data.sequences import SequenceDataset

    torch.set_num_threads(1)
    release = pin(lake, None)
    config = DataConfig(lake=lake, split=SPLIT, domain=DOMAIN_ALL, **settings)
    dataset = SequenceDataset(release, SPLIT, DOMAIN_ALL)
    catalogue = read_catalogue(release, DOMAIN_ALL)
    return Loader(dataset, catalogue, config, batch_size=BATCH, max_length=LENGTH, seed=0)


def _padded(batches: Any) -> tuple[int, int]:
    """The newest items of each training part, int64 [BATCH, LENGTH], padded behind: windows gathered row by row, which
    was three times as fast as a mask over the padded batch."""
    import torch

    columns = np.arange(LENGTH)
    rows = items = 0
    for read in batches:
        lists = read.column("items")
        trained = read.column("valid_start").to_numpy().astype(np.int64)
        lengths = np.minimum(trained, LENGTH)
        starts = lists.offsets.to_numpy().astype(np.int64)[:-1] + trained - lengths
        flat = np.concatenate([lists.values.to_numpy(), np.zeros(LENGTH, np.int32)])
        windows = np.lib.stride_tricks.sliding_window_view(flat, LENGTH)
        users = torch.from_numpy(read.column("user").to_numpy().astype(np.int64))
        for first in range(0, len(starts), BATCH):
            some = slice(first, first + BATCH)
            padded = windows[starts[some]]
            padded *= columns < lengths[some, None]
            tensors = torch.from_numpy(padded).long(), torch.from_numpy(lengths[some]), users[some]
            rows += len(tensors[0])
        items += int(lengths.sum())
    return rows, items


def _timed(epoch: Callable[[], tuple[int, int]]) -> Numbers:
    """Rows and items a second: the median of some epochs, after one that fills the page cache."""
    import torch

    torch.set_num_threads(1)
    rows, items = epoch()
    seconds = []
    for _ in range(EPOCHS):
        begun = time.perf_counter()
        assert epoch() == (rows, items)
        seconds.append(time.perf_counter() - begun)
    return {"rows": rows / statistics.median(seconds), "items": items / statistics.median(seconds)}


def _files(lake: str) -> list[str]:
    from trainer.data.release import pin

    return [str(file) for file in pin(lake, None).files(SEQUENCES, {"split": SPLIT, "domain": DOMAIN_ALL})]


# --- the lake ---------------------------------------------------------------------------------------------------------


def make_lake(folder: Path, users: int) -> str:
    """A lake of `users` sequences (split SPLIT, domain `all`), made once."""
    place = folder / f"{users}"
    settings = {"users": users, "items": ITEMS, "mean_length": MEAN_LENGTH, "buckets": BUCKETS}
    note = place / _MADE
    if not (note.exists() and json.loads(note.read_text()) == settings):
        run(Case("the table", "tests.benchmarks.stream:make", {"folder": str(place), "users": users}))
        note.write_text(json.dumps(settings))
    return str(place)


def make(folder: str, users: int) -> Numbers:
    """Write the tables a trainer reads."""
    import shutil

    from etl.lake.spark_io import FileWriter, data_files, table_filesystem

    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    index = FIRST_INDEX + np.arange(ITEMS)
    raw, nothing = [f"i{n}" for n in index], [[]] * ITEMS
    items = {
        "item": raw,
        "index": index,
        "kept": [True] * ITEMS,
        "degree": [1] * ITEMS,
        "title": raw,
        "year": [2000] * ITEMS,
        "categories": nothing,
        "attributes": nothing,
    }
    members = {"domain": [DOMAIN_ALL] * ITEMS, "item": raw, "index": index, "rule": ["all"] * ITEMS}
    filesystem = table_filesystem(folder, SEQUENCES)
    Path(folder, SEQUENCES.name).mkdir()
    entries = []
    for bucket in range(BUCKETS):
        writer = FileWriter(filesystem, SEQUENCES, (SPLIT, DOMAIN_ALL, bucket))
        for first in range(bucket, users, BUCKETS * 4_096):
            user = FIRST_INDEX + np.arange(first, min(first + BUCKETS * 4_096, users), BUCKETS)
            # Times that are all the same spare the disk where memory is measured; they are never read.
            writer.add(_sequences(random, user, with_times=users <= USERS))
        entries += _written(writer)
    versions = {
        "items": _commit(folder, tables.ITEMS, _whole(folder, tables.ITEMS, items)),
        "domains": _commit(folder, tables.DOMAINS, _whole(folder, tables.DOMAINS, members)),
        "sequences": _commit(folder, SEQUENCES, data_files(entries)),
    }
    named = [{"table": name, "version": version} for name, version in versions.items()]
    release = {
        "release": [1],
        "created": [0],
        "tables": [named],
        "config": ["{}"],
        "config_hash": [""],
        "code_version": [""],
    }
    _commit(folder, tables.RELEASES, _whole(folder, tables.RELEASES, release))
    return {"users": users}


def _sequences(random: np.random.Generator, user: np.ndarray, *, with_times: bool) -> pa.RecordBatch:
    n = len(user)
    sigma = 0.6
    lengths = np.clip(random.lognormal(np.log(MEAN_LENGTH) - sigma**2 / 2, sigma, n), 5, 5_000).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    items = FIRST_INDEX + (ITEMS * random.random(offsets[-1], dtype=np.float32) ** 3).astype(np.int32)
    times = np.zeros(offsets[-1], np.int64)
    if with_times:
        times = 1_700_000_000_000_000 + np.cumsum(random.integers(0, 10**9, offsets[-1]))
    columns = {
        "user": user,
        "items": pa.ListArray.from_arrays(offsets, pa.array(items)),
        "times": pa.ListArray.from_arrays(offsets, pa.array(times)),
        "event_types": pa.nulls(n, pa.list_(pa.string())),
        "values": pa.nulls(n, pa.list_(pa.float32())),
        "valid_start": lengths - 2,
        "test_start": lengths - 1,
        "end": lengths,
    }
    schema = pa.schema([SEQUENCES.schema.field(name) for name in columns])
    arrays = [pa.array(column, field.type) for column, field in zip(columns.values(), schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _whole(folder: str, table: Table, columns: dict[str, Any]) -> list[Any]:
    """A small table as one data file."""
    from etl.lake.spark_io import FileWriter, data_files, table_filesystem

    Path(folder, table.name).mkdir()
    rows = pa.RecordBatch.from_pydict(columns, schema=table.schema)
    key = tuple(rows[name][0].as_py() for name in table.partition_by)
    writer = FileWriter(table_filesystem(folder, table), table, key)
    writer.add(rows)
    return list(data_files(_written(writer)))


def _written(writer: Any) -> list[str]:
    files: list[str] = writer.close()["file"].to_pylist()
    return files


def _commit(folder: str, table: Table, files: list[Any]) -> int:
    from etl.lake.commit import Commit, commit_files

    return commit_files(
        folder, table, files, Commit(mode="append", app="benchmark", app_version=1, metadata={})
    ).version
