"""Which items may be an answer: those in stock, of some categories, and none that a request excludes.

Shape letters: ``B`` users, ``V`` catalogue rows, ``M`` different sets of items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from trainer.arrays import IntArray
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events
from trainer.inference.scorer import Scores


class AllowedItems:
    """Items by raw id. Equal to itself alone, so that what is derived from it can be kept beside it."""

    def __init__(self, raw_ids: pa.Array) -> None:
        self.raw_ids = raw_ids

    def __len__(self) -> int:
        return len(self.raw_ids)

    def flags(self, catalogue: Catalogue) -> Tensor:
        """[V] bool: the rows of a catalogue that may be an answer."""
        found = pc.is_in(pa.array(catalogue.raw_ids, pa.string()), value_set=self.raw_ids)
        return torch.from_numpy(found.to_numpy(zero_copy_only=False).copy())


class Asking(Protocol):
    """What of a request says which items may be its answer."""

    @property
    def exclude(self) -> Sequence[str]: ...

    @property
    def allowed(self) -> AllowedItems | None: ...


@dataclass(frozen=True)
class Within:
    """The rows that may be answers to each of B requests."""

    excluded: Sequence[IntArray]  # [B] rows that may not
    flags_MV: Tensor  # bool
    set_of_B: IntArray  # -> M; -1: all rows

    def left_out(self, seen: Events, users: IntArray) -> Events:
        """What is left out of the answers of some of the users, besides `seen`."""
        added = [self.excluded[user] for user in users]
        parts = np.split(seen.items, seen.offsets[1:-1])
        whole = [np.concatenate([own, more]).astype(np.int64) for own, more in zip(parts, added, strict=True)]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in whole])]).astype(np.int64)
        items = np.concatenate([np.empty(0, np.int64), *whole])
        return replace(seen, offsets=offsets, columns={"items": items}, request_times=None)

    def of(self, scores: Scores, users: IntArray) -> Scores:
        """Scores of some of the users, -inf for rows that may not be their answer."""
        sets = torch.from_numpy(self.set_of_B[users])
        if (sets < 0).all():
            return scores
        flags_MV = torch.cat([self.flags_MV, torch.ones(1, self.flags_MV.shape[1], dtype=torch.bool)])  # -1: the last

        def columns(start: int, stop: int) -> Tensor:
            block = scores.columns(start, stop)
            return block.masked_fill(~flags_MV[:, start:stop][sets].to(block.device), -torch.inf)

        return Scores(scores.num_users, scores.num_rows, columns)


def within(requests: Sequence[Asking], row_of: Mapping[str, int], flags: Callable[[AllowedItems], Tensor]) -> Within:
    """What requests say, in rows of a catalogue. `flags`: [V] of a set of items."""
    sets = list(dict.fromkeys(request.allowed for request in requests if request.allowed is not None))
    place = {one: number for number, one in enumerate(sets)}
    return Within(
        [np.array([row_of[item] for item in request.exclude if item in row_of], np.int64) for request in requests],
        torch.stack([flags(one) for one in sets]) if sets else torch.ones(0, 0, dtype=torch.bool),
        np.array([-1 if request.allowed is None else place[request.allowed] for request in requests], np.int64),
    )
