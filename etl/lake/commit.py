"""Data files into a Delta table, exactly once: verified, synced to disk, committed in one transaction.

Apart from `spark_io` because racing processes and tests need it without a JVM. All of a write is *one* transaction. It
carries an application transaction (app, version) that is read and committed on the same handle, so a repeated,
duplicated or racing delivery lands once. `max_commit_retries` is 0: the log is never rebased beneath a decision (an
append that lands under a stale partition overwrite would survive in the replaced partition); a loser opens a fresh
handle, looks again and decides again.
"""

import contextlib
import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction

from etl.durable import sync
from etl.lake.datafile import DataFile, InvalidFile, check_file
from etl.lake.delta_log import seal, snapshot_digest
from etl.lake.lease import as_writer, check_lease
from etl.lake.snapshots import (
    LakeError,
    UnsupportedFeature,
    active_files,
    check_contract,
    delta_uri,
    local_path,
    make_folder,
    missing_columns,
    open_table,
    our_commits,
    partition_texts,
    table_filesystem,
    table_uri,
    within,
)
from etl.lake.store_errors import store_problem
from etl.redaction import one_line
from etl.settings import RunAgain
from etl.tables import PROPERTY_FORMAT, Table

Mode = Literal["append", "overwrite", "partitions"]
PATIENCE_SECONDS = 120.0  # how long a loser of races tries again
CHECKERS = 8  # threads that read footers


class CommitConflict(RunAgain):
    """A commit that kept losing to others."""


@dataclass(frozen=True)
class Written:
    """What a write left: the table's version that holds it, its rows, and whether this call committed it."""

    version: int
    rows: int
    committed: bool


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a transaction does to a table, once per (app, app_version), and what it records.

    `mode`: "append" adds; "overwrite" replaces the table; "partitions" replaces the partitions the files belong to, or
    those `partition_scope` (column -> values; columns left out match anything) names. `properties` are the table's,
    beside the contract's, set when it is made, and when it is overwritten. `transactions` are recorded beside
    (app, app_version), for `snapshots.transactions` to find.
    """

    mode: Mode
    app: str
    app_version: int
    metadata: Mapping[str, str]
    properties: Mapping[str, str] | None = None
    partition_scope: Mapping[str, Sequence[Any]] | None = None
    transactions: Mapping[str, int] | None = None


@as_writer
def commit_files(lake: str, table: Table, files: Sequence[DataFile], commit: Commit) -> Written:
    """Verify `files` and commit them all in one transaction.

    No file is ever deleted. Only the lake's writer commits (`lake.lease`): others wait.
    Raises InvalidFile, LakeError, CommitConflict, LakeBusy, LeaseLost; the table's rows are then as they were.
    """
    mode, app, app_version = commit.mode, commit.app, commit.app_version
    partition_scope, properties = commit.partition_scope, commit.properties or {}
    if done := landed(lake, table, app, app_version):
        return done
    if mode != "partitions" and partition_scope is not None:
        raise LakeError(
            f"{table.name}: expected no partition_scope with mode {mode}; replace partitions, or leave it out"
        )
    scope = None if partition_scope is None else partition_texts(table, partition_scope)
    actions, rows = _check(lake, table, files)
    _sync_data(lake, table, files)
    mark = uuid.uuid4().hex  # tells our commit from a twin's
    commit_info = {**commit.metadata, "app": app, "app_version": str(app_version), "rows": str(rows), "commit": mark}
    landing = {**(commit.transactions or {}), app: app_version}
    added = [DataFile(action.path, action.partition_values, action.size) for action in actions]
    deadline = time.monotonic() + PATIENCE_SECONDS
    losses = 0
    while True:
        check_lease(lake)
        handle = open_table(lake, table)
        if handle is None:
            _create(lake, table, properties)
            continue
        if done := _landed(handle, lake, table, app, app_version, mark):
            return done
        check_contract(handle, lake, table)
        _check_writable(handle, table, mode)
        if gained := missing_columns(handle, table):
            with contextlib.suppress(CommitFailedError):  # somebody was faster: look again
                handle.alter.add_columns(gained)
            continue
        if changed := _changed_properties(handle, table, mode, properties):
            set_properties(handle, lake, table, changed)
            continue
        if mode != "overwrite":
            check_contract(handle, lake, table, exact=True)
        existing = active_files(handle, table)
        _check_distinct([file.path for file in (*existing, *files)], table)
        how, filters, replaced = _replacement(table, files, existing, mode, scope)
        gone = {file.path for file in replaced}
        kept = [file for file in existing if file.path not in gone]
        named = snapshot_digest([*kept, *added], handle.metadata().configuration)
        commit_properties = CommitProperties(
            seal({**commit_info, "snapshot": named}, actions, sorted(gone), landing),
            0,
            [Transaction(name, number) for name, number in landing.items()],
        )
        check_lease(lake)
        try:
            handle.create_write_transaction(
                actions,
                how,
                Schema.from_arrow(table.stored),
                list(table.partition_by),
                filters,
                commit_properties=commit_properties,
                post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
            )
        except (DeltaError, OSError) as error:
            # Whatever was raised, the commit may have landed: ours or a twin's. Only a fresh handle knows.
            if not isinstance(error, CommitFailedError) and landed(lake, table, app, app_version) is None:
                raise LakeError(
                    store_problem(table_uri(lake, table), error)
                    or f"{table.name}: the commit failed ({one_line(error)}); try again"
                ) from None
            losses += 1
            if time.monotonic() > deadline:
                raise CommitConflict(
                    f"{table.name}: expected to commit within {PATIENCE_SECONDS:.0f} s, others were faster "
                    f"{losses:,} times; run fewer writers at once, or again"
                ) from None
            time.sleep(random.uniform(0, min(0.02 * 2 ** min(losses, 8), 1.0)))
            continue
        version = int(handle.version()) + 1  # with no retries, the one after the handle's
        _sync_log(lake, table, version)
        return Written(version, rows, True)


def landed(lake: str, table: Table, app: str, app_version: int) -> Written | None:
    """What an earlier call with this (app, app_version), or a newer version of app, committed; None if nothing."""
    handle = open_table(lake, table)
    return None if handle is None else _landed(handle, lake, table, app, app_version)


def _landed(handle: DeltaTable, lake: str, table: Table, app: str, app_version: int, mark: str = "") -> Written | None:
    """See landed. `mark`: what this call's commit carries; it may have landed though an error was raised."""
    recorded = handle.transaction_version(app)
    if recorded is None or recorded < app_version:
        return None
    for commit in our_commits(handle):
        if commit["app"] == app and int(commit["app_version"]) == app_version:
            _sync_log(lake, table, int(commit["version"]))  # its writer may have died before it could
            return Written(int(commit["version"]), int(commit["rows"]), bool(mark) and commit.get("commit") == mark)
    return Written(int(handle.version()), 0, False)  # a newer version of app, or its commit has left the log


