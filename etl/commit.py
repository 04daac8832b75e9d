"""Delta tables without Spark: open one, commit data files to it exactly once, remove what no version names.

The part of `etl.delta` that talks to the log; apart because racing processes, tests and maintenance need it without a
JVM. All of a write is *one* Delta transaction. It carries an application transaction (app, version) that is read and
committed on the same handle, so a repeated, duplicated or racing delivery lands once. `max_commit_retries` is 0: the
log is never rebased beneath a decision; a loser opens a fresh handle, looks again and decides again.
"""

import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from etl.config import GraftrecError
from etl.datafile import DataFile, InvalidFile, check_file, partition_text, partition_value
from etl.tables import TABLES, Table

Mode = Literal["append", "overwrite", "partitions"]
STAGING = "_staging-"  # folders of unfinished writes, beside the data
PATIENCE_SECONDS = 120.0  # how long a loser of races tries again


class LakeError(GraftrecError):
    """What lies at a lake's or a table's place can't be used as one."""


class UnsupportedFeature(LakeError):
    """A table that uses a Delta feature this reader or writer doesn't know."""


class CommitConflict(GraftrecError):
    """A commit that kept losing to others."""


@dataclass(frozen=True)
class Written:
    """What a write left: the table's version that holds it, its rows, and whether this call committed it."""

    version: int
    rows: int
    committed: bool


# --- where tables lie ---------------------------------------------------------------------------------------------------


def local_path(lake: str) -> Path | None:
    """The folder of a lake on a local disk, None for an object store's URI."""
    if lake.startswith("file://"):
        return Path(unquote(urlparse(lake).path))
    return None if "://" in lake else Path(lake)


def table_uri(lake: str, table: Table) -> str:
    """Where `table` lies: an absolute local path, or a URI."""
    local = local_path(lake)
    return str((local / table.name).absolute()) if local is not None else f"{lake.rstrip('/')}/{table.name}"


def table_filesystem(lake: str, table: Table) -> pafs.FileSystem:
    """A pyarrow file system rooted at the table, on local disks or whatever store `deltalake` reaches."""
    uri = table_uri(lake, table)
    if local_path(lake) is not None:
        return pafs.SubTreeFileSystem(uri, pafs.LocalFileSystem())
    return pafs.PyFileSystem(DeltaStorageHandler(uri))


def open_table(lake: str, table: Table, version: int | None = None) -> DeltaTable | None:
    """A fresh handle on `table` at `version` (None: the newest), or None where there is no such table.

    Raises LakeError where something else lies there, the log is torn, or the version isn't there; UnsupportedFeature
    where its readers need to know more than we do.
    """
    uri = table_uri(lake, table)
    logged = _check_local(lake, table)
    try:
        handle = DeltaTable(uri, version=version)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError, ValueError) as error:
        raise _unreadable(uri, table, version, error) from None
    if version is None and handle.version() < logged:
        raise LakeError(
            f"{uri}: the log has version {logged}, but only {handle.version()} is readable; restore the log"
        )
    _check_features(handle, table)
    return handle


def current_version(lake: str, table: Table) -> int | None:
    """The newest version of `table`, None where there is no such table. Raises LakeError (see open_table)."""
    handle = open_table(lake, table)
    return None if handle is None else int(handle.version())


def last_commit(lake: str, table: Table) -> Mapping[str, Any]:
    """The custom metadata of the newest version that one of our jobs wrote, with its `version`; {} where there is none."""
    handle = open_table(lake, table)
    return {} if handle is None else next(_our_commits(handle), {})


def _our_commits(handle: DeltaTable) -> Iterator[dict[str, Any]]:
    return (commit for commit in handle.history() if "app" in commit and "app_version" in commit)


def _unreadable(uri: str, table: Table, version: int | None, error: Exception) -> LakeError:
    reason = " ".join(str(error).split())
    if version is not None:
        try:
            newest = DeltaTable(uri).version()
        except (DeltaError, OSError, ValueError):
            pass
        else:
            return LakeError(
                f"{uri}: expected version {version} of {table.name}, found 0 to {newest}; pin one of these"
            )
    return LakeError(
        f"{uri}: expected the Delta table {table.name}, found one that can't be read ({reason}); restore its log"
    )


