"""Whether friends have more items in common than strangers who are as active: if not, social features can't help.

McPherson, Smith-Lovin and Cook 2001, *Birds of a Feather: Homophily in Social Networks*. Training parts alone are
compared, so that the figure may be looked at before anything is evaluated.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
MOST_PAIRS = 200_000  # of friends that are compared
_NEAR = 10  # places by which a stranger's number of items may differ in the order of users


@dataclass(frozen=True)
class Homophily:
    """Mean overlap of two users' items (of both, over of either: Jaccard), of friends, and of a friend's stand-in: a
    stranger with about as many friends and items."""

    friendships: int  # either way counts once
    users: int  # who have a friend
    pairs: int  # compared: both have items
    friends: float
    strangers: float

    def line(self) -> str:
        """The line of the report."""
        times = f", {self.friends / self.strangers:.1f} times as much" if self.strangers else ""
        return (
            f"social: {self.friendships:,} friendships of {self.users:,} users; overlap of items with friends "
            f"{self.friends:.4f}, with strangers of the same numbers of friends and items {self.strangers:.4f}{times} "
            f"({self.pairs:,} pairs, training part)"
        )


def homophily(
    social: Iterable[pa.RecordBatch], sequences: Iterable[pa.RecordBatch], *, seed: int = 0
) -> Homophily | None:
    """Of rows of SOCIAL (user_index, friend_index) and of SEQUENCES (user, items, valid_start) of one split; None
    without friends who have items."""
    ends = [np.stack([batch.column(name).to_numpy() for name in ("user_index", "friend_index")], 1) for batch in social]
    edges = np.concatenate([np.zeros((0, 2), np.int64), *ends]).astype(np.int64)
    edges = np.unique(np.sort(edges[edges[:, 0] != edges[:, 1]], axis=1), axis=0)
    keys, size = _taken(sequences, num_users=int(edges.max(initial=-1)) + 1)
    friends = np.bincount(edges.ravel(), minlength=len(size))
    known = edges[(size[edges] > 0).all(1)]
    if not len(known):
        return None
    random = np.random.default_rng(seed)
    if len(known) > MOST_PAIRS:
        known = known[np.sort(random.choice(len(known), MOST_PAIRS, replace=False))]
    strangers = _strangers(known, edges, friends, size, random)
    return Homophily(
        len(edges),
        int((friends > 0).sum()),
        len(known),
        float(_overlap(known, keys, size).mean()),
        float(_overlap(strangers, keys, size).mean()) if len(strangers) else 0.0,
    )


def _taken(sequences: Iterable[pa.RecordBatch], *, num_users: int) -> tuple[Ints, Ints]:
    """Distinct pairs of a user and an item, as user << 32 | item, ascending; and items of each user."""
    found = [np.zeros(0, np.int64)]
    for batch in sequences:
        lists = batch.column("items")
        length = np.diff(lists.offsets.to_numpy())
        place = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        trained = place < np.repeat(batch.column("valid_start").to_numpy(), length)
        user = np.repeat(batch.column("user").to_numpy().astype(np.int64), length)[trained]
        found.append(user << 32 | lists.flatten().to_numpy().astype(np.int64)[trained])
    keys = np.unique(np.concatenate(found))
    return keys, np.bincount(keys >> 32, minlength=num_users)


def _strangers(pairs: Ints, edges: Ints, friends: Ints, size: Ints, random: np.random.Generator) -> Ints:
    """Each pair with the friend's stand-in: near the friend in the order of users by friends and items, no friend of
    the user. A pair that finds none in some draws is left out."""
    users = np.flatnonzero((friends > 0) & (size > 0))
    order = users[np.lexsort((size[users], np.log2(friends[users]).astype(int)))]
    rank = np.empty(len(size), np.int64)
    rank[order] = np.arange(len(order))
    known = np.concatenate([edges[:, 0] << 32 | edges[:, 1], edges[:, 1] << 32 | edges[:, 0]])
    found, left = [], pairs
    for _ in range(20):
        step = random.integers(1, _NEAR + 1, len(left)) * random.choice([-1, 1], len(left))
        place = rank[left[:, 1]] + step
        other = order[np.clip(place, 0, len(order) - 1)]
        good = (place >= 0) & (place < len(order)) & (other != left[:, 0]) & (other != left[:, 1])
        good &= ~np.isin(left[:, 0] << 32 | other, known)
        found.append(np.stack([left[:, 0], other], 1)[good])
        left = left[~good]
    return np.concatenate(found)


def _overlap(pairs: Ints, keys: Ints, size: Ints) -> npt.NDArray[np.float64]:
    """[N] Jaccard of each pair's items."""
    first = np.searchsorted(keys, pairs[:, 0] << 32)
    length = size[pairs[:, 0]]
    owner = np.repeat(np.arange(len(pairs)), length)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(first, length)
    wanted = pairs[owner, 1] << 32 | (keys[place] & 0xFFFFFFFF)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    both = np.bincount(owner[keys[at] == wanted], minlength=len(pairs))
    found: npt.NDArray[np.float64] = both / (size[pairs].sum(1) - both)
    return found
