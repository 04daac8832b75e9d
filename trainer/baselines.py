"""The simple baselines that stand beside every model: popularity, and item-to-item over a user's last items.

All work on flat arrays in one index space (global item indices, say): a candidate, an item read and an item trained on
are the same kind of number, so that item-to-item may read one domain, or all of them, and score another's items.
Similarities come from training parts only; what a user has held out is never counted.

Item-to-item cosine: Sarwar, Karypis, Konstan, Riedl 2001; the top of the last items alone: Linden, Smith, York 2003.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histories:
    """B users' items, oldest first: user b's are ``items[offsets[b]:offsets[b + 1]]``."""

    users: IntArray  # [B] any id that is the same in every domain
    offsets: IntArray  # [B + 1]
    items: IntArray  # [sum of lengths]
    times: IntArray  # [sum of lengths], or empty where no one asks

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def keep(self, flags: npt.NDArray[np.bool_]) -> "Histories":
        """Only the interactions whose flag is set."""
        kept = np.concatenate([[0], np.cumsum(flags)])[self.offsets]
        return Histories(self.users, kept, self.items[flags], self.times[flags] if len(self.times) else self.times)

    def until(self, ends: IntArray) -> "Histories":
        """The first ``ends[b]`` items of each user: a training part, or what is read at a validation or test."""
        return self.keep(self._positions() < np.repeat(ends, self.lengths))

    def before(self, times: IntArray) -> "Histories":
        """What each user did strictly before ``times[b]``."""
        return self.keep(self.times < np.repeat(times, self.lengths))

    def take(self, rows: IntArray) -> "Histories":
        """Some users, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Histories(
            self.users[rows], offsets, self.items[flat], self.times[flat] if len(self.times) else self.times
        )

    def _positions(self) -> IntArray:
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)


def merge(first: Histories, second: Histories) -> Histories:
    """Two domains' histories as one per user of either, in time order (ties: `first` before `second`); users sorted."""
    users, places = np.unique(np.concatenate([first.users, second.users]), return_inverse=True)
    owner = np.concatenate(
        [np.repeat(places[: len(first)], first.lengths), np.repeat(places[len(first) :], second.lengths)]
    )
    times = np.concatenate([first.times, second.times])
    order = np.lexsort((times, owner))  # stable
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(users)))])
    return Histories(users, offsets, np.concatenate([first.items, second.items])[order], times[order])


@dataclass(frozen=True)
class Popularity:
    """Every user gets the items with the most training interactions."""

    counts: npt.NDArray[np.float32]  # [num_items]

    def score(self, histories: Histories, candidates: IntArray) -> Tensor:
        """Scores float32 [B, C]; a candidate that was never trained on scores 0."""
        return torch.from_numpy(self.counts[candidates]).expand(len(histories), -1)


def popularity(train: Histories, num_items: int) -> Popularity:
    """Interactions of each item in the training parts; item indices are below `num_items`."""
    return Popularity(np.bincount(train.items, minlength=num_items).astype(np.float32))


@dataclass(frozen=True)
class ItemToItem:
    """A candidate's score: summed cosine to the user's last `last` items, the n-th last of them weighed decay**n."""

    similarity: sp.csr_array  # float32 [num_items, num_items], zero diagonal
    popularity: Popularity  # breaks ties, and serves users without a history
    last: int | None
    decay: float

    def score(self, histories: Histories, candidates: IntArray) -> Tensor:
        """Scores float32 [B, C]."""
        lengths = histories.lengths
        age = np.repeat(histories.offsets[1:], lengths) - 1 - np.arange(len(histories.items))
        recent = age < (self.last if self.last is not None else np.inf)
        owner = np.repeat(np.arange(len(histories)), lengths)[recent]
        weights = np.float32(self.decay) ** age[recent].astype(np.float32)
        shape = (len(histories), self.similarity.shape[0])
        read = sp.csr_array((weights, (owner, histories.items[recent])), shape=shape)
        scores = torch.from_numpy((read @ self.similarity[:, candidates]).toarray())
        popular = self.popularity.score(histories, candidates)
        return scores + 1e-6 * popular / popular.max().clamp(min=1)


def item_to_item(train: Histories, num_items: int, *, last: int | None = 5, decay: float = 1.0) -> ItemToItem:
    """Cosine of binary user vectors over the training parts: users of both / sqrt(users of one x users of other)."""
    owner = np.repeat(np.arange(len(train)), train.lengths)
    seen = sp.csr_array((np.ones(len(owner), np.float32), (owner, train.items)), shape=(len(train), num_items))
    seen.data[:] = 1  # repeats count once
    scale = 1 / np.sqrt(np.maximum(seen.sum(0), 1))
    seen = (seen @ sp.diags_array(scale.astype(np.float32))).tocsr()
    similarity = (seen.T @ seen).tocsr()
    similarity.setdiag(0)
    return ItemToItem(similarity, popularity(train, num_items), last, decay)
