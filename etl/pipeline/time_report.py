"""How many users and items each split by time can evaluate, and how many of them are new, streamed from `sequences`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class TimeSplit:
    """One domain of a split by time. New: without an event before `train_until`."""

    split: str
    domain: str
    dates: tuple[str, str, str]
    trained: int  # users
    validated: int
    tested: int
    new_users: int  # of those tested
    items: int  # by the end of the test part
    new_items: int

    def line(self) -> str:
        train, validate, test = self.dates
        return (
            f"split {self.split}, {self.domain}: {self.trained:,} users train until {train}; {self.validated:,} are "
            f"validated until {validate}, {self.tested:,} tested until {test} ({self.new_users:,} new); "
            f"{self.items:,} items, {self.new_items:,} new"
        )


def time_split(settings: Mapping[str, Any], domain: str, batches: Iterable[pa.RecordBatch]) -> TimeSplit:
    """Counted in rows of SEQUENCES (items, valid_start, test_start, end) of one split and domain."""
    users = np.zeros(4, np.int64)
    known, there = np.zeros(0, bool), np.zeros(0, bool)
    for batch in batches:
        first, second, end = (batch.column(name).to_numpy() for name in ("valid_start", "test_start", "end"))
        tested = end > second
        users += [(first > 0).sum(), (second > first).sum(), tested.sum(), (tested & (first == 0)).sum()]
        lists = batch.column("items")
        size, items = pc.list_value_length(lists).to_numpy(), pc.list_flatten(lists).to_numpy()
        place = np.arange(len(items)) - np.repeat(np.cumsum(size) - size, size)
        grown = int(max(items.max(initial=-1) + 1, len(known)))
        known, there = (np.pad(flags, (0, grown - len(flags))) for flags in (known, there))
        known[items[place < np.repeat(first, size)]] = True
        there[items[place < np.repeat(end, size)]] = True
    validate, test = settings["validate_until"] or settings["train_until"], settings["test_until"] or "the log's end"
    trained, validated, all_tested, new_users = (int(count) for count in users)
    return TimeSplit(
        settings["name"],
        domain,
        (settings["train_until"], validate, test),
        trained,
        validated,
        all_tested,
        new_users,
        items=int(there.sum()),
        new_items=int((there & ~known).sum()),
    )


def by_time(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of an ETL configuration, as releases record it: its splits by time."""
    yield from (split for split in settings.get("splits", ()) if split.get("train_until"))
