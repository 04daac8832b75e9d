"""A lake of an older format brought to the contract's (`etl.tables.FORMAT`), in place, by its one writer.

A table's files are written again in the new form and replace the old ones in one transaction; then the table gets its
format's number. A last, empty commit repeats what the table's job recorded, with the new versions of its inputs. The
table of releases comes last: until then the lake counts as old. Its transaction adds a release of the new versions,
where they belong together. Killed anywhere, the same command goes on from the tables that are done. Old releases stay,
and can be read.
"""

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from etl.jobs.releases import check_inputs, checked
from etl.lake.commit import Commit, CommitConflict, commit_files, set_properties
from etl.lake.datafile import DataFile, data_schema, partition_value
from etl.lake.file_reader import open_parquet
from etl.lake.forms import with_gained
from etl.lake.lease import WAIT_SECONDS, writing
from etl.lake.records import renewed_record
from etl.lake.retention import unfinished_removed
from etl.lake.snapshots import (
    LakeError,
    check_formats,
    checked_files,
    existing_table,
    form_of,
    format_of,
    open_table,
    our_commits,
    table_filesystem,
)
from etl.lake.spark_io import FileWriter, data_files
from etl.program import spelled
from etl.tables import (
    FORMAT,
    INTERACTIONS,
    PROPERTY_TIME,
    QUARANTINE,
    RECOMMENDATIONS,
    RELEASES,
    SEQUENCES,
    TABLES,
    TIME_TIMESTAMP,
    Table,
)

_ROWS, _RECORD = "migrate/rows", "migrate/record"  # applications of our two commits; the format is their version


def migrate(lake: str, *, wait_seconds: float = WAIT_SECONDS) -> None:
    """Bring the lake to the contract's format. Raises LakeError, LakeBusy, LeaseLost."""
    with writing(lake, RELEASES, wait_seconds=wait_seconds):
        found = [table for table in TABLES.values() if open_table(lake, table) is not None]
        if not found:
            raise LakeError(f"{lake}: expected a lake (a folder of Delta tables), found no table; mend --lake")
        if all(format_of(existing_table(lake, table)) >= table.format for table in found):
            check_formats(lake)
            print(f"{lake}: every table is of format {FORMAT} already", flush=True)
            return
        kind = _kind_of_time(lake)
        newest: dict[str, int] = {}  # of tables that are done
        last_job: dict[str, int] = {}  # the version of the last commit of each table's job
        for table in (table.of(kind) if table.name != RELEASES.name else table for table in found):
            if table.name in (QUARANTINE.name, RECOMMENDATIONS.name):
                newest[table.name] = int(existing_table(lake, table).version())
            elif table.name == RELEASES.name:
                _migrate_releases(lake, newest)
            else:
                recorded = _recorded_by_job(existing_table(lake, table))
                last_job[table.name] = int(recorded.get("version", -1))
                newest[table.name] = _migrate_table(lake, table, renewed_record(recorded, newest, last_job))


def _kind_of_time(lake: str) -> str:
    for table in (INTERACTIONS, SEQUENCES):
        handle = open_table(lake, table)
        if handle is not None and (kind := handle.metadata().configuration.get(PROPERTY_TIME)):
            return str(kind)
        if handle is not None:
            raise LakeError(
                f"{handle.table_uri}: expected the table property {PROPERTY_TIME}, found none; make the tables anew in "
                "another lake"
            )
    return TIME_TIMESTAMP


def _recorded_by_job(handle: DeltaTable) -> dict[str, Any]:
    """The newest commit that isn't one of this module; {} where there is none."""
    return next((commit for commit in our_commits(handle) if commit["app"] not in (_ROWS, _RECORD)), {})


def _migrate_table(lake: str, table: Table, metadata: Mapping[str, str]) -> int:
    """The table's version of the contract's format."""
    begun = time.monotonic()
    rows = None
    if form_of(existing_table(lake, table), lake, table) != table.stored:
        with unfinished_removed(lake, table):
            files = _rewritten(lake, table)
            rows = _commit(lake, table, files, _ROWS, metadata)
    _set_format(lake, table)
    record = Commit(mode="append", app=_RECORD, app_version=FORMAT, metadata=metadata)
    written = commit_files(lake, table, [], record)
    did = "unchanged" if rows is None else f"{rows:,} rows, {time.monotonic() - begun:.1f} s"
    print(f"{table.name:<13}{did} (version {written.version})", flush=True)
    return written.version


