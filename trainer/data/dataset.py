"""A pinned release of the lake, read through Arrow: vocabularies, knowledge, and sequences as flat arrays."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake.exceptions import TableNotFoundError

from etl import tables
from etl.config import GraftrecError
from etl.tables import FIRST_INDEX, Table

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


class DataError(GraftrecError):
    """A lake, release, split or domain that is not there, or a file that can't be read."""


@dataclass(frozen=True)
class Release:
    """One consistent set of table versions."""

    lake: str
    number: int
    versions: dict[str, int]

    def files(self, table: Table, partitions: dict[str, str] | None = None) -> list[str]:
        """Data files of a table's pinned version, sorted by path; only those of the partitions named."""
        handle = _open(self.lake, table, self.versions.get(table.name))
        filters: list[Any] = [(column, "=", value) for column, value in (partitions or {}).items()]
        return sorted(handle.file_uris(partition_filters=filters or None))

    def read(self, table: Table, columns: Sequence[str], partitions: dict[str, str] | None = None) -> pa.Table:
        """`columns` (no partition columns) of a table, in the order of its files. For vocabulary-sized tables."""
        files = self.files(table, partitions)
        schema = pa.schema([table.schema.field(name) for name in columns])
        if not files:
            return schema.empty_table()
        return (
            pads.dataset(files, format="parquet", schema=_data_schema(table))
            .to_table(columns=list(columns))
            .cast(schema)
        )


def _data_schema(table: Table) -> pa.Schema:
    """The schema of a table's data files: partition columns live in the log. All nullable, as writers make them."""
    return pa.schema([field.with_nullable(True) for field in table.schema if field.name not in table.partition_by])


def _open(lake: str, table: Table, version: int | None) -> deltalake.DeltaTable:
    try:
        return deltalake.DeltaTable(f"{lake.rstrip('/')}/{table.name}", version=version)
    except TableNotFoundError:
        raise DataError(
            f"no table {table.name} in the lake {lake}: expected those of a complete run; run `python -m etl all` on it"
        ) from None
    except Exception as error:  # deltalake raises a plain DeltaError for a version that is not there or a torn log
        raise DataError(
            f"table {table.name} of the lake {lake}, version {version}: {' '.join(str(error).split())}"
        ) from None


def pin(lake: str, release: int | None) -> Release:
    """The release to read: the one named, else the newest. Raises DataError."""
    rows = _open(lake, tables.RELEASES, None).to_pyarrow_table(columns=["release", "tables"]).to_pylist()
    known = {row["release"]: row for row in rows}
    if not known:
        raise DataError(f"the lake {lake} has no complete release; run `python -m etl all --lake {lake}`")
    number = max(known) if release is None else release
    if number not in known:
        raise DataError(f"no release {number} in the lake {lake}; it has {min(known)} to {max(known)}")
    return Release(lake, number, {entry["table"]: entry["version"] for entry in known[number]["tables"]})


@dataclass(frozen=True)
class Catalogue:
    """A domain's items as model rows: rows below FIRST_INDEX are reserved, then kept items by global index.

    global_index [V]; raw ids [V] (empty for reserved rows); popularity [V], interactions in the training part of the
    domain.
    """

    global_index: IntArray
    raw_ids: list[str]
    titles: list[str]

    def __len__(self) -> int:
        return len(self.global_index)

    @functools.cached_property
    def row_of(self) -> Int32Array:
        """Global index -> row; UNK where the domain lacks the item."""
        lookup = np.full(int(self.global_index.max(initial=FIRST_INDEX)) + 1, tables.UNK, dtype=np.int32)
        lookup[self.global_index] = np.arange(len(self), dtype=np.int32)
        return lookup

    def rows(self, index: npt.NDArray[Any]) -> Int32Array:
        """Rows of global indices, whatever is beyond the catalogue as UNK."""
        clipped = np.minimum(index, len(self.row_of) - 1)
        return np.where(index < len(self.row_of), self.row_of[clipped], np.int32(tables.UNK)).astype(np.int32)


def read_catalogue(release: Release, domain: str) -> Catalogue:
    """The kept items of a domain. Raises DataError where the domain is unknown or keeps none."""
    members = release.read(tables.DOMAINS, ["index"], {"domain": domain})
    if not len(members):
        known = sorted({part["domain"] for part in _partitions(release, tables.DOMAINS)})
        raise DataError(
            f"no domain {domain!r} in release {release.number} of {release.lake}; it has {', '.join(known)}"
        )
    items = release.read(tables.ITEMS, ["index", "item", "title", "kept"])
    items = items.filter(items["kept"])
    items = items.filter(pa.compute.is_in(items["index"], value_set=members["index"])).sort_by("index")
    if not len(items):
        raise DataError(f"domain {domain!r} keeps no item after k-core; loosen kcore.min_item or the domain's rule")
    reserved = list(range(FIRST_INDEX))
    titles = items["title"].fill_null("").to_pylist()
    return Catalogue(
        np.concatenate([reserved, items["index"].to_numpy()]).astype(np.int64),
        [""] * FIRST_INDEX + items["item"].to_pylist(),
        [""] * FIRST_INDEX + titles,
    )


