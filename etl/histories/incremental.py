"""A bucket of users' histories after a new day: of affected users made anew, of the others copied, without its old log.

A table of histories has every kept event of a user in its row of the domain `all`, but for a joint split in time order.
That row and the events appended
since, which come later in the log, are the user's history now. Only users whose old events didn't count before, or
whose history has become longer than `max_events`, are looked up in the bucket's whole log.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.histories.reader import (
    PART_EVENTS,
    Catalogue,
    Histories,
    Inputs,
    Ints,
    Key,
    Rows,
    events_of,
    find,
    histories,
    joined,
    time_order,
    whole,
)
from etl.lake.datafile import DataFile, data_schema
from etl.lake.file_reader import open_parquet
from etl.lake.snapshots import existing_table, snapshot_files
from etl.tables import DOMAIN_ALL, INTERACTIONS, SEQUENCES

_LISTS = {"event_type": "event_types", "value": "values"}


@dataclass(frozen=True)
class PreviousState:
    """What was there: files of the table by bucket, split and domain, and what the log has gained since by bucket."""

    files: Mapping[int, Mapping[Key, Sequence[str]]]
    appended: Mapping[int, tuple[str, ...]]
    whole: frozenset[str]  # splits whose rows of the domain `all` are in (time, source_order)


def previous_state(
    lake: str, version: int | None, appended: Sequence[DataFile], whole: Sequence[str]
) -> PreviousState | None:
    """What of SEQUENCES at `version` can be copied, where the log has gained the files `appended` since. `whole`:
    the splits whose rows of the domain `all` are in (time, source_order). None where its files don't each hold a run of
    neighbouring users.
    """
    actions = pa.table(existing_table(lake, SEQUENCES, version).get_add_actions(flatten=True))
    columns = [actions[name].to_pylist() for name in ("path", "min.user", "max.user") if name in actions.column_names]
    if len(columns) < 3:
        return None
    spans = {unquote(path): (low, high) for path, low, high in zip(*columns, strict=True)}
    files: dict[int, dict[Key, list[str]]] = {}
    for file in sorted(snapshot_files(lake, SEQUENCES, version), key=lambda file: spans[file.path]):
        split, domain, bucket = (str(file.partition[name]) for name in ("split", "domain", "bucket"))
        paths = files.setdefault(int(bucket), {}).setdefault((split, domain), [])
        if paths and spans[paths[-1]][1] >= spans[file.path][0]:
            return None
        paths.append(file.path)
    log: dict[int, list[str]] = {}
    for file in appended:
        log.setdefault(int(file.partition["bucket"] or 0), []).append(file.path)
    return PreviousState(files, {bucket: tuple(paths) for bucket, paths in log.items()}, frozenset(whole))


def refresh_bucket(
    users: pa.Table, bucket: int, rows: Rows, catalogue: Catalogue, read: Inputs, before: PreviousState
) -> Iterator[tuple[Key, pa.RecordBatch]] | None:
    """SEQUENCES, less its partition columns, of the kept `users` (user, index, degree; by index) of a bucket: for each
    split and domain in turn batches in the table's order. None where so many are affected that all should be made anew.
    """
    index, degree = users["index"].to_numpy(), users["degree"].to_numpy()
    files = before.files.get(bucket, {})
    every = next((key for key in files if key[0] in before.whole and key[1] == DOMAIN_ALL), None)
    held: dict[Key, list[pa.Table]] = {}
    if every is not None and len(files[every]) == 1:  # a part of the bucket's events at most
        held[every] = list(_groups(files[every], read))
    old_rows = [] if every is None else held.get(every) or _groups(files[every], read)
    events, count = _appended(whole(users["user"]), bucket, catalogue, replace(read, log=before.appended))
    gained = np.bincount(events["user"].to_numpy(), minlength=len(index))
    length, old = _old_rows(old_rows, index, gained > 0)
    from_log = np.where(length >= 0, (gained > 0) & (length + gained > read.max_events), degree > count)
    from_log |= gained > read.max_events
    affected = (gained > 0) | from_log
    if np.clip(degree[affected], 1, read.max_events).sum() > PART_EVENTS:
        return None
    made = [_histories(users, old, events, (gained > 0) & ~from_log, catalogue, read)]
    if from_log.any():
        made += histories(users.filter(pa.array(from_log)), bucket, catalogue, read)
    new: dict[Key, list[pa.RecordBatch]] = {}
    for part in made:
        for key, batch in rows(part):
            new.setdefault(key, []).append(batch)
    return _merged(files, held, new, index[~affected], read)


def _appended(users: pa.Array, bucket: int, catalogue: Catalogue, read: Inputs) -> tuple[pa.RecordBatch, Ints]:
    """The kept events of the log that `read` names, and how many of each user it has, kept or not."""
    count = np.zeros(len(users), np.int64)
    return joined(list(events_of(users, bucket, catalogue, read, count=count)), read), count


def _old_rows(groups: Iterable[pa.Table], index: Ints, wanted: npt.NDArray[np.bool_]) -> tuple[Ints, list[pa.Table]]:
    """The length of each user's old row, -1 for none; and, with `place` in `index`, the rows of those `wanted`."""
    length = np.full(len(index), -1)
    found: list[pa.Table] = []
    for group in groups:
        place, known = find(index, group["user"].to_numpy())
        length[place[known]] = pc.list_value_length(group["items"]).to_numpy()[known]
        mine = np.flatnonzero(known & wanted[place])
        if len(mine):
            found.append(group.take(pa.array(mine)).append_column("place", pa.array(place[mine])))
    return length, found


