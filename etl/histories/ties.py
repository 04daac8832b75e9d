"""The order of a user's events that have one time: as in the log's files, by item, or scrambled by a seed.

Where most events share their second with another one (77 % of MovieLens-1M's), this order decides which event is held
out and what precedes it, so that figures on two orders are of two tasks. An order is a function of raw ids, times and
the seed alone: the same on every engine, in every bucket and after every new day. Events that differ in neither user,
item nor time stay as in the files. Shape letter: ``N`` events.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.config import SplitConfig
from etl.histories.reader import Histories, Ints

Words = npt.NDArray[np.uint64]


def by_order(histories: Histories, splits: Sequence[SplitConfig]) -> Iterator[tuple[Histories, list[SplitConfig]]]:
    """The histories in each order that some of the splits have, with these splits."""
    orders: dict[tuple[str, int], list[SplitConfig]] = {}
    for split in splits:
        orders.setdefault((split.ties, split.ties_seed), []).append(split)
    for of_order in orders.values():
        yield in_order(histories, of_order[0]), of_order


def in_order(histories: Histories, split: SplitConfig) -> Histories:
    """The same events, those of one user and time in the split's order. They come in that of the files."""
    if split.ties == "file" or not len(histories.user):
        return histories
    is_equal_N = np.zeros(len(histories.user), bool)  # to the one before
    is_equal_N[1:] = (np.diff(histories.user) == 0) & (np.diff(histories.time) == 0)
    is_tied_N = is_equal_N.copy()
    is_tied_N[:-1] |= is_equal_N[1:]
    tied = np.flatnonzero(is_tied_N)
    key = _item_places(histories, tied) if split.ties == "item" else _drawn(histories, tied, split.ties_seed)
    order = np.arange(len(histories.user))
    order[tied] = tied[np.lexsort((key, np.cumsum(~is_equal_N)[tied]))]  # stable: equal keys stay as in the files
    return replace(
        histories,
        item=histories.item[order],
        bits=histories.bits[order],
        more={name: values.take(pa.array(order)) for name, values in histories.more.items()},
    )


def _item_places(histories: Histories, rows: Ints) -> Ints:
    """The place of each row's item among the items of all `rows`, by raw id."""
    raw, place = _raw_items(histories, rows)
    rank = np.empty(len(raw), np.int64)
    rank[sorted(range(len(raw)), key=lambda number: _by_number(raw[number]))] = np.arange(len(raw))
    found: Ints = rank[place]
    return found


def _by_number(raw: str) -> tuple[int, int, str]:
    """Whole numbers come first, by value, so that item 9 stands before 10; then other ids, by their code points."""
    is_number = raw.isascii() and raw.isdecimal() and len(raw) < 19
    return (0, int(raw), raw) if is_number else (1, 0, raw)


def _drawn(histories: Histories, rows: Ints, seed: int) -> Words:
    """A number of each row, by the seed, its raw user, raw item and time."""
    raw, place = _raw_items(histories, rows)
    item = np.array([_word(seed, one) for one in raw], np.uint64)[place]
    owners, owner = np.unique(histories.user[rows], return_inverse=True)
    user = np.array([_word(seed, one) for one in histories.raw.take(pa.array(owners)).to_pylist()], np.uint64)[owner]
    time = histories.time[rows].astype(np.int64).view(np.uint64)
    return mixed(user ^ mixed(item ^ mixed(time)))


def _raw_items(histories: Histories, rows: Ints) -> tuple[list[str], Ints]:
    """The raw ids of the items of `rows`, each once, and the place of each row's among them."""
    assert histories.catalogue is not None
    items, place = np.unique(histories.item[rows], return_inverse=True)
    by_index = np.argsort(histories.catalogue.index)
    at = by_index[np.searchsorted(histories.catalogue.index[by_index], items)]
    return histories.catalogue.item.take(pa.array(at)).to_pylist(), place


def _word(seed: int, raw: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{raw}".encode(), digest_size=8, person=b"ties").digest(), "big")


def mixed(z: Words) -> Words:
    """Well mixed bits: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Words = z ^ (z >> np.uint64(31))
    return found