def _check_local(lake: str, table: Table) -> int:
    """On a local disk: refuse what isn't a lake, a table or a whole log. The newest version in the log, -1 for none."""
    root = local_path(lake)
    if root is None or not root.exists():
        return -1
    advice = "give an empty folder or another --lake"
    if not root.is_dir():
        raise LakeError(f"{root}: expected a lake (a folder of Delta tables), found a file; {advice}")
    entries = [path.name for path in root.iterdir() if path.name[0] not in "._"]
    known = {*TABLES, table.name}
    if (root / "_delta_log").exists() or (entries and not any(name in known for name in entries)):
        found = "a single table" if (root / "_delta_log").exists() else ", ".join(sorted(entries)[:3])
        raise LakeError(f"{root}: expected a lake (a folder of Delta tables), found {found}; {advice}")
    folder = root / table.name
    if not folder.exists():
        return -1
    if not folder.is_dir():
        raise LakeError(f"{folder}: expected the Delta table {table.name}, found a file; {advice}")
    log = folder / "_delta_log"
    if not log.is_dir():
        ours = ("part-", *(f"{column}=" for column in table.partition_by[:1]))
        if foreign := [p.name for p in folder.iterdir() if not p.name.startswith((*ours, STAGING, "."))]:
            raise LakeError(f"{folder}: expected the Delta table {table.name}, found {min(foreign)}; {advice}")
        return -1
    versions = {int(path.stem): path for path in log.glob("*.json") if re.fullmatch(r"\d{20}", path.stem)}
    for version, path in versions.items():
        if path.stat().st_size == 0:
            raise LakeError(f"{path}: expected version {version} of {table.name}, found an empty file; restore the log")
    return max(versions, default=-1)


def _check_features(handle: DeltaTable, table: Table) -> None:
    protocol = handle.protocol()
    features = list(protocol.reader_features or [])
    mapping = handle.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mapping != "none" and "columnMapping" not in features:
        features.append("columnMapping")
    if features or protocol.min_reader_version > 2:
        names = ", ".join(sorted(features)) or f"reader version {protocol.min_reader_version}"
        raise UnsupportedFeature(
            f"{table.name}: its readers must know {names}, which graftrec doesn't; rewrite the table without"
        )


# --- snapshots ----------------------------------------------------------------------------------------------------------


def snapshot_files(
    lake: str, table: Table, version: int | None = None, partitions: Mapping[str, Sequence[Any]] | None = None
) -> list[DataFile]:
    """The files of `table` at `version` (None: the newest), sorted by path; only of `partitions` (column -> values).

    Raises LakeError where there is no such table or version, or (local disks) where one of the files is missing.
    """
    handle = open_table(lake, table, version)
    if handle is None:
        raise LakeError(
            f"{table_uri(lake, table)}: expected the Delta table {table.name}, found none; run the job that writes it"
        )
    check_contract(handle, lake, table)
    scope = partition_scope_texts(table, partitions or {})
    files = [file for file in active_files(handle, table) if _within(file, scope)]
    if local_path(lake) is not None:
        root = Path(table_uri(lake, table))
        for file in files:
            path = root / file.path
            if not path.is_file() or path.stat().st_size != file.size:
                raise LakeError(
                    f"{path}: version {handle.version()} of {table.name} needs this file of {file.size:,} bytes, "
                    f"found {'another size' if path.is_file() else 'none'}; restore it, or pin another version"
                )
    return files


def active_files(handle: DeltaTable, table: Table) -> list[DataFile]:
    """The files a handle's version names, sorted by path."""
    actions = pa.table(handle.get_add_actions())
    if actions.num_rows == 0:
        return []
    partitions = actions.column("partition").to_pylist() if table.partition_by else [{}] * actions.num_rows
    rows = zip(actions.column("path").to_pylist(), partitions, actions.column("size_bytes").to_pylist(), strict=True)
    return sorted(
        (
            DataFile(unquote(path), {k: partition_text(v) for k, v in values.items()}, size)
            for path, values, size in rows
        ),
        key=lambda file: file.path,
    )


def check_contract(handle: DeltaTable, lake: str, table: Table) -> None:
    """Raise LakeError unless the table has the contract's columns, types, nullability and partition columns."""
    found, expected = handle.schema(), Schema.from_arrow(table.schema)
    partitioned = tuple(handle.metadata().partition_columns)
    if found == expected and partitioned == table.partition_by:
        return
    ours, theirs = ({field.name: field for field in schema.fields} for schema in (expected, found))
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    what = (
        f"columns {differing} differ"
        if differing
        else f"it is ordered or partitioned otherwise, by {list(partitioned)}"
    )
    raise LakeError(
        f"{table_uri(lake, table)}: expected the columns of etl/tables.py, but {what}; write it anew to another lake"
    )


def partition_scope_texts(table: Table, scope: Mapping[str, Sequence[Any]]) -> dict[str, list[str | None]]:
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
                raise LakeError(f"{table.name}: partition column {column}: {error}") from None
    return texts


def _within(file: DataFile, scope: Mapping[str, Sequence[str | None]]) -> bool:
    return all(file.partition[column] in values for column, values in scope.items())


