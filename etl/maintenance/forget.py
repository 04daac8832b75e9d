"""Forget users: out of every table of the newest version, and then every older version out of the lake.

First the users are put on the list of those who are left out (`etl.lake.suppression`), so that no later run brings
them back. Each table is then written without them, and repeats what its job had recorded, so that the next run finds
nothing to do. A release of the new versions becomes the only one: the files and log entries of all others, which hold
the users too, are deleted. Killed anywhere, the same command goes on: what was done is noted in `.forgetting`, and what
is left is found in the tables. A release that a live process reads stays until that has ended; the command then ends
with 5.
"""

import datetime as dt
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from etl.jobs.releases import check_inputs, mark_removed, release_with, released, versions_of
from etl.lake.commit import Commit, CommitConflict, commit_files
from etl.lake.datafile import DataFile
from etl.lake.lease import WAIT_SECONDS, writing
from etl.lake.readers import readers
from etl.lake.records import job_record, renewed_record
from etl.lake.retention import drop_history, remove_orphans, unfinished_removed
from etl.lake.rows import batches_of, has_rows, partitions_of, rewritten, scope_of
from etl.lake.small_files import delete_file, read_file, write_file
from etl.lake.snapshots import (
    LakeError,
    check_formats,
    checked_files,
    current_version,
    existing_table,
    open_table,
    our_commits,
)
from etl.lake.suppression import Suppression, suppress
from etl.program import spelled
from etl.settings import GraftrecError, RunAgain
from etl.sources.columns import FILE_SHIFT
from etl.tables import (
    BASKETS,
    FEATURES,
    FIRST_INDEX,
    INTERACTIONS,
    ITEMS,
    NEGATIVES,
    PROPERTY_BUCKETS,
    PROPERTY_TIME,
    QUARANTINE,
    RECOMMENDATIONS,
    RELEASES,
    SEQUENCES,
    SERVED,
    SOCIAL,
    TABLES,
    USERS,
    Table,
    bucket_of,
)

JOURNAL = ".forgetting"
_APP = "forget/"  # what applications of our commits begin with
# Tables with rows of a user, those first that need an index which the table `users` gives.
_TABLES = (SEQUENCES, BASKETS, NEGATIVES, RECOMMENDATIONS, SERVED, FEATURES, SOCIAL, QUARANTINE, INTERACTIONS, USERS)


class Reading(RunAgain):
    """Users are out of the newest tables, but older releases stay for now: `done` so far."""

    def __init__(self, message: str, done: "Forgotten") -> None:
        super().__init__(message)
        self.done = done


@dataclass
class Forgotten:
    """What was done so far: kept in the lake until all is done. Holds no raw id.

    `users`: keyed hashes. `indices`: of the users who were found. `rows`: table -> rows removed. `places`: of the log's
    files whose events they had. `releases`: those whose files are gone.
    """

    id: str
    begun: str
    users: list[str]
    indices: list[int] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    texts: int = 0  # of rejected rows that named a user, emptied
    places: list[int] = field(default_factory=list)
    releases: list[int] = field(default_factory=list)
    entries: int = 0  # of tables' logs, deleted
    files: int = 0  # of old versions, deleted
    release: int = 0  # the one that is left; 0: the lake has none


def forget(lake: str, users: Sequence[str], *, wait_seconds: float = WAIT_SECONDS) -> Forgotten:
    """Take users (raw ids) out of a lake. Raises Reading (run again), CommitConflict, LakeError, LakeBusy."""
    with writing(lake, RELEASES, wait_seconds=wait_seconds):
        check_formats(lake)
        if all(current_version(lake, table) is None for table in TABLES.values()):
            raise LakeError(f"{lake}: expected a lake (a folder of Delta tables), found no table; mend --lake")
        listed = suppress(lake, users)
        done = _begun(lake, [listed.hash_of(user) for user in users])
        _without_users(lake, sorted(set(users)), listed, done)
        _record(lake)
        done.release = _release(lake, done)
        _drop_the_past(lake, done)
        delete_file(lake, JOURNAL)
        return done


