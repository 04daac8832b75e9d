"""Several things about what comes next, told together by one user vector (DUPN: Ni et al. 2018; survey 3.1).

At each position of a sequence: the item that follows, its category, the event's kind, the level of its value. The
losses are summed over positions and added up, each with a weight that is set, or learned.

Shape letters: ``B`` sequences, ``T`` positions, ``N`` real positions, ``V`` catalogue rows, ``L`` levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import MultiConfig, NextItemConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.loss import summed_loss, wide
from trainer.tasks.next_item import NextItem, begun

WEIGHTS = "loss_weights"  # the head that holds them, where they are learned
NOTHING = -1  # class of what has none


class Multi:
    """The task. `class_V`: the category of each catalogue row; `levels_L`: the values that there are, ascending. None:
    it is only asked."""

    causal = True

    def __init__(self, config: MultiConfig, class_V: Tensor | None = None, levels_L: Tensor | None = None) -> None:
        self.config, self.class_V, self.levels_L = config, class_V, levels_L
        self._next = NextItem(NextItemConfig(loss=config.loss))

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(weighed sum of the losses, number of positions) of this rank's slice."""
        whole = "next_item" in self.config.tells and self.config.loss.kind == "full"
        table_VD = model.item_vectors() if whole else None
        real_BT = batch.mask_BT
        inputs_BT, kinds_BT = begun(batch)
        hidden_ND = model(
            inputs_BT, batch.lengths, batch.users, real_BT, causal=True, table_VD=table_VD, event_types_BT=kinds_BT
        )
        items_N = batch.items[real_BT]
        total = hidden_ND.new_zeros(())
        for place, name in enumerate(self.config.tells):
            if name == "next_item":
                loss = summed_loss(model, hidden_ND, items_N, self.config.loss, draw=batch.draw, table_VD=table_VD)
                count = torch.tensor(len(items_N), device=loss.device)
            else:
                class_N = self.classes(name, batch, real_BT)
                known_N = class_N != NOTHING
                scores_NC = wide(model.task_heads[name](hidden_ND[known_N]))
                loss, count = F.cross_entropy(scores_NC, class_N[known_N], reduction="sum"), known_N.sum()
            if self.config.weighting == "uncertainty":
                loss = model.task_heads[WEIGHTS](place, loss, count)
            total = total + self.config.weights.get(name, 1.0) * loss
        return total, real_BT.sum()

    def classes(self, name: str, batch: Batch, asked_BT: Tensor) -> Tensor:
        """What `name` is of the events at flagged positions [B, T]; NOTHING where they have none."""
        if name == "category":
            assert self.class_V is not None, "a task that is trained has classes"
            self.class_V = self.class_V.to(asked_BT.device)  # once
            return self.class_V[batch.items[asked_BT]]
        if name == "event_type":
            assert batch.event_types is not None, "kinds are read"
            return batch.event_types[asked_BT] - 1  # 0, none of the names, becomes NOTHING
        assert self.levels_L is not None, "a task that is trained has classes"
        assert batch.values is not None, "values are read"
        values_N = batch.values[asked_BT]
        levels_L = self.levels_L = self.levels_L.to(values_N.device)  # once
        place_N = torch.searchsorted(levels_L, values_N.nan_to_num(torch.inf)).clamp(max=len(levels_L) - 1)
        return torch.where(levels_L[place_N] == values_N, place_N, NOTHING)

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of users after all that is read."""
        return self._next.query(model, batch, table_VD)
