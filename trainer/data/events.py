"""Users' events as one ragged container: every room that reads or passes on a user's history uses it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainer.arrays import FloatArray, Int8Array, IntArray

Column = npt.NDArray[Any]
# What is not read is empty: times, values (NaN: none), places among names of event types (0: none of them).
_NOT_READ = {"times": np.int64, "values": np.float32, "event_types": np.int8}


@dataclass(frozen=True)
class Events:
    """Events of B users, oldest first: user b's are places ``offsets[b]`` to ``offsets[b + 1]`` of every column."""

    users: IntArray  # [B] any id that is the same in every domain
    offsets: IntArray  # [B + 1]
    columns: Mapping[str, Column]  # name -> [sum of lengths]; `items` is always there
    # [B] when each user's request is made, as `times`; None: there is none, or it is not known.
    request_times: IntArray | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, users: IntArray, offsets: IntArray, items: Column, *more: Column) -> "Events":
        """`more`: times and event types, those that are there; empty ones are left out."""
        named = zip(("times", "event_types"), more, strict=False)
        return Events(users, offsets, {"items": items} | {name: values for name, values in named if len(values)})

    def __len__(self) -> int:
        return len(self.users)

    # --- columns

    def column(self, name: str) -> Column:
        """Empty where it was not read."""
        return self.columns[name] if name in self.columns else np.empty(0, _NOT_READ[name])

    @property
    def items(self) -> npt.NDArray[Any]:
        return self.columns["items"]

    @property
    def times(self) -> IntArray:
        return self.column("times")

    @property
    def values(self) -> FloatArray:
        return self.column("values")

    @property
    def event_types(self) -> Int8Array:
        return self.column("event_types")

    def with_columns(self, **columns: Column) -> Self:
        """With these in the place of those of the same names."""
        return replace(self, columns={**self.columns, **columns})

    # --- places

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    @property
    def owners(self) -> IntArray:
        """[sum of lengths] the user of each place, 0 to B - 1."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def positions(self) -> IntArray:
        """[sum of lengths] of each place within its user's events."""
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)

    # --- some of them

    def keep(self, flags: npt.NDArray[np.bool_]) -> "Events":
        """Only the events whose flag is set."""
        kept = np.concatenate([[0], np.cumsum(flags)])[self.offsets]
        columns = {name: values[flags] for name, values in self.columns.items()}
        return Events(self.users, kept, columns, request_times=self.request_times)

    def until(self, ends: IntArray) -> "Events":
        """The first ``ends[b]`` events of each user: a training part, or what is read at a validation or test."""
        return self.keep(self.positions < np.repeat(ends, self.lengths))

    def newest(self, count: int) -> "Events":
        """The last `count` events of each user."""
        return self.keep(self.positions >= np.repeat(self.lengths - count, self.lengths))

    def before(self, times: IntArray, *, always: npt.NDArray[np.bool_] | None = None) -> "Events":
        """What each user did strictly before ``times[b]``, and what is flagged as kept `always`.

        Raises ValueError where there are no times.
        """
        self.require_times()
        is_before = self.times < np.repeat(times, self.lengths)
        return self.keep(is_before if always is None else is_before | always)

    def take(self, rows: IntArray) -> "Events":
        """Some users, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        columns = {name: values[flat] for name, values in self.columns.items()}
        requested = None if self.request_times is None else self.request_times[rows]
        return Events(self.users[rows], offsets, columns, request_times=requested)

    def of_users(self, users: IntArray) -> "Events":
        """Those of exactly these users, in that order; none of a user who is not here. The users here ascend."""
        if not len(self):
            return replace(self, users=users, offsets=np.zeros(len(users) + 1, np.int64))
        place = np.minimum(np.searchsorted(self.users, users), len(self) - 1)
        taken = self.take(place)
        return replace(taken.keep(np.repeat(self.users[place] == users, taken.lengths)), users=users)

    # --- in another form

    def in_time_order(self) -> "Events":
        """Each user's by time, those of one time as they are. Raises ValueError where there are no times."""
        self.require_times()
        order = np.lexsort((self.times, self.owners))  # stable
        return replace(self, columns={name: values[order] for name, values in self.columns.items()})

    def padded(self, name: str, fill: int = 0) -> IntArray:
        """A column as [B, longest], `fill` behind each user's last event."""
        lengths = self.lengths
        width = int(lengths.max(initial=0))
        found = np.full((len(self), width), fill, dtype=np.int64)
        if width:  # without an event there may be no such column
            found[np.arange(width) < lengths[:, None]] = self.columns[name]
        return found

    def require_times(self) -> None:
        if len(self.times) != len(self.items):
            raise ValueError(
                f"expected a time of each of {len(self.items)} interactions, found {len(self.times)} times"
            )


def joined(parts: Sequence[Events], name: str) -> Column:
    """A column of several, one behind the other; of those that have it."""
    given = [part.columns[name] for part in parts if name in part.columns]
    return np.concatenate(given) if given else np.empty(0, _NOT_READ.get(name, np.int32))


def beside(first: Events, second: Events) -> Events:
    """The events of each user of either: those of `first`, then those of `second`; users ascend. With the columns that
    both have."""
    users, places = np.unique(np.concatenate([first.users, second.users]), return_inverse=True)
    owner = np.repeat(places, np.concatenate([first.lengths, second.lengths]))
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(users)))])
    together = {name: joined((first, second), name) for name in dict.fromkeys([*first.columns, *second.columns])}
    whole = {name: values[order] for name, values in together.items() if len(values) == len(order)}
    return Events(users, offsets, whole)


def merge(first: Events, second: Events) -> Events:
    """As `beside`, in time order (ties: `first` before `second`).

    Raises ValueError where there are no times: without them no one knows which domain's items are the last.
    """
    first.require_times()
    second.require_times()
    return beside(first, second).in_time_order()


def sampled(users: IntArray, share: float) -> npt.NDArray[np.bool_]:
    """About this share of users, whatever table they come from (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    flags: npt.NDArray[np.bool_] = (z ^ (z >> np.uint64(31))).astype(np.float64) < share * 2.0**64
    return flags
