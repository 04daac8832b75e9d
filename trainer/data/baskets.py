"""Baskets read as sequences: a user's baskets one behind the other, a SEP behind each."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl import tables
from etl.config import etl_command
from etl.tables import SEP
from trainer.arrays import Int32Array, IntArray
from trainer.data.events import Column
from trainer.data.release import DataError, Release, TableFile, blamed, known_sequences, open_parquet
from trainer.data.sequences import SequenceDataset, Sequences


class BasketDataset(SequenceDataset):
    """The baskets of one split and domain, each user a sequence; its parts are those of the baskets.

    A group is a data file, that is, a bucket's users or a part of them: a user's baskets lie in one file, but maybe in
    several row groups of it. They have no values, event types or times, whichever are requested. Raises DataError where
    there are none, and for a file that can't be read.
    """

    table = tables.BASKETS
    held_out = "a basket"
    advice = "give users of three baskets and more"
    by_number = False  # the last basket, and the one before it
    has_negatives = False  # they would be items that the user never had

    def __init__(
        self,
        release: Release,
        split: str,
        domain: str,
        *,
        values: bool = False,
        event_types: Sequence[str] = (),
        times: bool = False,
    ) -> None:
        self.release, self.split, self.domain = release, split, domain
        has_any = tables.BASKETS.name in release.versions
        self.files = release.files(tables.BASKETS, {"split": split, "domain": domain}) if has_any else []
        if not self.files:
            known = known_sequences(release, tables.BASKETS) if has_any else []
            has = f"it has {', '.join('/'.join(pair) for pair in known)}" if known else "it has none at all"
            raise DataError(
                f"no baskets of split {split!r} and domain {domain!r} in release {release.number} of {release.lake}; "
                f"{has}; name the log's basket column, or set baskets.gap_minutes, and run "
                f"{etl_command(release.lake)} again"
            )
        self._kept_rows = None
        self.groups = [(file, 0) for file in self.files]
        self.rows_per_group = [self._num_users(file) for file in self.files]

    def _num_users(self, file: TableFile) -> int:
        with blamed(file), open_parquet(file) as parquet:
            users = parquet.read(columns=["user"], use_threads=False)["user"].to_numpy()
        changes = np.diff(users)
        if (changes < 0).any():  # a table rewritten by others
            return len(np.unique(users))
        return int(np.count_nonzero(changes)) + 1 if len(users) else 0

    def _users(self, group: int) -> IntArray:
        return self._whole_group(group, times=False, held_out=False).users

    def _whole_group(self, group: int, *, times: bool, held_out: bool) -> Sequences:
        """One file's users."""
        file, _ = self.groups[group]
        columns = ["user", "basket", "part", "items", *(["time"] if times else [])]
        with blamed(file), open_parquet(file) as parquet:
            return _joined(parquet.read(columns=columns, use_threads=False))


def _joined(baskets: pa.Table) -> Sequences:
    """Baskets in the order of user and number, as sequences."""
    user, number = (baskets[name].to_numpy().astype(np.int64) for name in ("user", "basket"))
    if (np.diff(user) < 0).any() or (
        (np.diff(user) == 0) & (np.diff(number) <= 0)
    ).any():  # a table rewritten by others
        return _joined(baskets.take(pa.array(np.lexsort((number, user)))))
    items, size = separated(baskets["items"].combine_chunks())
    first = np.flatnonzero(np.diff(user, prepend=-1))  # each user's first basket
    part = baskets["part"].cast(pa.string())

    def length(*names: str) -> IntArray:
        inside = pc.is_in(part, value_set=pa.array(names)).to_numpy()
        return np.add.reduceat(size * inside, first) if len(first) else np.empty(0, np.int64)

    trained, until_test, whole = (length(*tables.PARTS[: count + 1]) for count in range(len(tables.PARTS)))
    offsets = np.concatenate([[0], np.cumsum(whole)]).astype(np.int64)
    columns: dict[str, Column] = {"items": items}
    if "time" in baskets.column_names:
        columns["times"] = np.repeat(baskets["time"].to_numpy(), size)
    return Sequences(user[first], offsets, columns, trained, until_test, whole)


def separated(baskets: pa.ListArray) -> tuple[Int32Array, IntArray]:
    """(the items of all baskets one behind the other, a SEP behind each; places that each basket takes)."""
    size = pc.list_value_length(baskets).to_numpy().astype(np.int64) + 1
    items = np.full(int(size.sum()), SEP, dtype=np.int32)
    is_item = np.ones(len(items), dtype=bool)
    is_item[np.cumsum(size) - 1] = False
    items[is_item] = baskets.flatten().to_numpy()
    return items, size


DATASETS = {dataset.table.name: dataset for dataset in (SequenceDataset, BasketDataset)}


def open_dataset(
    table: str,
    release: Release,
    split: str,
    domain: str,
    *,
    values: bool = False,
    event_types: Sequence[str] = (),
    times: bool = False,
) -> SequenceDataset:
    """What a task's `needs.table` has of a split and domain. Raises DataError."""
    return DATASETS[table](release, split, domain, values=values, event_types=event_types, times=times)
