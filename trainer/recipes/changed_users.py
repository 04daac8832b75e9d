"""Whose recommendations may differ from those that the table holds: users whose histories have changed since.

The rows of everybody else were computed by the same model and code from the same history, so they are kept, whichever
release they name.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.lake.snapshots import last_commit
from etl.settings import GraftrecError
from etl.tables import RECOMMENDATIONS, Table
from trainer.arrays import IntArray
from trainer.data.release import Release, TableFile, open_parquet, pin

RULES = "rules"  # in a commit's metadata: what decides on a row besides the user's history
_COLUMNS = ("items", "event_types", "times")


@dataclass(frozen=True)
class HistoryRows:
    """Rows that are read of each user; `only_who`: only whether there is one counts."""

    table: Table
    split: str
    domain: str
    only_who: bool = False


@dataclass(frozen=True)
class ChangedUsers:
    """`users`: global indices of those whose rows are computed again, or leave; `buckets` that they belong to; `since`:
    the release that the table's rows were last brought to."""

    users: IntArray
    buckets: tuple[int, ...]
    since: int


def changed_users(release: Release, domain: str, rules: str, read: Sequence[HistoryRows]) -> ChangedUsers | None:
    """Users whose rows of `read` differ from the release that the domain's recommendations were last made from. None
    where all rows are to be made: by other rules, or what was read then is gone."""
    recorded = last_commit(release.lake, RECOMMENDATIONS)
    made = json.loads(recorded.get(RULES, "{}")).get(domain) if recorded else None
    if made is None or made["rules"] != rules:
        return None
    try:
        before = release if made["release"] == release.number else pin(release.lake, int(made["release"]))
        users: set[int] = set()
        buckets: set[int] = set()
        for rows in read:
            for bucket, found in _changed(before, release, rows):
                users |= found
                buckets.add(bucket)
    except GraftrecError:
        return None
    return ChangedUsers(np.array(sorted(users), np.int64), tuple(sorted(buckets)), int(made["release"]))


def recorded_rules(lake: str, domain: str, rules: str, release: int) -> str:
    """What a commit of a domain's rows records under RULES, beside what it held of other domains."""
    before = json.loads(last_commit(lake, RECOMMENDATIONS).get(RULES, "{}"))
    return json.dumps({**before, domain: {"rules": rules, "release": release}}, sort_keys=True)


def _changed(before: Release, now: Release, rows: HistoryRows) -> Iterator[tuple[int, set[int]]]:
    """Each bucket with users whose rows differ, and these."""
    old, new = (one.by_bucket(rows.table, {"split": rows.split, "domain": rows.domain}) for one in (before, now))
    for bucket in sorted(old.keys() | new.keys()):
        was, is_now = ({file.path: file for file in one.get(bucket, ())} for one in (old, new))
        # A file that both versions have holds the same rows.
        earlier = _histories([file for path, file in was.items() if path not in is_now], rows)
        later = _histories([file for path, file in is_now.items() if path not in was], rows)
        found = {user for user in earlier.keys() | later.keys() if earlier.get(user) != later.get(user)}
        if found:
            yield bucket, found


def _histories(files: Sequence[TableFile], rows: HistoryRows) -> dict[int, int]:
    """User -> a hash of all that may be read of its history."""
    found: dict[int, int] = {}
    for file in files:
        with open_parquet(file) as opened:
            there = opened.schema_arrow.names
            names = [name for name in _COLUMNS if name in there and not rows.only_who]
            for batch in opened.iter_batches(columns=["user", *names]):
                for user, digest in zip(batch["user"].to_pylist(), _hashes(batch, names), strict=True):
                    found[user] = hash((found.get(user, 0), digest))
    return found


def _hashes(batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[int]:
    """Of each row: of the bytes of its lists."""
    columns = [_Bytes(batch[name]) for name in names]
    for row in range(batch.num_rows):
        yield hash(tuple(column[row] for column in columns))


class _Bytes:
    """The values of a list column as bytes, row by row."""

    def __init__(self, lists: pa.ListArray) -> None:
        flat = lists.flatten()
        if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
            flat = flat.dictionary_encode()
            self._names: list[str] | None = flat.dictionary.to_pylist()
            values = flat.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        else:
            self._names, values = None, flat.cast(pa.int64()).to_numpy(zero_copy_only=False)
        self._values = values
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        self._stops = np.cumsum(lengths)
        self._starts = self._stops - lengths

    def __getitem__(self, row: int) -> object:
        part = self._values[self._starts[row] : self._stops[row]]
        if self._names is None:
            return part.tobytes()
        return tuple(None if one < 0 else self._names[one] for one in part)
