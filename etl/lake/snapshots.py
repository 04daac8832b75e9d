"""A lake of Delta tables, without Spark: where a table lies, opening it, and the files and commits a version names.

The part of `spark_io` that only looks. What isn't a lake, a table or a whole log is refused in one line, and so is a
table with features (deletion vectors, column mapping…) that a reader of plain Parquet files would get wrong.
"""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import DeltaTable, Field, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from etl.lake.datafile import DataFile, partition_text, partition_value
from etl.lake.delta_log import check_log, recorded_snapshot, snapshot_digest
from etl.lake.forms import forms
from etl.lake.store_errors import store_problem
from etl.plain_path import delta_path
from etl.program import spelled
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import FORMAT, PROPERTY_FORMAT, TABLES, Table

STAGING = "_staging-"  # folders of unfinished writes, beside the data
_ADVICE = "give an empty folder or another --lake"
_RESTORE = "restore the log from a copy"


class LakeError(GraftrecError):
    """What lies at a lake's or a table's place can't be used as one."""


class OtherFormat(LakeError):
    """A lake whose tables are stored in an older format, or in one that this version doesn't know."""


class UnsupportedFeature(LakeError):
    """A table that uses a Delta feature this reader or writer doesn't know."""


def local_path(lake: str) -> Path | None:
    """The folder of a lake on a local disk, None for an object store's URI."""
    if lake.startswith("file://"):
        return Path(unquote(urlparse(lake).path))
    return None if "://" in lake else Path(lake)


def make_folder(folder: Path) -> None:
    """A local folder and those above it. Raises LakeError where there can't be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LakeError(f"{folder}: expected to make a folder ({error.strerror}); give another --lake") from None


def table_uri(lake: str, table: Table) -> str:
    """Where `table` lies: an absolute local path, or a URI."""
    local = local_path(lake)
    return str((local / table.name).absolute()) if local is not None else f"{lake.rstrip('/')}/{table.name}"


def delta_uri(lake: str, table: Table) -> str:
    """Where `deltalake` opens or makes `table`: at table_uri, or, where it would misread that path, through links."""
    uri = table_uri(lake, table)
    return uri if local_path(lake) is None else delta_path(uri)


def table_filesystem(lake: str, table: Table) -> pafs.FileSystem:
    """A pyarrow file system rooted at the table."""
    return lake_filesystem(table_uri(lake, table))


def lake_filesystem(place: str) -> pafs.FileSystem:
    """A pyarrow file system rooted at a lake, or a folder of it, on local disks or whatever store `deltalake`
    reaches."""
    folder = local_path(place)
    if folder is not None:
        return pafs.SubTreeFileSystem(str(folder.absolute()), pafs.LocalFileSystem())
    return pafs.PyFileSystem(DeltaStorageHandler(place.rstrip("/")))


def open_table(lake: str, table: Table, version: int | None = None) -> DeltaTable | None:
    """A fresh handle on `table` at `version` (None: the newest), or None where there is no such table.

    Raises LakeError where something else lies there, the log is torn, or the version isn't there; UnsupportedFeature
    where its readers need to know more than we do.
    """
    uri = table_uri(lake, table)
    logged = _check_place(lake, table)  # before opening: what is committed meanwhile is only newer
    if logged < 0 and local_path(lake) is not None:
        return None
    try:
        handle = DeltaTable(delta_uri(lake, table), version=version)
    except TableNotFoundError as error:
        if logged < 0:
            return None
        raise _unreadable(lake, table, version, error) from None
    except (DeltaError, OSError, ValueError, OverflowError) as error:
        raise _unreadable(lake, table, version, error) from None
    if version is None and handle.version() < logged:
        raise LakeError(f"{uri}: expected version {logged}, as logged, found {handle.version()}; restore the log")
    _check_features(handle, table)
    return handle


def existing_table(lake: str, table: Table, version: int | None = None) -> DeltaTable:
    """As open_table, but a table that isn't there is a LakeError too."""
    handle = open_table(lake, table, version)
    if handle is None:
        raise LakeError(
            f"{table_uri(lake, table)}: expected the Delta table {table.name}, found none; run its job first"
        )
    return handle


def current_version(lake: str, table: Table) -> int | None:
    """The newest version of `table`, None where there is no such table. Raises LakeError (see open_table)."""
    handle = open_table(lake, table)
    return None if handle is None else int(handle.version())


def last_commit(lake: str, table: Table, version: int | None = None) -> Mapping[str, Any]:
    """The custom metadata, with its `version`, of the newest version one of our jobs wrote; {} where there is none.

    `version`: the newest up to this one.
    """
    handle = open_table(lake, table)
    commits = iter(()) if handle is None else our_commits(handle)
    return next((commit for commit in commits if version is None or commit["version"] <= version), {})


def transactions(lake: str, table: Table, apps: Sequence[str]) -> dict[str, int]:
    """Application -> the newest version of it that has landed, of those of `apps` that have."""
    handle = open_table(lake, table)
    found = {} if handle is None else {app: handle.transaction_version(app) for app in apps}
    return {app: int(version) for app, version in found.items() if version is not None}


