"""Users' histories from the log, a bucket at a time, in one task and without Spark.

The log is partitioned by the user's bucket, so what a task needs of it lies in a few files, which pyarrow reads and
numpy sorts; no row and no user is a Python object. What is held at once is bounded by settings, not by the log: a
bucket of more than PART_EVENTS events is cut into parts of neighbouring users, by way of files in the temporary folder;
and of a user with a history longer than `max_events` the newest so many are kept, while reading.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import existing_table, snapshot_files
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import DOMAINS, INTERACTIONS, ITEMS, Table

PART_EVENTS = 1 << 21  # sorted at once
CHUNK_EVENTS = 1 << 20  # read at once

Ints = npt.NDArray[np.signedinteger]


@dataclass(frozen=True)
class Inputs:
    """What a task reads: data files of pinned versions, and the rules of reading."""

    lake: str
    log: Mapping[int, tuple[str, ...]]  # bucket -> files of INTERACTIONS
    items: tuple[str, ...]  # files of ITEMS
    domains: tuple[tuple[str, str], ...]  # (domain, file of DOMAINS)
    names: tuple[str, ...]  # the domains; bit k stands for names[k]
    columns: tuple[str, ...]  # of event_type, value and basket: those to read
    max_events: int


@dataclass(frozen=True)
class Histories:
    """The `N` kept events of `U` users of a bucket, by user, time and source_order."""

    users: Ints  # [U] global index, ascending
    user: Ints  # [N] place in `users`
    item: Ints  # [N] global index
    bits: Ints  # [N] bit k: the item belongs to domain k
    time: Ints  # [N]
    more: Mapping[str, pa.Array]  # [N] each: the columns requested
    raw: pa.Array  # [U] raw user ids
    catalogue: "Catalogue | None" = None  # that has the items' raw ids


Key = tuple[str, str]  # split and domain
Rows = Callable[[Histories], Iterator[tuple[Key, pa.RecordBatch]]]


@dataclass(frozen=True)
class Catalogue:
    """The `V` kept items of the domains requested."""

    item: pa.Array  # [V] raw id
    index: Ints  # [V]
    bits: Ints  # [V]


def inputs(
    lake: str, versions: Mapping[str, int], *, names: Sequence[str], columns: Sequence[str], max_events: int
) -> Inputs:
    """The inputs as of `versions`; of `columns` only those that have a value anywhere in the log."""
    log: dict[int, list[str]] = {}
    for file in snapshot_files(lake, INTERACTIONS, versions[INTERACTIONS.name]):
        log.setdefault(int(file.partition["bucket"] or 0), []).append(file.path)
    members = snapshot_files(lake, DOMAINS, versions[DOMAINS.name], {"domain": names})
    return Inputs(
        lake=lake,
        log={bucket: tuple(paths) for bucket, paths in log.items()},
        items=tuple(file.path for file in snapshot_files(lake, ITEMS, versions[ITEMS.name])),
        domains=tuple((file.partition["domain"] or "", file.path) for file in members),
        names=tuple(names),
        columns=tuple(_given(lake, versions[INTERACTIONS.name], columns)),
        max_events=max_events,
    )


def _given(lake: str, version: int, columns: Sequence[str]) -> list[str]:
    """Those of the log's columns that have a value, by the statistics that our commits record."""
    actions = pa.table(existing_table(lake, INTERACTIONS, version).get_add_actions(flatten=True))

    def empty(name: str) -> bool:
        nulls = f"null_count.{name}"
        return nulls in actions.column_names and actions[nulls].to_pylist() == actions["num_records"].to_pylist()

    return [name for name in columns if not empty(name)]


def read_catalogue(read: Inputs) -> Catalogue:
    """It grows with the items alone."""
    items = stacked([_read(read.lake, ITEMS, path, ["item", "index", "kept"]) for path in read.items])
    items = items.filter(items["kept"])
    index = items["index"].to_numpy()
    bits = item_bits(read)[index]
    inside = np.flatnonzero(bits)
    return Catalogue(whole(items["item"].take(pa.array(inside))), index[inside], bits[inside])


def item_bits(read: Inputs) -> npt.NDArray[np.int64]:
    """Each item's domains as bits, by global index; 0 for those not kept."""
    items = stacked([_read(read.lake, ITEMS, path, ["index", "kept"]) for path in read.items])
    kept = np.zeros(int(items["index"].to_numpy().max(initial=0)) + 1, bool)
    kept[items["index"].to_numpy()] = items["kept"].to_numpy()
    bits = np.zeros(len(kept), np.int64)
    for name, path in read.domains:
        members = _read(read.lake, DOMAINS, path, ["index"])["index"].to_numpy()
        bits[members[members < len(bits)]] |= np.int64(1 << read.names.index(name))
    return np.where(kept, bits, 0)


