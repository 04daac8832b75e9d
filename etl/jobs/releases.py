"""One row per complete run: the versions of all tables, consistent with each other. Trainers pin a release."""

import datetime as dt
import json
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from etl.config import EtlConfig
from etl.jobs.job import Outcome, RunContext
from etl.lake import spark_io
from etl.lake.file_reader import check_files, open_parquet
from etl.lake.snapshots import local_path, table_filesystem
from etl.lake.spark_io import spark_schema
from etl.program import spelled
from etl.redaction import without_secrets
from etl.settings import config_hash
from etl.tables import FEATURES, QUARANTINE, RELEASES, TABLES


def transform(
    spark: SparkSession, release: int, versions: Mapping[str, int], config: EtlConfig, *, code: str, created: int
) -> DataFrame:
    """RELEASES: one row."""
    tables = [(name, version) for name, version in sorted(versions.items())]
    settings = without_secrets(config.model_dump(mode="json"))
    text = json.dumps(settings, separators=(",", ":"), ensure_ascii=False)
    row = (release, created, tables, text, config_hash(config), code, None)
    return spark.createDataFrame([row], spark_schema(RELEASES))


def checked(lake: str, versions: Mapping[str, int]) -> dict[str, str]:
    """The digest of each table's log. Raises GraftrecError where a log or, on a disk, a data file is not as written."""
    if local_path(lake) is not None:
        for name, version in versions.items():
            check_files(
                lake, TABLES[name], [file.path for file in spark_io.snapshot_files(lake, TABLES[name], version)]
            )
    return {name: spark_io.log_digest(lake, TABLES[name], version) for name, version in versions.items()}


def release(engine: RunContext, versions: Mapping[str, int], *, code: str) -> tuple[int, Outcome]:
    """The number of the release that holds `versions`: the last one, or, where they differ from its, a new one.

    Raises CommitConflict where they weren't made from each other.
    """
    lake = engine.config.lake
    check_inputs(lake, versions)
    last = spark_io.last_commit(lake, RELEASES)
    named = json.dumps(versions, sort_keys=True)
    number = int(last["release"]) if last else 0
    digests = json.dumps(checked(lake, versions), sort_keys=True)
    if last and last["versions"] == named:
        if last.get("digests", digests) != digests:
            raise spark_io.LakeError(
                f"{lake}: expected the tables of release {number} as it recorded them, found a log altered; restore "
                "it from a copy, or give another --lake"
            )
        return number, Outcome(int(last["version"]), 1, False)
    number += 1
    frame = transform(engine.spark, number, versions, engine.config, code=code, created=time.time_ns() // 1_000)
    written = spark_io.write(engine.spark, frame, lake, RELEASES, _commit(number, named, digests))
    if not written.committed and spark_io.last_commit(lake, RELEASES)["versions"] != named:
        raise spark_io.CommitConflict("releases: another run released other versions meanwhile; run again")
    return number, Outcome(written.version, written.rows, written.committed)


def release_with(lake: str, changed: Mapping[str, int]) -> tuple[int, bool]:
    """The newest release with other versions of some tables, as a new release: its number, and whether it was appended
    now (not where the newest has these versions already). Needs no Spark. Only the lake's writer may.

    Raises LakeError where there is no release.
    """
    rows = released(lake)
    if not rows:
        raise spark_io.LakeError(f"{lake}: expected a release, found none; run `{spelled('etl', 'all')}` first")
    newest = rows[-1]
    versions, number = versions_of(newest), int(newest["release"])
    if all(versions.get(name) == version for name, version in changed.items()):
        return number, False
    versions, number = {**versions, **changed}, number + 1
    digests = json.dumps(checked(lake, versions), sort_keys=True)
    entries = [{"table": name, "version": version} for name, version in sorted(versions.items())]
    row = newest | {"release": number, "created": time.time_ns() // 1_000, "tables": entries, "removed": None}
    named = json.dumps(versions, sort_keys=True)
    files = _written(lake, [row])
    return number, spark_io.commit_files(lake, RELEASES, files, _commit(number, named, digests)).committed


def released(lake: str) -> list[dict[str, Any]]:
    """All rows of RELEASES, in order; none where there is no such table. Needs no Spark. Raises LakeError."""
    if spark_io.current_version(lake, RELEASES) is None:
        return []
    rows: list[dict[str, Any]] = []
    for file in spark_io.snapshot_files(lake, RELEASES):
        with open_parquet(lake, RELEASES, file.path) as opened:
            rows += [{"removed": None, **row} for row in opened.read().to_pylist()]
    return sorted(rows, key=lambda row: int(row["release"]))


def versions_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Table -> version of a row of RELEASES."""
    return {entry["table"]: int(entry["version"]) for entry in row["tables"]}


def mark_removed(lake: str, numbers: Collection[int]) -> None:
    """Note of these releases that they can't be read any more. Needs no Spark. Only the lake's writer may."""
    rows = released(lake)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    marked = [row | {"removed": now} if row["release"] in numbers and not row["removed"] else row for row in rows]
    if marked == rows:
        return
    last = spark_io.last_commit(lake, RELEASES)
    metadata = {name: last[name] for name in ("job", "release", "versions", "digests") if name in last}
    done = spark_io.Commit(mode="overwrite", app=f"removed/{uuid.uuid4().hex}", app_version=0, metadata=metadata)
    with spark_io.unfinished_removed(lake, RELEASES):
        spark_io.commit_files(lake, RELEASES, _written(lake, marked), done)


def _written(lake: str, rows: Sequence[Mapping[str, Any]]) -> list[spark_io.DataFile]:
    writer = spark_io.FileWriter(table_filesystem(lake, RELEASES), RELEASES, ())
    writer.add(pa.RecordBatch.from_pylist([dict(row) for row in rows], schema=RELEASES.schema))
    return spark_io.data_files(writer.close().column("file").to_pylist())


def _commit(number: int, versions: str, digests: str) -> spark_io.Commit:
    metadata = {"job": "releases", "release": str(number), "versions": versions, "digests": digests}
    return spark_io.Commit(mode="append", app="job/releases", app_version=number, metadata=metadata)


def check_inputs(lake: str, versions: Mapping[str, int]) -> None:
    """Raise CommitConflict unless each table's commit has read the very versions of the other tables.

    `quarantine` is left out: several jobs write it, each its own rows, and only where there are any. So is `features`:
    an encoder's vectors stay as they are until it runs again, and the table's commit says what each was made from.
    """
    for name in versions.keys() - {QUARANTINE.name, FEATURES.name}:
        inputs = json.loads(spark_io.last_commit(lake, TABLES[name], versions[name]).get("inputs", "{}"))
        for source, read in inputs.items():
            # A version that no job of ours committed, such as a compaction, has the rows of the one before.
            if read != versions[source] and _job_version(lake, source, read) != versions[source]:
                raise spark_io.CommitConflict(
                    f"releases: expected {name} to be made from {source} version {versions[source]}, found version "
                    f"{read}: another run has written to {lake} meanwhile; run again"
                )


def _job_version(lake: str, name: str, version: int) -> int | None:
    """The newest version up to `version` that one of our jobs committed."""
    found = spark_io.last_commit(lake, TABLES[name], version).get("version")
    return None if found is None else int(found)
