"""Splits by time: two or three dates cut the events of every user and domain into training, validation and test part.

All users are cut at the same dates, so nothing that is trained on happened after what is held out. A user without
events before `train_until` trains nothing: it is new, and what it holds out is evaluated without a history.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl.config import EtlConfig, SplitConfig
from etl.histories.reader import Ints
from etl.jobs.job import Run
from etl.lake import spark_io
from etl.settings import ConfigError
from etl.sources import values
from etl.tables import INTERACTIONS, TIME_ORDINAL

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Dates:
    """Where the parts begin and the last one ends, in microseconds since 1970 UTC."""

    validation: int
    test: int
    end: int


def dates_of(split: SplitConfig) -> Dates:
    """Of a split by time. Raises GraftrecError for what is no date."""

    def read(name: str) -> int:
        return values.day(getattr(split, name), setting=f"splits.{split.name}.{name}")

    assert split.train_until is not None
    validation = read("train_until")
    test = validation if split.validate_until is None else read("validate_until")
    return Dates(validation, test, _NEVER if split.test_until is None else read("test_until"))


def offsets(time: npt.NDArray[np.int64], size: Ints, split: SplitConfig) -> tuple[Ints, Ints, Ints]:
    """valid_start, test_start and end of users with `size` > 0 events each, whose times stand one behind the other."""
    dates, starts = dates_of(split), np.cumsum(size) - size
    bounds = (dates.validation, dates.test, dates.end)
    first, second, third = (np.add.reduceat(time < bound, starts, dtype=np.int64) for bound in bounds)
    return first, second, third


def parts(time: npt.NDArray[np.int64], split: SplitConfig) -> npt.NDArray[np.int64]:
    """Of each time 0, 1 or 2 for training, validation and test part, 3 for what is later."""
    dates = dates_of(split)
    return np.searchsorted([dates.validation, dates.test, dates.end], time, "right")


def names(config: EtlConfig) -> list[str]:
    """The splits by time."""
    return [split.name for split in config.splits if split.is_by_time]


def check_times(run: Run) -> None:
    """Raise ConfigError where a log whose times are mere order is to be split by time."""
    by_time = names(run.config)
    if by_time and spark_io.last_commit(run.lake, INTERACTIONS)["time"] == TIME_ORDINAL:
        raise ConfigError(
            f"splits.{by_time[0]}: expected a log with times, found one whose times are mere order; leave train_until "
            "out"
        )


def check(split: SplitConfig) -> None:
    """Raise GraftrecError for a split by time that can't be made."""
    where = f"splits.{split.name}"
    if not split.is_by_time:
        if split.validate_until or split.test_until:
            raise ConfigError(f"{where}: expected train_until beside validate_until or test_until, found none; set it")
        return
    if split.cold_users or split.cold_items or split.causal_target:
        raise ConfigError(
            f"{where}: expected train_until without cold_users, cold_items and causal_target, found one of them; a "
            "split by time cuts all domains at the same date, leave it out"
        )
    dates = dates_of(split)
    if not dates.validation <= dates.test < dates.end:
        raise ConfigError(
            f"{where}: expected train_until <= validate_until < test_until, found {split.train_until}, "
            f"{split.validate_until} and {split.test_until}; put the dates in order"
        )
