"""Item lists that were taken together, in time order. The last basket of a user is the test part, the one before it
validation, where there are at least three.

Baskets are made per domain: of a basket, a domain sees its own items. Where a split is `causal`, other domains' events
at or after the first held-out item's time are left out first. A split by time cuts a basket in two where one of its
dates falls into it. Of a user's kept events, of all domains, with or without a basket, only the newest
`sequences.max_events` count. A log without baskets isn't read, unless gaps in time make them in time
(`baskets.gap_minutes`), between events of whichever domain.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.config import EtlConfig, SplitConfig
from etl.histories import ties
from etl.histories.reader import Histories, Key
from etl.jobs import changed_buckets, time_splits
from etl.jobs.domains import names_of
from etl.jobs.job import Job, Outcome, Run
from etl.jobs.sequences import cut, of_domain, settings
from etl.lake import spark_io
from etl.settings import ConfigError
from etl.tables import BASKETS, DOMAIN_ALL, DOMAINS, INTERACTIONS, ITEMS, TIME_ORDINAL, USERS

_MIN_BASKETS = 3
_PARTS = pa.array(["train", "validation", "test"])


def rows(
    histories: Histories, *, names: Sequence[str], splits: Sequence[SplitConfig], gap: float | None = None
) -> Iterator[tuple[Key, pa.RecordBatch]]:
    """BASKETS, less its partition columns, of each split and domain. `names`: the domains, in the order of bits. `gap`:
    minutes; None: as the log has them."""
    for ordered, of_order in ties.by_order(histories, splits):
        yield from _rows(ordered, names, of_order, gap)


def _rows(
    histories: Histories, names: Sequence[str], splits: Sequence[SplitConfig], gap: float | None
) -> Iterator[tuple[Key, pa.RecordBatch]]:
    """As `rows`, of splits with one rule for ties, whose order the histories have."""
    if gap is None:
        coded = pc.dictionary_encode(histories.more["basket"])
        basket = coded.indices.fill_null(-1).to_numpy()
    else:
        basket = _sessions(histories, gap)
    last = np.append(histories.time, np.iinfo(np.int64).max)
    for split in splits:
        if split.cold_users is not None or split.cold_items is not None or split.is_by_chance:
            continue  # who is new in a domain has no baskets there to read; a basket is not cut by item or by chance
        cut_time = last[cut(histories, split, split.causal_target, names)]
        before = histories.time < cut_time[histories.user]
        before |= cut_time[histories.user] == last[-1]
        for number, name in enumerate(names):
            if split.joint_target is not None and name == DOMAIN_ALL:
                continue  # a basket can hold both what is trained on and what the target holds out
            at = of_domain(histories, number)
            at = at[basket[at] >= 0]
            if split.causal_target not in (None, name):
                at = at[before[at]]
            if len(at):
                own = basket[at]
                if split.is_by_time:
                    own = own * np.int64(4) + time_splits.parts(histories.time[at], split)
                made = _baskets(histories, at, own, split)
                if made.num_rows:
                    yield (split.name, name), made


def _sessions(histories: Histories, gap: float) -> np.ndarray:
    """[N] numbers of sessions: one begins with a user's first event, and after a pause of more than `gap` minutes."""
    pause = np.diff(histories.time, prepend=0) > gap * 60_000_000
    begins = pause | (np.diff(histories.user, prepend=-1) != 0)
    return np.cumsum(begins)


def _baskets(histories: Histories, at: np.ndarray, basket: np.ndarray, split: SplitConfig) -> pa.RecordBatch:
    """The baskets of the events in rows `at`, each a row, by user and first event."""
    user = histories.user[at]
    order = np.lexsort((basket, user))  # stable: events stay in time order
    changes = (np.diff(user[order]) != 0) | (np.diff(basket[order]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    first = order[starts]  # place of each basket's first event
    size = np.diff(np.append(starts, len(order)))
    turn = np.argsort(first)
    first, size, starts = first[turn], size[turn], starts[turn]
    offsets = np.concatenate([[0], np.cumsum(size)])
    events = order[np.arange(len(order)) - np.repeat(offsets[:-1], size) + np.repeat(starts, size)]
    owner = user[first]
    count = np.bincount(owner, minlength=len(histories.users))
    number = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
    left = count[owner] - number
    part = np.where(count[owner] >= _MIN_BASKETS, np.maximum(3 - left, 0), 0)
    time = histories.time[at[first]]
    if split.is_by_time:
        part = time_splits.parts(time, split)
    baskets = pa.RecordBatch.from_pydict(
        {
            "user": pa.array(histories.users[owner], pa.int32()),
            "basket": pa.array(number, pa.int32()),
            "time": pa.array(time, pa.int64()),
            "part": _PARTS.take(pa.array(np.minimum(part, 2))),
            "items": pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(histories.item[at[events]], pa.int32())
            ),
        }
    )
    return baskets.filter(pa.array(part < len(_PARTS)))


def run(run: Run) -> Outcome:
    time_splits.check_times(run)
    gap = run.config.baskets.gap_minutes
    if gap is not None and spark_io.last_commit(run.lake, INTERACTIONS)["time"] == TIME_ORDINAL:
        raise ConfigError(
            "baskets.gap_minutes: expected a log with times, found one whose times are mere order; name its basket "
            "column instead, or leave both out"
        )
    cut_rows = partial(rows, names=names_of(run.config.domains), splits=run.config.splits, gap=gap)
    columns = ("basket",) if gap is None else ()
    return changed_buckets.write(run, cut_rows, columns=columns, needs=gap is None, properties={})


def _settings(config: EtlConfig) -> object:
    return [settings(config), config.baskets.model_dump()]


JOB = Job(
    BASKETS,
    run,
    reads=(INTERACTIONS, USERS, ITEMS, DOMAINS),
    settings=_settings,
)
