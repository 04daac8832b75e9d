"""Raw logs of any size for benchmarks, by numpy: Zipf-like items, users of log-normal activity, rows in time order."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Ints = npt.NDArray[np.int64]
FILE_ROWS = 2_000_000
LOG_DAYS = 1_000
START = 1_700_000_000_000_000  # microseconds since 1970 UTC
_MADE = "made.json"


def write_log(
    folder: Path, *, events: int, users: int, items: int, seed: int = 0, heavy: int = 0, days: int = LOG_DAYS
) -> Path:
    """A log of Parquet files ``events/*.parquet`` (user, item, time) and ``items.parquet`` (item, category), once.

    Two thirds of the items are of the category `source`, the rest `target`. `heavy`: further events, of one user.
    """
    settings = {"events": events, "users": users, "items": items, "seed": seed, "heavy": heavy, "days": days}
    note = folder / _MADE
    if note.exists() and json.loads(note.read_text()) == settings:
        return folder
    (folder / "events").mkdir(parents=True, exist_ok=True)
    number = np.arange(items)
    category = pa.array(np.where(number % 3 == 2, "target", "source"))
    pq.write_table(pa.table({"item": ids("i", number), "category": category}), folder / "items.parquet")
    for part, table in enumerate(_parts(events, users, items, seed, heavy, days)):
        pq.write_table(
            table, folder / "events" / f"{part:05d}.parquet", compression="zstd", row_group_size=FILE_ROWS // 8
        )
    note.write_text(json.dumps(settings))
    return folder


def _parts(events: int, users: int, items: int, seed: int, heavy: int, days: int) -> Iterator[pa.Table]:
    random = np.random.default_rng([seed, events, users, items])
    activity = np.cumsum(random.lognormal(0.0, 0.8, users))
    popularity = np.cumsum(random.permutation((np.arange(items) + 10.0) ** -0.9))
    total = events + heavy
    span = days * 86_400_000_000
    for begin in range(0, total, FILE_ROWS):
        size = min(FILE_ROWS, total - begin)
        user = np.searchsorted(activity, random.random(size) * activity[-1])
        item = np.searchsorted(popularity, random.random(size) * popularity[-1])
        if heavy:
            user = np.where(random.random(size) < heavy / total, users, user)
        first, last = span * begin // total, span * (begin + size) // total
        time = START + np.sort(random.integers(first, last, size))
        yield pa.table({"user": ids("u", user), "item": ids("i", item), "time": time})


def ids(letter: str, numbers: Ints) -> pa.Array:
    return pc.binary_join_element_wise(letter, pc.cast(pa.array(numbers), pa.string()), "")


def etl_config(log: Path, lake: Path, *, spark: dict[str, object], buckets: int = 16) -> dict[str, object]:
    """An ETL configuration of such a log, for `etl.config`, as YAML would have it."""
    return {
        "lake": str(lake),
        "source": {
            "kind": "log",
            "root": str(log),
            "events": {
                "path": "events/*.parquet",
                "format": "parquet",
                "columns": {"user": "user", "item": "item", "time": "time"},
                "time_unit": "us",
            },
            "items": {"path": "items.parquet", "format": "parquet", "id": "item", "categories": "category"},
        },
        "kcore": {"min_user": 5, "min_item": 5, "iterate": True},
        "domains": [{"name": "source", "any_of": ["source"]}, {"name": "target", "any_of": ["target"]}],
        "spark": spark,
        "buckets": buckets,
    }
