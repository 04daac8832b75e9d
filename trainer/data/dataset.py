"""A pinned release of the lake, read through Arrow: vocabularies, knowledge, and sequences as flat arrays."""

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import deltalake
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl import file_reader, tables
from etl.config import GraftrecError, etl_command
from etl.datafile import DataFile
from etl.delta_log import snapshot_digest
from etl.lake import LakeError, checked_files, open_table, our_commits, table_uri, within
from etl.plain_path import absolute
from etl.tables import FIRST_INDEX, Table

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]
FloatArray = npt.NDArray[np.float32]
_FOOTERS = 64  # of data files, kept: a twentieth of what a row group takes is reading its file's anew


class DataError(GraftrecError):
    """A lake, release, split or domain that is not there, or a file that can't be read."""


@dataclass(frozen=True)
class TableFile:
    """A data file of a pinned table version, wherever the lake lies; as text, its place."""

    lake: str
    table: Table = field(compare=False)
    path: str  # within the table

    def __str__(self) -> str:
        return f"{table_uri(self.lake, self.table)}/{self.path}"


@dataclass(frozen=True)
class Release:
    """One consistent set of table versions."""

    lake: str
    number: int
    versions: dict[str, int]
    digests: dict[str, str] = field(default_factory=dict)  # of tables' logs; none of releases of before

    def files(self, table: Table, partitions: dict[str, str] | None = None) -> list[TableFile]:
        """Data files of a table's pinned version, sorted by path; only those of the partitions named. Their bytes are
        checked. Raises DataError."""
        scope = {column: [value] for column, value in (partitions or {}).items()}
        paths = [file for file in self._logged(table) if within(file, scope)]
        try:
            file_reader.check_files(self.lake, table, [file.path for file in paths])
        except GraftrecError as error:
            raise DataError(str(error)) from None
        return [TableFile(self.lake, table, file.path) for file in paths]

    def partitions(self, table: Table) -> list[Mapping[str, str | None]]:
        """The partition of each data file of a table. Raises DataError."""
        return [file.partition for file in self._logged(table)]

    def _logged(self, table: Table) -> list[DataFile]:
        """All data files of a table's pinned version, as its commit and the release recorded them."""
        handle = _open(self.lake, table, self.versions.get(table.name))
        try:
            files = checked_files(handle, self.lake, table)
        except LakeError as error:
            raise DataError(str(error)) from None
        recorded = self.digests.get(table.name)
        if recorded not in (None, snapshot_digest(files, handle.metadata().configuration)):
            raise DataError(
                f"{table_uri(self.lake, table)}: expected version {handle.version()} as release {self.number} recorded "
                "it, found its log altered; restore the log from a copy"
            )
        return files

    def read(
        self, table: Table, columns: Sequence[str], partitions: dict[str, str] | None = None,
        *, indices: IntArray | None = None,
    ) -> pa.Table:  # fmt: skip
        """`columns` (no partition columns) of a table, in the order of its files; `indices`: only the rows whose
        column `index` is one of these. For vocabulary-sized tables."""
        schema = pa.schema([table.schema.field(name).with_nullable(True) for name in columns])
        parts = [schema.empty_table()]
        for file in self.files(table, partitions):
            part = _read(file, schema)
            known = None if indices is None else pc.is_in(part["index"], value_set=pa.array(indices, pa.int32()))
            parts.append(part if known is None else part.filter(known))
        return pa.concat_tables(parts).cast(pa.schema([table.schema.field(name) for name in columns]))


