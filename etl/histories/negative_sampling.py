"""Drawing items a user has not taken, without replacement, for many users at once and without Spark.

`uniform-100` draws uniformly, `popular-100` in proportion to popularity. A user has a stream of 64-bit numbers
(splitmix64; Steele, Lea and Flood 2014), a function of the seed, domain, protocol, part and the raw id. Each number
picks an item: one of the items in the order of a hash of their raw ids, or by the cumulative popularity in that order.
What is taken or drawn already is passed over, so that drawing goes on as it would without it: successive draws without
replacement, at a cost that does not depend on the catalogue. For whom that takes too long, and where the catalogue is
small, the rest comes from a race of all items (each has an exponential waiting time of its own for each user, and the
first win; Efraimidis and Spirakis 2006), which has the same distribution. `top-100` takes the most popular.

Shapes: `B` users, `V` items, `N` negatives wanted of a user, `D` numbers drawn at once.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_NEGATIVES = 100
TOP = "top-100"
POPULAR = "popular-100"
ROUNDS = 5  # of drawing, before the race
SMALL = 256  # items: a race at once

_DRAWS = 128  # a round; the low bits of a number, which its item doesn't depend on, hold the place among them
_BITS = np.uint64(7)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CELLS = 1 << 16  # users × items of a race, or users × draws, at once: what a cache holds

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidates:
    """The `V` kept items of a domain by `word`, a hash of the raw id. Made by `candidates`."""

    index: Ints  # [V] global
    word: Words  # [V] ascending
    weight: Ints  # [V] popularity
    cumulative: Ints  # [V] of the weights
    top: Ints  # [V] places by falling weight; of equal ones by index
    place: npt.NDArray[np.int32]  # [largest index + 1] global index -> place, -1: none

    def places(self, index: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """Places of global indices, -1 for those that are no candidates."""
        known = index < len(self.place)
        return np.where(known, self.place[np.where(known, index, 0)], np.int32(-1))


@dataclass(frozen=True)
class Taken:
    """What each of `B` users may not be given, as sorted keys: user · V + place."""

    keys: Ints
    num_items: int

    def holds(self, user: Ints, place: Ints) -> Bools:
        """Of each pair. Fast for ascending ones."""
        wanted = user * self.num_items + place
        at = np.searchsorted(self.keys, wanted)
        if not len(self.keys):
            return np.zeros(len(wanted), bool)
        found: Bools = self.keys[np.minimum(at, len(self.keys) - 1)] == wanted
        return found


def candidates(index: Ints, word: Words, weight: Ints) -> Candidates:
    """Of items in any order. Indices are ≥ 0."""
    order = np.argsort(word, kind="stable")
    index, word, weight = index[order], word[order], weight[order]
    place = np.full(int(index.max(initial=0)) + 1, -1, np.int32)
    place[index] = np.arange(len(index), dtype=np.int32)
    return Candidates(index, word, weight, np.cumsum(weight), np.lexsort((index, -weight)), place)


def taken(user: Ints, place: npt.NDArray[np.integer], chosen: Candidates) -> Taken:
    """Of pairs (user, place) in any order, a place of -1 left out."""
    known = place >= 0
    size = len(chosen.index)
    return Taken(np.sort(user[known].astype(np.int64) * size + place[known]), size)


def draw(
    chosen: Candidates, gone: Taken, found_BN: Ints, word_B: Words, users: Ints, *, protocol: str, stream: str
) -> None:
    """Fill up the rows `users` of `found_BN`: places of each user's negatives, padded by -1 where there aren't as many.

    What stands there already was drawn before, and no check is made of it. `word_B`: a hash of each user's raw id.
    `stream`: the seed and whatever else the numbers depend on.
    """
    own_B = mix(word_B ^ word_of(f"{stream}/{protocol}"))
    open_B = users[found_BN[users, -1] < 0]
    if protocol == TOP:
        _take_top(found_BN, open_B, chosen, gone)
        return
    for number in range(ROUNDS if len(chosen.index) > SMALL else 0):
        for rows in _blocks(open_B, _DRAWS):
            _draw_round(found_BN, rows, own_B[rows], number, chosen, gone, protocol)
        open_B = open_B[found_BN[open_B, -1] < 0]
    for rows in _blocks(open_B, len(chosen.index)):
        _race(found_BN, rows, own_B[rows], chosen, gone, protocol)


def _draw_round(
    found_BN: Ints, rows: Ints, own: Words, number: int, chosen: Candidates, gone: Taken, protocol: str
) -> None:
    """One more round of draws for the users `rows`."""
    at = np.arange(number * _DRAWS + 1, (number + 1) * _DRAWS + 1, dtype=np.uint64)
    value_BD = mix(own[:, None] + at * _GOLDEN)
    value_BD = (value_BD >> _BITS << _BITS) | np.arange(_DRAWS, dtype=np.uint64)
    value_BD.sort(axis=1)  # so that equal items lie side by side, and look-ups ascend
    share = (value_BD >> np.uint64(11)).astype(np.float64) * 2.0**-53
    if protocol == POPULAR:
        place_BD = np.searchsorted(chosen.cumulative, (share * chosen.cumulative[-1]).astype(np.int64).ravel(), "right")
        place_BD = place_BD.reshape(share.shape)
    else:
        place_BD = (share * len(chosen.index)).astype(np.int64)
    new_BD = np.ones(place_BD.shape, bool)
    new_BD[:, 1:] = place_BD[:, 1:] != place_BD[:, :-1]
    starts = np.flatnonzero(new_BD)
    nth = np.minimum.reduceat((value_BD & np.uint64(_DRAWS - 1)).astype(np.int64).ravel(), starts)  # first of equals
    user, place = starts // _DRAWS, place_BD.ravel()[starts]
    free = ~gone.holds(rows[user], place)
    had = found_BN[rows]
    if (had >= 0).any():
        free &= ~_keys_of(had, chosen).holds(user, place)
    drawn_BD = np.full(place_BD.shape, -1, np.int64)
    drawn_BD[user[free], nth[free]] = place[free]
    found_BN[rows] = append(had, drawn_BD)


def _race(found_BN: Ints, rows: Ints, own: Words, chosen: Candidates, gone: Taken, protocol: str) -> None:
    """Fill up from all items."""
    word_BV = mix(own[:, None] ^ mix(chosen.word))
    number_BV = ((word_BV >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # in (0, 1]
    if protocol == POPULAR:
        with np.errstate(divide="ignore", invalid="ignore"):
            number_BV = np.where(chosen.weight > 0, -np.log(number_BV) / chosen.weight, np.inf)
    num_items = len(chosen.index)
    had = found_BN[rows]
    for place, row in enumerate(rows):
        first, last = np.searchsorted(gone.keys, [row * num_items, (row + 1) * num_items])
        number_BV[place, gone.keys[first:last] - row * num_items] = np.inf
    user, nth = np.nonzero(had >= 0)
    number_BV[user, had[user, nth]] = np.inf
    most = min(found_BN.shape[1], num_items)
    if most < num_items:
        nearest = np.argpartition(number_BV, most - 1, axis=1)[:, :most]
    else:
        nearest = np.broadcast_to(np.arange(most), (len(rows), most))
    value = np.take_along_axis(number_BV, nearest, axis=1)
    order = np.argsort(value, axis=1, kind="stable")
    nearest, value = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(value, order, axis=1)
    found_BN[rows] = append(had, np.where(np.isfinite(value), nearest, -1))


def _take_top(found_BN: Ints, open_B: Ints, chosen: Candidates, gone: Taken) -> None:
    """The most popular, in ever longer stretches until each user has enough."""
    start, size = 0, 2 * found_BN.shape[1]
    while len(open_B) and start < len(chosen.top):
        stretch = chosen.top[start : start + size]
        for rows in _blocks(open_B, len(stretch)):
            place_BD = np.broadcast_to(stretch, (len(rows), len(stretch)))
            had = found_BN[rows]
            out = gone.holds(np.repeat(rows, len(stretch)), place_BD.ravel())
            if (had >= 0).any():
                user = np.repeat(np.arange(len(rows)), len(stretch))
                out |= _keys_of(had, chosen).holds(user, place_BD.ravel())
            found_BN[rows] = append(had, np.where(out.reshape(place_BD.shape), -1, place_BD))
        start, size = start + size, 2 * size
        open_B = open_B[found_BN[open_B, -1] < 0]


def append(had_BN: Ints, drawn_BD: Ints) -> Ints:
    """Those of `had_BN` and then those of `drawn_BD` that aren't -1, as many as there is room for."""
    both = np.concatenate([had_BN, drawn_BD], axis=1)
    width = had_BN.shape[1]
    there = both >= 0
    rank = np.cumsum(there, axis=1) - 1
    user, at = np.nonzero(there & (rank < width))
    filled = np.full(had_BN.shape, -1, np.int64)
    filled[user, rank[user, at]] = both[user, at]
    return filled


def _keys_of(place_BN: Ints, chosen: Candidates) -> Taken:
    user, at = np.nonzero(place_BN >= 0)
    return taken(user, place_BN[user, at], chosen)


def _blocks(rows: Ints, width: int) -> list[Ints]:
    """Cut users so that a block of them × `width` stays small."""
    size = max(1, _CELLS // max(width, 1))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def word_of(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def mix(words: Words) -> Words:
    """The finaliser of splitmix64: every bit of the input moves half of the output's."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
