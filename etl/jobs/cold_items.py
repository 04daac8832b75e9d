"""Splits with cold items: all events of a share of the items leave the training part, as inputs too.

Which items is decided by a hash of the raw id, so it is the same on every engine and day, in every domain and table.
The rest of a user's events are warm; the last of them are held out as well, so that a model is measured on both.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from etl.config import EtlConfig, SplitConfig
from etl.histories.reader import Catalogue, Ints
from etl.settings import ConfigError
from etl.tables import cold_item_hash

WARM, VALIDATION, TEST, NO_PART = range(4)
Parts = npt.NDArray[np.int8]  # [largest index + 1] WARM, VALIDATION or TEST of an item, by global index


def names(config: EtlConfig) -> list[str]:
    """The splits with cold items."""
    return [split.name for split in config.splits if split.cold_items is not None]


def parts(catalogue: Catalogue, split: SplitConfig, domains: Sequence[str]) -> Parts:
    """The part that holds out all events of an item. `domains`: their names, in the order of bits."""
    cold = split.cold_items
    assert cold is not None
    found = np.full(int(catalogue.index.max(initial=0)) + 1, WARM, np.int8)
    inside = np.arange(len(catalogue.index))
    if cold.domain is not None:
        inside = np.flatnonzero(catalogue.bits & np.int64(1 << list(domains).index(cold.domain)))
    for index, raw in zip(catalogue.index[inside].tolist(), catalogue.item.take(inside).to_pylist(), strict=True):
        share = cold_item_hash(raw, cold.seed)
        found[index] = TEST if share < cold.share else VALIDATION if share < cold.share + cold.validation else WARM
    return found


def cut(
    at: npt.NDArray[np.int64], item_N: Ints, size_U: Ints, split: SplitConfig, parts: Parts
) -> tuple[npt.NDArray[np.int64], Ints, Ints, Ints]:
    """The rows `at` of users with `size` > 0 events each, whose items stand one behind the other in time order: first
    what is trained on, then the validation and the test part, then what belongs to none; and valid_start, test_start
    and end.

    Of warm items the last are held out as in other splits. A user with fewer than `min_train` warm ones is not
    evaluated at all: it holds nothing out, and its cold events are past the end.
    """
    part_N = parts[item_N].astype(np.int64)
    starts_U = np.cumsum(size_U) - size_U
    is_warm_N = part_N == WARM
    warm_U = np.add.reduceat(is_warm_N, starts_U, dtype=np.int64)
    before_N = np.cumsum(is_warm_N) - is_warm_N  # warm events before, of all users
    left_N = np.repeat(before_N[starts_U] + warm_U, size_U) - before_N  # of its user's, this one and those behind
    enough_N = np.repeat(warm_U >= split.min_train + split.validation + split.test, size_U)
    is_last_N = is_warm_N & enough_N & (left_N <= split.validation + split.test)
    part_N[is_last_N] = np.where(left_N[is_last_N] <= split.test, TEST, VALIDATION)
    part_N[~is_warm_N & np.repeat(warm_U < split.min_train, size_U)] = NO_PART
    user_N = np.repeat(np.arange(len(size_U)), size_U)
    order = np.lexsort((part_N, user_N))  # stable
    num_U = [np.add.reduceat(part_N <= part, starts_U, dtype=np.int64) for part in (WARM, VALIDATION, TEST)]
    return at[order], num_U[0], num_U[1], num_U[2]


def check(split: SplitConfig, known: Sequence[str]) -> None:
    """Raise ConfigError for a split that can't be made. `known`: the domains."""
    cold, where = split.cold_items, f"splits.{split.name}"
    if cold is None:
        return
    if split.cold_users is not None or split.joint_target is not None or split.causal_target is not None:
        raise ConfigError(
            f"{where}: expected cold_items without cold_users, joint_target and causal_target, found one of them; make "
            "two splits"
        )
    if cold.domain is not None and cold.domain not in known:
        raise ConfigError(
            f"{where}.cold_items.domain: expected a domain ({', '.join(known)}), found {cold.domain!r}; mend the name, "
            "or leave it out for all"
        )
