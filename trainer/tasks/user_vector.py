"""A user as one vector: the hidden state of a CLS behind what the user did (PeterRec: Yuan et al. 2020; survey 3.3).

Where the network isn't causal there is a CLS at both ends, and the vector is the sum of both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS
from trainer.models import SequenceModel


def user_vectors(
    model: SequenceModel,
    items_BT: Tensor,
    read_BT: Tensor,
    users_B: Tensor,
    *,
    causal: bool,
    table_VD: Tensor | None = None,
) -> Tensor:
    """[B, D], of the newest items that are flagged as read and fit the model; `table_VD`: as `forward`'s."""
    more = 1 if causal else 2
    items_BT, lengths_B = newest(items_BT, read_BT, at_most=model.config.max_length - more)
    begin = 0 if causal else 1
    items_BT = F.pad(items_BT, (begin, 1))
    lengths_B = lengths_B + more
    place_T = torch.arange(items_BT.shape[1], device=items_BT.device)
    asked_BT = place_T == lengths_B[:, None] - 1
    if not causal:
        asked_BT = asked_BT | (place_T == 0)
    items_BT = torch.where(asked_BT, CLS, items_BT)
    hidden_ND: Tensor = model(items_BT, lengths_B, users_B, asked_BT, causal=causal, table_VD=table_VD)
    return hidden_ND if causal else hidden_ND.view(len(lengths_B), 2, -1).sum(1)


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
