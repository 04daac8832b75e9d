"""The one way to score by a model: at validation, at test, by the served model and by the batch recommender.

The catalogue is scored a block of rows at a time, so that a large one costs time and not memory.

Shape letters: ``B`` users, ``T`` positions, ``D`` width, ``C`` candidates, ``V`` catalogue rows, ``K`` best rows,
``N`` rows to score (ragged, padded by -1).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX, PAD, SEP
from trainer.arrays import IntArray
from trainer.data.batch import Batch
from trainer.data.events import Events
from trainer.models import SequenceModel
from trainer.parallel.cores import torch_threads_for
from trainer.tasks import Task

SCORES_PER_BLOCK = 1 << 24  # made at once, 4 bytes each
HISTORIES_PER_BATCH = 256  # read at once
ROWS_PER_BLOCK = 1 << 16  # of the item table, made at once where it is not the embedding itself


class Scores:
    """Scores [B, V] of B users for V rows, made a block of columns at a time whenever they are read.

    `columns(start, stop)` gives those of rows `start` to `stop`, [B, stop - start] floating, always the same ones.
    """

    def __init__(self, num_users: int, num_rows: int, columns: Callable[[int, int], Tensor]) -> None:
        self.num_users, self.num_rows, self.columns = num_users, num_rows, columns
        self._last: tuple[int, int, Tensor] | None = None  # kept: most catalogues are one block, which is read twice

    @classmethod
    def of(cls, scores_BV: Tensor) -> "Scores":
        """Those that are there already."""
        num_users, num_rows = scores_BV.shape
        return cls(num_users, num_rows, lambda start, stop: scores_BV[:, start:stop])

    def blocks(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(its first row, its scores) of each block of rows from `first`; no more than SCORES_PER_BLOCK scores each."""
        width = max(1, SCORES_PER_BLOCK // max(1, self.num_users))
        for start in range(first, self.num_rows, width):
            stop = min(start + width, self.num_rows)
            if self._last is None or self._last[:2] != (start, stop):
                self._last = None  # first given up, then made anew
                self._last = (start, stop, self.columns(start, stop))
            yield start, self._last[2]

    def whole(self) -> Tensor:
        """All of them, [B, V]."""
        return self.columns(0, self.num_rows)

    @torch.inference_mode()
    def gather(self, rows_BN: Tensor, first: int = 0) -> Tensor:
        """Scores [B, N] of rows int64 [B, N], bit for bit those of `blocks(first)`; 0 for rows below `first`."""
        found: Tensor | None = None
        for start, block in self.blocks(first):
            rows = rows_BN.to(block.device) - start
            here = block.gather(1, rows.clamp(0, block.shape[1] - 1))
            found = torch.zeros_like(here) if found is None else found
            found = torch.where((rows >= 0) & (rows < block.shape[1]), here, found)
        return torch.zeros(rows_BN.shape) if found is None else found


def has_items(histories: Events) -> npt.NDArray[np.bool_]:
    """[B] whether there is anything in a history but the ends of baskets."""
    flags: npt.NDArray[np.bool_] = histories.keep(histories.items != SEP).lengths > 0
    return flags


def answered(model: SequenceModel, histories: Events) -> npt.NDArray[np.bool_]:
    """[B] whether a model says more of a user than what is popular: of those with an item, and with
    `model.user_features.alone` of those with features. Users and items are the model's rows."""
    flags = has_items(histories)
    if model.config.user_features.alone:
        flags = flags | model.has_user_features(torch.from_numpy(histories.users.astype(np.int64))).cpu().numpy()
    return flags


@torch.inference_mode()
def top_k(scores: Scores, seen: Events, k: int) -> tuple[IntArray, Tensor]:
    """Rows [B, K] and scores [B, K], on the CPU, of the best rows not in `seen` (rows), K = min(k, V), best first.

    Equal scores are in order of rows. -inf where there are no more; a score that is NaN is as good as -inf. The scores
    of `seen` are overwritten. Memory: one block of scores, whatever the catalogue.
    """
    B, wanted = scores.num_users, min(k, scores.num_rows)
    owner = torch.from_numpy(seen.owners)
    items = torch.from_numpy(seen.items)
    best_BK, rows_BK = torch.empty(B, 0), torch.empty(B, 0, dtype=torch.long)
    for start, block in scores.blocks(FIRST_INDEX):
        here = (items >= start) & (items < start + block.shape[1])
        block[owner[here].to(block.device), items[here].to(block.device) - start] = -torch.inf
        with torch_threads_for(block.numel()):
            best, rows = _best_columns(block, wanted)
        # Those of earlier blocks stand first, and the sort is stable.
        best, order = torch.cat([best_BK, best.cpu()], 1).sort(dim=1, descending=True, stable=True)
        rows_BK = torch.cat([rows_BK, rows.cpu() + start], 1).gather(1, order[:, :wanted])
        best_BK = best[:, :wanted]
    lacking = wanted - best_BK.shape[1]  # as many as there are reserved rows, at most
    best_BK = torch.nn.functional.pad(best_BK, (0, lacking), value=-torch.inf)
    return torch.nn.functional.pad(rows_BK, (0, lacking)).numpy(), best_BK


def _best_columns(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each user and their columns, best first, equal ones in order of columns."""
    if k >= block.shape[1]:
        best, columns = block.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(
            dim=1, descending=True, stable=True
        )
        return best, columns
    best, columns = block.topk(k + 1, sorted=False)
    columns, order = columns.sort(dim=1)
    best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # `topk` says nothing of which of several equal scores it takes, and takes NaN for the largest.
    unsure = (~(best[:, k] < best[:, k - 1]) & (best[:, k] > -torch.inf)) | best[:, 0].isnan()
    for user in unsure.nonzero()[:, 0].tolist():
        best[user], columns[user] = (part[0, : k + 1] for part in _best_columns(block[user, None], block.shape[1]))
    return best[:, :k], columns[:, :k]


class LaterVectors(NamedTuple):
    """What scores items that came after training."""

    vectors_NQ: Tensor
    bias_N: Tensor


class ModelScorer:
    """Scores of catalogue rows for histories; -inf for rows that are not `among` (bool [V]; None: all that the model
    predicts). Make a new one when the weights change: the item table is kept.

    `later`: items that came after training, rows behind the model's own, whose scores stay as they are:
    products of a larger table could differ in the last bit.
    """

    def __init__(
        self,
        model: SequenceModel,
        task: Task,
        *,
        device: torch.device | str = "cpu",
        among: Tensor | None = None,
        later: LaterVectors | None = None,
    ) -> None:
        self.model, self.task, self.device = model, task, torch.device(device)
        among = model.predicted_V if among is None else among
        self._left_out_V = None if among is None else ~among.to(self.device)
        self._later = None if later is None else LaterVectors(*(part.to(self.device) for part in later))
        self._later_scored_NQ = None if self._later is None else model.as_scored(self._later.vectors_NQ)
        self.num_rows = model.num_items + (0 if later is None else len(later.bias_N))

    def scores(self, histories: Events, candidates: IntArray | None = None) -> Scores:
        """Scores [B, C] float32 on the model's device; items and candidates are catalogue rows, users global indices.

        Candidates None: every row. The newest items that fit the model are read, the rest is cut. Users beyond the
        model's table, and UNK, are scored as unknown users. A history may be empty.
        """
        hidden_BD = self.hidden(histories)
        rows_C = None if candidates is None else torch.from_numpy(np.ascontiguousarray(candidates)).to(self.device)

        @torch.inference_mode()
        def columns(start: int, stop: int) -> Tensor:
            with self._evaluated(), torch_threads_for(len(hidden_BD) * (stop - start)):
                return block(start, stop)

        def of_own(rows: slice | Tensor) -> Tensor:
            if isinstance(rows, slice) and self._scored_VD is None:
                rows = torch.arange(rows.start, rows.stop, device=self.device)
            scores = self.task.scores(self.model, hidden_BD, rows, self._scored_VD, self._bias_V)
            if self._left_out_V is not None:
                scores.masked_fill_(self._left_out_V[rows], -torch.inf)
            return scores

        own, later_NQ = self.model.num_items, self._later_scored_NQ

        def block(start: int, stop: int) -> Tensor:
            rows_N = None if rows_C is None else rows_C[start:stop]
            if later_NQ is None or self._later is None:
                return of_own(slice(start, stop) if rows_N is None else rows_N)
            bias_N = self._later.bias_N
            if rows_N is None:
                edge = min(max(own, start), stop)
                later = self.task.scores(self.model, hidden_BD, slice(edge - own, stop - own), later_NQ, bias_N)
                return torch.cat([of_own(slice(start, edge)), later], 1)
            is_own = rows_N < own
            scores = torch.empty(len(hidden_BD), len(rows_N), device=self.device)
            scores[:, is_own] = of_own(rows_N[is_own]).to(scores)
            scores[:, ~is_own] = self.task.scores(self.model, hidden_BD, rows_N[~is_own] - own, later_NQ, bias_N)
            return scores

        return Scores(len(histories), self.num_rows if candidates is None else len(candidates), columns)

    @torch.inference_mode()
    def score(self, histories: Events, candidates: IntArray | None = None) -> Tensor:
        """As `scores`, all of them [B, C] on the CPU; without candidates, the reserved rows at -inf."""
        whole = self.scores(histories, candidates).whole()
        if candidates is None:
            whole[:, :FIRST_INDEX] = -torch.inf
        return whole.cpu()

    @functools.cached_property
    def _table_VD(self) -> Tensor | None:
        """The item table: the embedding itself where items have no knowledge, else made once, and in blocks. None where
        row-wise tables are there to spare a second one: its rows are then read block by block, each time."""
        model = self.model
        if model.num_items <= ROWS_PER_BLOCK:
            return model.item_vectors()
        if model.tables is not None and (not model.scores_with_table or model.tables.world.size > 1):
            return None
        if model.scores_with_table:
            return model.item_vectors()
        table_VD: Tensor | None = None
        for start in range(0, model.num_items, ROWS_PER_BLOCK):
            rows = torch.arange(start, min(start + ROWS_PER_BLOCK, model.num_items), device=self.device)
            vectors = model.item_vectors(rows)
            if table_VD is None:
                table_VD = vectors.new_empty(model.num_items, vectors.shape[1])
            table_VD[start : start + len(rows)] = vectors
        return table_VD

    @functools.cached_property
    def _scored_VD(self) -> Tensor | None:
        """The item table as it scores: the same one, or where scores are cosines another, made once and in blocks. None
        as of the item table, for which a second one is one too many."""
        table_VD, model = self._table_VD, self.model
        if table_VD is None or not model.scores_cosines:
            return table_VD
        if model.tables is not None and len(table_VD) > ROWS_PER_BLOCK:
            return None
        scored_VD = torch.empty_like(table_VD)
        for start in range(0, len(table_VD), ROWS_PER_BLOCK):
            scored_VD[start : start + ROWS_PER_BLOCK] = model.as_scored(table_VD[start : start + ROWS_PER_BLOCK])
        return scored_VD

    @functools.cached_property
    def _read_VD(self) -> Tensor | None:
        """The table that histories are read by, later items behind the model's own."""
        if self._later is None or self._table_VD is None:
            return self._table_VD
        return torch.cat([self._table_VD, self._later.vectors_NQ.to(self._table_VD)])

    @functools.cached_property
    def _bias_V(self) -> Tensor | None:
        return None if self._scored_VD is None else self.model.bias()

    @torch.inference_mode()
    def hidden(self, histories: Events) -> Tensor:
        """The query of each user, [B, D]. Users of like lengths are read together: less padding."""
        with self._evaluated():
            recent = histories.newest(self.model.config.max_length - 1)  # the query adds a position of its own
            order = np.argsort(recent.lengths, kind="stable")
            parts = [
                self.task.query(self.model, self._batch(recent.take(users)), self._read_VD)
                for users in np.split(order, range(HISTORIES_PER_BATCH, len(order), HISTORIES_PER_BATCH))
            ]
            return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """The model in evaluation mode, and then as it was: a validation comes in the middle of a training."""
        if not self.model.training:
            yield
            return
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def _batch(self, histories: Events) -> Batch:
        """Padded at the end to the longest."""
        users = histories.users.astype(np.int64)
        if self.model.config.user_features.alone:
            users = np.where(has_items(histories), users, -1 - users)
        batch = Batch(
            torch.from_numpy(histories.padded("items", PAD)),
            torch.from_numpy(histories.lengths.astype(np.int64)),
            torch.from_numpy(users),
            len(histories),
            slice(0, len(histories)),
            (),
        )
        if len(histories.event_types):
            batch.event_types = torch.from_numpy(histories.padded("event_types"))
        if self.model.config.reads_times:
            batch.times, batch.request_times = _times_of(histories, needs_request=self.model.config.reads_request_time)
        return batch.to(self.device)


def _times_of(histories: Events, *, needs_request: bool) -> tuple[Tensor, Tensor]:
    """(times [B, T] of events, [B] of requests). A request is not earlier than its user's last event: clocks differ."""
    histories.require_times()
    if needs_request and histories.request_times is None:
        raise ValueError("expected the times of requests, which the model reads, found none")
    requests = np.zeros(len(histories), np.int64) if histories.request_times is None else histories.request_times
    last = requests.copy()
    has_any = histories.lengths > 0
    last[has_any] = histories.times[histories.offsets[1:][has_any] - 1]
    return torch.from_numpy(histories.padded("times")), torch.from_numpy(np.maximum(requests, last))