def histories(users: pa.Table, bucket: int, catalogue: Catalogue, read: Inputs) -> Iterator[Histories]:
    """The kept events of `users` (user, index, degree; by index), who are of one bucket: in parts, by index.

    `degree` decides where parts are cut, so that they are of about the same size, and nothing else.
    """
    index, raw = users["index"].to_numpy(), whole(users["user"])
    parts = _parts(np.clip(users["degree"].to_numpy(), 1, read.max_events))
    events = events_of(raw, bucket, catalogue, read)
    if len(parts) == 1:
        yield _histories(events, index, raw, catalogue, read)
        return
    with tempfile.TemporaryDirectory(prefix="graftrec-") as scratch:
        paths = [Path(scratch) / str(number) for number in range(len(parts))]
        _scatter(events, parts, paths, read)
        for path, (start, stop) in zip(paths, parts, strict=True):
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                yield _histories(stream, index[start:stop], raw[start:stop], catalogue, read, first=start)
            path.unlink()


def _parts(length: Ints) -> list[tuple[int, int]]:
    """Runs of users whose `length` events fill a part; one who has near half of that is alone."""
    alone = length > PART_EVENTS * 3 // 8
    filled = np.cumsum(np.where(alone, 0, length))
    number = np.maximum(filled - 1, 0) // PART_EVENTS + 2 * np.cumsum(alone) - alone
    return [(start, stop) for _, start, stop in runs(number)]


def find(known: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where in `known` (ascending) each of `wanted` stands, and whether it does."""
    place = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
    return place, known[place] == wanted if len(known) else np.zeros(len(wanted), bool)


def runs(values: Ints) -> Iterator[tuple[int, int, int]]:
    """(value, start, stop) of each run of equal values."""
    if len(values):
        starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist()]
        yield from zip(values[starts].tolist(), starts, [*starts[1:], len(values)], strict=True)


def _schema(read: Inputs) -> pa.Schema:
    """Events in a task. `user` and `item` are places in the bucket's users and in the catalogue."""
    own = [("user", pa.int32()), ("item", pa.int32()), ("time", pa.int64()), ("source_order", pa.int64())]
    return pa.schema([*own, *((name, INTERACTIONS.schema.field(name).type) for name in read.columns)])


def events_of(
    users: pa.Array, bucket: int, catalogue: Catalogue, read: Inputs, *, count: npt.NDArray[np.int64] | None = None
) -> Iterator[pa.RecordBatch]:
    """The bucket's events of these users with items of the catalogue, in the order of the files: user, item (places in
    `users` and the catalogue), time, source_order and the columns requested. `count`: to each user's its events, of
    whatever items, are added.
    """
    schema = _schema(read)
    for chunk in _chunks(bucket, read):
        user, item = _places(chunk["user"], users), _places(chunk["item"], catalogue.item)
        if count is not None:
            count += np.bincount(user[user >= 0], minlength=len(count))
        known = (user >= 0) & (item >= 0)
        if not known.all():
            user, item, chunk = user[known], item[known], chunk.filter(pa.array(known))
        rest = [whole(chunk[name]) for name in schema.names[2:]]
        yield pa.record_batch([pa.array(user), pa.array(item), *rest], schema=schema)


def _chunks(bucket: int, read: Inputs) -> Iterator[pa.Table]:
    """The bucket's part of the log in tables of about CHUNK_EVENTS rows. Ids come as dictionaries."""
    columns = ["user", "item", "time", "source_order", *read.columns]
    waiting: list[pa.Table] = []
    for path in read.log.get(bucket, ()):
        opened = open_parquet(read.lake, INTERACTIONS, path, read_dictionary=["user", "item"])
        with _named(INTERACTIONS, path), opened as file:
            for group in range(file.num_row_groups):
                waiting.append(file.read_row_group(group, columns=columns, use_threads=False))
                if sum(len(table) for table in waiting) >= CHUNK_EVENTS:
                    yield stacked(waiting)
                    waiting = []
    if waiting:
        yield stacked(waiting)


def stacked(tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of several files of one table. A column that one engine calls nullable, another may not."""
    return pa.concat_tables(tables, promote_options="default")


def _places(column: pa.ChunkedArray, known: pa.Array) -> npt.NDArray[np.int32]:
    """Where in `known` (each once) the values of a dictionary column stand, -1 for those it lacks."""
    coded = whole(column.unify_dictionaries())
    values = coded.dictionary
    if len(known) <= len(values):
        place = _index_in(values, known)
    else:  # of the shorter one a hash table is made: of 10 million items it takes 7 s, and there is one a chunk
        found = _index_in(known, values)
        at = np.flatnonzero(found >= 0)
        place = np.full(len(values), -1, np.int32)
        place[found[at]] = at
    of_row: npt.NDArray[np.int32] = place[coded.indices.to_numpy()]
    return of_row


def _index_in(values: pa.Array, known: pa.Array) -> npt.NDArray[np.int32]:
    found: npt.NDArray[np.int32] = pc.index_in(values, value_set=known).fill_null(-1).to_numpy(zero_copy_only=False)
    return found


def _scatter(
    events: Iterable[pa.RecordBatch], parts: Sequence[tuple[int, int]], paths: Sequence[Path], read: Inputs
) -> None:
    """Events to the file of their user's part."""
    starts = np.array([start for start, _ in parts])
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), _schema(read))) for path in paths]
        for batch in events:
            part_of_row = np.searchsorted(starts, batch["user"].to_numpy(), "right") - 1
            order = np.argsort(part_of_row.astype(np.int16), kind="stable")
            for part, start, stop in runs(part_of_row[order]):
                writers[part].write_batch(batch.take(pa.array(order[start:stop])))