def _begun(lake: str, users: list[str]) -> Forgotten:
    """The journal of these users that a killed run has left, or a new one."""
    content = read_file(lake, JOURNAL)
    if content is not None:
        try:
            found = Forgotten(**json.loads(content))
        except (ValueError, TypeError):
            raise LakeError(
                f"{lake}/{JOURNAL}: expected what a run had done so far, found it damaged; remove it"
            ) from None
        if sorted(found.users) == sorted(users):
            return found
        if not set(found.users) <= set(users):
            raise GraftrecError(
                f"{lake}: expected the users whom an interrupted run was about to forget, found others; give its "
                "command again first, or these users beside its own"
            )
    begun = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return Forgotten(uuid.uuid4().hex[:12], begun, users)


def _note(lake: str, done: Forgotten) -> None:
    write_file(lake, JOURNAL, json.dumps(asdict(done)).encode())


# --- rows of the newest versions --------------------------------------------------------------------------------------


def _without_users(lake: str, users: Sequence[str], listed: Suppression, done: Forgotten) -> None:
    ids = pa.array(users, pa.string())
    done.indices = sorted({*done.indices, *_indices(lake, ids)})
    done.places = sorted({*done.places, *_places(lake, ids)})
    _note(lake, done)
    indices = pa.array(done.indices, pa.int32())
    for table in _TABLES:
        if open_table(lake, table) is None:
            continue
        if table is QUARANTINE:
            done.texts += _without_texts(lake, _mentions(users))
        elif table is INTERACTIONS:
            _lower_degrees(lake, ids, done.id)
            done.rows[table.name] = done.rows.get(table.name, 0) + _filtered(lake, table, {"user": ids})
        elif table in (SEQUENCES, BASKETS, NEGATIVES):
            gone = _filtered(lake, table, {"user": indices}, buckets=users)
            done.rows[table.name] = done.rows.get(table.name, 0) + gone
        else:
            columns = {FEATURES.name: ["id"], SOCIAL.name: ["user", "friend"]}.get(table.name, ["user"])
            gone = _filtered(lake, table, dict.fromkeys(columns, ids))
            done.rows[table.name] = done.rows.get(table.name, 0) + gone
        _note(lake, done)


def _files(lake: str, table: Table) -> list[DataFile]:
    found = checked_files(existing_table(lake, table), lake, table)
    return [file for file in found if file.partition["kind"] == "user"] if table is FEATURES else found


def _indices(lake: str, ids: pa.Array) -> list[int]:
    if open_table(lake, USERS) is None:
        return []
    found: list[int] = []
    for file in _files(lake, USERS):
        for batch in batches_of(lake, USERS, file, ["user", "index"]):
            found += batch.filter(pc.is_in(batch["user"], value_set=ids))["index"].to_pylist()
    return found


def _events(lake: str, ids: pa.Array, columns: Sequence[str]) -> list[pa.RecordBatch]:
    """The users' rows of the log."""
    handle = open_table(lake, INTERACTIONS)
    if handle is None:
        return []
    buckets = _buckets(INTERACTIONS, handle.metadata().configuration, ids.to_pylist())
    found = []
    for file in checked_files(handle, lake, INTERACTIONS):
        if buckets is None or file.partition["bucket"] in buckets:
            for batch in batches_of(lake, INTERACTIONS, file, ["user", *columns]):
                found.append(batch.filter(pc.is_in(batch["user"], value_set=ids)))
    return found


def _places(lake: str, ids: pa.Array) -> set[int]:
    """Of the log's files that the users' events came from."""
    orders = (batch["source_order"].to_numpy() for batch in _events(lake, ids, ["source_order"]))
    return {int(place) for order in orders for place in set((order >> FILE_SHIFT).tolist())}


def _buckets(table: Table, configuration: Mapping[str, str], users: Sequence[str]) -> set[str] | None:
    """The partitions of users, where the table says how many it has."""
    given = configuration.get(PROPERTY_BUCKETS, "")
    if "bucket" not in table.partition_by or not given.isdigit():
        return None
    return {str(bucket_of(user, int(given))) for user in users}


