"""Users' sequences, streamed from data files as flat arrays."""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl import tables
from etl.tables import FIRST_INDEX
from trainer.arrays import FloatArray, Int8Array, IntArray
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events, joined, sampled
from trainer.data.release import (
    FOOTERS,
    Damage,
    DataError,
    Release,
    TableFile,
    blamed,
    known_sequences,
    metadata,
    open_parquet,
)


@dataclass(frozen=True)
class Sequences(Events):
    """Users' events of one split, by global index, and where its parts begin and end in each."""

    valid_start: IntArray  # [B]
    test_start: IntArray  # [B]; empty, as `end`, where what is held out was not read
    end: IntArray  # [B]

    def history_end(self, part: str) -> IntArray:
        """Where the input ends when `part` is requested: training part for validation, training and validation for
        test."""
        return {"train": self.valid_start, "validation": self.valid_start, "test": self.test_start}[part]

    @property
    def nbytes(self) -> int:
        bounds = (self.valid_start, self.test_start, self.end)
        return sum(array.nbytes for array in (self.users, self.offsets, *bounds, *self.columns.values()))

    def take(self, rows: IntArray) -> "Sequences":
        """The sequences of some rows, in that order."""
        taken = super().take(rows)
        bounds = (bound[rows] if len(bound) else bound for bound in (self.valid_start, self.test_start, self.end))
        return Sequences(taken.users, taken.offsets, taken.columns, *bounds)


def together(parts: Sequence[Sequences]) -> Sequences:
    """Those of all parts, one behind the other."""
    none = np.empty(0, np.int64)

    def joined_users(name: str) -> IntArray:
        return np.concatenate([none, *(getattr(part, name) for part in parts)])

    lengths = np.concatenate([none, *(part.lengths for part in parts)])
    names = dict.fromkeys(name for part in parts for name in ("items", *part.columns)) or {"items": None}
    return Sequences(
        joined_users("users"),
        np.concatenate([[0], np.cumsum(lengths)]),
        {name: joined(parts, name) for name in names},
        *(joined_users(name) for name in ("valid_start", "test_start", "end")),
    )


class SequenceDataset:
    """The sequences of one split and domain of a release, as row groups that can be read in any combination.

    `values`: the events' values (ratings, prices) are read too. `event_types`: names of kinds of event to be
    distinguished: those of an event are read as its place among them, from 1 on, and 0 for whatever else. `times`: when
    events were is read in any case. Raises DataError where there are none, and for a file that is missing, damaged or
    not of the contract's schema.
    """

    table = tables.SEQUENCES
    values = False
    times = False
    event_types: Sequence[str] = ()
    held_out = "items"  # by a user, in words
    advice = "shorten the split's hold-out, or give more interactions per user"  # where nobody holds out anything
    has_negatives = True  # fixed ones, of the table `negatives`
    by_number = True  # whether a split's `validation` and `test` are how many are held out

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
        self.values, self.event_types, self.times = values, event_types, times
        self.files = release.files(tables.SEQUENCES, {"split": split, "domain": domain})
        if not self.files:
            known = known_sequences(release, tables.SEQUENCES)
            raise DataError(
                f"no sequences of split {split!r} and domain {domain!r} in release {release.number} of {release.lake}; "
                f"it has {', '.join('/'.join(pair) for pair in known)}"
            )
        self._kept_rows: list[IntArray] | None = None
        self.groups: list[tuple[TableFile, int]] = []
        self.rows_per_group: list[int] = []
        self._metadata = functools.lru_cache(FOOTERS)(metadata)  # of files, which never change
        for file in self.files:
            with blamed(file), open_parquet(file) as parquet:
                _check_columns(parquet.schema_arrow)
                for group in range(parquet.num_row_groups):
                    self.groups.append((file, group))
                    self.rows_per_group.append(parquet.metadata.row_group(group).num_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_group)

    def sample_users(self, share: float) -> Self:
        """The same with about this share of users, who are the same ones in whatever table, and among those of a larger
        share. Raises DataError where nobody is left."""
        if share >= 1:
            return self
        fewer = copy.copy(self)
        fewer._kept_rows = []
        for group in range(len(self.groups)):
            fewer._kept_rows.append(np.flatnonzero(sampled(self._users(group), share)))
        fewer.rows_per_group = [len(rows) for rows in fewer._kept_rows]
        if not fewer.num_rows:
            raise DataError(
                f"expected users in a share of {share:g} of the {self.num_rows:,} of split {self.split!r} and domain "
                f"{self.domain!r}, found none; raise data.user_share"
            )
        return fewer

    def _users(self, group: int) -> IntArray:
        """Of a row group, in its order."""
        file, number = self.groups[group]
        with blamed(file), open_parquet(file, self._metadata(file)) as parquet:
            column = parquet.read_row_group(number, columns=["user"], use_threads=False)["user"]
        return np.asarray(column.to_numpy(), dtype=np.int64)

    def read(self, groups: Sequence[int], *, times: bool = False) -> Sequences:
        """Some row groups, in the order given. Raises DataError naming a file that can't be read."""
        parts = [self.read_group(group, times=times) for group in groups]
        return parts[0] if len(parts) == 1 else together(parts)

    def read_group(self, group: int, *, times: bool = False, held_out: bool = True) -> Sequences:
        """One row group. `held_out` False: without test_start and end. Raises DataError naming a file that can't be
        read. May be called from several threads."""
        found = self._whole_group(group, times=times, held_out=held_out)
        return found if self._kept_rows is None else found.take(self._kept_rows[group])

    def _whole_group(self, group: int, *, times: bool, held_out: bool) -> Sequences:
        """With the users that `sample_users` leaves out."""
        file, number = self.groups[group]
        columns = ["user", "items", "valid_start", *(["test_start", "end"] if held_out else [])]
        with blamed(file), open_parquet(file, self._metadata(file)) as parquet:
            # One thread, and no coalesced reads ahead: a row group is one unit of work.
            columns += [*(["times"] if times or self.times else []), *(["values"] if self.values else [])]
            columns += ["event_types"] if self.event_types else []
            table = parquet.read_row_group(number, columns=columns, use_threads=False)
            found = _flatten(table, self._metadata(file).row_group(number).num_rows, self.event_types)
            if self.times and len(found.times) != len(found.items):
                raise Damage(f"expected a time of each of {len(found.items):,} items, found {len(found.times):,}")
            return found

    def read_all(self, *, times: bool = False) -> Sequences:
        return self.read(range(len(self.groups)), times=times)


