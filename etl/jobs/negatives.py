"""Fixed evaluation negatives: for each user with a hold-out, items it has not interacted with in any part.

How they are drawn: `negative_sampling`. A draw is a function of seed, domain, part, the *raw* ids of user and item
and the catalogue. What was drawn stays as it is when a new day comes, less what the user has taken meanwhile or what is
no candidate any more, which further draws replace.

A task writes the buckets of the users it is given: it reads their part of `sequences`, and of the negatives before,
file by file, without Spark and without a Python object for a row. Of users whose sequence is as it was, earlier
negatives are copied.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import NegativesConfig
from etl.histories.bucket_writer import in_turn, written_by
from etl.histories.negative_sampling import (
    NUM_NEGATIVES,
    Candidates,
    Ints,
    Taken,
    Words,
    append,
    candidates,
    draw,
    taken,
)
from etl.histories.reader import find, stacked
from etl.jobs import cold_items, dated_candidates, time_splits
from etl.jobs.domains import names_of
from etl.jobs.job import Job, Outcome, Run
from etl.lake import spark_io
from etl.lake.datafile import DataFile
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import LakeError, snapshot_files, table_filesystem
from etl.lake.spark_io import FileWriter, bucket_of
from etl.tables import DOMAINS, INTERACTIONS, ITEMS, NEGATIVES, SEQUENCES, USERS, Table

BLOCK_USERS = 1 << 15  # of a file, with all their rows in memory
BLOCK_ITEMS = 1 << 23  # of their sequences
_PARTS = ("validation", "test")
_COLUMNS = ["protocol", "part", "user", "items"]
_SEQUENCE = ["user", "items", "valid_start", "test_start", "end"]

_ROWS = 1 << 13  # handed to a writer at once: 3 MB

Key = tuple[str, str, int]  # split, domain, bucket
Files = Mapping[int, Sequence[tuple[str, str, str]]]  # bucket -> (split, domain, file)


@dataclass(frozen=True)
class Inputs:
    """What a task reads: the catalogue, by word, and data files of pinned versions.

    `items`: index, word, degree, bits (bit k: the item belongs to names[k]). `drawn`: earlier negatives; where they are
    known: `before`, the sequences they were drawn for, and `lost`, by domain, what were candidates then and aren't now.
    `dated`: of splits by time, (split, domain) -> an item's events, see `dated_candidates`.
    """

    lake: str
    names: Sequence[str]
    items: pa.Table
    sequences: Files
    drawn: Files
    before: Files
    lost: Mapping[str, pa.Array]
    config: NegativesConfig
    dated: Mapping[tuple[str, str], pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Earlier:
    """Negatives that were drawn earlier, and where they are known, what they were drawn from."""

    drawn: pa.Table  # rows of NEGATIVES, in any order
    sequences: pa.Table | None = None  # for which they were drawn
    lost: pa.Array | None = None  # indices that were candidates then and aren't now


def rows(
    sequences: pa.Table,
    word: Words,
    chosen_of: Mapping[str, Candidates],
    *,
    domain: str,
    config: NegativesConfig,
    earlier: Earlier | None = None,
) -> Iterator[pa.RecordBatch]:
    """NEGATIVES, less its partition columns, of users of one split and domain, in the table's order.

    `sequences`: user (ascending), items, valid_start, test_start, end of users; `word`: a hash of each one's raw id.
    `chosen_of`: the candidates of each part.
    """
    chosen_rows = pc.less(sequences["valid_start"], sequences["end"]).to_numpy()
    sequences, word = _where(sequences, chosen_rows), word[chosen_rows]
    settled = np.zeros(len(sequences), bool)
    if earlier is not None:
        settled = _settled(sequences, earlier, len(config.protocols))
    others = _where(sequences, ~settled)
    user, values, size = others["user"].to_numpy(), *_flat(others["items"])
    owner = np.repeat(np.arange(len(user)), size)
    distinct = {id(chosen): chosen for chosen in chosen_of.values()}  # as a rule both parts have the same
    gone_of = {key: taken(owner, chosen.places(values), chosen) for key, chosen in distinct.items()}
    drawn = None if earlier is None else earlier.drawn.select(_COLUMNS).combine_chunks()
    if drawn is not None:
        place, known = find(sequences["user"].to_numpy(), drawn["user"].to_numpy())
        stays = known & settled[place] if len(settled) else known
    for protocol in sorted(config.protocols):
        for part in sorted(_PARTS):
            chosen = chosen_of[part]
            gone = gone_of[id(chosen)]
            found = np.full((len(user), NUM_NEGATIVES), -1, np.int64)
            if drawn is not None:
                chosen_rows = pc.and_(pc.equal(drawn["protocol"], protocol), pc.equal(drawn["part"], part)).to_numpy()
                _put_earlier(found, drawn.take(np.flatnonzero(chosen_rows & ~stays)), user, gone, chosen)
            at = np.flatnonzero(_holds(others, part))
            draw(chosen, gone, found, word[~settled], at, protocol=protocol, stream=f"{config.seed}/{domain}/{part}")
            made = _table(protocol, part, user[at], found[at], chosen)
            if drawn is not None:
                made = _merged(drawn, np.flatnonzero(chosen_rows & stays), made)
            yield from made.combine_chunks().to_batches()


def _merged(drawn: pa.Table, rows: Ints, made: pa.Table) -> pa.Table:
    """These rows of `drawn`, which lie together, and `made`, by user. Lists are copied twice, whatever the order."""
    if not len(rows):
        return made
    first, stop = int(rows[0]), int(rows[-1]) + 1
    both = pa.concat_tables([drawn.slice(first, stop - first), made]).combine_chunks()
    at = np.concatenate([rows - first, stop - first + np.arange(len(made))])
    return both.take(at[np.argsort(both["user"].to_numpy()[at], kind="stable")])


def _holds(sequences: pa.Table, part: str) -> npt.NDArray[np.bool_]:
    first, last = ("valid_start", "test_start") if part == "validation" else ("test_start", "end")
    found: npt.NDArray[np.bool_] = sequences[first].to_numpy() < sequences[last].to_numpy()
    return found


def _table(protocol: str, part: str, user: Ints, found: Ints, chosen: Candidates) -> pa.Table:
    there = found >= 0
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    items = pa.array(chosen.index[found[there]], pa.int32())
    columns = {
        "protocol": pa.repeat(protocol, len(user)),
        "part": pa.repeat(part, len(user)),
        "user": pa.array(user, pa.int32()),
        "items": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items),
    }
    return pa.table(columns).cast(_schema(NEGATIVES, _COLUMNS))


def _settled(sequences: pa.Table, earlier: Earlier, num_protocols: int) -> npt.NDArray[np.bool_]:
    """Of whom earlier negatives are copied."""
    if earlier.sequences is None or earlier.lost is None:
        return np.zeros(len(sequences), bool)
    return ~_changed(sequences, earlier.sequences) & _whole(sequences, earlier.drawn, earlier.lost, num_protocols)


def _changed(now: pa.Table, before: pa.Table) -> npt.NDArray[np.bool_]:
    """Whose items or hold-out aren't as they were. `now`: by user."""
    before = _by_user([before])
    place, same = find(before["user"].to_numpy(), now["user"].to_numpy())
    if not same.any():
        return ~same
    (values, size), (old_values, old_size) = _flat(now["items"]), _flat(before["items"])
    for mine, theirs in (
        *((now[name].to_numpy(), before[name].to_numpy()) for name in ("valid_start", "test_start", "end")),
        (size, old_size),
    ):
        same &= mine == theirs[place]
    both = np.flatnonzero(same)
    if len(both):
        kept = np.zeros(len(before), bool)
        kept[place[both]] = True
        equal = values[np.repeat(same, size)] == old_values[np.repeat(kept, old_size)]
        starts = np.cumsum(size[both]) - size[both]
        same[both] &= np.logical_and.reduceat(equal, starts)
    return ~same