def _read(file: TableFile, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`; those that the file lacks are null."""
    with blamed(file), open_parquet(file) as parquet:
        found = parquet.read(columns=[name for name in schema.names if name in parquet.schema_arrow.names])
        columns = [
            found[each.name].cast(each.type) if each.name in found.column_names else pa.nulls(len(found), each.type)
            for each in schema
        ]
        return pa.table(columns, schema=schema)


def _open(lake: str, table: Table, version: int | None) -> deltalake.DeltaTable:
    """Of the columns' names alone must be the contract's: other writers have other widths of integers."""
    try:
        handle = open_table(lake, table, version)
    except LakeError as error:
        raise DataError(str(error)) from None
    if handle is None:
        raise DataError(
            f"no table {table.name} in the lake {lake}: expected those of a complete run; run {etl_command(lake)}"
        )
    expected, found = set(table.schema.names), {column.name for column in handle.schema().fields}
    needed = {column.name for column in table.schema if not column.nullable}
    if (needed - found) or (expected - found and found - expected):
        raise DataError(
            f"{table_uri(lake, table)}: expected the columns {', '.join(sorted(expected - found))}, found "
            f"{', '.join(sorted(found - expected)) or 'none'} instead; run {etl_command(lake)} into another lake"
        )
    return handle


def pin(lake: str, release: int | None) -> Release:
    """The release to read: the one named, else the newest. Raises DataError."""
    lake = absolute(lake)  # what a run records is known from every folder
    handle = _open(lake, tables.RELEASES, None)
    rows = (
        Release(lake, 0, {tables.RELEASES.name: handle.version()})
        .read(tables.RELEASES, ["release", "tables"])
        .to_pylist()
    )
    known = {row["release"]: row for row in rows}
    if not known:
        raise DataError(f"the lake {lake} has no complete release; run {etl_command(lake)}")
    number = max(known) if release is None else release
    if number not in known:
        raise DataError(f"no release {number} in the lake {lake}; it has {min(known)} to {max(known)}")
    try:
        commits = [commit for commit in our_commits(handle) if commit.get("release") == str(number)]
    except LakeError as error:
        raise DataError(str(error)) from None
    digests = json.loads(commits[0].get("digests", "{}")) if commits else {}
    return Release(lake, number, {entry["table"]: entry["version"] for entry in known[number]["tables"]}, digests)


class Texts(Sequence[str]):
    """Strings that stay in Arrow's memory: ten million Python strings would be gigabytes. Arrow takes them as they are
    (``pa.array(texts, pa.string())`` copies nothing)."""

    def __init__(self, column: pa.StringArray | pa.ChunkedArray) -> None:
        self._array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Texts": ...
    def __getitem__(self, place: int | slice) -> "str | Texts":
        if isinstance(place, slice):
            return Texts(self._array[place])
        text: str = self._array[int(place)].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 65_536):
            yield from self._array[start : start + 65_536].to_pylist()

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return self._array if type is None else self._array.cast(type)


@dataclass(frozen=True)
class Catalogue:
    """A domain's items as model rows: rows below FIRST_INDEX are reserved, then kept items by global index.

    global_index [V]; raw_ids and titles [V], empty for reserved rows.
    """

    global_index: IntArray
    raw_ids: Sequence[str]
    titles: Sequence[str]

    def __len__(self) -> int:
        return len(self.global_index)

    @functools.cached_property
    def _row_of(self) -> pa.Int32Array:
        """Global index -> row; UNK where the domain lacks the item, and at the end, for whatever lies beyond."""
        lookup = np.full(int(self.global_index.max(initial=FIRST_INDEX)) + 2, tables.UNK, dtype=np.int32)
        lookup[self.global_index] = np.arange(len(self), dtype=np.int32)
        return pa.array(lookup)

    def rows(self, index: npt.NDArray[Any]) -> Int32Array:
        """Rows of global indices, whatever is beyond the catalogue as UNK. The result is read-only."""
        beyond = len(self._row_of) - 1
        unsigned = index.view(f"u{index.dtype.itemsize}")  # so that what is negative lies beyond, too
        if unsigned.max(initial=0) > beyond:
            index = np.where(unsigned > beyond, beyond, index)
        # Arrow's gather: numpy's would first widen each index to 64 bits. Bounds are checked above, in a tenth of the
        # time that its own check takes.
        rows: Int32Array = pc.take(self._row_of, pa.array(index), boundscheck=False).to_numpy()
        return rows


def read_catalogue(release: Release, domain: str) -> Catalogue:
    """The kept items of a domain. Raises DataError where the domain is unknown or keeps none."""
    members = release.read(tables.DOMAINS, ["index"], {"domain": domain})
    if not len(members):
        known = sorted({str(part["domain"]) for part in release.partitions(tables.DOMAINS)})
        raise DataError(
            f"no domain {domain!r} in release {release.number} of {release.lake}; it has {', '.join(known)}"
        )
    items = release.read(tables.ITEMS, ["index", "item", "title", "kept"])
    items = items.filter(items["kept"])
    items = items.filter(pc.is_in(items["index"], value_set=members["index"])).sort_by("index")
    if not len(items):
        raise DataError(f"domain {domain!r} keeps no item after k-core; loosen kcore.min_item or the domain's rule")
    return Catalogue(
        np.concatenate([np.arange(FIRST_INDEX), items["index"].to_numpy()]).astype(np.int64),
        _texts(items["item"]),
        _texts(items["title"].fill_null("")),
    )


def rows_of_domain(release: Release, catalogue: Catalogue, domain: str) -> npt.NDArray[np.bool_]:
    """[V] which rows of a catalogue are kept items of `domain`. Raises DataError where none is."""
    kept = read_catalogue(release, domain).global_index[FIRST_INDEX:]
    rows = np.isin(catalogue.global_index, kept)
    rows[:FIRST_INDEX] = False
    if not rows.any():
        raise DataError(
            f"expected items of domain {domain!r} among those that are read, found none; set data.domain to one that "
            f"holds them, e.g. {tables.DOMAIN_ALL!r}"
        )
    return rows


def rows_by_raw_id(own: Catalogue, asked: Catalogue) -> IntArray:
    """[rows of `asked`] rows of `own` with the same raw id, UNK where it has none; reserved rows are themselves."""
    wanted, had = (pa.array(catalogue.raw_ids[FIRST_INDEX:], pa.string()) for catalogue in (asked, own))
    found = pc.index_in(wanted, had)
    rows = found.fill_null(tables.UNK - FIRST_INDEX).to_numpy(zero_copy_only=False).astype(np.int64) + FIRST_INDEX
    return np.concatenate([np.arange(FIRST_INDEX), rows])


def _texts(column: pa.ChunkedArray) -> Texts:
    """With an empty text for each reserved row before."""
    return Texts(pa.concat_arrays([pa.array([""] * FIRST_INDEX, pa.string()), *column.chunks]))


def known_sequences(release: Release, table: Table) -> list[tuple[str, str]]:
    """Splits and domains that a table has."""
    return sorted({(str(part["split"]), str(part["domain"])) for part in release.partitions(table)})


def domains_with_sequences(release: Release, split: str) -> list[str]:
    """Domains that have sequences in a split; none where there is no such split."""
    return sorted({str(part["domain"]) for part in release.partitions(tables.SEQUENCES) if part["split"] == split})


def vocabulary_size(release: Release, table: Table) -> int:
    """Largest index of a vocabulary plus one; FIRST_INDEX for an empty one."""
    if table.name not in release.versions:
        return FIRST_INDEX
    index = release.read(table, ["index"])["index"]
    return int(pc.max(index).as_py()) + 1 if len(index) else FIRST_INDEX


def read_knowledge(release: Release, catalogue: Catalogue, slots: dict[str, int]) -> Int32Array:
    """Entity indices [V, slots] of a catalogue's rows: slots of one relation in order of rank; UNK where unknown.

    `slots` maps relation -> number of slots, e.g. {"director": 1, "actor": 3}. Raises DataError for a relation without
    triples.
    """
    filled = np.full((len(catalogue), sum(slots.values())), tables.UNK, dtype=np.int32)
    filled[: tables.UNK] = tables.PAD
    if not slots:
        return filled
    triples = release.read(tables.KNOWLEDGE, ["head_index", "relation", "rank", "tail_index"])
    start = 0
    for relation, width in slots.items():
        chosen = triples.filter(pc.equal(triples["relation"], relation)).sort_by(
            [("head_index", "ascending"), ("rank", "ascending")]
        )
        heads, tails = chosen["head_index"].to_numpy(), chosen["tail_index"].to_numpy()
        rows = catalogue.rows(heads)
        # Position among the triples of one head, so that a gap in ranks leaves no empty slot.
        position = np.arange(len(heads)) - np.searchsorted(heads, heads, side="left") if len(heads) else heads
        usable = (rows != tables.UNK) & (position < width)
        filled[rows[usable], start + position[usable]] = tails[usable]
        start += width
    return filled


@dataclass(frozen=True)
class Sequences:
    """Many users' sequences as flat arrays: row u's items are ``items[offsets[u]:offsets[u + 1]]`` (global indices).

    Arrays that were not asked for are empty.
    """

    users: IntArray  # [U] global user index
    offsets: IntArray  # [U + 1]
    items: Int32Array  # [sum of lengths]
    times: IntArray  # [sum of lengths]
    valid_start: IntArray  # [U]
    test_start: IntArray  # [U]
    end: IntArray  # [U]
    values: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))  # [sum of lengths]; NaN: none
    event_types: Int8Array = field(default_factory=lambda: np.empty(0, np.int8))  # [sum of lengths]; 0: none of them

    def __len__(self) -> int:
        return len(self.users)

    @property
    def owners(self) -> IntArray:
        """[sum of lengths] row of each place."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def positions(self) -> IntArray:
        """[sum of lengths] of each place within its sequence."""
        return np.arange(len(self.items)) - self.offsets[self.owners]

    def history_end(self, part: str) -> IntArray:
        """Where the input ends when `part` is asked for: training part for validation, training and validation for
        test."""
        return {"train": self.valid_start, "validation": self.valid_start, "test": self.test_start}[part]

    def take(self, rows: IntArray) -> "Sequences":
        """The sequences of some rows, in that order."""
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Sequences(
            self.users[rows], offsets, self.items[flat], self.times[flat] if len(self.times) else self.times,
            self.valid_start[rows], self.test_start[rows], self.end[rows],
            self.values[flat] if len(self.values) else self.values,
            self.event_types[flat] if len(self.event_types) else self.event_types,
        )  # fmt: skip


class SequenceDataset:
    """The sequences of one split and domain of a release, as row groups that can be read in any combination.

    `values`: the events' values (ratings, prices) are read too. `event_types`: names of kinds of event to be told
    apart: those of an event are read as its place among them, from 1 on, and 0 for whatever else.
    Raises DataError where there are none, and for a file that is missing, damaged or not of the contract's schema.
    """

    values = False
    event_types: Sequence[str] = ()

    def __init__(
        self, release: Release, split: str, domain: str, *, values: bool = False, event_types: Sequence[str] = ()
    ) -> None:
        self.release, self.split, self.domain = release, split, domain
        self.values, self.event_types = values, event_types
        self.files = release.files(tables.SEQUENCES, {"split": split, "domain": domain})
        if not self.files:
            known = known_sequences(release, tables.SEQUENCES)
            raise DataError(
                f"no sequences of split {split!r} and domain {domain!r} in release {release.number} of {release.lake}; "
                f"it has {', '.join('/'.join(pair) for pair in known)}"
            )
        self.groups: list[tuple[TableFile, int]] = []
        self.rows_per_group: list[int] = []
        self._metadata = functools.lru_cache(_FOOTERS)(_metadata)  # of files, which never change
        for file in self.files:
            with blamed(file), open_parquet(file) as parquet:
                _check_columns(parquet.schema_arrow)
                for group in range(parquet.num_row_groups):
                    self.groups.append((file, group))
                    self.rows_per_group.append(parquet.metadata.row_group(group).num_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_group)

    def read(self, groups: Sequence[int], *, times: bool = False) -> Sequences:
        """Some row groups, in the order given. Raises DataError naming a file that can't be read."""
        parts = [self.read_group(group, times=times) for group in groups]
        return parts[0] if len(parts) == 1 else _concatenated(parts)

    def read_group(self, group: int, *, times: bool = False, held_out: bool = True) -> Sequences:
        """One row group. `held_out` False: without test_start and end. Raises DataError naming a file that can't be
        read. May be called from several threads."""
        file, number = self.groups[group]
        columns = ["user", "items", "valid_start", *(["test_start", "end"] if held_out else [])]
        with blamed(file), open_parquet(file, self._metadata(file)) as parquet:
            # One thread, and no coalesced reads ahead: a row group is one unit of work.
            columns += [*(["times"] if times else []), *(["values"] if self.values else [])]
            columns += ["event_types"] if self.event_types else []
            table = parquet.read_row_group(number, columns=columns, use_threads=False)
            return _flatten(table, self.rows_per_group[group], self.event_types)

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


@contextmanager
def blamed(file: TableFile) -> Iterator[None]:
    """What goes wrong while a data file is read, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except GraftrecError as error:
        raise DataError(str(error)) from None
    except (OSError, pa.ArrowException, _Damage) as error:
        told = " ".join(str(error).split())
        raise DataError(f"can't read {file}: {told}; restore it, or write its table anew by `python -m etl`") from None


class _Damage(Exception):
    """Contents that the contract rules out."""


def _metadata(file: TableFile) -> pq.FileMetaData:
    with open_parquet(file) as parquet:
        return parquet.metadata


@contextmanager
def open_parquet(file: TableFile, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """The file, opened for the context. `metadata`: its footer, where it was read before."""
    with file_reader.open_parquet(file.lake, file.table, file.path, metadata=metadata) as parquet:
        yield parquet


def _check_columns(found: pa.Schema) -> None:
    """Integers where the contract has them, of whatever width and in whatever kind of list."""
    for name in ("user", "items", "times", "valid_start", "test_start", "end"):
        expected = tables.SEQUENCES.schema.field(name).type
        if name not in found.names:
            raise _Damage(f"expected a column {name} of {expected}, found {', '.join(found.names)}")
        kind = found.field(name).type
        of_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        value = kind.value_type if of_list else kind
        if of_list != pa.types.is_list(expected) or not pa.types.is_integer(value):
            raise _Damage(f"expected a column {name} of {expected}, found {kind}")


def _flatten(table: pa.Table, num_rows: int, event_types: Sequence[str]) -> Sequences:
    """Arrow's own buffers, where they have the contract's types. Raises _Damage."""

    def column(name: str) -> pa.Array:
        if name not in table.column_names:
            return pa.array([], pa.int64())
        values = table[name].cast(tables.SEQUENCES.schema.field(name).type)
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()  # the latter copies
        if name != "times" and values.null_count:
            raise _Damage(f"column {name} may not be null, found {values.null_count:,} of {len(values):,}")
        return values

    def integers(name: str) -> IntArray:
        values: IntArray = column(name).to_numpy().astype(np.int64)
        return values

    if table.num_rows != num_rows:
        raise _Damage(f"expected a row group of {num_rows:,} rows, found {table.num_rows:,}")
    lists = column("items")
    items = lists.flatten()
    lengths = pc.list_value_length(lists).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = pc.list_flatten(column("times")).to_numpy() if "times" in table.column_names else np.empty(0, np.int64)
    valid_start, test_start, end = integers("valid_start"), integers("test_start"), integers("end")
    bounds = [valid_start, test_start, end, lengths] if len(end) else [valid_start, lengths]
    if items.null_count or (len(items) and items.to_numpy().min() < FIRST_INDEX):
        raise _Damage(f"expected item indices from {FIRST_INDEX} on, found {pc.min(items)} or null")
    if any((before > after).any() for before, after in itertools.pairwise([np.zeros_like(valid_start), *bounds])):
        raise _Damage("expected 0 <= valid_start <= test_start <= end <= length of items, found a row that isn't so")
    values = _values(table["values"], lengths) if "values" in table.column_names else np.empty(0, np.float32)
    kinds = event_type_codes(table["event_types"], lengths, event_types) if event_types else np.empty(0, np.int8)
    return Sequences(integers("user"), offsets, items.to_numpy(), times, valid_start, test_start, end, values, kinds)


def _values(column: pa.ChunkedArray, lengths: IntArray) -> FloatArray:
    """Side by side with items; NaN where an event, or all of a user's, have none. Raises _Damage."""
    found = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    flat, given = _beside(column, lengths, "values")
    found[given] = flat.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return found


def event_type_codes(column: pa.ChunkedArray, lengths: IntArray, names: Sequence[str]) -> Int8Array:
    """Places among `names` side by side with items, from 1 on; 0 for none of them. Raises _Damage."""
    found = np.zeros(int(lengths.sum()), dtype=np.int8)
    flat, given = _beside(column, lengths, "event types")
    place = pc.index_in(flat.cast(pa.string()), pa.array(names, pa.string()), skip_nulls=True).fill_null(-1)
    found[given] = place.to_numpy(zero_copy_only=False) + 1
    return found


def _beside(column: pa.ChunkedArray, lengths: IntArray, what: str) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """What a column of lists holds, and the places of items that it is beside: those of users who have any. Raises
    _Damage."""
    lists = column.combine_chunks()
    has_any = lists.is_valid().to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    if len(flat) != int(lengths[has_any].sum()):
        raise _Damage(f"expected as many {what} as items, found {len(flat):,} for {int(lengths[has_any].sum()):,}")
    return flat, np.repeat(has_any, lengths)


def _concatenated(parts: Sequence[Sequences]) -> Sequences:
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])

    def together(name: str, kind: type) -> npt.NDArray[Any]:
        return np.concatenate([np.empty(0, kind), *(getattr(part, name) for part in parts)])

    return Sequences(
        together("users", np.int64), np.concatenate([[0], np.cumsum(lengths)]), together("items", np.int32),
        together("times", np.int64), together("valid_start", np.int64), together("test_start", np.int64),
        together("end", np.int64), together("values", np.float32), together("event_types", np.int8),
    )  # fmt: skip
