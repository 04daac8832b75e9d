"""Remove releases, and files that no release needs: listed first, removed when that is asked for.

The newest releases stay, and those that a live process reads (`etl.lake.readers`). A release that goes is first marked
as removed, so that nobody pins it any more, and only then are readers looked for and files deleted. Files that were
written or replaced lately stay in any case: their commit may be on the way, or somebody without a mark may read them.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from etl.jobs.releases import mark_removed, released, versions_of
from etl.lake.lease import WAIT_SECONDS, writing
from etl.lake.readers import readers
from etl.lake.retention import remove_orphans
from etl.lake.small_files import bytes_under
from etl.lake.snapshots import LakeError, check_formats, lake_filesystem, open_table
from etl.tables import RELEASES, TABLES


@dataclass
class Removal:
    """What a lake has, and what goes. `files`: table -> files that go; bytes are of files on the storage."""

    kept: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    read: dict[int, list[str]] = field(default_factory=dict)  # release -> live processes
    files: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_freed: int = 0
    tables: dict[str, int] = field(default_factory=dict)  # table -> bytes before


def remove(
    lake: str,
    *,
    keep_releases: int,
    older_than_seconds: float,
    keep: Collection[int] = (),
    apply: bool = False,
    wait_seconds: float = WAIT_SECONDS,
) -> Removal:
    """Find what nothing needs, and, with `apply`, delete it. `keep`: releases that stay besides.

    Raises LakeError, also where a release that stays can't be opened: nothing is deleted then; LakeBusy.
    """
    with writing(lake, RELEASES, wait_seconds=wait_seconds):
        check_formats(lake)
        found = [table for table in TABLES.values() if open_table(lake, table) is not None]
        if not found:
            raise LakeError(f"{lake}: expected a lake (a folder of Delta tables), found no table; mend --lake")
        there = [row for row in released(lake) if not row["removed"]]
        numbers = [int(row["release"]) for row in there]
        result = Removal(read={number: who for number, who in readers(lake).items() if number in numbers})
        wanted = {*numbers[-keep_releases:], *result.read, *keep}
        result.removed = [number for number in numbers if number not in wanted]
        if apply and result.removed:
            mark_removed(lake, result.removed)
            result.read = readers(lake)  # one may have come before the mark
        held = {*wanted, *result.read}
        result.kept = [number for number in numbers if number in held]
        versions = [versions_of(row) for row in released(lake) if int(row["release"]) in held]
        for table in found:
            keep_versions = sorted({one[table.name] for one in versions if table.name in one})
            orphans = remove_orphans(
                lake, table, older_than_seconds=older_than_seconds, keep_versions=keep_versions, dry_run=True
            )
            result.tables[table.name] = bytes_under(lake, table.name)
            if orphans:
                result.files[table.name] = len(orphans)
                result.bytes_freed += _bytes_of(lake, [f"{table.name}/{path}" for path in orphans])
        result.bytes_before = sum(result.tables.values())
        if apply:
            for table in found:  # every version that stays has been opened
                keep_versions = sorted({one[table.name] for one in versions if table.name in one})
                remove_orphans(lake, table, older_than_seconds=older_than_seconds, keep_versions=keep_versions)
        return result


def _bytes_of(lake: str, paths: list[str]) -> int:
    return sum(info.size or 0 for info in lake_filesystem(lake).get_file_info(paths))
