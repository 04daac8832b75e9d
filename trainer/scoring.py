"""The one way a model is asked: at validation, at test, by the served model and by the batch recommender.

Shape letters: ``B`` users, ``T`` positions, ``C`` candidates, ``V`` catalogue rows.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX, PAD
from trainer.baselines import Histories, IntArray
from trainer.data.batch import Batch
from trainer.models import Bert4Rec
from trainer.tasks import Task


class Scorer:
    """Scores of catalogue rows for histories. Make a new one when the weights change: the item table is kept."""

    def __init__(self, model: Bert4Rec, task: Task, *, device: torch.device | str = "cpu") -> None:
        self.model, self.task, self.device = model, task, torch.device(device)

    @functools.cached_property
    def _table_VD(self) -> Tensor:
        return self.model.item_vectors()

    @torch.inference_mode()
    def score(self, histories: Histories, candidates: IntArray | None = None) -> Tensor:
        """Scores float32 [B, C] on the CPU; items and candidates are catalogue rows, users global indices.

        Candidates None: every row, the reserved ones at -inf. The newest items that fit the model are read, the rest is
        cut. Users beyond the model's table, and UNK, are asked as unknown users. A history may be empty.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            hidden_BD = self.task.query(self.model, self._batch(histories))
            if candidates is None:
                scores = self.model.scores(hidden_BD, table_VD=self._table_VD).float()
                scores[:, :FIRST_INDEX] = -torch.inf
            else:
                rows = torch.from_numpy(np.ascontiguousarray(candidates)).to(self.device)
                scores = self.model.scores(hidden_BD, rows, self._table_VD).float()
            return scores.cpu()
        finally:
            self.model.train(was_training)

    def _batch(self, histories: Histories) -> Batch:
        """Padded at the end, the newest `max_length - 1` items of each user: the query adds a position of its own."""
        recent = histories.newest(self.model.config.max_length - 1)
        lengths = recent.lengths
        width = int(lengths.max(initial=0))
        items = np.full((len(recent), width), PAD, dtype=np.int64)
        items[np.arange(width) < lengths[:, None]] = recent.items
        batch = Batch(
            torch.from_numpy(items), torch.from_numpy(lengths.astype(np.int64)),
            torch.from_numpy(recent.users.astype(np.int64)), len(recent), slice(0, len(recent)), (),
        )  # fmt: skip
        return batch.to(self.device)
