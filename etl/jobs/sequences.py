"""One row per split, domain and user: the user's kept items in time order, and where its hold-out begins.

A task sorts the events of a bucket's users once, with each item's domains as bits (`reader`); every domain and
split is then cut from that. Of a user's kept events, of all domains, only the newest `sequences.max_events` count.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl.config import EtlConfig, SplitConfig
from etl.histories import ties
from etl.histories.reader import Histories, Ints, Key, read_catalogue
from etl.jobs import changed_buckets, cold_items, hashed_splits, time_splits
from etl.jobs.domains import names_of
from etl.jobs.job import Job, Outcome, Run
from etl.lake import spark_io
from etl.settings import ConfigError
from etl.tables import (
    DOMAIN_ALL,
    DOMAINS,
    INTERACTIONS,
    ITEMS,
    PROPERTY_BUCKETS,
    PROPERTY_TIME,
    SEQUENCES,
    TIME_ORDINAL,
    USERS,
    cold_user_hash,
)

VALIDATION, TEST = 1, 2


def rows(
    histories: Histories,
    *,
    names: Sequence[str],
    splits: Sequence[SplitConfig],
    cold_parts: Mapping[str, cold_items.Parts] | None = None,
) -> Iterator[tuple[Key, pa.RecordBatch]]:
    """SEQUENCES, less its partition columns, of each split and domain. `names`: the domains, in the order of bits.
    `cold_parts`: see `cold_items.parts`."""
    for ordered, of_order in ties.by_order(histories, splits):
        yield from _rows(ordered, names, of_order, cold_parts or {})


def _rows(
    histories: Histories,
    names: Sequence[str],
    splits: Sequence[SplitConfig],
    cold_parts: Mapping[str, cold_items.Parts],
) -> Iterator[tuple[Key, pa.RecordBatch]]:
    """As `rows`, of splits with one rule for ties, whose order the histories have."""
    cold = {split.name: cold_part(histories, split, names) for split in splits if split.cold_users is not None}
    cuts = {
        split.name: cut(histories, split, split.causal_target, names, cold.get(split.name))
        for split in splits
        if split.causal_target is not None
    }
    for number, name in enumerate(names):
        at = of_domain(histories, number)
        if not len(at):
            continue
        user = histories.user[at]
        num_events = np.bincount(user, minlength=len(histories.users))
        present = np.flatnonzero(num_events)
        size = num_events[present]
        lists = _lists(histories, at, size)
        for split in splits:
            end = size
            if split.causal_target not in (None, name):
                end = np.add.reduceat(at < cuts[split.name][user], np.cumsum(size) - size, dtype=np.int64)
            valid_start, test_start = _parts(end, split)
            if split.is_by_time:
                valid_start, test_start, end = time_splits.offsets(histories.time[at], size, split)
            part = cold.get(split.name)
            if part is not None and split.joint_target == name:
                valid_start = np.where(part[present] > 0, 0, size)
                test_start = np.where(part[present] == TEST, 0, size)
            own = lists
            if split.is_by_chance:
                moved, valid_start, test_start = hashed_splits.parts(histories, at, size, split)
                own = lists if moved is at else _lists(histories, moved, size)
            if split.joint_target is not None and name == DOMAIN_ALL:
                moved, valid_start, test_start, end = _joint(histories, at, size, split, names, part)
                own = _lists(histories, moved, size)
            if split.cold_items is not None:
                parts = cold_parts[split.name]
                moved, valid_start, test_start, end = cold_items.cut(at, histories.item[at], size, split, parts)
                own = _lists(histories, moved, size)
            columns = {
                "user": pa.array(histories.users[present], pa.int32()),
                **own,
                "valid_start": pa.array(valid_start, pa.int32()),
                "test_start": pa.array(test_start, pa.int32()),
                "end": pa.array(end, pa.int32()),
            }
            yield (split.name, name), pa.RecordBatch.from_pydict(columns)


def of_domain(histories: Histories, number: int) -> npt.NDArray[np.int64]:
    """The rows of events of the domain that has this number."""
    return np.flatnonzero(histories.bits & np.int64(1 << number))


def cut(
    histories: Histories, split: SplitConfig, target: str | None, names: Sequence[str], cold: Ints | None = None
) -> npt.NDArray[np.int64]:
    """The row of each user's first event that the domain `target` holds out; for users without: past the last. `cold`:
    see `cold_part`."""
    found = np.full(len(histories.users), len(histories.user))
    if target is None:
        return found
    at = of_domain(histories, list(names).index(target))
    size = np.bincount(histories.user[at], minlength=len(found))
    if cold is not None:
        held_users = np.flatnonzero(cold)
        found[held_users] = at[(np.cumsum(size) - size)[held_users]]
        return found
    held = split.validation + split.test
    cut_users = np.flatnonzero(size >= split.min_train + held) if held else np.zeros(0, np.int64)
    found[cut_users] = at[np.cumsum(size)[cut_users] - held]
    return found


def cold_part(histories: Histories, split: SplitConfig, names: Sequence[str]) -> Ints:
    """[U] the part that holds out a user's whole history in the joint target: VALIDATION, TEST, or 0 (trained on).

    Users are chosen by `tables.cold_user_hash` among those with `min_train` events elsewhere strictly before their
    first event there. All others are trained on: without earlier events there is nothing to personalise from.
    """
    assert split.joint_target is not None
    assert split.cold_users is not None
    part = np.zeros(len(histories.users), np.int64)
    at = of_domain(histories, list(names).index(split.joint_target))
    present, first = np.unique(histories.user[at], return_index=True)
    start = np.full(len(part), np.iinfo(np.int64).min)  # nothing is before
    start[present] = histories.time[at[first]]
    is_before = histories.time < start[histories.user]
    known = np.bincount(histories.user[is_before], minlength=len(part)) >= split.min_train
    for user in np.flatnonzero(known).tolist():
        share = cold_user_hash(histories.raw[user].as_py(), split.joint_target)
        part[user] = TEST if share < split.cold_users else VALIDATION if share < 2 * split.cold_users else 0
    return part


def _joint(
    histories: Histories,
    at: npt.NDArray[np.int64],
    size: Ints,
    split: SplitConfig,
    names: Sequence[str],
    cold: Ints | None,
) -> tuple[npt.NDArray[np.int64], Ints, Ints, Ints]:
    """The rows `at` of users with `size` events each: first what is trained on, then what the joint target holds out,
    then what a causal split or one by time cuts off, each in time order. And valid_start, test_start and end."""
    assert split.joint_target is not None
    user = histories.user[at]
    in_target = histories.bits[at] & np.int64(1 << list(names).index(split.joint_target)) != 0
    if split.is_by_time:
        part = time_splits.parts(histories.time[at], split)
        is_held = in_target & (part > 0) & (part <= TEST)
        is_past = (part > 0) & ~is_held
    else:
        is_late = at >= cut(histories, split, split.joint_target, names, cold)[user]
        is_held = is_late & in_target
        is_past = is_late & ~in_target & (split.causal_target is not None)
    starts = np.cumsum(size) - size
    held = np.add.reduceat(is_held, starts, dtype=np.int64)
    end = size - np.add.reduceat(is_past, starts, dtype=np.int64)
    order = np.lexsort((is_held + 2 * is_past, user))  # stable
    test = np.minimum(held, split.test)
    if split.is_by_time:
        test = np.add.reduceat(is_held & (part == TEST), starts, dtype=np.int64)
    if cold is not None:
        test = held * (cold[user[starts]] == TEST)
    return at[order], end - held, end - test, end


def _parts(end: Ints, split: SplitConfig) -> tuple[Ints, Ints]:
    """valid_start and test_start."""
    enough = end >= split.min_train + split.validation + split.test
    return np.where(enough, end - (split.validation + split.test), end), np.where(enough, end - split.test, end)


def _lists(histories: Histories, at: npt.NDArray[np.int64], size: Ints) -> dict[str, pa.Array]:
    """The parallel lists of users with `size` events; event types and values only where a user has any."""
    offsets = np.concatenate([[0], np.cumsum(size)])
    columns: dict[str, pa.Array] = {
        "items": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(histories.item[at], pa.int32())),
        "times": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(histories.time[at], pa.int64())),
    }
    for name, column in (("event_type", "event_types"), ("value", "values")):
        kind = SEQUENCES.schema.field(column).type
        if name not in histories.more:
            columns[column] = pa.nulls(len(size), kind)
            continue
        values = histories.more[name].take(pa.array(at)).cast(kind.value_type)
        given = np.logical_or.reduceat(pc.is_valid(values).to_numpy(zero_copy_only=False), offsets[:-1])
        offsets_given = np.concatenate([[0], np.cumsum(size * given)])
        columns[column] = pa.ListArray.from_arrays(
            pa.array(offsets_given, pa.int32()), values.filter(pa.array(np.repeat(given, size))), mask=pa.array(~given)
        )
    return columns


def settings(config: EtlConfig) -> object:
    """What of the configuration decides how histories are cut."""
    splits = [
        split.model_dump(exclude={"ties", "ties_seed"} if split.ties == "file" else None)  # as before there were others
        for split in config.splits
    ]
    return [splits, [domain.name for domain in config.domains], config.sequences.model_dump()]


def check(config: EtlConfig) -> None:
    """Raise ConfigError for splits that can't be made."""
    names = [split.name for split in config.splits]
    if not names:
        raise ConfigError("splits: expected at least one, found none; leave the setting out for last-5")
    if len(set(names)) < len(names):
        raise ConfigError(f"splits: expected different names, found {', '.join(names)}; rename one")
    known = names_of(config.domains)
    for split in config.splits:
        time_splits.check(split)
        if split.ties != "scrambled" and split.ties_seed:
            raise ConfigError(
                f"splits.{split.name}.ties_seed: expected ties scrambled, which it is the seed of, found {split.ties}; "
                "leave it out, or set ties"
            )
        cold_items.check(split, known)
        hashed_splits.check(split)
        if split.causal_target is not None and split.causal_target not in known:
            raise ConfigError(
                f"splits.{split.name}.causal_target: expected a domain ({', '.join(known)}), "
                f"found {split.causal_target!r}; mend the name"
            )
        joint = split.joint_target
        if joint is not None and (joint == DOMAIN_ALL or joint not in known):
            raise ConfigError(
                f"splits.{split.name}.joint_target: expected a domain ({', '.join(known)}) other than {DOMAIN_ALL}, "
                f"found {joint!r}; mend the name"
            )
        if joint is not None and split.causal_target not in (None, joint):
            raise ConfigError(
                f"splits.{split.name}: expected joint_target and causal_target to be the same domain, found {joint!r} "
                f"and {split.causal_target!r}; make two splits"
            )
        if split.cold_users is not None and joint is None:
            raise ConfigError(
                f"splits.{split.name}.cold_users: expected a joint_target, the domain that the users are new in, found "
                "none; name it"
            )


