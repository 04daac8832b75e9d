"""What a log looks like: popularity, repeats, sessions, histories, calendar, of `interactions` and `items` of a lake.

python -m tests.benchmarks.log_statistics LAKE
"""

import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl import tables
from trainer.data.release import pin

SESSION_GAP = 3_600 * 1_000_000  # microseconds without an event that end a session
HEAD = 0.1  # share of the items
DAY = 24 * SESSION_GAP
BREAK = 30 * DAY  # a user who does nothing for so long, and then something, comes back

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Log:
    """Events, user by user in time order; ids are dense."""

    user: Ints
    item: Ints
    time: Ints  # microseconds
    category: Ints  # of the item: the last one it has, as numbers


def read_log(lake: str) -> Log:
    """The newest release of a lake, all domains."""
    release = pin(lake, None)
    events = release.read(tables.INTERACTIONS, ["user", "item", "time", "source_order"])
    items = release.read(tables.ITEMS, ["item", "categories"])
    last = [(names or ["none"])[-1] for names in items["categories"].to_pylist()]
    numbers = np.unique(last, return_inverse=True)[1]
    of_item = dict(zip(items["item"].to_pylist(), numbers.tolist(), strict=True))
    names, item = np.unique(np.array(events["item"].to_pylist(), dtype=object).astype(str), return_inverse=True)
    user = np.unique(np.array(events["user"].to_pylist(), dtype=object).astype(str), return_inverse=True)[1]
    category = np.array([of_item[name] for name in names.tolist()])[item]
    time = events["time"].cast("int64").to_numpy()  # microseconds
    order = np.lexsort((events["source_order"].to_numpy(), time, user))
    return Log(user[order], item[order], time[order], category[order])


def statistics(log: Log) -> dict[str, float]:
    """Name -> value, in the order in which they are shown."""
    popularity = np.sort(np.bincount(log.item))
    histories = np.bincount(log.user)
    sessions = _sessions(log)
    distance, by_chance = repeat_distance(log.user, log.category), repeat_distance(log.user, _shuffled(log))
    return {
        "users": len(histories),
        "items": len(popularity),
        "events": len(log.user),
        "popularity: Gini": gini(popularity),
        "popularity: share of the top 10 % of items": head_share(popularity),
        "history: events, median": float(np.median(histories)),
        "history: events, mean": float(histories.mean()),
        "history: events, 90th percentile": float(np.percentile(histories, 90)),
        "session: events, median": float(np.median(sessions)),
        "session: events, mean": float(sessions.mean()),
        "sessions of a user, mean": len(sessions) / len(histories),
        "repeat distance of a genre: events, median": float(np.median(distance)),
        "the same in a history that is shuffled": float(np.median(by_chance)),
        "mean repeat distance over that of a shuffled history": float(distance.mean() / by_chance.mean()),
        **calendar(log),
    }


def calendar(log: Log) -> dict[str, float]:
    """Days, returning users, new items, and how the log changes with the calendar. Days and weekdays are UTC's."""
    day = log.time // DAY
    days = np.bincount(day - day.min())
    own = np.diff(log.user) == 0
    breaks = np.bincount(log.user[1:][own & (np.diff(log.time) >= BREAK)], minlength=int(log.user.max()) + 1)
    first_day = np.full(int(log.item.max()) + 1, day.max())
    np.minimum.at(first_day, log.item, day)
    weekend = np.isin((np.arange(day.min(), day.max() + 1) + 3) % 7, (5, 6))  # 1970 began on a Thursday
    evening = np.isin(log.time % DAY // SESSION_GAP, range(17, 23))
    return {
        "days": len(days),
        "users who come back after 30 days, share": float((breaks > 0).mean()),
        "breaks of 30 days, mean of a user": float(breaks.mean()),
        "items first taken after a tenth of the days, share": float((first_day > day.min() + len(days) / 10).mean()),
        "popularity: correlation of first and last quarter": popularity_drift(log),
        "events of a weekend day over a weekday's": _ratio(days[weekend], days[~weekend]),
        "events of an evening hour over another's": float(evening.mean() / 6 / ((1 - evening.mean()) / 18)),
    }


def popularity_drift(log: Log) -> float:
    """Correlation of the logarithms of items' events in the first and in the last quarter of the log: 1 where nothing
    changes but chance."""
    ordered, quarter = log.item[np.argsort(log.time, kind="stable")], len(log.item) // 4
    size = int(log.item.max()) + 1
    early, late = (np.log1p(np.bincount(part, minlength=size)) for part in (ordered[:quarter], ordered[-quarter:]))
    return float(np.corrcoef(early, late)[0, 1])


def _ratio(some: Ints, others: Ints) -> float:
    """Of means; NaN where there are none."""
    return float(some.mean() / others.mean()) if len(some) and len(others) else float("nan")


def gini(counts: Ints) -> float:
    """0: all items alike, 1: one has everything (Gini 1912)."""
    ordered = np.sort(counts)
    size = len(ordered)
    return float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * ordered.sum()))


def head_share(counts: Ints) -> float:
    """Share of the events that the most popular tenth of the items has."""
    ordered = np.sort(counts)[::-1]
    return float(ordered[: max(1, round(HEAD * len(ordered)))].sum() / ordered.sum())


def repeat_distance(user: Ints, category: Ints) -> Ints:
    """Events from one of a category to the user's next of the same; users do not take an item twice."""
    place = np.arange(len(user))
    order = np.lexsort((place, category, user))
    same = (user[order][1:] == user[order][:-1]) & (category[order][1:] == category[order][:-1])
    return np.diff(place[order])[same]


def _sessions(log: Log) -> Ints:
    """Events of each session."""
    begins = np.ones(len(log.user), bool)
    begins[1:] = (np.diff(log.user) != 0) | (np.diff(log.time) > SESSION_GAP)
    return np.diff(np.append(np.flatnonzero(begins), len(begins)))


def _shuffled(log: Log) -> Ints:
    """Every user's categories in random order."""
    draw = np.random.default_rng(0).random(len(log.user))
    return log.category[np.lexsort((draw, log.user))]


if __name__ == "__main__":
    for name, value in statistics(read_log(sys.argv[1])).items():
        print(f"{name:<58}{value:>12,.3f}")