# --- what is checked --------------------------------------------------------------------------------------------------


def _check(lake: str, table: Table, files: Sequence[DataFile]) -> tuple[list[AddAction], int]:
    """Log entries of all files, each verified, and their rows."""
    _check_distinct([file.path for file in files], table)
    filesystem = table_filesystem(lake, table)
    with ThreadPoolExecutor(CHECKERS) as pool:
        checked = list(pool.map(lambda file: check_file(filesystem, file, table), files))
    if local_path(lake) is not None:
        root = os.path.realpath(table_uri(lake, table))
        for file in files:
            if not os.path.realpath(os.path.join(root, file.path)).startswith(root + os.sep):
                raise InvalidFile(f"{file.path}: expected a file in {root}, found a link that leads out; copy it there")
    return [action for action, _ in checked], sum(rows for _, rows in checked)


def _check_distinct(paths: Sequence[str], table: Table) -> None:
    if len(set(paths)) < len(paths):
        seen: set[str] = set()
        twice = next(path for path in paths if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise InvalidFile(f"{table.name}: expected each file once, found {twice} twice; name new files by a UUID")


def _check_writable(handle: DeltaTable, table: Table, mode: Mode) -> None:
    configuration, protocol = handle.metadata().configuration, handle.protocol()
    needed = [key for key in configuration if key.startswith("delta.constraints.")] or list(
        protocol.writer_features or []
    )
    if needed or protocol.min_writer_version > 2:
        names = ", ".join(sorted(needed)) or f"writer version {protocol.min_writer_version}"
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
) -> tuple[str, list[tuple[str, str, Any]] | None, Sequence[DataFile]]:
    """deltalake's mode and partition filters, and the files that go. It removes what they match and checks nothing, so
    it is checked here."""
    if mode != "partitions":
        return mode, None, existing if mode == "overwrite" else []
    if not table.partition_by or (scope is not None and not scope):
        raise LakeError(f"{table.name}: expected partition columns to replace by, found none; overwrite or append")
    if scope is None:
        touched = {file.key(table) for file in files}
        scope = {c: sorted({key[i] for key in touched}, key=str) for i, c in enumerate(table.partition_by)}
        if lost := {file.key(table) for file in existing if within(file, scope)} - touched:
            raise LakeError(
                f"{table.name}: replacing the partitions written would remove others too, such as "
                f"{min(lost, key=str)}; name a partition_scope, or write all of them"
            )
    elif outside := [file for file in files if not within(file, scope)]:
        raise InvalidFile(
            f"{table.name}: {outside[0].path} belongs to {dict(outside[0].partition)}, outside the partitions that are "
            f"replaced; write it apart, or widen the scope"
        )
    replaced = [file for file in existing if within(file, scope)]
    return *_filters(table, existing, replaced), replaced


