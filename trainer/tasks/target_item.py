"""Items of another domain told by a user's vector (PeterRec's fine-tuning: Yuan et al. 2020; survey 3.3).

What is read is all that the user did but for the items that are predicted, with a CLS behind, whose hidden state is the
user vector; where the network isn't causal, with a CLS at both ends, and the vector is the sum of both. So a user who
is new in the target domain is asked like any other. One pass over a sequence serves all its targets (the paper reads it
once for each).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS
from trainer.config import TargetItemConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.loss import is_predicted, summed_loss


class TargetItem:
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
        more = 1 if self.causal else 2
        read_BT = batch.mask_BT & ~is_predicted(model, batch.items)
        items_BT, lengths_B = newest(batch.items, read_BT, at_most=model.config.max_length - more)
        begin = 0 if self.causal else 1
        items_BT = F.pad(items_BT, (begin, 1))
        lengths_B = lengths_B + more
        place_T = torch.arange(items_BT.shape[1], device=items_BT.device)
        asked_BT = place_T == lengths_B[:, None] - 1
        if not self.causal:
            asked_BT = asked_BT | (place_T == 0)
        items_BT = torch.where(asked_BT, CLS, items_BT)
        hidden_ND: Tensor = model(items_BT, lengths_B, batch.users, asked_BT, causal=self.causal, table_VD=table_VD)
        return hidden_ND if self.causal else hidden_ND.view(len(lengths_B), 2, -1).sum(1)


def newest(items_BT: Tensor, kept_BT: Tensor, *, at_most: int) -> tuple[Tensor, Tensor]:
    """The newest kept items of each sequence in order, [B, T'], PAD (0) behind, and their number [B]."""
    count_B = kept_BT.sum(1)
    lengths_B = count_B.clamp(max=at_most)
    width = int(lengths_B.amax()) if len(lengths_B) else 0
    place_BT = (~kept_BT).byte().argsort(dim=1, stable=True)  # of the kept ones, in order, first
    rank_BT = (count_B - lengths_B)[:, None] + torch.arange(width, device=items_BT.device)
    chosen_BT = items_BT.gather(1, place_BT.gather(1, rank_BT.clamp(max=max(items_BT.shape[1] - 1, 0))))
    real_BT = torch.arange(width, device=items_BT.device) < lengths_B[:, None]
    return chosen_BT * real_BT, lengths_B