# --- commits ------------------------------------------------------------------------------------------------------------


def commit_files(
    lake: str,
    table: Table,
    files: Sequence[DataFile],
    *,
    mode: Mode,
    app: str,
    app_version: int,
    metadata: Mapping[str, str],
    properties: Mapping[str, str] | None = None,
    partition_scope: Mapping[str, Sequence[Any]] | None = None,
    transactions: Mapping[str, int] | None = None,
) -> Written:
    """Verify `files` and commit them all in one transaction, once per (app, app_version).

    `mode`: "append" adds; "overwrite" replaces the table; "partitions" replaces the partitions the files belong to, or
    those `partition_scope` (column -> values; columns left out match anything) names. `properties` are table properties,
    set when the table is made, and when it is overwritten. `transactions` are recorded beside (app, app_version), for
    `transactions()` to find. Raises InvalidFile, LakeError, CommitConflict; the table is then as it was.
    """
    if done := landed(lake, table, app, app_version):
        return done
    filesystem = table_filesystem(lake, table)
    checked = [check_file(filesystem, file, table) for file in files]
    _check_distinct([file.path for file in files], table)
    scope = None if partition_scope is None else partition_scope_texts(table, partition_scope)
    rows = sum(count for _, count in checked)
    if files and (root := local_path(lake)) is not None:
        _check_inside(Path(table_uri(lake, table)), files)
        _sync_data(root, Path(table_uri(lake, table)), files)
    custom = {**metadata, "app": app, "app_version": str(app_version), "rows": str(rows)}
    recorded = [Transaction(name, number) for name, number in {**(transactions or {}), app: app_version}.items()]
    deadline = time.monotonic() + PATIENCE_SECONDS
    for attempt in range(1_000_000):
        handle = open_table(lake, table)
        if handle is None:
            _create(lake, table, properties or {})
            continue
        if done := _landed(handle, app, app_version):
            return done
        check_contract(handle, lake, table)
        _check_writable(handle, table, mode)
        if _set_properties(handle, table, mode, properties or {}):
            continue
        existing = active_files(handle, table)
        _check_distinct([file.path for file in (*existing, *files)], table)
        how, filters = _replacement(table, files, existing, mode, scope)
        try:
            handle.create_write_transaction(
                [action for action, _ in checked],
                how,
                handle.schema(),
                list(table.partition_by),
                filters,
                commit_properties=CommitProperties(custom, 0, recorded),
                post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
            )
        except (DeltaError, OSError) as error:
            # Whatever was raised, the commit may have landed: ours or a twin's. Only a fresh handle knows.
            if done := landed(lake, table, app, app_version):
                _sync_log(lake, table, done.version)
                return done
            if not isinstance(error, CommitFailedError):
                raise LakeError(
                    f"{table.name}: the commit failed ({' '.join(str(error).split())}); try again"
                ) from None
            if time.monotonic() > deadline:
                raise CommitConflict(
                    f"{table.name}: expected to commit within {PATIENCE_SECONDS:.0f} s, others were always faster "
                    f"({attempt + 1} tries); run fewer writers at once, or again"
                ) from None
            time.sleep(random.uniform(0, min(0.02 * 2**attempt, 1.0)))
            continue
        version = int(handle.version()) + 1
        _sync_log(lake, table, version)
        return Written(version, rows, True)
    raise AssertionError("unreachable")


def landed(lake: str, table: Table, app: str, app_version: int) -> Written | None:
    """What an earlier call with this (app, app_version), or a newer version of app, committed; None if nothing."""
    handle = open_table(lake, table)
    return None if handle is None else _landed(handle, app, app_version)


def transactions(lake: str, table: Table, apps: Sequence[str]) -> dict[str, int]:
    """Application -> the newest version of it that has landed, of those of `apps` that have."""
    handle = open_table(lake, table)
    found = {} if handle is None else {app: handle.transaction_version(app) for app in apps}
    return {app: int(version) for app, version in found.items() if version is not None}


def _landed(handle: DeltaTable, app: str, app_version: int) -> Written | None:
    recorded = handle.transaction_version(app)
    if recorded is None or recorded < app_version:
        return None
    for commit in _our_commits(handle):
        if commit["app"] == app and int(commit["app_version"]) == app_version:
            return Written(int(commit["version"]), int(commit["rows"]), False)
    return Written(int(handle.version()), 0, False)  # its commit has left the log


