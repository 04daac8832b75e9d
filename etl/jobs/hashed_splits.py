"""Splits by chance: some of each user's events, or all events of some users, chosen by a hash.

The hash is of the raw user id and of an event's place among the user's events in (time, source order), so that a split
is the same on every engine, and a new event redraws none of the older ones. Shape letters: ``N`` events, ``U`` users.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from etl.config import SplitConfig
from etl.histories.reader import Histories, Ints
from etl.histories.ties import mixed
from etl.settings import ConfigError

_MANY = 2.0**64
_NOTHING = 1e-9  # below which a share of a count is a rounding error


def parts(histories: Histories, at: Ints, size: Ints, split: SplitConfig) -> tuple[Ints, Ints, Ints]:
    """Of the events in rows `at`, of users with `size` > 0 events each: these rows in the order of parts, each part in
    time order, and valid_start and test_start of each user."""
    user = histories.user[at]
    if split.user_folds is not None:
        is_cold = folds(histories, split.user_folds)[user[np.cumsum(size) - size]] == split.fold
        start = np.where(is_cold, 0, size)
        return at, start, start
    assert split.random is not None
    validation, test = counts(size, *split.random)
    few = size - validation - test < split.min_train
    validation, test = np.where(few, 0, validation), np.where(few, 0, test)
    drawn = np.lexsort((_draws(histories)[at], user))
    rank = np.empty(len(at), np.int64)
    rank[drawn] = np.arange(len(at)) - np.repeat(np.cumsum(size) - size, size)
    part = np.where(rank < np.repeat(test, size), 2, np.where(rank < np.repeat(test + validation, size), 1, 0))
    return at[np.lexsort((part, user))], size - validation - test, size - test  # stable: in time order within a part


def counts(size: Ints, validation: float, test: float) -> tuple[Ints, Ints]:
    """How many of `size` events are for validation and test: shares rounded down, but one where that is none, as long
    as more than one is left to train on (as RecBole cuts ratios)."""
    held = [np.floor(share * size + _NOTHING).astype(np.int64) for share in (validation, test)]
    left = size - held[0] - held[1]
    for place, share in ((1, test), (0, validation)):
        more = (left > 1) & (held[place] == 0) & (share > 0)
        held[place], left = held[place] + more, left - more
    return held[0], held[1]


def folds(histories: Histories, count: int) -> npt.NDArray[np.int64]:
    """[U] the fold of each user, of `count` about equal ones."""
    shares = np.array([_hash(raw) / _MANY for raw in histories.raw.to_pylist()])
    found: npt.NDArray[np.int64] = (shares * count).astype(np.int64)
    return np.minimum(found, count - 1)


def _draws(histories: Histories) -> npt.NDArray[np.uint64]:
    """[N] a number of each event: the finaliser of SplitMix64 (Steele et al. 2014) of the user's hash and its place."""
    words = np.array([_hash(raw) for raw in histories.raw.to_pylist()], np.uint64)
    first = np.searchsorted(histories.user, np.arange(len(words)))
    place = (np.arange(len(histories.user)) - first[histories.user]).astype(np.uint64)
    return mixed(words[histories.user] + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _hash(raw: str) -> int:
    return int.from_bytes(hashlib.blake2b(raw.encode(), digest_size=8, person=b"splits").digest(), "big")


def check(split: SplitConfig) -> None:
    """Raise ConfigError for a split by chance that can't be made."""
    if not split.is_by_chance:
        return
    where = f"splits.{split.name}"
    others = ("train_until", "causal_target", "joint_target", "cold_users", "cold_items")
    if found := [name for name in others if getattr(split, name) is not None]:
        raise ConfigError(
            f"{where}: expected random or user_folds alone, found {found[0]} beside it; make two splits of them"
        )
    if split.random is not None and split.user_folds is not None:
        raise ConfigError(f"{where}: expected random or user_folds, found both; make two splits of them")
    if split.random is not None and not (min(split.random) >= 0 < sum(split.random) < 1):
        raise ConfigError(
            f"{where}.random: expected shares of validation and test from 0 on, above 0 and below 1 together, found "
            f"{split.random[0]:g} and {split.random[1]:g}; mend them"
        )
    if split.user_folds is not None and split.fold >= split.user_folds:
        raise ConfigError(
            f"{where}.fold: expected a fold from 0 to {split.user_folds - 1}, found {split.fold}; mend the number"
        )
