"""Answers for users without a history by what their friends have, as the recipe `friends` evaluates it."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX, UNK
from trainer.arrays import IntArray
from trainer.data.events import Events
from trainer.inference.allowed_items import within
from trainer.inference.recommender import DEFAULT_K, FRIENDS, POPULAR, Answer, Request, RequestError, check_k
from trainer.inference.scorer import Scores, top_k
from trainer.social.friends_folder import FriendsModel

_NOTHING = Events.of(np.array([UNK]), np.zeros(2, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))


class FriendsRecommender:
    """An attention over friends, ready to answer requests that name a user of its network, or friends."""

    def __init__(self, model: FriendsModel, version: str) -> None:
        self.model, self.version = model, version
        self._row_of = {raw: row for row, raw in enumerate(model.catalogue.raw_ids) if row >= FIRST_INDEX}

    def of_domain(self, domain: str) -> "FriendsRecommender":
        """Itself. Raises RequestError for another domain than its own."""
        if domain not in ("", self.model.domain):
            raise RequestError(f"domain: expected {self.model.domain!r}, found {domain!r}")
        return self

    def prepare(self) -> None:
        """Answer once, as `Recommender.prepare`."""
        self.answer([Request([])])

    @functools.cached_property
    def _knows_U(self) -> npt.NDArray[np.bool_]:
        """Whether each user of the network has a friend who has a history."""
        evidence = self.model.trained.evidence
        found: npt.NDArray[np.bool_] = evidence.knows @ (evidence.size > 0).astype(np.float32) > 0
        return found

    def places(self, raw_ids: Sequence[str] | pa.Array) -> IntArray:
        """Place in the network of each user who has a friend with a history, -1 of others."""
        found = pc.index_in(pa.array(raw_ids, pa.string()), self.model.raw_ids).fill_null(-1)
        place: IntArray = found.to_numpy(zero_copy_only=False).astype(np.int64)
        return np.where((place >= 0) & self._knows_U[place], place, -1) if len(self._knows_U) else place

    def best(self, places_B: IntArray, seen: Events, k: int) -> tuple[IntArray, Tensor]:
        """Rows [B, K] and scores [B, K] of the best items not in `seen` (rows), for places from `places`."""
        size = self.model.trained.evidence.batch_users()
        found = [
            top_k(Scores.of(torch.from_numpy(self.model.trained.scores(places_B[part]))), seen.take(part), k)
            for part in np.split(np.arange(len(places_B)), range(size, len(places_B), size))
        ]
        return np.concatenate([rows for rows, _ in found]), torch.cat([scores for _, scores in found])

    def answer(self, requests: Sequence[Request], k: int = DEFAULT_K) -> list[Answer]:
        """One answer for each request, in order; by what is popular where no friend with a history is known. Friends
        that a request gives take the place of those that the user has. Raises RequestError."""
        check_k(k)
        places = self.places([request.user or "" for request in requests])
        return [self._one(request, place, k) for request, place in zip(requests, places.tolist(), strict=True)]

    def _one(self, request: Request, place: int, k: int) -> Answer:
        items = [*request.items, *(item for basket in request.baskets or () for item in basket)]
        rows = [self._row_of.get(item, UNK) for item in items]
        seen = _NOTHING if not rows else _history([row for row in rows if row != UNK])
        trained, basis = self.model.trained, FRIENDS
        friends = self._given(request)
        if request.friends and len(friends):
            scores = trained.scores_of_friends(friends, mutual=not self.model.config.directed)
        elif not request.friends and place >= 0:
            scores = trained.scores(np.array([place]))
        else:
            scores, basis = trained.evidence.popular[None].astype(np.float32), POPULAR
        asked = within([request], self._row_of, lambda allowed: allowed.flags(self.model.catalogue))
        this = np.zeros(1, np.int64)
        best_rows, best = top_k(
            asked.of(Scores.of(torch.from_numpy(scores.copy())), this), asked.left_out(seen, this), k
        )
        count = int(torch.isfinite(best[0]).sum())
        raw_ids = self.model.catalogue.raw_ids
        unknown = [item for item, row in zip(items, rows, strict=True) if row == UNK]
        answered = [raw_ids[row] for row in best_rows[0, :count].tolist()]
        return Answer(answered, best[0, :count].tolist(), basis, unknown, self.version)

    def _given(self, request: Request) -> IntArray:
        """Places of the friends of a request who are in the network; none if none of these has a history."""
        found = pc.index_in(pa.array(dict.fromkeys(request.friends), pa.string()), self.model.raw_ids).drop_null()
        places: IntArray = found.to_numpy().astype(np.int64)
        return places if (self.model.trained.evidence.size[places] > 0).any() else places[:0]


def _history(rows: list[int]) -> Events:
    given = np.array(rows, dtype=np.int64)
    return Events.of(np.array([UNK]), np.array([0, len(given)]), given, np.empty(0, np.int64))