def run(run: Run) -> Outcome:
    check(run.config)
    time_splits.check_times(run)
    log = spark_io.last_commit(run.lake, INTERACTIONS)
    if log["time"] == TIME_ORDINAL and (tied := [split for split in run.config.splits if split.ties != "file"]):
        raise ConfigError(
            f"splits.{tied[0].name}.ties: expected a log with times, found one whose times are mere order, in which "
            "nothing is tied; leave it out"
        )
    names = names_of(run.config.domains)
    by_item = [split for split in run.config.splits if split.cold_items is not None]
    catalogue = read_catalogue(changed_buckets.inputs_of(run, run.inputs, ())) if by_item else None
    cold_parts = {split.name: cold_items.parts(catalogue, split, names) for split in by_item if catalogue is not None}
    return changed_buckets.write(
        run,
        partial(rows, names=names, splits=run.config.splits, cold_parts=cold_parts),
        columns=("event_type", "value"),
        whole=tuple(
            split.name
            for split in run.config.splits
            if split.joint_target is None and split.cold_items is None and split.random is None and split.ties == "file"
        ),
        properties={PROPERTY_BUCKETS: log["buckets"], PROPERTY_TIME: log["time"]},
    )


JOB = Job(
    SEQUENCES,
    run,
    reads=(INTERACTIONS, USERS, ITEMS, DOMAINS),
    settings=settings,
)