def _whole(sequences: pa.Table, drawn: pa.Table, lost: pa.Array, num_protocols: int) -> npt.NDArray[np.bool_]:
    """Who has all of its negatives, each of them a hundred, none of them `lost`."""
    complete = pc.list_value_length(drawn["items"]).to_numpy() == NUM_NEGATIVES
    if len(lost):
        values, size = _flat(drawn["items"])
        row = np.repeat(np.arange(len(size)), size)
        complete[row[pc.is_in(pa.array(values), value_set=lost).to_numpy(zero_copy_only=False)]] = False
    place, known = find(sequences["user"].to_numpy(), drawn["user"].to_numpy())
    found = np.bincount(place[known & complete], minlength=len(sequences))
    num_parts = _holds(sequences, "validation").astype(int) + _holds(sequences, "test")
    whole: npt.NDArray[np.bool_] = found == num_parts * num_protocols
    return whole


def _put_earlier(found: Ints, drawn: pa.Table, user: Ints, gone: Taken, chosen: Candidates) -> None:
    """Fill in what was drawn earlier for `user` (ascending), less what can't be any more."""
    row, known = find(user, drawn["user"].to_numpy())
    values, size = _flat(drawn["items"])
    nth = np.arange(len(values)) - np.repeat(np.cumsum(size) - size, size)
    mine = np.repeat(known, size)
    found[np.repeat(row, size)[mine], nth[mine]] = chosen.places(values[mine])
    taken_since = gone.holds(np.repeat(np.arange(len(user)), found.shape[1]), found.ravel()).reshape(found.shape)
    found[:] = append(np.full_like(found, -1), np.where(taken_since, -1, found))