def our_commits(handle: DeltaTable) -> Iterator[dict[str, Any]]:
    """Custom metadata, with `version`, of the commits our jobs made, newest first."""
    try:
        history = handle.history()
    except (DeltaError, OSError, ValueError) as error:
        raise _unreadable_log(handle.table_uri, error) from None
    return (commit for commit in history if "app" in commit and "app_version" in commit)


def snapshot_files(
    lake: str, table: Table, version: int | None = None, partitions: Mapping[str, Sequence[Any]] | None = None
) -> list[DataFile]:
    """The files of `table` at `version` (None: the newest), sorted by path; only of `partitions` (column -> values).

    Raises LakeError where there is no such table or version, or (local disks) where one of the files is missing.
    """
    handle = existing_table(lake, table, version)
    check_contract(handle, lake, table)
    scope = partition_texts(table, partitions or {})
    files = [file for file in checked_files(handle, lake, table) if within(file, scope)]
    if local_path(lake) is not None:
        root = Path(table_uri(lake, table))
        for file in files:
            path = root / file.path
            if not path.is_file() or path.stat().st_size != file.size:
                raise LakeError(
                    f"{path}: version {handle.version()} of {table.name} needs this file of {file.size:,} bytes, found "
                    f"{'another size' if path.is_file() else 'none'}; restore it, or pin another version"
                )
    return files


def checked_files(handle: DeltaTable, lake: str, table: Table) -> list[DataFile]:
    """As active_files. Raises LakeError where they are not those that the version's commit recorded."""
    files = active_files(handle, table)
    recorded = recorded_snapshot(table_filesystem(lake, table), handle.version())
    if recorded not in (None, snapshot_digest(files, handle.metadata().configuration)):
        raise LakeError(
            f"{table_uri(lake, table)}: expected the files that the commit of version {handle.version()} recorded, "
            f"found the log altered; {_RESTORE}"
        )
    return files


def log_digest(lake: str, table: Table, version: int) -> str:
    """What a release records of a table: the digest of its files and properties at `version`. Raises LakeError."""
    handle = existing_table(lake, table, version)
    return snapshot_digest(checked_files(handle, lake, table), handle.metadata().configuration)


def active_files(handle: DeltaTable, table: Table) -> list[DataFile]:
    """The files a handle's version names, sorted by path."""
    actions = pa.table(handle.get_add_actions())
    if actions.num_rows == 0:
        return []
    partitions = actions.column("partition").to_pylist() if table.partition_by else [{}] * actions.num_rows
    rows = zip(actions.column("path").to_pylist(), partitions, actions.column("size_bytes").to_pylist(), strict=True)
    files = [
        DataFile(unquote(path), {column: partition_text(value) for column, value in values.items()}, size)
        for path, values, size in rows
    ]
    return sorted(files, key=lambda file: file.path)


def check_formats(lake: str) -> None:
    """Raise OtherFormat where a table of the lake is stored in another format than the contract's."""
    for table in TABLES.values():
        handle = open_table(lake, table)
        if handle is not None:
            check_format(handle, lake, table)


def check_format(handle: DeltaTable, lake: str, table: Table) -> None:
    """Raise OtherFormat unless the table is stored in the contract's format."""
    found = format_of(handle)
    if found > FORMAT:
        raise OtherFormat(
            f"{table_uri(lake, table)}: expected format {FORMAT} or older, found {found}; use a newer graftrec"
        )
    if found < table.format:
        raise OtherFormat(
            f"{lake}: expected tables of format {table.format} (times as timestamps, attributes as maps), found "
            f"{table.name} of format {found}; run `{spelled('etl', 'migrate')} --lake {shlex.quote(lake)}`"
        )


def format_of(handle: DeltaTable) -> int:
    """The format a table is stored in: see `etl.tables.FORMAT`."""
    return int(handle.metadata().configuration.get(PROPERTY_FORMAT, "1"))


def check_contract(handle: DeltaTable, lake: str, table: Table, *, exact: bool = False) -> None:
    """Raise LakeError unless the table has the contract's columns, types, nullability and partition columns.

    Columns that may be null and that the contract has gained at its end since may be missing. `exact`: as `table` is
    stored, not as a lake of another kind of time, or an older format, stores it.
    """
    form = form_of(handle, lake, table)
    if exact and form != table.stored:
        raise _other_columns(handle, lake, table)


def form_of(handle: DeltaTable, lake: str, table: Table) -> pa.Schema:
    """The schema that the table is stored in, with those of missing_columns: see `etl.lake.forms`.

    Raises LakeError where it is none of these.
    """
    found, partitioned = [*handle.schema().fields, *missing_columns(handle, table)], handle.metadata().partition_columns
    form = next((form for form in forms(table) if Schema.from_arrow(form).fields == found), None)
    if form is None or tuple(partitioned) != table.partition_by:
        raise _other_columns(handle, lake, table)
    return form