def _create(lake: str, table: Table, properties: Mapping[str, str]) -> None:
    """Version 0: an empty table. One of several racing creators wins, the others find its table."""
    uri = table_uri(lake, table)
    if local_path(lake) is not None:
        Path(uri).mkdir(parents=True, exist_ok=True)
    try:
        DeltaTable.create(
            uri,
            table.schema,
            mode="error",
            partition_by=list(table.partition_by),
            configuration=dict(properties),
            raise_if_key_not_exists=False,
        )
    except (DeltaError, OSError) as error:
        if open_table(lake, table) is None:
            raise LakeError(f"{uri}: can't make a table ({' '.join(str(error).split())})") from None
    _sync_log(lake, table, 0)


def _set_properties(handle: DeltaTable, table: Table, mode: Mode, properties: Mapping[str, str]) -> bool:
    """Whether table properties had to be changed, in a commit of its own, which only an overwrite may do."""
    found = handle.metadata().configuration
    changed = {key: value for key, value in properties.items() if found.get(key) != value}
    if not changed:
        return False
    if mode != "overwrite":
        differing = ", ".join(f"{key}={found.get(key)} (now {value})" for key, value in changed.items())
        raise LakeError(
            f"{table.name}: its rows were written with {differing}; overwrite the whole table, or keep the setting"
        )
    try:
        handle.alter.set_table_properties(changed, raise_if_not_exists=False)
    except CommitFailedError:
        pass  # somebody was faster: look again
    return True


def _check_writable(handle: DeltaTable, table: Table, mode: Mode) -> None:
    configuration = handle.metadata().configuration
    constraints = [key for key in configuration if key.startswith("delta.constraints.")]
    features = sorted(handle.protocol().writer_features or [])
    if constraints or features or handle.protocol().min_writer_version > 2:
        names = ", ".join(constraints or features) or f"writer version {handle.protocol().min_writer_version}"
        raise UnsupportedFeature(
            f"{table.name}: its writers must know {names}, which graftrec doesn't; rewrite the table without"
        )
    if mode != "append" and configuration.get("delta.appendOnly", "false") == "true":
        raise LakeError(f"{table.name}: expected to replace rows, found delta.appendOnly=true; append, or unset it")


def _replacement(
    table: Table,
    files: Sequence[DataFile],
    existing: Sequence[DataFile],
    mode: Mode,
    scope: Mapping[str, Sequence[str | None]] | None,
) -> tuple[str, list[tuple[str, str, list[str]]] | None]:
    """deltalake's mode and partition filters. It removes what they match and checks nothing, so it is checked here."""
    if mode != "partitions":
        return mode, None
    if not table.partition_by:
        raise LakeError(f"{table.name}: expected partition columns to replace by, found none; overwrite or append")
    touched = {file.key(table) for file in files}
    if scope is None:
        scope = {c: sorted({key[i] for key in touched}, key=str) for i, c in enumerate(table.partition_by)}
        if lost := {file.key(table) for file in existing if _within(file, scope)} - touched:
            raise LakeError(
                f"{table.name}: replacing the partitions written would remove others too, such as {min(lost, key=str)}; "
                f"name a partition_scope, or write all of them"
            )
    elif outside := [file for file in files if not _within(file, scope)]:
        raise InvalidFile(
            f"{table.name}: {outside[0].path} belongs to {dict(outside[0].partition)}, outside the replaced partitions; "
            f"write it apart, or widen the scope"
        )
    if not all(scope.values()):  # nothing to replace: only the transaction is recorded
        return "append", None
    return "overwrite", [(column, "in", [text or "" for text in texts]) for column, texts in scope.items()]


def _check_distinct(paths: Sequence[str], table: Table) -> None:
    if twice := sorted({path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else ()):
        raise InvalidFile(f"{table.name}: expected each file once, found {twice[0]} twice; name new files by a UUID")


def _check_inside(root: Path, files: Sequence[DataFile]) -> None:
    real = os.path.realpath(root)
    for file in files:
        if not os.path.realpath(root / file.path).startswith(real + os.sep):
            raise InvalidFile(
                f"{file.path}: expected a file under {root}, found a link that leads out of it; copy it there"
            )


# --- to disk ------------------------------------------------------------------------------------------------------------


def _sync_data(lake: Path, root: Path, files: Sequence[DataFile]) -> None:
    """Files first, then every folder between them and the lake, so that a commit never names what power loss can take."""
    folders = {lake, root}
    for file in files:
        path = root / file.path
        _sync(path)
        folders.update(parent for parent in path.parents if parent.is_relative_to(root))
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        _sync(folder)


def _sync_log(lake: str, table: Table, version: int) -> None:
    root = local_path(lake)
    if root is None:
        return
    log = Path(table_uri(lake, table)) / "_delta_log"
    for path in [*log.glob(f"{version:020d}.*"), log / "_last_checkpoint", log, log.parent, root]:
        if path.exists():
            _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
