"""Masked item prediction (survey 3.2.1, 4.4; Sun et al. 2019): some items are hidden, the rest of the sequence tells
them.

Of the chosen positions 80 % become MASK, 10 % a random item, 10 % stay. In a share of samples the sequence is cut after
a random item and only that newest one is chosen, and always becomes MASK: as at evaluation, a MASK
behind the newest item. (Always cutting at the sequence's own end trains one target per user, over and over: NDCG@10
0.119 for 0.127.)
"""

import torch
from torch import Tensor

from etl.tables import FIRST_INDEX, MASK, PAD
from trainer.config import MaskedItemConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.models.time import EventInputs
from trainer.tasks.base import Task
from trainer.tasks.loss import is_predicted, loss_at
from trainer.tasks.positions import Inputs, positions_of, uniform
from trainer.tasks.times import times_before_mask, times_of_masked


class MaskedItem(Task):
    """The task; holds settings only."""

    causal = False

    def __init__(self, config: MaskedItemConfig) -> None:
        self.config = config

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of masked positions whose items are predicted) of this rank's slice."""
        corrupted_BT, lengths_B, chosen_BT = self.mask(batch, model.num_items)
        if model.untrained_V is not None:  # an item that nobody has had, drawn in the place of one that is masked
            corrupted_BT = torch.where(model.untrained_V[corrupted_BT], MASK, corrupted_BT)
        events = EventInputs(times=times_of_masked(model, batch, chosen_BT))
        chosen_BT &= is_predicted(model, batch.items)
        whole = self.config.loss.kind == "full"
        table_VD = model.item_vectors() if whole else None
        positions = positions_of(batch, chosen_BT, self.config.mask_probability)
        inputs = Inputs(corrupted_BT, lengths_B, batch.users, events)
        hidden_ND = positions.hidden(model, inputs, causal=False, table_VD=table_VD)
        return loss_at(model, hidden_ND, batch, positions, self.config.loss, table_VD)

    def mask(self, batch: Batch, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
        """(corrupted items [B, T], lengths [B], chosen positions [B, T] bool), at least one of each sequence.

        Drawn for the global batch, then cut to this rank's rows, so that it depends on no world size.
        """
        T = batch.items.shape[1]
        uniform_3BT, uniform_2B = uniform(batch, 1, 3, 2)
        place_T = torch.arange(T, device=batch.items.device)
        last_only_B = uniform_2B[0] < self.config.last_only_probability
        cut_B = (1 + (uniform_2B[1] * batch.lengths).long()).minimum(batch.lengths)
        lengths_B = torch.where(last_only_B, cut_B, batch.lengths)
        chosen_BT = (uniform_3BT[0] < self.config.mask_probability) & batch.mask_BT
        alone_B1 = (last_only_B | ~chosen_BT.any(1))[:, None]
        chosen_BT = torch.where(alone_B1, place_T == lengths_B[:, None] - 1, chosen_BT)
        kind_BT = torch.where(alone_B1, 0.0, uniform_3BT[1])
        anything_BT = (uniform_3BT[2] * (num_items - FIRST_INDEX)).long() + FIRST_INDEX
        replaced_BT = torch.where(kind_BT < 0.8, MASK, torch.where(kind_BT < 0.9, anything_BT, batch.items))
        corrupted_BT = torch.where(chosen_BT, replaced_BT, batch.items)
        return torch.where(place_T < lengths_B[:, None], corrupted_BT, PAD), lengths_B, chosen_BT

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """The query: hidden states [B, D] of a MASK put behind each sequence. `batch` leaves room for
        it."""
        items_BT = torch.cat([batch.items, batch.items.new_zeros(len(batch.items), 1)], dim=1)
        asked_BT = torch.arange(items_BT.shape[1], device=items_BT.device) == batch.lengths[:, None]
        items_BT = torch.where(asked_BT, MASK, items_BT)
        events = EventInputs(times=times_before_mask(model, batch))
        query_BD: Tensor = model(
            items_BT, batch.lengths + 1, batch.users, asked_BT, causal=False, table_VD=table_VD, events=events
        )
        return query_BD