def _histories(
    users: pa.Table,
    old: list[pa.Table],
    events: pa.RecordBatch,
    mine: npt.NDArray[np.bool_],
    catalogue: Catalogue,
    read: Inputs,
) -> Histories:
    """Of the users at the places `mine` of `users`: the events of their `old` rows, and the appended `events`."""
    old = [table.filter(pa.array(mine[table["place"].to_numpy()])) for table in old]
    events = events.filter(pa.array(mine[events["user"].to_numpy()]))
    size = [pc.list_value_length(table["items"]).to_numpy() for table in old]
    num_old = sum(int(sizes.sum()) for sizes in size)
    bits_of_index = np.zeros(int(catalogue.index.max(initial=0)) + 1, np.int64)
    bits_of_index[catalogue.index] = catalogue.bits
    own = np.cumsum(mine) - 1  # place among them
    places = [np.repeat(table["place"].to_numpy(), sizes) for table, sizes in zip(old, size, strict=True)]
    user = own[np.concatenate([*places, events["user"].to_numpy()])]
    item = np.concatenate([*(_flat(table["items"]) for table in old), catalogue.index[events["item"].to_numpy()]])
    time = np.concatenate([*(_flat(table["times"]) for table in old), events["time"].to_numpy()])
    turn = np.concatenate([np.arange(num_old), num_old + events["source_order"].to_numpy()])
    order = time_order(user, time, turn)
    more = {}
    for name in read.columns:
        lists = [_with_nulls(table[_LISTS[name]], sizes) for table, sizes in zip(old, size, strict=True)]
        kind = INTERACTIONS.schema.field(name).type
        values = pa.concat_arrays([*(values.cast(kind) for values in lists), events[name]])
        more[name] = values.take(pa.array(order))
    item = item[order]
    chosen = users.filter(pa.array(mine))
    index, raw = chosen["index"].to_numpy(), whole(chosen["user"])
    return Histories(index, user[order], item, bits_of_index[item], time[order], more, raw, catalogue)


def _with_nulls(lists: pa.ChunkedArray, size: Ints) -> pa.Array:
    """The values of all lists, a null list being `size` nulls."""
    there = np.repeat(pc.is_valid(lists).to_numpy(), size)
    at = np.cumsum(there) - 1
    return whole(pc.list_flatten(lists)).take(pa.array(np.where(there, at, 0), mask=~there))


def _merged(
    files: Mapping[Key, Sequence[str]],
    held: dict[Key, list[pa.Table]],
    new: Mapping[Key, list[pa.RecordBatch]],
    stays: Ints,
    read: Inputs,
) -> Iterator[tuple[Key, pa.RecordBatch]]:
    """The old rows of the users `stays` (ascending) and the `new` ones, by split and domain, in the table's order.
    `held`: row groups that are in memory already.
    """
    schema = data_schema(SEQUENCES)
    for key in sorted({*files, *new}):
        rows = pa.concat_tables([schema.empty_table(), *(pa.table(batch).cast(schema) for batch in new.get(key, ()))])
        rows = rows.take(pc.sort_indices(rows["user"]))
        done, user = 0, rows["user"].to_numpy()
        for group in held.pop(key, None) or _groups(files.get(key, ()), read):
            old_user = group["user"].to_numpy()
            upto = int(np.searchsorted(user, old_user[-1], "right"))
            kept = np.flatnonzero(find(stays, old_user)[1])
            both = pa.concat_tables([group.cast(schema), rows.slice(done, upto - done)]).combine_chunks()
            at = np.concatenate([kept, len(group) + np.arange(upto - done)])
            at = at[np.argsort(both["user"].to_numpy()[at])]
            done = upto
            for batch in both.take(pa.array(at)).combine_chunks().to_batches():
                yield key, batch
        for batch in rows.slice(done).combine_chunks().to_batches():
            yield key, batch


def _groups(paths: Sequence[str], read: Inputs) -> Iterator[pa.Table]:
    """Row groups of files of SEQUENCES, by user: files hold runs of neighbouring users."""
    for path in paths:
        with open_parquet(read.lake, SEQUENCES, path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, use_threads=False)


def _flat(lists: pa.ChunkedArray) -> npt.NDArray[np.signedinteger]:
    values: npt.NDArray[np.signedinteger] = pc.list_flatten(lists).to_numpy()
    return values