def _filtered(lake: str, table: Table, wanted: Mapping[str, pa.Array], *, buckets: Sequence[str] = ()) -> int:
    """Commit the table without rows whose columns hold one of the `wanted` values; how many these were."""
    handle = existing_table(lake, table)
    files = _files(lake, table)
    of_users = _buckets(table, handle.metadata().configuration, buckets) if buckets else None
    if of_users is not None:
        files = [file for file in files if file.partition["bucket"] in of_users]
    gone = 0
    touched = [file for file in files if any(has_rows(lake, table, file, *one) for one in wanted.items())]
    affected = {file.key(table) for file in touched}
    for key, parts in partitions_of(files, table).items():
        if key in affected:
            gone += _rewrite(lake, table, key, parts, lambda batch: _less(batch, wanted))
    return gone


def _less(batch: pa.RecordBatch, wanted: Mapping[str, pa.Array]) -> pa.RecordBatch:
    found = [pc.is_in(batch[name], value_set=values.cast(batch[name].type)) for name, values in wanted.items()]
    either = found[0]
    for one in found[1:]:
        either = pc.or_(either, one)
    return batch.filter(pc.invert(either))


def _rewrite(
    lake: str,
    table: Table,
    key: tuple[str | None, ...],
    files: Sequence[DataFile],
    change: Callable[[pa.RecordBatch], pa.RecordBatch],
    *,
    app: str = "",
) -> int:
    """Replace one partition (a table without partitions: all of it); how many rows are gone."""
    handle = existing_table(lake, table)
    table = table.of(_kind_of_time(handle.metadata().configuration, table))
    record = job_record(next(our_commits(handle), {}))
    if table.name == USERS.name:
        record |= {"next_index": str(_next_index(lake, record))}
    with unfinished_removed(lake, table):
        written, gone = rewritten(lake, table, files, change)
        commit = Commit(
            mode="partitions" if table.partition_by else "overwrite",
            app=app or f"{_APP}{uuid.uuid4().hex}",
            app_version=0,
            metadata=record,
            partition_scope=scope_of(key, table) if table.partition_by else None,
        )
        commit_files(lake, table, written, commit)
    return gone


def _kind_of_time(configuration: Mapping[str, str], table: Table) -> str:
    return configuration.get(PROPERTY_TIME, table.time)


def _next_index(lake: str, record: Mapping[str, str]) -> int:
    """Of a new user: an index that was given once is never given again, for old models know it."""
    highest = int(record.get("next_index", FIRST_INDEX)) - 1
    for file in _files(lake, USERS):
        for batch in batches_of(lake, USERS, file, ["index"]):
            highest = max(highest, pc.max(batch["index"]).as_py() or 0)
    return highest + 1


def _lower_degrees(lake: str, ids: pa.Array, done: str) -> None:
    """Take the users' events out of the items' degrees; once, however often this is called for one run `done`."""
    app = f"{_APP}degrees/{done}"
    handle = open_table(lake, ITEMS)
    if handle is None or handle.transaction_version(app) is not None:
        return
    counts: Counter[str] = Counter()
    for batch in _events(lake, ids, ["item"]):
        counts.update(batch["item"].to_pylist())
    if not counts:
        return
    items = pa.array(list(counts), pa.string())
    less = pa.array([counts[item] for item in counts], pa.int64())

    def lowered(batch: pa.RecordBatch) -> pa.RecordBatch:
        taken = pc.fill_null(less.take(pc.index_in(batch["item"], value_set=items)), 0)
        degree = pc.subtract(batch["degree"], taken)
        return batch.set_column(batch.schema.get_field_index("degree"), batch.schema.field("degree"), degree)

    _rewrite(lake, ITEMS, (), _files(lake, ITEMS), lowered, app=app)


