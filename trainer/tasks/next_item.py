"""Next item prediction (survey 4.3): left to right, each position tells the item after it.

A CLS stands before the oldest item, so that the first item is predicted too and an empty history has a query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS, UNK
from trainer.config import NextItemConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.models.time import EventInputs
from trainer.tasks.base import Task
from trainer.tasks.loss import is_predicted, loss_at, loss_of_users, summed_loss
from trainer.tasks.positions import Inputs, positions_of
from trainer.tasks.times import times_behind_cls


class NextItem(Task):
    """The task; holds settings only."""

    causal = True

    def __init__(self, config: NextItemConfig) -> None:
        self.config = config

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, number of predicted items) of this rank's slice."""
        whole = self.config.loss.scores_catalogue
        table_VD = model.item_vectors() if whole else None
        inputs_BT, events = begun(model, batch)
        real_BT = batch.mask_BT if self.config.targets > 1 else batch.mask_BT & is_predicted(model, batch.items)
        one_query = (
            whole and not model.reads_sequence and self.config.targets == 1 and not self.config.loss.label_smoothing
        )
        asking_BT = real_BT
        if one_query:
            asking_BT = torch.zeros_like(real_BT)
            asking_BT[:, 0] = True
        positions, inputs = positions_of(batch, asking_BT), Inputs(inputs_BT, batch.lengths, batch.users, events)
        hidden_ND = positions.hidden(model, inputs, causal=True, table_VD=table_VD)
        if one_query:
            targets_N = batch.items[real_BT]
            return loss_of_users(model, hidden_ND, targets_N, real_BT.nonzero()[:, 0], table_VD, self.config.loss)
        if self.config.targets > 1:
            asking, targets_N = self._following(batch)
            wanted_N = is_predicted(model, targets_N)
            hidden_ND, targets_N = hidden_ND[asking[wanted_N]], targets_N[wanted_N]
            loss = summed_loss(model, hidden_ND, targets_N, self.config.loss, draw=batch.draw, table_VD=table_VD)
            return loss, torch.tensor(len(targets_N), device=loss.device)
        return loss_at(model, hidden_ND, batch, positions, self.config.loss, table_VD)

    def _following(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each real position and each of the next items that there are: the position's number, and the item."""
        number_BT = (batch.mask_BT.flatten().cumsum(0) - 1).view_as(batch.items)
        asking, targets = [], []
        for ahead in range(min(self.config.targets, batch.items.shape[1])):
            real_BT = batch.mask_BT[:, ahead:]
            asking.append(number_BT[:, : real_BT.shape[1]][real_BT])
            targets.append(batch.items[:, ahead:][real_BT])
        return torch.cat(asking), torch.cat(targets)

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """The query: hidden states [B, D] at the newest item (at CLS for an empty history)."""
        items_BT, events = _begin(model, batch)
        newest_BT = torch.arange(items_BT.shape[1], device=items_BT.device) == batch.lengths[:, None]
        query_BD: Tensor = model(
            items_BT, batch.lengths + 1, batch.users, newest_BT, causal=True, table_VD=table_VD, events=events
        )
        return query_BD


def begun(model: SequenceModel, batch: Batch) -> tuple[Tensor, EventInputs]:
    """Items [B, T] and what is read beside them: at each position what stood before it, a CLS at the first."""
    items_BT, events = _begin(model, batch)
    return items_BT[:, :-1], events.until(items_BT.shape[1] - 1)


def _begin(model: SequenceModel, batch: Batch) -> tuple[Tensor, EventInputs]:
    """All of a batch, [B, T + 1], behind a CLS."""
    kinds_BT = None if batch.event_types is None else F.pad(batch.event_types, (1, 0))
    events = EventInputs(kinds_BT, times_behind_cls(model, batch), _asked(model, batch))
    return F.pad(batch.items, (1, 0), value=CLS), events


def _asked(model: SequenceModel, batch: Batch) -> Tensor | None:
    """[B, T + 1] whether each position's next item is of the domain that is asked; behind the newest, it is. Items that
    came after training are of none. None where the model doesn't read it."""
    if not model.config.domain_asked:
        return None
    assert model.asked_V is not None, "the domain asked is known"
    is_known_BT = batch.items < len(model.asked_V)
    next_BT = model.asked_V[torch.where(is_known_BT, batch.items, UNK)] & is_known_BT
    asked_BT = F.pad(next_BT, (0, 1))
    return asked_BT | (torch.arange(asked_BT.shape[1], device=asked_BT.device) == batch.lengths[:, None])
