"""A pinned release of the lake: its tables, and their data files, checked and opened."""

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl import tables
from etl.config import ColdItemsConfig, SplitConfig, etl_command
from etl.lake import file_reader
from etl.lake.datafile import DataFile
from etl.lake.delta_log import snapshot_digest
from etl.lake.readers import mark_reading
from etl.lake.snapshots import (
    LakeError,
    check_format,
    checked_files,
    open_table,
    our_commits,
    table_uri,
    within,
)
from etl.plain_path import absolute
from etl.program import spelled
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, TIME_TIMESTAMP, Table
from trainer.arrays import IntArray

FOOTERS = 64  # of data files, kept: a twentieth of what a row group takes is reading its file's anew


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
    by_time: Mapping[str, dt.datetime] = field(default_factory=dict)  # split by time -> until when it trains
    cold_items: Mapping[str, ColdItemsConfig] = field(default_factory=dict)  # split with cold items -> which they are
    etl: Mapping[str, Any] = field(default_factory=dict)  # the ETL's configuration, as recorded; {}: not known

    @property
    def splits(self) -> list[SplitConfig]:
        """The rules of its splits, as far as it says."""
        fields = SplitConfig.model_fields
        return [SplitConfig(**{key: one[key] for key in fields if key in one}) for one in self.etl.get("splits", ())]

    def split(self, name: str) -> SplitConfig | None:
        """The rule of a split; None where the release doesn't say."""
        return next((split for split in self.splits if split.name == name), None)

    @property
    def has_mere_order(self) -> bool:
        """Whether the log has an order of events, and no times. Raises DataError."""
        properties = (
            _open(self.lake, tables.SEQUENCES, self.versions.get(tables.SEQUENCES.name)).metadata().configuration
        )
        return bool(properties.get(tables.PROPERTY_TIME) == tables.TIME_ORDINAL)

    def has_validation(self, split: str) -> bool:
        """Whether the split may have one, as far as its rule says."""
        rule = self.split(split)
        return rule is None or rule.has_validation

    def files(self, table: Table, partitions: Mapping[str, str | None] | None = None) -> list[TableFile]:
        """Data files of a table's pinned version, sorted by path; only those of the partitions named. Their bytes are
        checked. Raises DataError."""
        scope = {column: [value] for column, value in (partitions or {}).items()}
        paths = [file for file in self._logged(table) if within(file, scope)]
        try:
            file_reader.check_files(self.lake, table, [file.path for file in paths])
        except GraftrecError as error:
            raise DataError(str(error)) from None
        return [TableFile(self.lake, table, file.path) for file in paths]

    def by_bucket(self, table: Table, partitions: Mapping[str, str | None]) -> dict[int, list[TableFile]]:
        """Bucket of users -> data files of a table's pinned version, of the partitions named. Raises DataError."""
        scope = {column: [value] for column, value in partitions.items()}
        found: dict[int, list[TableFile]] = {}
        for file in self._logged(table):
            if within(file, scope):
                found.setdefault(int(file.partition["bucket"] or 0), []).append(TableFile(self.lake, table, file.path))
        return found

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

    def has_times(self, table: Table) -> bool:
        """Whether the times of a table are times, and not mere order. Raises DataError."""
        handle = _open(self.lake, table, self.versions.get(table.name))
        time = handle.metadata().configuration.get(tables.PROPERTY_TIME, TIME_TIMESTAMP)
        return bool(time == TIME_TIMESTAMP)

    def require_times(self, table: Table, reader: str) -> None:
        """Raises DataError where the log has no times, which `reader` reads."""
        if not self.has_times(table):
            raise DataError(
                f"expected a log with times, which {reader} reads (model.time), found mere order in {table.name} of "
                f"release {self.number} of {self.lake}; leave model.time out, or name the log's column of times and "
                f"its unit in the source (columns.time, time_unit) and run {etl_command(self.lake)} into another lake"
            )

    def read(
        self,
        table: Table,
        columns: Sequence[str],
        partitions: Mapping[str, str | None] | None = None,
        *,
        indices: IntArray | None = None,
    ) -> pa.Table:
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
    """The release to read: the one named, else the newest. Until this process ends, maintenance leaves its files.

    Raises DataError.
    """
    found = described(lake, release)
    mark_reading(found.lake, found.number)
    return described(found.lake, found.number, readable=True)  # not removed before the mark was there


