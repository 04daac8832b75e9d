"""What became of served lists: the table `served` joined with the events that came later.

A list *hits* at k where its user took one of its first k items within some hours after it was given. An item that was
shown and not taken is an impression: a log of these is read by the ETL as events of a type of their own, which tasks
take for negatives (`task.impressions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trainer.arrays import IntArray

MICROSECONDS_PER_HOUR = 3_600_000_000


@dataclass(frozen=True)
class HitRate:
    """Of the lists of one version whose hours are over before the log ends."""

    version: str
    lists: int
    users: int
    hits: dict[int, float]  # k -> share of the lists


@dataclass(frozen=True)
class Shown:
    """Items of served lists, one a row, best first within a list; `taken`: within the hours."""

    rows: pa.Table  # list, user, item, rank, time, version
    taken: npt.NDArray[np.bool_]


def shown(served: pa.Table, events: pa.Table, *, hours: float, taken: Sequence[str] = ()) -> Shown:
    """Lists of known users whose hours are over before the last event. `served`: of the table SERVED; `events`: user,
    item, time (microseconds), and event_type, where only events of types `taken` count as taken."""
    window = int(hours * MICROSECONDS_PER_HOUR)
    end = pc.max(events["time"]).as_py() if len(events) else 0
    if taken:
        events = events.filter(pc.is_in(events["event_type"], value_set=pa.array(taken)))
    known = served.filter(pc.and_(pc.is_valid(served["user"]), pc.less_equal(served["time"], end - window)))
    lists = known["items"].combine_chunks()
    lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
    owner = pc.list_parent_indices(lists)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    ranks = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    rows = pa.table({"list": owner, "item": lists.flatten(), "rank": ranks})
    rows = rows.append_column("user", known["user"].take(owner))
    rows = rows.append_column("time", known["time"].take(owner)).append_column("version", known["version"].take(owner))
    return Shown(rows, _taken(rows, events, window))


def _taken(rows: pa.Table, events: pa.Table, window: int) -> npt.NDArray[np.bool_]:
    """Whether the user took the item in the `window` after the list was given: the pair's first event since then."""
    pairs = [pa.concat_arrays([*rows[name].chunks, *events[name].chunks]) for name in ("user", "item")]
    codes = [pc.dictionary_encode(one).indices.to_numpy(zero_copy_only=False).astype(np.int64) for one in pairs]
    pair = codes[0] * (int(codes[1].max(initial=0)) + 1) + codes[1]
    asked, happened = pair[: len(rows)], pair[len(rows) :]
    given, when = rows["time"].to_numpy(), events["time"].to_numpy()
    order = np.lexsort((when, happened))
    happened, when = happened[order], when[order]
    first = _first_after(happened, when, asked, given)
    inside = first < len(happened)
    at = np.minimum(first, max(len(happened) - 1, 0))
    if not len(happened):
        return np.zeros(len(rows), bool)
    found: npt.NDArray[np.bool_] = inside & (happened[at] == asked) & (when[at] <= given + window)
    return found


def _first_after(pairs: IntArray, times: IntArray, asked: IntArray, after: IntArray) -> IntArray:
    """Of each (asked, after): the place of the first event of that pair later than that; `pairs`, `times` in order."""
    is_asked = np.r_[np.zeros(len(pairs), np.int64), np.ones(len(asked), np.int64)]
    both = np.lexsort((is_asked, np.r_[times, after], np.r_[pairs, asked]))
    is_event = both < len(pairs)
    before = np.cumsum(is_event)  # of this pair and those before it, until then
    first = np.empty(len(asked), np.int64)
    places = both[~is_event] - len(pairs)
    first[places] = before[~is_event]
    return first


def hit_rates(lists: Shown, ks: Sequence[int]) -> list[HitRate]:
    """Of each version, by name."""
    rows, found = lists.rows, []
    versions = rows["version"].to_numpy(zero_copy_only=False)
    owner, rank = rows["list"].to_numpy(), rows["rank"].to_numpy()
    users = rows["user"].to_numpy(zero_copy_only=False)
    for version in sorted(set(versions.tolist())):
        of_version = versions == version
        number = len(np.unique(owner[of_version]))
        hits = {k: len(np.unique(owner[of_version & lists.taken & (rank <= k)])) / number for k in ks}
        found.append(HitRate(version, number, len(set(users[of_version].tolist())), hits))
    return found


def impressions(lists: Shown, event_type: str) -> pa.Table:
    """Items that were shown and not taken, as a log: user, item, time (timestamp), event_type."""
    rows = lists.rows.filter(pa.array(~lists.taken))
    time = rows["time"].cast(pa.timestamp("us", "UTC"))
    kinds = pa.array([event_type] * len(rows), pa.string())
    return pa.table({"user": rows["user"], "item": rows["item"], "time": time, "event_type": kinds})
