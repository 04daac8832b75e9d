"""Next item prediction (survey 4.3): left to right, each position tells the item after it.

A CLS stands before the oldest item, so that the first item is predicted too and an empty history can be asked.
"""

import torch
from torch import Tensor

from etl.tables import CLS
from trainer.config import NextItemConfig
from trainer.data.batch import Batch
from trainer.models.bert4rec import Bert4Rec
from trainer.tasks.loss import summed_loss


class NextItem:
    """The task; holds settings only."""

    causal = True

    def __init__(self, config: NextItemConfig) -> None:
        self.config = config

    def loss(self, model: Bert4Rec, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of predicted positions) of this rank's slice."""
        whole = self.config.loss.kind == "full"
        table_VD = model.item_vectors() if whole else None
        inputs_BT = torch.cat([_begin(batch), batch.items[:, :-1]], dim=1)
        real_BT = batch.mask_BT
        hidden_ND = model(inputs_BT, batch.lengths, batch.users, real_BT, causal=True, table_VD=table_VD)
        targets_N = batch.items[real_BT]
        loss = summed_loss(model, hidden_ND, targets_N, self.config.loss, draw=batch.draw, table_VD=table_VD)
        return loss, real_BT.sum()

    def query(self, model: Bert4Rec, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """How the model is asked: hidden states [B, D] at the newest item (at CLS for an empty history)."""
        items_BT = torch.cat([_begin(batch), batch.items], dim=1)
        newest_BT = torch.arange(items_BT.shape[1], device=items_BT.device) == batch.lengths[:, None]
        query_BD: Tensor = model(items_BT, batch.lengths + 1, batch.users, newest_BT, causal=True, table_VD=table_VD)
        return query_BD


def _begin(batch: Batch) -> Tensor:
    return batch.items.new_full((len(batch.items), 1), CLS)