def described(lake: str, release: int | None, *, readable: bool = False) -> Release:
    """As pin, for what is recorded of a release: its files may be gone, or go, unless it is to be `readable`."""
    lake = absolute(lake)  # what a run records is known from every folder
    handle = _open(lake, tables.RELEASES, None)
    try:
        check_format(handle, lake, tables.RELEASES)
    except LakeError as error:
        raise DataError(str(error)) from None
    rows = (
        Release(lake, 0, {tables.RELEASES.name: handle.version()})
        .read(tables.RELEASES, ["release", "tables", "config", "removed"])
        .to_pylist()
    )
    known = {row["release"]: row for row in rows}
    if not known:
        raise DataError(f"the lake {lake} has no complete release; run {etl_command(lake)}")
    number = max(known) if release is None else release
    if number not in known:
        raise DataError(f"no release {number} in the lake {lake}; it has {min(known)} to {max(known)}")
    if readable and (removed := known[number]["removed"]):
        there = ", ".join(str(one) for one, row in known.items() if not row["removed"])
        raise DataError(
            f"release {number} of {lake}: expected its files, found that maintenance removed them at {removed}; pin "
            f"one that is there: {there}"
        )
    try:
        commits = [commit for commit in our_commits(handle) if commit.get("release") == str(number)]
    except LakeError as error:
        raise DataError(str(error)) from None
    digests = json.loads(commits[0].get("digests", "{}")) if commits else {}
    versions = {entry["table"]: entry["version"] for entry in known[number]["tables"]}
    etl = json.loads(known[number]["config"])
    splits = etl.get("splits", ())
    by_time = {split["name"]: _date(split["train_until"]) for split in splits if split.get("train_until")}
    cold = {split["name"]: ColdItemsConfig(**split["cold_items"]) for split in splits if split.get("cold_items")}
    return Release(lake, number, versions, digests, by_time, cold, etl)


def created(lake: str) -> dict[int, dt.datetime]:
    """Release -> when it was made. Raises DataError."""
    handle = _open(lake, tables.RELEASES, None)
    found = Release(absolute(lake), 0, {tables.RELEASES.name: handle.version()}).read(
        tables.RELEASES, ["release", "created"]
    )
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return {row["release"]: epoch + dt.timedelta(microseconds=row["created"]) for row in found.to_pylist()}


def _date(written: str) -> dt.datetime:
    """As the ETL reads it: in UTC unless it gives an offset."""
    date = dt.datetime.fromisoformat(written)
    return date if date.tzinfo else date.replace(tzinfo=dt.UTC)


def known_sequences(release: Release, table: Table) -> list[tuple[str, str]]:
    """Splits and domains that a table has."""
    return sorted({(str(part["split"]), str(part["domain"])) for part in release.partitions(table)})


def domains_with_sequences(release: Release, split: str) -> list[str]:
    """Domains that have sequences in a split; none where there is no such split."""
    return sorted({str(part["domain"]) for part in release.partitions(tables.SEQUENCES) if part["split"] == split})


def num_buckets(release: Release) -> int:
    """Into how many buckets a lake's users are parted."""
    handle = _open(release.lake, tables.SEQUENCES, release.versions.get(tables.SEQUENCES.name))
    return int(handle.metadata().configuration[tables.PROPERTY_BUCKETS])


def vocabulary_size(release: Release, table: Table) -> int:
    """Largest index of a vocabulary plus one; FIRST_INDEX for an empty one."""
    if table.name not in release.versions:
        return FIRST_INDEX
    index = release.read(table, ["index"])["index"]
    return int(pc.max(index).as_py()) + 1 if len(index) else FIRST_INDEX


@contextmanager
def blamed(file: TableFile) -> Iterator[None]:
    """What goes wrong while a data file is read, as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except GraftrecError as error:
        raise DataError(str(error)) from None
    except (OSError, pa.ArrowException, Damage) as error:
        reason = one_line(error)
        raise DataError(
            f"can't read {file}: {reason}; restore it, or write its table anew by `{spelled('etl', 'all')}`"
        ) from None


class Damage(Exception):
    """Contents that the contract rules out."""


def metadata(file: TableFile) -> pq.FileMetaData:
    with open_parquet(file) as parquet:
        return parquet.metadata


@contextmanager
def open_parquet(file: TableFile, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """The file, opened for the context. `metadata`: its footer, where it was read before."""
    with file_reader.open_parquet(file.lake, file.table, file.path, metadata=metadata) as parquet:
        yield parquet