def training_interactions(dataset: SequenceDataset, catalogue: Catalogue, *, others: bool = False) -> IntArray:
    """Interactions [V] of each catalogue row in all users' training parts, 0 for reserved rows; by row group. `others`:
    only those of none of the kinds of event that the dataset tells apart."""
    counts = np.zeros(len(catalogue), dtype=np.int64)
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        is_counted = sequences.positions < sequences.valid_start[sequences.owners]
        if others and dataset.event_types:
            is_counted &= sequences.event_types == 0
        counts += np.bincount(catalogue.rows(sequences.items[is_counted]), minlength=len(catalogue))
    counts[:FIRST_INDEX] = 0
    return counts


def training_events(dataset: SequenceDataset, num_users: int) -> IntArray:
    """[num_users] events of each user in the training part; by row group."""
    found = np.zeros(num_users, dtype=np.int64)
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        found[sequences.users] = sequences.valid_start
    return found


def _check_columns(found: pa.Schema) -> None:
    """Integers where the contract has them, of whatever width and in whatever kind of list."""
    for name in ("user", "items", "times", "valid_start", "test_start", "end"):
        expected = tables.SEQUENCES.schema.field(name).type
        if name not in found.names:
            raise Damage(f"expected a column {name} of {expected}, found {', '.join(found.names)}")
        kind = found.field(name).type
        of_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        value = kind.value_type if of_list else kind
        if of_list != pa.types.is_list(expected) or not pa.types.is_integer(value):
            raise Damage(f"expected a column {name} of {expected}, found {kind}")


def _flatten(table: pa.Table, num_rows: int, event_types: Sequence[str]) -> Sequences:
    """Arrow's own buffers, where they have the contract's types. Raises Damage."""

    def column(name: str) -> pa.Array:
        if name not in table.column_names:
            return pa.array([], pa.int64())
        values = table[name].cast(tables.SEQUENCES.schema.field(name).type)
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()  # the latter copies
        if name != "times" and values.null_count:
            raise Damage(f"column {name} may not be null, found {values.null_count:,} of {len(values):,}")
        return values

    def integers(name: str) -> IntArray:
        values: IntArray = column(name).to_numpy().astype(np.int64)
        return values

    if table.num_rows != num_rows:
        raise Damage(f"expected a row group of {num_rows:,} rows, found {table.num_rows:,}")
    lists = column("items")
    items = lists.flatten()
    lengths = pc.list_value_length(lists).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    valid_start, test_start, end = integers("valid_start"), integers("test_start"), integers("end")
    bounds = [valid_start, test_start, end, lengths] if len(end) else [valid_start, lengths]
    if items.null_count or (len(items) and items.to_numpy().min() < FIRST_INDEX):
        raise Damage(f"expected item indices from {FIRST_INDEX} on, found {pc.min(items)} or null")
    if any((before > after).any() for before, after in itertools.pairwise([np.zeros_like(valid_start), *bounds])):
        raise Damage("expected 0 <= valid_start <= test_start <= end <= length of items, found a row that isn't so")
    columns: dict[str, npt.NDArray[Any]] = {"items": items.to_numpy()}
    if "times" in table.column_names:
        columns["times"] = pc.list_flatten(column("times")).to_numpy()
    if "values" in table.column_names:
        columns["values"] = _values(table["values"], lengths)
    if event_types:
        columns["event_types"] = event_type_codes(table["event_types"], lengths, event_types)
    return Sequences(integers("user"), offsets, columns, valid_start, test_start, end)


def _values(column: pa.ChunkedArray, lengths: IntArray) -> FloatArray:
    """Side by side with items; NaN where an event, or all of a user's, have none. Raises Damage."""
    found = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    flat, given = _beside(column, lengths, "values")
    found[given] = flat.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return found


def event_type_codes(column: pa.ChunkedArray, lengths: IntArray, names: Sequence[str]) -> Int8Array:
    """Places among `names` side by side with items, from 1 on; 0 for none of them. Raises Damage."""
    found = np.zeros(int(lengths.sum()), dtype=np.int8)
    flat, given = _beside(column, lengths, "event types")
    place = pc.index_in(flat.cast(pa.string()), pa.array(names, pa.string()), skip_nulls=True).fill_null(-1)
    found[given] = place.to_numpy(zero_copy_only=False) + 1
    return found


def _beside(column: pa.ChunkedArray, lengths: IntArray, what: str) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """What a column of lists holds, and the places of items that it is beside: those of users who have any. Raises
    Damage."""
    lists = column.combine_chunks()
    has_any = lists.is_valid().to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    if len(flat) != int(lengths[has_any].sum()):
        raise Damage(f"expected as many {what} as items, found {len(flat):,} for {int(lengths[has_any].sum()):,}")
    return flat, np.repeat(has_any, lengths)