def _rewritten(lake: str, table: Table) -> list[DataFile]:
    """The files of the table's newest version, each as a new file of the contract's form."""
    files = checked_files(existing_table(lake, table), lake, table)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return data_files(pool.map(lambda file: _rewritten_file(lake, table, file), files))
    finally:
        pool.shutdown(cancel_futures=True)


def _rewritten_file(lake: str, table: Table, file: DataFile) -> str:
    key = tuple(partition_value(file.partition[name], table.schema.field(name)) for name in table.partition_by)
    writer = FileWriter(table_filesystem(lake, table), table, key)
    with open_parquet(lake, table, file.path) as opened:
        for group in range(opened.num_row_groups):
            for batch in opened.read_row_group(group, use_threads=False).to_batches():
                writer.add(with_gained(batch, data_schema(table)))
    return str(writer.close()["file"][0].as_py())


def _commit(lake: str, table: Table, files: list[DataFile], app: str, metadata: Mapping[str, str]) -> int:
    """The rows that replace the table's."""
    done = Commit(mode="overwrite", app=app, app_version=FORMAT, metadata=metadata)
    return commit_files(lake, table, files, done).rows


def _set_format(lake: str, table: Table) -> None:
    handle = existing_table(lake, table)
    if format_of(handle) < table.format:
        set_properties(handle, lake, table, table.properties)


# --- releases ---------------------------------------------------------------------------------------------------------


def _migrate_releases(lake: str, newest: Mapping[str, int]) -> None:
    """`newest`: the migrated versions."""
    handle = existing_table(lake, RELEASES)
    if form_of(handle, lake, RELEASES) != RELEASES.stored:
        rows = _released(lake, handle)
        last = max(rows.to_pylist(), key=lambda row: int(row["release"]), default=None)
        new = None if last is None else _new_release(lake, last, newest)
        with unfinished_removed(lake, RELEASES):
            if new is None:
                metadata = renewed_record(_recorded_by_job(handle), {}, {})
                _commit(lake, RELEASES, _written(lake, rows), _ROWS, metadata)
            else:
                row, metadata = new
                rows = pa.concat_tables([rows, pa.Table.from_pylist([row], schema=RELEASES.schema)])
                _commit_release(lake, rows, metadata)
    _set_format(lake, RELEASES)
    print(f"{lake} is of format {FORMAT}", flush=True)


def _released(lake: str, handle: DeltaTable) -> pa.Table:
    rows = [RELEASES.schema.empty_table()]
    for file in checked_files(handle, lake, RELEASES):
        with open_parquet(lake, RELEASES, file.path) as opened:
            found = [with_gained(batch, RELEASES.schema) for batch in opened.iter_batches()]
            rows += [pa.Table.from_batches([one]).select(RELEASES.schema.names).cast(RELEASES.schema) for one in found]
    return pa.concat_tables(rows)


def _new_release(
    lake: str, last: Mapping[str, Any], newest: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The row of a release of the migrated versions, and what its commit records. None where a run that hasn't ended
    left tables that don't belong together."""
    versions = {entry["table"]: newest[entry["table"]] for entry in last["tables"] if entry["table"] in newest}
    number = int(last["release"]) + 1
    try:
        check_inputs(lake, versions)
    except CommitConflict:
        print(f"releases     no new one: the last run has not ended; run `{spelled('etl', 'all')}` again", flush=True)
        return None
    print(f"releases     release {number} has the rows of these tables as they are now", flush=True)
    tables = [{"table": name, "version": version} for name, version in sorted(versions.items())]
    digests = json.dumps(checked(lake, versions), sort_keys=True)
    named = json.dumps(versions, sort_keys=True)
    row = {**last, "release": number, "created": time.time_ns() // 1_000, "tables": tables}
    return row, {"job": RELEASES.name, "release": str(number), "versions": named, "digests": digests}


def _written(lake: str, rows: pa.Table) -> list[DataFile]:
    writer = FileWriter(table_filesystem(lake, RELEASES), RELEASES, ())
    for batch in rows.sort_by("release").to_batches():
        writer.add(batch)
    return data_files(writer.close()["file"].to_pylist())


def _commit_release(lake: str, rows: pa.Table, metadata: Mapping[str, str]) -> None:
    number = int(metadata["release"])
    files = _written(lake, rows)
    done = Commit(mode="overwrite", app="job/releases", app_version=number, metadata=metadata)
    commit_files(lake, RELEASES, files, done)
