"""Files that no version needs any more: of writes that died, and of versions that have been replaced.

Not `DeltaTable.vacuum`: that compares percent-encoded paths with plain ones, and writes versions of its own into the
log, by which every job downstream would take its inputs for changed.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from urllib.parse import unquote

import pyarrow.fs as pafs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from etl.durable import sync
from etl.lake.lease import as_writer, check_lease
from etl.lake.snapshots import (
    STAGING,
    LakeError,
    active_files,
    existing_table,
    local_path,
    open_table,
    table_filesystem,
    table_uri,
)
from etl.lake.store_errors import store_problem
from etl.lake.write_tasks import abandon
from etl.redaction import one_line
from etl.tables import Table

_OWN_NAME = re.compile(r"(.*/)?part-[0-9a-f]{32}(\.[0-9a-f]{8})?\.zstd\.parquet")
_CLOCK_SECONDS = 1.0  # a file's time may lie before the clock's


@contextlib.contextmanager
def unfinished_removed(lake: str, table: Table) -> Iterator[None]:
    """Where a write fails or is stopped within, delete the data files that it has left.

    These are files named as ours, made since it began, that no version names. Only a process that is the lake's writer
    deletes any: files that others are about to commit look alike.
    """
    since = time.time() - _CLOCK_SECONDS
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what failed is said, not that something is left
            check_lease(lake)
            abandon()
            _remove_unfinished(lake, table, since)
        raise


def _remove_unfinished(lake: str, table: Table, since: float) -> None:
    filesystem = table_filesystem(lake, table)
    listed = filesystem.get_file_info(pafs.FileSelector("", recursive=True))
    newest = open_table(lake, table)
    keep: set[str] = set()
    if newest is not None:
        keep = {file.path for file in active_files(newest, table)} | _replaced_since(newest, filesystem, since)
    for info in listed:
        is_new = info.mtime is not None and info.mtime.timestamp() >= since
        if info.type == pafs.FileType.File and is_new and _OWN_NAME.fullmatch(info.path) and info.path not in keep:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_file(info.path)
    if local_path(lake) is not None:
        folders = [info.path for info in listed if info.type == pafs.FileType.Directory]
        for path in [*sorted(folders, key=len, reverse=True), ""]:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(os.path.join(table_uri(lake, table), path))


@as_writer
def remove_orphans(
    lake: str, table: Table, *, older_than_seconds: float, keep_versions: Sequence[int], dry_run: bool = False
) -> list[str]:
    """Delete the files of `table` that neither its newest version nor `keep_versions` (of held releases) name.

    Returns their paths. A file stays while it is younger than `older_than_seconds` (its commit may be on the way), or
    was replaced less than that ago (somebody may be reading it): give more than any write or unpinned read takes.
    Nothing is deleted, and LakeError raised, where one of `keep_versions` can't be opened. `dry_run`: only tell.
    """
    horizon = time.time() - older_than_seconds
    filesystem = table_filesystem(lake, table)
    existing_table(lake, table)
    # Files are listed before the log is read, so a commit in between only adds to what is kept.
    listed = filesystem.get_file_info(pafs.FileSelector("", recursive=True))
    newest = existing_table(lake, table)
    keep = {file.path for file in active_files(newest, table)} | _replaced_since(newest, filesystem, horizon)
    for version in set(keep_versions):
        keep |= {file.path for file in active_files(existing_table(lake, table, version), table)}
    orphans = sorted(
        info.path
        for info in listed
        if info.type == pafs.FileType.File
        and not info.path.startswith("_delta_log/")
        and info.path not in keep
        and info.mtime is not None
        and info.mtime.timestamp() < horizon
    )
    if not dry_run:
        for path in orphans:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_file(path)
        _remove_staging(lake, table, listed, horizon)
    return orphans


@as_writer
def drop_history(lake: str, table: Table) -> int:
    """Make the newest version of `table` the only one that its log knows: a checkpoint of it, and no entry before.

    Entries of the log name the least and greatest value of each column of their files, users among them. Returns the
    number of entries and checkpoints that are gone. Killed, it can be called again. Raises LakeError.
    """
    handle = existing_table(lake, table)
    newest, filesystem = int(handle.version()), table_filesystem(lake, table)
    listed = filesystem.get_file_info(pafs.FileSelector("_delta_log"))
    names = {info.base_name: info.path for info in listed if info.type == pafs.FileType.File}
    older = sorted(name for name in names if name[:20].isdigit() and int(name[:20]) < newest)
    if not older:
        return 0
    if not any(name.startswith(f"{newest:020d}.checkpoint") for name in names):
        try:
            handle.create_checkpoint()
        except (DeltaError, OSError) as error:
            reason = store_problem(table_uri(lake, table), error) or one_line(error)
            raise LakeError(f"{table_uri(lake, table)}: no checkpoint can be made ({reason}); mend that") from None
        if (folder := local_path(lake)) is not None:
            for path in (folder / table.name / "_delta_log").iterdir():
                sync(path)
            sync(folder / table.name / "_delta_log")
    check_lease(lake)
    for name in older:  # the oldest first: what is left has no gap
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(names[name])
    return len(older)


def _replaced_since(newest: DeltaTable, filesystem: pafs.FileSystem, horizon: float) -> set[str]:
    """Files that versions younger than `horizon` (seconds since 1970) removed, read from their log entries."""
    removed: set[str] = set()
    for commit in newest.history():
        if commit.get("timestamp", 0) / 1000 < horizon:
            continue
        with filesystem.open_input_stream(f"_delta_log/{commit['version']:020d}.json") as entry:
            actions = [json.loads(line) for line in entry.read().decode().splitlines() if line]
        removed |= {unquote(action["remove"]["path"]) for action in actions if "remove" in action}
    return removed


def _remove_staging(lake: str, table: Table, listed: Sequence[pafs.FileInfo], horizon: float) -> None:
    """Old staging folders that are empty. Partition folders stay: another writer may be about to use them."""
    if local_path(lake) is None:
        return
    old = [i for i in listed if i.type == pafs.FileType.Directory and i.mtime and i.mtime.timestamp() < horizon]
    for path in sorted((info.path for info in old if info.path.startswith(STAGING)), key=len, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(table_uri(lake, table), path))