def _other_columns(handle: DeltaTable, lake: str, table: Table) -> LakeError:
    found, partitioned = handle.schema(), handle.metadata().partition_columns
    expected = Schema.from_arrow(table.stored)
    ours, theirs = ({field.name: field for field in schema.fields} for schema in (expected, found))
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    what = f"columns {differing} differ" if differing else f"order or partition columns {list(partitioned)} differ"
    return LakeError(
        f"{table_uri(lake, table)}: expected the columns of etl/tables.py, but {what}; write it anew to another lake"
    )


def missing_columns(handle: DeltaTable, table: Table) -> list[Field]:
    """Columns that may be null, at the contract's end, that a table of an earlier version lacks."""
    names = {field.name for field in handle.schema().fields}
    fields: list[Field] = Schema.from_arrow(table.stored).fields
    last = itertools.takewhile(lambda field: field.nullable and field.name not in names, reversed(fields))
    return list(last)[::-1]


def partition_texts(table: Table, scope: Mapping[str, Sequence[Any]]) -> dict[str, list[str | None]]:
    """Partition values as the log spells them. Raises LakeError for a column or a value that can't be one."""
    texts: dict[str, list[str | None]] = {}
    for column, values in scope.items():
        if column not in table.partition_by:
            raise LakeError(f"{table.name}: expected partition columns {list(table.partition_by)}, found {column}")
        texts[column] = [partition_text(value) for value in values]
        for text in texts[column]:
            try:
                partition_value(text, table.schema.field(column))
            except ValueError as error:
                raise LakeError(f"{table.name}: partition column {column}: {error}; name one that can be") from None
    return texts


def within(file: DataFile, scope: Mapping[str, Sequence[str | None]]) -> bool:
    """Whether a file's partition is one that `scope` (column -> values) names."""
    return all(file.partition[column] in values for column, values in scope.items())


def _unreadable(lake: str, table: Table, version: int | None, error: Exception) -> LakeError:
    uri = table_uri(lake, table)
    if problem := store_problem(uri, error):
        return LakeError(problem)
    if version is not None:
        try:
            newest = DeltaTable(delta_uri(lake, table)).version()
        except (DeltaError, OSError, ValueError):
            pass
        else:
            return LakeError(f"{uri}: expected version {version} of {table.name}, newest is {newest}; pin one it has")
    reason = one_line(error)
    return LakeError(f"{uri}: expected the Delta table {table.name}, its log can't be read ({reason}); restore the log")


def _unreadable_log(place: str, error: Exception) -> LakeError:
    """The fault of the store where it is one, else of the log."""
    reason = one_line(error)
    return LakeError(store_problem(place, error) or f"{place}: its log can't be read ({reason}); {_RESTORE}")


def _check_place(lake: str, table: Table) -> int:
    """Refuse what isn't a lake, a table or a whole log. The newest version in the log, -1 for none."""
    root = local_path(lake)
    if root is not None and not _is_table(root, table):
        return -1
    place = table_uri(lake, table)
    try:
        return check_log(table_filesystem(lake, table), place)
    except ValueError as error:
        raise LakeError(f"{place}: {error}; {_RESTORE}") from None
    except OSError as error:
        raise _unreadable_log(place, error) from None


def _is_table(root: Path, table: Table) -> bool:
    """Whether the lake at `root` has the table. Refuses what isn't a lake or a table."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise LakeError(f"{root}: expected a lake (a folder of Delta tables), found a file; {_ADVICE}")
    entries = sorted(path.name for path in root.iterdir() if path.name[0] not in "._")
    if (root / "_delta_log").exists() or (entries and not any(name in (*TABLES, table.name) for name in entries)):
        found = "a single table" if (root / "_delta_log").exists() else ", ".join(entries[:3])
        raise LakeError(f"{root}: expected a lake (a folder of Delta tables), found {found}; {_ADVICE}")
    folder = root / table.name
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise LakeError(f"{folder}: expected the Delta table {table.name}, found a file; {_ADVICE}")
    log = folder / "_delta_log"
    if not log.is_dir():
        ours = ("part-", STAGING, ".", *(f"{column}=" for column in table.partition_by[:1]))  # of an unfinished write
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
        begun = foreign == [log.name] and log.is_dir()  # by another process, since we looked
        if foreign and not begun:
            raise LakeError(f"{folder}: expected the Delta table {table.name}, found {foreign[0]}; {_ADVICE}")
        return False
    return True


def _check_features(handle: DeltaTable, table: Table) -> None:
    protocol = handle.protocol()
    features = set(protocol.reader_features or [])
    if handle.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        features.add("columnMapping")
    if features or protocol.min_reader_version > 3:
        names = ", ".join(sorted(features)) or f"reader version {protocol.min_reader_version}"
        raise UnsupportedFeature(
            f"{table.name}: its readers must know {names}, which graftrec doesn't; rewrite the table without"
        )