def _filters(
    table: Table, existing: Sequence[DataFile], replaced: Sequence[DataFile]
) -> tuple[str, list[tuple[str, str, Any]] | None]:
    """Partition filters that match exactly `replaced`, which a scope cut out of `existing`."""
    if not replaced:
        return "append", None
    filters: list[tuple[str, str, Any]] = []
    for column in table.partition_by:
        texts = {file.partition[column] for file in replaced}
        if texts == {file.partition[column] for file in existing}:
            continue
        if texts == {None}:
            filters.append((column, "=", ""))  # deltalake's spelling of null, which "in" doesn't know
        elif None in texts:
            raise LakeError(
                f"{table.name}: the null and other values of {column} can't be replaced at once; do it apart"
            )
        else:
            filters.append((column, "in", sorted(text for text in texts if text is not None)))
    return "overwrite", filters or None


# --- what is committed besides ----------------------------------------------------------------------------------------


def _create(lake: str, table: Table, properties: Mapping[str, str]) -> None:
    """Version 0: an empty table. One of several racing creators wins, the others find its table."""
    uri = table_uri(lake, table)
    if local_path(lake) is not None:
        make_folder(Path(uri))
    try:
        DeltaTable.create(
            delta_uri(lake, table),
            table.stored,
            mode="error",
            partition_by=list(table.partition_by),
            configuration={**table.properties, **properties},
            raise_if_key_not_exists=False,
            commit_properties=CommitProperties(max_commit_retries=0),  # a retry would add a second table's metadata
        )
    except (DeltaError, OSError) as error:
        if open_table(lake, table) is None:
            reason = store_problem(uri, error)
            raise LakeError(reason or f"{uri}: a table can't be made ({one_line(error)}); mend that") from None
    _sync_log(lake, table, 0)


def _changed_properties(handle: DeltaTable, table: Table, mode: Mode, properties: Mapping[str, str]) -> dict[str, str]:
    """The table properties that have to be changed, which only an overwrite may do. The format is none: migration sets
    it."""
    found = handle.metadata().configuration
    wanted = {key: value for key, value in table.properties.items() if key != PROPERTY_FORMAT} | dict(properties)
    changed = {key: value for key, value in wanted.items() if found.get(key) != value}
    if changed and mode != "overwrite":
        differing = ", ".join(f"{key}={found.get(key)} (now {value})" for key, value in changed.items())
        raise LakeError(f"{table.name}: its rows were written with {differing}; overwrite it all, or keep the setting")
    return changed


def set_properties(handle: DeltaTable, lake: str, table: Table, properties: Mapping[str, str]) -> None:
    """Set table properties, in a commit of its own, unless somebody was faster: look again."""
    check_lease(lake)
    with contextlib.suppress(CommitFailedError):
        handle.alter.set_table_properties(dict(properties), raise_if_not_exists=False)
    _sync_log(lake, table, int(handle.version()))


# --- to disk ----------------------------------------------------------------------------------------------------------


def _sync_data(lake: str, table: Table, files: Sequence[DataFile]) -> None:
    """Files first, then every folder up to the lake, so that no commit names what a power loss can take."""
    if local_path(lake) is None or not files:
        return
    root = Path(table_uri(lake, table))
    folders = {root, root.parent}
    for file in files:
        path = root / file.path
        sync(path)
        folders.update(parent for parent in path.parents if parent.is_relative_to(root))
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        sync(folder)


def _sync_log(lake: str, table: Table, version: int) -> None:
    """The log entry, a checkpoint beside it, and the folders up to the one that holds the lake."""
    if local_path(lake) is None:
        return
    log = Path(table_uri(lake, table)) / "_delta_log"
    entries = [*log.glob(f"{version:020d}.*"), log / "_last_checkpoint", log]
    for path in [*entries, log.parent, log.parent.parent, log.parent.parent.parent]:
        with contextlib.suppress(FileNotFoundError):
            sync(path)