def _histories(
    events: Iterable[pa.RecordBatch], users: Ints, raw: pa.Array, catalogue: Catalogue, read: Inputs, *, first: int = 0
) -> Histories:
    """The newest `max_events` of each user, sorted. `first`: the place that events call the first of `users`."""
    held: list[pa.RecordBatch] = []
    num_held, limit = 0, min(PART_EVENTS, read.max_events + CHUNK_EVENTS // 2)
    for batch in events:
        held.append(batch)
        num_held += len(batch)
        if num_held > limit:
            held = [_newest(joined(held, read), read.max_events)]
            num_held = len(held[0])
            limit = num_held + CHUNK_EVENTS // 2
    kept = _newest(joined(held, read), read.max_events)
    user = kept["user"].to_numpy() - np.int32(first)
    order = time_order(user, kept["time"].to_numpy(), kept["source_order"].to_numpy())
    item = kept["item"].to_numpy()[order]
    return Histories(
        users=users,
        user=user[order],
        item=catalogue.index[item],
        bits=catalogue.bits[item],
        time=kept["time"].to_numpy()[order],
        more={name: kept[name].take(pa.array(order)) for name in read.columns},
        raw=raw,
        catalogue=catalogue,
    )


def joined(batches: list[pa.RecordBatch], read: Inputs) -> pa.RecordBatch:
    """One batch of all. Empties the list, so that they are held once."""
    joined = pa.concat_batches(batches) if batches else pa.RecordBatch.from_pylist([], schema=_schema(read))
    batches.clear()
    return joined


def _newest(events: pa.RecordBatch, most: int) -> pa.RecordBatch:
    """The newest `most` events of each user, in the order they came."""
    user = events["user"].to_numpy()
    excess = np.maximum(np.bincount(user) - most, 0) if len(user) else np.zeros(0, np.int64)
    if not excess.any():
        return events
    rows = np.flatnonzero(excess[user] > 0)
    of_row = events.take(pa.array(rows)) if len(rows) < len(user) else events
    rows = rows[time_order(user[rows], of_row["time"].to_numpy(), of_row["source_order"].to_numpy())]
    keep = np.ones(len(user), bool)
    for place, start, _ in runs(user[rows]):
        keep[rows[start : start + excess[place]]] = False
    return events.filter(pa.array(keep))


def time_order(user: Ints, time: Ints, source_order: Ints) -> npt.NDArray[np.int64]:
    """The order of rows by user (≥ 0), time and source_order.

    One sort of 64-bit numbers that hold the user and as much of the time as there is room for, then one by all of the
    rest where these numbers are equal: a third of the time of a sort by three keys.
    """
    if not len(user):
        return np.zeros(0, np.int64)
    since = (time - time.min()).view(np.uint64)  # also where the difference is no int64
    since //= max(np.gcd.reduce(since), np.uint64(1))  # times are often whole seconds
    bits = int(since.max()).bit_length()
    room = 64 - int(user.max()).bit_length()
    key = since >> np.uint64(max(bits - room, 0))
    if room < 64:
        key |= user.astype(np.uint64) << np.uint64(min(bits, room))
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if equal.any():
        tied = np.zeros(len(key), bool)
        tied[1:] |= equal
        tied[:-1] |= equal
        at = np.flatnonzero(tied)
        rows = order[at]
        order[at] = rows[np.lexsort((source_order[rows], time[rows], key[at]))]
    return order


def _read(lake: str, table: Table, path: str, columns: list[str]) -> pa.Table:
    with _named(table, path), open_parquet(lake, table, path) as file:
        return file.read(columns, use_threads=False)


@contextlib.contextmanager
def _named(table: Table, path: str) -> Iterator[None]:
    """Name the file that can't be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = one_line(error)
        raise GraftrecError(
            f"{table.name}: {path} can't be read ({reason}); restore it, or make the table anew"
        ) from None


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