def _partitions(release: Release, table: Table) -> list[dict[str, str]]:
    partitions: list[dict[str, str]] = _open(release.lake, table, release.versions.get(table.name)).partitions()
    return partitions


def domains_with_sequences(release: Release, split: str) -> list[str]:
    """Domains that have sequences in a split; none where there is no such split."""
    return sorted({part["domain"] for part in _partitions(release, tables.SEQUENCES) if part["split"] == split})


def vocabulary_size(release: Release, table: Table) -> int:
    """Largest index of a vocabulary plus one; FIRST_INDEX for an empty one."""
    if table.name not in release.versions:
        return FIRST_INDEX
    index = release.read(table, ["index"])["index"]
    return int(pa.compute.max(index).as_py()) + 1 if len(index) else FIRST_INDEX


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
        chosen = triples.filter(pa.compute.equal(triples["relation"], relation)).sort_by(
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
    """Many users' sequences as flat arrays: row u's items are ``items[offsets[u]:offsets[u + 1]]`` (global indices)."""

    users: IntArray  # [U] global user index
    offsets: IntArray  # [U + 1]
    items: Int32Array  # [sum of lengths]
    times: IntArray  # [sum of lengths]
    valid_start: IntArray  # [U]
    test_start: IntArray  # [U]
    end: IntArray  # [U]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def nbytes(self) -> int:
        return int(self.items.nbytes + self.times.nbytes + 5 * self.users.nbytes)

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
        )  # fmt: skip


_OFFSETS = ("valid_start", "test_start", "end")


class SequenceDataset:
    """The sequences of one split and domain of a release, as row groups that can be read in any combination."""

    def __init__(self, release: Release, split: str, domain: str) -> None:
        self.release, self.split, self.domain = release, split, domain
        self.files = release.files(tables.SEQUENCES, {"split": split, "domain": domain})
        if not self.files:
            known = sorted({(p["split"], p["domain"]) for p in _partitions(release, tables.SEQUENCES)})
            raise DataError(
                f"no sequences of split {split!r} and domain {domain!r} in release {release.number} of {release.lake}; "
                f"it has {', '.join('/'.join(pair) for pair in known)}"
            )
        self.groups: list[tuple[str, int]] = []
        self.rows_per_group: list[int] = []
        for file in self.files:
            metadata = _parquet(file).metadata
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group))
                self.rows_per_group.append(metadata.row_group(group).num_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_group)

    def read(self, groups: Sequence[int], *, times: bool = False) -> Sequences:
        """Some row groups, in the order given. Raises DataError naming a file that can't be read."""
        wanted = ["user", "items", *_OFFSETS, *(["times"] if times else [])]
        parts: list[pa.Table] = []
        by_file: dict[str, list[int]] = {}
        for group in groups:
            file, number = self.groups[group]
            by_file.setdefault(file, []).append(number)
        for file, numbers in by_file.items():
            try:
                parts.append(_parquet(file).read_row_groups(numbers, columns=wanted, use_threads=False))
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"can't read {file}: {' '.join(str(error).split())}; restore it, or run `python -m etl sequences`"
                ) from None
        return _flatten(pa.concat_tables(parts), times=times)

    def read_all(self, *, times: bool = False) -> Sequences:
        return self.read(range(len(self.groups)), times=times)


def training_interactions(dataset: SequenceDataset, catalogue: Catalogue) -> IntArray:
    """Interactions [V] of each catalogue row in all users' training parts, 0 for reserved rows; by row group."""
    counts = np.zeros(len(catalogue), dtype=np.int64)
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        lengths = np.diff(sequences.offsets)
        position = np.arange(len(sequences.items)) - np.repeat(sequences.offsets[:-1], lengths)
        trained = sequences.items[position < np.repeat(sequences.valid_start, lengths)]
        counts += np.bincount(catalogue.rows(trained), minlength=len(catalogue))
    counts[:FIRST_INDEX] = 0
    return counts


def _parquet(file: str) -> pq.ParquetFile:
    path = file.removeprefix("file://")
    try:
        return pq.ParquetFile(path if Path(path).exists() else file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"can't read {file}: {' '.join(str(error).split())}") from None


def _flatten(table: pa.Table, *, times: bool) -> Sequences:
    def column(name: str) -> IntArray:
        values: IntArray = table[name].to_numpy().astype(np.int64)
        return values

    items = table["items"].combine_chunks()
    if isinstance(items, pa.ChunkedArray):
        items = items.chunk(0) if items.num_chunks else pa.array([], pa.list_(pa.int32()))
    offsets = items.offsets.to_numpy().astype(np.int64)
    flat_times = np.empty(0, dtype=np.int64)
    if times:
        stamps = pa.compute.list_flatten(table["times"])
        flat_times = stamps.to_numpy().astype(np.int64)
    return Sequences(
        column("user"), offsets - offsets[0], items.flatten().to_numpy(zero_copy_only=False), flat_times,
        column("valid_start"), column("test_start"), column("end"),
    )  # fmt: skip
