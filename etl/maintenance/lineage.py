"""Where a user's events and recommendations came from, read from a lake's tables without Spark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from etl.jobs.releases import released, versions_of
from etl.lake.rows import batches_of
from etl.lake.snapshots import LakeError, checked_files, existing_table, open_table
from etl.sources.columns import FILE_SHIFT
from etl.sources.reshape import PLACE_BITS
from etl.tables import DELIVERIES, INTERACTIONS, PROPERTY_BUCKETS, RECOMMENDATIONS, Table, bucket_of


@dataclass(frozen=True)
class Event:
    """One event of a user and where it stands. `time`: microseconds since 1970, or order; `line` from 1; `path` ""
    where no delivery is recorded, as in a lake of before; `interactions`: the version that brought it."""

    item: str
    time: int
    event_type: str | None
    value: float | None
    path: str
    line: int
    interactions: int | None


def recommendations_of(lake: str, user: str) -> list[dict[str, Any]]:
    """A user's rows of RECOMMENDATIONS, by domain and rank; with `version`, that of the table. Raises LakeError."""
    handle = existing_table(lake, RECOMMENDATIONS)
    found = []
    for file in checked_files(handle, lake, RECOMMENDATIONS):
        for batch in batches_of(lake, RECOMMENDATIONS, file):
            rows = batch.filter(pc.equal(batch["user"], user)).to_pylist()
            found += [row | {"domain": file.partition["domain"], "version": int(handle.version())} for row in rows]
    return sorted(found, key=lambda row: (row["domain"], row["rank"]))


def release_of(lake: str, number: int) -> dict[str, Any] | None:
    """A row of RELEASES, with `versions`; None where there is none of that number."""
    row = next((row for row in released(lake) if row["release"] == number), None)
    return None if row is None else row | {"versions": versions_of(row)}


def deliveries(lake: str) -> list[dict[str, Any]]:
    """All rows of DELIVERIES, oldest first; none where there is no such table."""
    return sorted(_rows(lake, DELIVERIES), key=lambda row: (row["interactions"], row["place"]))


def events_of(lake: str, user: str, release: Mapping[str, Any] | None) -> tuple[list[Event], int, bool]:
    """A user's events, oldest first; the version of INTERACTIONS that they were read from: the release's, or, where its
    files are gone, the newest; whether it is the release's. Raises LakeError."""
    wanted = None if release is None else release["versions"].get(INTERACTIONS.name)
    version, is_released = wanted, wanted is not None
    try:
        handle = existing_table(lake, INTERACTIONS, version)
        rows = _events(lake, user, handle)
    except (LakeError, OSError):
        if not is_released:
            raise
        handle, is_released = existing_table(lake, INTERACTIONS), False
        rows = _events(lake, user, handle)
    version = int(handle.version())
    by_place = {row["place"]: row for row in deliveries(lake) if row["interactions"] <= version}
    several = _gives_several_rows(json.loads(release["config"]) if release else {})
    found = []
    for row in sorted(rows, key=lambda row: (row["time"], row["source_order"])):
        place, within = row["source_order"] >> FILE_SHIFT, row["source_order"] & ((1 << FILE_SHIFT) - 1)
        delivery = by_place.get(place, {})
        found.append(
            Event(
                row["item"],
                row["time"],
                row["event_type"],
                row["value"],
                str(delivery.get("path", "")),
                within >> PLACE_BITS if several else within,
                delivery.get("interactions"),
            )
        )
    return found, version, is_released


def _events(lake: str, user: str, handle: Any) -> list[dict[str, Any]]:
    buckets = handle.metadata().configuration.get(PROPERTY_BUCKETS, "")
    bucket = str(bucket_of(user, int(buckets))) if buckets.isdigit() else None
    rows: list[dict[str, Any]] = []
    for file in checked_files(handle, lake, INTERACTIONS):
        if bucket in (None, file.partition["bucket"]):
            for batch in batches_of(lake, INTERACTIONS, file):
                rows += batch.filter(pc.equal(batch["user"], pa.scalar(user))).to_pylist()
    return rows


def _rows(lake: str, table: Table) -> list[dict[str, Any]]:
    handle = open_table(lake, table)
    if handle is None:
        return []
    files = checked_files(handle, lake, table)
    return [row for file in files for batch in batches_of(lake, table, file) for row in batch.to_pylist()]


def _gives_several_rows(config: Mapping[str, Any]) -> bool:
    """Whether a line of the log may give several events: its place in the line is then part of the order."""
    events = config.get("source", {}).get("events", {})
    return bool(events.get("explode")) or events.get("matrix_from") is not None
