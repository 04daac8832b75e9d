"""A lake at one release, copied: the log of each table up to its version, and the files of that version.

The copy is a lake: its newest release is that one, and the next ETL run goes on from it. `.backup.json` names the
SHA-256 of every file; it is written last, so a copy without it is no backup.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from etl.jobs.releases import mark_removed, released, versions_of
from etl.lake.lease import WAIT_SECONDS, writing
from etl.lake.snapshots import (
    LakeError,
    active_files,
    check_formats,
    current_version,
    existing_table,
    lake_filesystem,
    open_table,
    our_commits,
    table_filesystem,
)
from etl.lake.suppression import KEY_FILE, SUPPRESSED
from etl.program import spelled
from etl.settings import GraftrecError
from etl.tables import RECOMMENDATIONS, RELEASES, TABLES, Table

MANIFEST = ".backup.json"
_PIECE_BYTES = 1 << 20


class BackupError(GraftrecError):
    """A backup that can't be made, or is none."""


def copy_lake(lake: str, to: Path, *, release: int | None = None, wait_seconds: float = WAIT_SECONDS) -> int:
    """Copy a lake at a release (None: the newest) to the new folder `to`; the release's number.

    Nobody else writes to the lake meanwhile. Raises BackupError, LakeError, LakeBusy.
    """
    if to.exists() and any(to.iterdir()):
        raise BackupError(f"{to}: expected a new or empty folder, found files; name another")
    with writing(lake, RELEASES, wait_seconds=wait_seconds):
        check_formats(lake)
        rows = {int(row["release"]): row for row in released(lake) if not row["removed"]}
        if not rows:
            raise BackupError(
                f"{lake}: expected a release, found none that can be read; run `{spelled('etl', 'all')}` first"
            )
        number = max(rows) if release is None else release
        if number not in rows:
            there = ", ".join(map(str, rows))
            raise BackupError(f"{lake}: expected release {number} with its files, found {there}; name one of these")
        versions = versions_of(rows[number])
        if number == max(rows) and (newest := current_version(lake, RECOMMENDATIONS)) is not None:
            versions[RECOMMENDATIONS.name] = newest
        versions[RELEASES.name] = _version_of_release(lake, number)
        to.mkdir(parents=True, exist_ok=True)
        for name, version in versions.items():
            _copy_table(lake, TABLES[name], version, to / name)
        for name in (SUPPRESSED, KEY_FILE):
            _copy_file(lake_filesystem(lake), name, to / name)
            if name == KEY_FILE and (to / name).exists():
                (to / name).chmod(0o600)
    others = [int(row["release"]) for row in released(str(to)) if row["release"] != number]
    mark_removed(str(to), others)
    (to / ".writer").unlink(missing_ok=True)
    (to / MANIFEST).write_text(json.dumps({"release": number, "files": dict(_digests(to))}, indent=1))
    return number


def check_backup(folder: Path) -> int:
    """The release that a copy holds. Raises BackupError where it isn't one, or a file is not as it was."""
    try:
        described: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files, number = dict(described["files"]), int(described["release"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupError(f"{folder}: expected a backup with {MANIFEST}, found none; name a finished one") from None
    found = dict(_digests(folder))
    if differing := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        raise BackupError(
            f"{folder / differing[0]}: expected the file that the backup recorded, found "
            f"{'another' if differing[0] in found else 'none'}; take another backup"
        )
    return number


def restore_lake(folder: Path, lake: Path) -> int:
    """Put the copy in `folder` where there is no lake; the release's number. Raises BackupError."""
    if lake.exists() and any(lake.iterdir()):
        raise BackupError(
            f"{lake}: expected a new or empty folder, found files; move them away, or name another --lake"
        )
    number = check_backup(folder)
    new = lake.with_name(f"{lake.name}.restoring")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new, ignore=shutil.ignore_patterns(MANIFEST))
    if lake.exists():
        lake.rmdir()
    new.rename(lake)
    return number


def _version_of_release(lake: str, number: int) -> int:
    """The newest version of the table of releases whose last release is `number`."""
    handle = existing_table(lake, RELEASES)
    commits = {int(one["version"]): int(one.get("release", 0)) for one in our_commits(handle)}
    if newer := [version for version, release in commits.items() if release > number]:
        return min(newer) - 1
    return int(handle.version())


def _copy_table(lake: str, table: Table, version: int, to: Path) -> None:
    handle = open_table(lake, table, version)
    assert handle is not None
    filesystem = table_filesystem(lake, table)
    listed = filesystem.get_file_info(pafs.FileSelector("_delta_log"))
    for info in listed:
        if info.base_name[:20].isdigit() and int(info.base_name[:20]) <= version:
            _copy_file(filesystem, info.path, to / info.path)
    for file in active_files(handle, table):
        _copy_file(filesystem, file.path, to / file.path)
    checkpoints = [int(path.name[:20]) for path in (to / "_delta_log").glob("*.checkpoint.parquet")]
    if checkpoints:
        (to / "_delta_log" / "_last_checkpoint").write_text(json.dumps({"version": max(checkpoints), "size": 0}))
    copied = open_table(str(to.parent), table)
    if copied is None or copied.version() != version:
        raise LakeError(f"{to}: expected version {version} of {table.name}, found another; make the backup again")


def _copy_file(filesystem: pafs.FileSystem, path: str, to: Path) -> None:
    try:
        with filesystem.open_input_file(path) as source:
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as target:
                while piece := source.read(_PIECE_BYTES):
                    target.write(piece)
    except FileNotFoundError:
        return


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, ".writer"):
            with path.open("rb") as file:
                yield str(path.relative_to(folder)), hashlib.file_digest(file, "sha256").hexdigest()
