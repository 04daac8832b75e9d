"""The simple baselines that stand beside every model: popularity, item-to-item and transitions of the last items.

All work on flat arrays in one index space (global item indices, say): a candidate, an item read and an item trained on
are the same kind of number, so that item-to-item may read one domain, or all of them, and score another's items.
Similarities come from training parts only; what a user has held out is never counted.

Item-to-item cosine: Sarwar, Karypis, Konstan, Riedl 2001; the top of the last items alone: Linden, Smith, York 2003.
Transitions: a Markov chain's counts (Shani, Heckerman, Brafman 2005), which know what follows what; steps that skip
items count less, as in the sequential rules of Ludewig and Jannach 2018.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from trainer.arrays import IntArray
from trainer.data.events import Events

SIMILARITIES_PER_BLOCK = 1 << 23  # made at once, 4 bytes each
PAIRS_PER_BLOCK = 1 << 22  # of transitions, counted at once, about 40 bytes each
TIE_BREAK = 1e-6  # share of popularity in an item-to-item score


@dataclass(frozen=True)
class Popularity:
    """Every user gets the items with the most training interactions."""

    counts: npt.NDArray[np.float32]  # [num_items]

    def score(self, histories: Events, candidates: IntArray) -> Tensor:
        """Scores float32 [B, C]; a candidate that was never trained on scores 0."""
        return torch.from_numpy(self.counts[candidates]).expand(len(histories), -1)


def popularity(train: Events, num_items: int) -> Popularity:
    """Interactions of each item in the training parts; item indices are below `num_items`."""
    return Popularity(np.bincount(train.items, minlength=num_items).astype(np.float32))


@dataclass(frozen=True)
class ItemToItem:
    """A candidate's score: summed similarity of the user's `last` items to it, the n-th last weighed by decay**n."""

    similarity: sp.csr_array  # float32 [num_items, num_items], from an item of the history (row) to a candidate
    popularity: Popularity  # breaks ties, and serves users without a history
    last: int | None  # None: the whole history
    decay: float

    def score(self, histories: Events, candidates: IntArray) -> Tensor:
        """Scores float32 [B, C]. Items of a history that were never trained on add nothing."""
        lengths = histories.lengths
        age = np.repeat(histories.offsets[1:], lengths) - 1 - np.arange(len(histories.items))
        recent = age < (len(age) if self.last is None else self.last)
        owner = np.repeat(np.arange(len(histories)), lengths)[recent]
        weights = np.float32(self.decay) ** age[recent].astype(np.float32)
        shape = (len(histories), self.similarity.shape[0])
        read = sp.csr_array((weights, (owner, histories.items[recent])), shape=shape)
        scores = torch.from_numpy((read @ self.similarity)[:, candidates].toarray())
        popular = self.popularity.score(histories, candidates)
        return scores + TIE_BREAK / float(self.popularity.counts.max(initial=1)) * popular


def item_to_item(
    train: Events,
    num_items: int,
    *,
    last: int | None = 5,
    decay: float = 1.0,
    towards: IntArray | None = None,
    neighbours: int = 2_000,
    max_history: int = 2_000,
) -> ItemToItem:
    """Cosine of items as binary user vectors: users of both / sqrt(users of one x users of the other).

    `train` holds training parts only, of one domain, or of all (`merge`). `towards`: the only items that will be
    candidates (None: any). Of each item the `neighbours` most similar of those are kept, and of each user the newest
    `max_history` interactions are counted, so that memory is 8 bytes x num_items x neighbours at most, and one user
    with a million events costs no more than its share.
    """
    recent = train.newest(max_history)
    owner = recent.owners
    seen = sp.csr_array((np.ones(len(owner), np.float32), (owner, recent.items)), shape=(len(recent), num_items))
    seen.sum_duplicates()
    seen.data[:] = 1  # repeats count once
    scale = 1 / np.sqrt(np.maximum(np.bincount(seen.indices, minlength=num_items), 1))
    seen.data *= scale.astype(np.float32)[seen.indices]
    wanted = np.zeros(num_items, dtype=bool)
    wanted[slice(None) if towards is None else towards] = True
    others = seen if towards is None else (seen @ sp.diags_array(wanted.astype(np.float32))).tocsr()
    others.eliminate_zeros()
    by_item = seen.T.tocsr()
    height = max(1, SIMILARITIES_PER_BLOCK // max(num_items, 1))
    blocks = [
        _nearest((by_item[start : start + height] @ others).toarray(), start, neighbours)
        for start in range(0, num_items, height)
    ]
    return ItemToItem(sp.vstack(blocks, format="csr"), popularity(train, num_items), last, decay)


def _nearest(similarity: npt.NDArray[np.float32], start: int, neighbours: int) -> sp.csr_array:
    """Rows `start`… of the similarity without their own item and with only their largest entries."""
    height, width = similarity.shape
    similarity[np.arange(height), start + np.arange(height)] = 0
    values, columns = torch.from_numpy(similarity).topk(min(neighbours, width), sorted=False)
    kept = (values > 0).numpy()
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))])
    return sp.csr_array((values.numpy()[kept], columns.numpy()[kept].astype(np.int32), offsets), shape=similarity.shape)


def transitions(
    train: Events,
    num_items: int,
    *,
    steps: int = 8,
    decay: float = 0.8,
    towards: IntArray | None = None,
    neighbours: int = 2_000,
    max_history: int = 2_000,
) -> ItemToItem:
    """Directed counts: how often j follows i, over the square root of j's popularity.

    ``C[i, j]`` sums ``decay**(d - 1)`` over all training sequences and their pairs of i at a position and j at the d-th
    position after it, d = 1 … `steps`. A candidate j scores ``C[i, j] * decay**n`` summed over the user's last `steps`
    items (i the n-th last, from 0), divided by ``sqrt(popularity of j)``: with no division the most popular items would
    follow everything. `train`, `towards`, `neighbours` and `max_history` as of `item_to_item`; pairs are counted in
    blocks, so that memory is bounded by them and by the neighbours kept.
    """
    recent = train.newest(max_history)
    owner = recent.owners
    popular = popularity(train, num_items)
    scale = (1 / np.sqrt(np.maximum(popular.counts, 1))).astype(np.float32)
    wanted = np.zeros(num_items, dtype=bool)
    wanted[slice(None) if towards is None else towards] = True
    positions = np.argsort(recent.items, kind="stable")  # item by item: a block holds all pairs of its rows
    starts = np.searchsorted(recent.items[positions], np.arange(num_items + 1))
    blocks, first = [], 0
    while first < num_items:
        stop = int(np.searchsorted(starts, starts[first] + PAIRS_PER_BLOCK // steps, side="right")) - 1
        stop = min(max(stop, first + 1), num_items)
        counts = _followers(recent.items, owner, positions[starts[first] : starts[stop]], first, steps, decay, wanted)
        counted = sp.csr_array(counts, shape=(stop - first, num_items))  # sums pairs that are the same
        counted.data *= scale[counted.indices]
        blocks.append(_largest(counted, neighbours))
        first = stop
    similarity = sp.vstack(blocks, format="csr") if blocks else sp.csr_array((0, num_items), dtype=np.float32)
    return ItemToItem(similarity, popular, steps, decay)


def _followers(
    items: IntArray,
    owner: IntArray,
    positions: IntArray,
    first: int,
    steps: int,
    decay: float,
    wanted: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float32], tuple[IntArray, IntArray]]:
    """Weights and (row, column) of pairs: items at `positions`, as rows from `first` on, and up to `steps` behind."""
    rows, columns, weights = [], [], []
    for step in range(1, steps + 1):
        here = positions[positions + step < len(items)]
        here = here[(owner[here + step] == owner[here]) & wanted[items[here + step]]]
        rows.append(items[here] - first)
        columns.append(items[here + step])
        weights.append(np.full(len(here), decay ** (step - 1), np.float32))
    return np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))


def _largest(rows: sp.csr_array, count: int) -> sp.csr_array:
    """Each row with only its `count` largest entries."""
    lengths = np.diff(rows.indptr)
    if int(lengths.max(initial=0)) <= count:
        return rows
    owner = np.repeat(np.arange(rows.shape[0]), lengths)
    order = np.lexsort((-rows.data, owner))
    order = np.sort(order[np.arange(len(order)) - rows.indptr[owner] < count])
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, count))])
    return sp.csr_array((rows.data[order], rows.indices[order], offsets), shape=rows.shape)