def _flat(lists: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """The values of all lists, and the lists' lengths."""
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()


# --- a task -----------------------------------------------------------------------------------------------------------


def write(users: DataFrame, read: Inputs, *, buckets: int, tasks: int) -> list[DataFile]:
    """Write data files of the negatives of the kept `users`. `tasks`: how many at most share the buckets. The files
    are the caller's to commit.
    """
    kept = users.where("kept").select(bucket_of(buckets).alias("bucket"), "index", F.xxhash64("user").alias("word"))
    return written_by(partial(write_task, read=read), kept, read.lake, NEGATIVES, buckets=buckets, tasks=tasks)


def write_task(batches: Iterable[pa.RecordBatch], read: Inputs) -> Iterator[pa.RecordBatch]:
    """One task: the users (bucket, index, word) of some buckets, in any order, to these buckets' files."""
    yield from in_turn(batches, partial(_write_buckets, read=read), read.lake, NEGATIVES)


def _write_buckets(users: pa.Table, read: Inputs) -> Iterator[pa.RecordBatch]:
    filesystem = table_filesystem(read.lake, NEGATIVES)
    of_domain = {name: dict.fromkeys(_PARTS, _candidates(read, number)) for number, name in enumerate(read.names)}
    of_dated = {
        (split, domain): dated_candidates.of_parts(_members(read, read.names.index(domain)), counts)
        for (split, domain), counts in read.dated.items()
    }
    for bucket in users["bucket"].unique().to_pylist():
        mine = users.filter(pc.equal(users["bucket"], bucket))
        index, word = mine["index"].to_numpy(), mine["word"].to_numpy().view(np.uint64)
        for split, domain in sorted({key[:2] for key in read.sequences.get(bucket, ())}):
            key = (split, domain, bucket)
            for sequences in _blocks(read, key):
                user = sequences["user"].to_numpy()
                span = (int(user[0]), int(user[-1]))
                # A split by time draws all again: what was drawn depends on its dates, and on no later day.
                kept = (split, domain) not in of_dated
                before = _span(read, SEQUENCES, read.before if kept else {}, key, span, _SEQUENCE)
                drawn = _span(read, NEGATIVES, read.drawn if kept else {}, key, span, _COLUMNS)
                writer = FileWriter(filesystem, NEGATIVES, key, packed=["items"])
                for batch in rows(
                    sequences,
                    word[np.searchsorted(index, user)],
                    of_dated.get((split, domain), of_domain[domain]),
                    domain=domain,
                    config=read.config,
                    earlier=None if drawn is None else Earlier(drawn, before, read.lost.get(domain)),
                ):
                    for start in range(0, batch.num_rows, _ROWS):
                        writer.add(batch.slice(start, _ROWS))
                yield writer.close()


def _members(read: Inputs, number: int) -> pa.Table:
    return read.items.filter(pa.array(read.items["bits"].to_numpy() & np.int64(1 << number) != 0))


def _candidates(read: Inputs, number: int) -> Candidates:
    mine = _members(read, number)
    index, degree = mine["index"].to_numpy().astype(np.int64), mine["degree"].to_numpy()
    return candidates(index, mine["word"].to_numpy().view(np.uint64), degree)


def _blocks(read: Inputs, key: Key) -> Iterator[pa.Table]:
    """The sequences of a partition in blocks of neighbouring users, those with a hold-out."""
    waiting: list[pa.Table] = []
    users = items = 0
    for group in _groups(read, SEQUENCES, read.sequences, key, _SEQUENCE):
        waiting.append(_where(group, pc.less(group["valid_start"], group["end"]).to_numpy()))
        users, items = users + len(waiting[-1]), items + len(pc.list_flatten(waiting[-1]["items"]))
        if users >= BLOCK_USERS or items >= BLOCK_ITEMS:
            yield _by_user(waiting)
            waiting, users, items = [], 0, 0
    if users:
        yield _by_user(waiting)


def _by_user(tables: list[pa.Table]) -> pa.Table:
    table = stacked(tables)
    user = table["user"].to_numpy()
    if (user[1:] >= user[:-1]).all():
        return table
    return table.combine_chunks().take(np.argsort(user, kind="stable"))


def _where(table: pa.Table, rows: npt.NDArray[np.bool_]) -> pa.Table:
    """The table itself where that is all of it: lists are long, and copying them what copying a bucket costs."""
    return table if rows.all() else table.filter(pa.array(rows))


def _span(
    read: Inputs, table: Table, files: Files, key: Key, span: tuple[int, int], columns: list[str]
) -> pa.Table | None:
    """The row groups of a partition that may hold users in `span`. None where there are no files."""
    if not files:
        return None
    schema = _schema(table, columns)
    groups = [group.cast(schema) for group in _groups(read, table, files, key, columns, span)]
    return pa.concat_tables([schema.empty_table(), *groups])


def _schema(table: Table, columns: Sequence[str]) -> pa.Schema:
    return pa.schema([table.schema.field(name) for name in columns])


def _groups(
    read: Inputs, table: Table, files: Files, key: Key, columns: list[str], span: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Row groups of a partition's files; of a `span` of users only those whose statistics say they may hold some."""
    for split, domain, path in files.get(key[2], ()):
        if (split, domain) != key[:2]:
            continue
        with open_parquet(read.lake, table, path) as file:
            place = file.schema.names.index("user")
            for number in range(file.num_row_groups):
                statistics = file.metadata.row_group(number).column(place).statistics
                if span is None or statistics is None or (statistics.min <= span[1] and statistics.max >= span[0]):
                    yield file.read_row_group(number, columns=columns, use_threads=False)


# --- the job ----------------------------------------------------------------------------------------------------------


def run(run: Run) -> Outcome:
    names = names_of(run.config.domains)
    items = _catalogue(run.read(ITEMS), run.read(DOMAINS), names)
    drawn: Files = {}
    before: Files = {}
    lost: dict[str, pa.Array] = {}
    if run.before is not None and run.base is not None:
        drawn = _files(run.lake, NEGATIVES, run.base)
        with contextlib.suppress(LakeError):  # maintenance has removed a version: then all that was drawn is looked at
            lost = _lost(_catalogue(run.read_before(ITEMS), run.read_before(DOMAINS), names), items, names)
            before = _files(run.lake, SEQUENCES, run.before[SEQUENCES.name])
    # Among a hundred warm items a cold one is found by being odd: splits with cold items have no negatives.
    without = cold_items.names(run.config)
    sequences = _files(run.lake, SEQUENCES, run.inputs[SEQUENCES.name], without)
    dated = dated_candidates.counts(run.read(SEQUENCES), time_splits.names(run.config))
    read = Inputs(run.lake, names, items, sequences, drawn, before, lost, run.config.negatives, dated)
    buckets = int(spark_io.last_commit(run.lake, INTERACTIONS)["buckets"])
    return run.commit_files(write(run.read(USERS), read, buckets=buckets, tasks=run.config.spark.shuffle_partitions))


def _lost(before: pa.Table, now: pa.Table, names: Sequence[str]) -> dict[str, pa.Array]:
    """Domain -> indices of the items that were its candidates and aren't."""
    index = before["index"].to_numpy()
    bits = np.zeros(int(max(index.max(initial=0), now["index"].to_numpy().max(initial=0))) + 1, np.int64)
    bits[now["index"].to_numpy()] = now["bits"].to_numpy()
    gone = before["bits"].to_numpy() & ~bits[index]
    return {name: pa.array(index[gone & np.int64(1 << k) != 0], pa.int32()) for k, name in enumerate(names)}


def _files(lake: str, table: Table, version: int, without: Sequence[str] = ()) -> Files:
    """`without`: splits that are left out."""
    found: dict[int, list[tuple[str, str, str]]] = {}
    for file in snapshot_files(lake, table, version):
        split, domain, bucket = (str(file.partition[name]) for name in ("split", "domain", "bucket"))
        if split in without:
            continue
        found.setdefault(int(bucket), []).append((split, domain, file.path))
    return found


def _catalogue(items: DataFrame, domains: DataFrame, names: Sequence[str]) -> pa.Table:
    """The kept items with their domains as bits. Collected: it grows with the items alone."""
    kept = items.where("kept").select("index", "degree", F.xxhash64("item").alias("word"))
    catalogue, members = kept.toArrow(), domains.select("domain", "index").toArrow()
    index = catalogue["index"].to_numpy()
    bits = np.zeros(int(max(index.max(initial=0), members["index"].to_numpy().max(initial=0))) + 1, np.int64)
    for number, name in enumerate(names):
        bits[members.filter(pc.equal(members["domain"], name))["index"].to_numpy()] |= np.int64(1 << number)
    return catalogue.append_column("bits", pa.array(bits[index]))


JOB = Job(
    NEGATIVES,
    run,
    reads=(USERS, ITEMS, DOMAINS, SEQUENCES),
    settings=lambda config: [
        config.negatives.model_dump(),
        [domain.name for domain in config.domains],
        *time_splits.names(config),
        *cold_items.names(config),
    ],
)
