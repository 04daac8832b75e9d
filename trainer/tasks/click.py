"""Content-based click prediction (Chen et al. 2019; survey 3.2.2, equation 2): does a user take an item, told by what
the user did before and by what the item is.

An item that was taken is a yes; `negatives` items drawn uniformly for each, less those that the user has taken in what
is read, are noes. A causal network tells every item of a sequence from those before it; one that isn't (pre-trained by
masked items) tells `cuts` of them, from a MASK in their place.

Shape letters: ``B`` sequences of this rank, ``G`` of the global batch, ``T`` positions, ``C`` cuts, ``K`` negatives,
``N`` items taken.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS, FIRST_INDEX, MASK, PAD
from trainer.config import ClickConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.loss import wide

HEAD = "click"


class Click:
    """The task; holds settings only."""

    def __init__(self, config: ClickConfig) -> None:
        self.config = config

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(binary cross-entropy summed over pairs, their number) of this rank's slice."""
        hidden_ND, row_N, place_N = self._asked(model, batch)
        targets_N = batch.items[row_N, place_N]
        drawn_NK = self._drawn(batch, model.num_items)[row_N, place_N]
        isn_taken_NK = (drawn_NK[:, :, None] != batch.items[row_N][:, None]).all(2)
        yes_N, no_NK = self.told(model, hidden_ND, targets_N), self.told(model, hidden_ND[:, None], drawn_NK)
        loss = F.softplus(-yes_N).sum() + (F.softplus(no_NK) * isn_taken_NK).sum()
        return loss, isn_taken_NK.sum() + len(targets_N)

    def told(self, model: SequenceModel, hidden_ND: Tensor, rows: Tensor) -> Tensor:
        """Logits, of the shape of `rows`, that the users of hidden states [..., D] take these catalogue rows."""
        assert model.content_VF is not None, "items have been described"
        hidden = hidden_ND.expand(*rows.shape, hidden_ND.shape[-1])
        return wide(model.task_heads[HEAD](hidden, model.content_VF[rows].to(hidden.dtype)))

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of users after all that is read."""
        begin, end = (CLS, PAD) if self.config.causal else (None, MASK)
        items_BT = batch.items if begin is None else F.pad(batch.items, (1, 0), value=begin)
        lengths_B = batch.lengths + 1
        items_BT = F.pad(items_BT, (0, 0 if self.config.causal else 1))
        asked_BT = torch.arange(items_BT.shape[1], device=items_BT.device) == lengths_B[:, None] - 1
        if not self.config.causal:
            items_BT = torch.where(asked_BT, end, items_BT)
        hidden_BD: Tensor = model(
            items_BT, lengths_B, batch.users, asked_BT, causal=self.config.causal, table_VD=table_VD
        )
        return hidden_BD

    def _asked(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states [N, D] before items that were taken; their rows and places)."""
        if self.config.causal:
            begin_B1 = batch.items.new_full((len(batch.items), 1), CLS)
            read_BT = torch.cat([begin_B1, batch.items[:, :-1]], dim=1)
            hidden_ND = model(read_BT, batch.lengths, batch.users, batch.mask_BT, causal=True)
            return hidden_ND, *batch.mask_BT.nonzero(as_tuple=True)
        random = np.random.default_rng([*batch.draw, 8])
        uniform_BC = torch.from_numpy(random.random((batch.global_rows, self.config.cuts))[batch.rows])
        has_any_B = batch.lengths > 0
        place_BC = (uniform_BC.to(batch.lengths.device) * batch.lengths[:, None]).long()
        row_N = torch.arange(len(place_BC), device=place_BC.device)[:, None].expand_as(place_BC)[has_any_B].flatten()
        place_N = place_BC[has_any_B].flatten()
        place_T = torch.arange(batch.items.shape[1], device=place_N.device)
        read_NT = torch.where(place_T < place_N[:, None], batch.items[row_N], PAD)
        asked_NT = place_T == place_N[:, None]
        read_NT = torch.where(asked_NT, MASK, read_NT)
        hidden_ND = model(read_NT, place_N + 1, batch.users[row_N], asked_NT, causal=False)
        return hidden_ND, row_N, place_N

    def _drawn(self, batch: Batch, num_items: int) -> Tensor:
        """[B, T, K] catalogue rows, drawn for the global batch, then cut to this rank's rows."""
        random = np.random.default_rng([*batch.draw, 7])
        shape = (batch.global_rows, batch.items.shape[1], self.config.negatives)
        drawn = random.integers(FIRST_INDEX, num_items, shape, dtype=np.int32)[batch.rows]
        return torch.from_numpy(drawn).long().to(batch.items.device)
