"""Users' histories as one ragged container."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainer.arrays import IntArray


@dataclass(frozen=True)
class Histories:
    """B users' items, oldest first: user b's are ``items[offsets[b]:offsets[b + 1]]``."""

    users: IntArray  # [B] any id that is the same in every domain
    offsets: IntArray  # [B + 1]
    items: IntArray  # [sum of lengths]
    times: IntArray  # [sum of lengths], or empty where no one asks
    # Kinds of event, [sum of lengths]: places among names that whoever reads them knows, 0 for none; empty as above.
    event_types: npt.NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def keep(self, flags: npt.NDArray[np.bool_]) -> "Histories":
        """Only the interactions whose flag is set."""
        kept = np.concatenate([[0], np.cumsum(flags)])[self.offsets]
        return Histories(
            self.users,
            kept,
            self.items[flags],
            self.times[flags] if len(self.times) else self.times,
            self.event_types[flags] if len(self.event_types) else self.event_types,
        )

    def until(self, ends: IntArray) -> "Histories":
        """The first ``ends[b]`` items of each user: a training part, or what is read at a validation or test."""
        return self.keep(self._positions() < np.repeat(ends, self.lengths))

    def newest(self, count: int) -> "Histories":
        """The last `count` items of each user."""
        return self.keep(self._positions() >= np.repeat(self.lengths - count, self.lengths))

    def before(self, times: IntArray, *, always: npt.NDArray[np.bool_] | None = None) -> "Histories":
        """What each user did strictly before ``times[b]``, and what is flagged as kept `always`.

        Raises ValueError where there are no times.
        """
        self.require_times()
        is_before = self.times < np.repeat(times, self.lengths)
        return self.keep(is_before if always is None else is_before | always)

    def take(self, rows: IntArray) -> "Histories":
        """Some users, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Histories(
            self.users[rows],
            offsets,
            self.items[flat],
            self.times[flat] if len(self.times) else self.times,
            self.event_types[flat] if len(self.event_types) else self.event_types,
        )

    def require_times(self) -> None:
        if len(self.times) != len(self.items):
            raise ValueError(
                f"expected a time of each of {len(self.items)} interactions, found {len(self.times)} times"
            )

    def _positions(self) -> IntArray:
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)


def merge(first: Histories, second: Histories) -> Histories:
    """Two domains' histories as one per user of either, in time order (ties: `first` before `second`); users sorted.

    Raises ValueError where there are no times: without them no one knows which domain's items are the last.
    """
    first.require_times()
    second.require_times()
    users, places = np.unique(np.concatenate([first.users, second.users]), return_inverse=True)
    owner = np.concatenate(
        [np.repeat(places[: len(first)], first.lengths), np.repeat(places[len(first) :], second.lengths)]
    )
    times = np.concatenate([first.times, second.times])
    order = np.lexsort((times, owner))  # stable
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(users)))])
    kinds = np.concatenate([first.event_types, second.event_types])
    kinds = kinds[order] if len(kinds) == len(order) else np.empty(0, np.int8)  # not of one alone
    return Histories(users, offsets, np.concatenate([first.items, second.items])[order], times[order], kinds)