def _mentions(users: Sequence[str]) -> re.Pattern[str]:
    """What finds an id in a text, between characters that no id has at its ends."""
    names = "|".join(re.escape(user) for user in sorted(users, key=len, reverse=True))
    return re.compile(rf"(?<![^\W_])(?:{names})(?![^\W_])")


def _without_texts(lake: str, mention: re.Pattern[str]) -> int:
    """Empty the texts of rejected rows that name a user; how many these were."""
    emptied = 0

    def named(batch: pa.RecordBatch) -> list[bool]:
        rows = zip(batch["raw"].to_pylist(), batch["found"].to_pylist(), strict=True)
        return [any(text is not None and mention.search(text) for text in row) for row in rows]

    def without(batch: pa.RecordBatch) -> pa.RecordBatch:
        mask = pa.array(named(batch), pa.bool_())
        for name in ("raw", "found"):
            column = pc.if_else(mask, pa.scalar(None, pa.string()), batch[name])
            batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column)
        return batch

    for key, files in partitions_of(_files(lake, QUARANTINE), QUARANTINE).items():
        batches = (batch for file in files for batch in batches_of(lake, QUARANTINE, file, ["raw", "found"]))
        if found := sum(sum(named(batch)) for batch in batches):
            _rewrite(lake, QUARANTINE, key, files, without)
            emptied += found
    return emptied


# --- one release, and nothing older -----------------------------------------------------------------------------------


def _record(lake: str) -> None:
    """Of each table a commit that names the newest versions of the tables it was made from, as its job would."""
    from etl.pipeline.run import JOBS, in_order

    newest: dict[str, int] = {}
    last_job: dict[str, int] = {}
    for job in in_order(JOBS):
        handle = open_table(lake, job.table)
        if handle is None:
            continue
        commits = list(our_commits(handle))
        of_jobs = [commit for commit in commits if not str(commit["app"]).startswith(_APP)]
        base = of_jobs[0] if of_jobs else commits[-1] if commits else {"version": handle.version()}
        last_job[job.name] = int(base["version"])
        newest[job.name] = int(handle.version())
        recorded = commits[0] if commits else {}
        record = renewed_record(recorded, newest, last_job)
        if recorded and record != job_record(recorded):
            time = _kind_of_time(handle.metadata().configuration, job.table)
            commit = Commit(mode="append", app=f"{_APP}{uuid.uuid4().hex}", app_version=0, metadata=record)
            newest[job.name] = commit_files(lake, job.table.of(time), [], commit).version


def _release(lake: str, done: Forgotten) -> int:
    """The number of the release of the tables as they are now; 0 for a lake that has none."""
    rows = released(lake)
    if not rows:
        return 0
    versions = {name: current_version(lake, TABLES[name]) for name in versions_of(rows[-1])}
    found = {name: version for name, version in versions.items() if version is not None}
    try:
        check_inputs(lake, found)
    except CommitConflict:
        raise Reading(
            f"{lake}: the users are out of the newest tables, but these are of a run that has not ended, so older "
            f"releases stay; run `{spelled('etl', 'all')}` with the lake's configuration, then this command again",
            done,
        ) from None
    return release_with(lake, found)[0]


def _drop_the_past(lake: str, done: Forgotten) -> None:
    """Delete the files and log entries of all versions but the newest."""
    rows = released(lake)
    older = [int(row["release"]) for row in rows if row["release"] != done.release]
    done.releases = sorted({*done.releases, *(row["release"] for row in rows if not row["removed"])} & set(older))
    _note(lake, done)
    mark_removed(lake, older)
    if reading := {number: who for number, who in readers(lake).items() if number in older}:
        by_release = sorted(reading.items())
        named = "; ".join(f"release {number} by {', '.join(who)}" for number, who in by_release)
        raise Reading(
            f"{lake}: the users are out of the newest tables, but older releases with them are being read: {named}; "
            "run the same command again when that has ended",
            done,
        )
    for table in TABLES.values():
        if open_table(lake, table) is not None:
            done.files += len(remove_orphans(lake, table, older_than_seconds=0, keep_versions=[]))
            done.entries += drop_history(lake, table)
            _note(lake, done)
