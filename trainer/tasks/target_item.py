"""Items of another domain predicted by a user's vector (PeterRec's fine-tuning: Yuan et al. 2020; survey 3.3).

What is read is all that the user did but for the items that are predicted. So a user who is new in the target domain is
scored like any other. One pass over a sequence serves all its targets (the paper reads it once for each).
"""

import torch
from torch import Tensor

from trainer.config import TargetItemConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.base import Task
from trainer.tasks.loss import is_predicted, summed_loss
from trainer.tasks.user_vector import user_vectors


class TargetItem(Task):
    """The task; holds settings only."""

    def __init__(self, config: TargetItemConfig) -> None:
        self.config, self.causal = config, config.causal

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of items predicted) of this rank's slice."""
        table_VD = model.item_vectors() if self.config.loss.kind == "full" else None
        asked_BT = batch.mask_BT & is_predicted(model, batch.items)
        user_BD = self.query(model, batch, table_VD)
        owner_N, targets_N = asked_BT.nonzero()[:, 0], batch.items[asked_BT]
        loss = summed_loss(model, user_BD[owner_N], targets_N, self.config.loss, draw=batch.draw, table_VD=table_VD)
        return loss, torch.tensor(len(targets_N), device=loss.device)

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """User vectors [B, D]."""
        read_BT = batch.mask_BT & ~is_predicted(model, batch.items)
        return user_vectors(model, batch.items, read_BT, batch.users, causal=self.causal, table_VD=table_VD)
