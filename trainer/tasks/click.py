"""Content-based click prediction (Chen et al. 2019; survey 3.2.2, equation 2): does a user take an item, predicted by
what the user did before and by what the item is.

An item that was taken is a yes; `negatives` items drawn uniformly for each are negatives, and what the log says was
shown (`impressions`), less items that the user has taken in what is read. A causal network predicts every item of a
sequence from those taken before it; one that isn't (pre-trained by masked items) predicts `cuts` of them, from a MASK
in their place.

Shape letters: ``B`` sequences of this rank, ``G`` of the global batch, ``T`` positions, ``C`` cuts, ``K`` negatives,
``N`` events to predict, ``M`` of them that are taken.
"""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import CLS, FIRST_INDEX, MASK, PAD
from trainer.config import ClickConfig, PairHeadConfig
from trainer.data.batch import Batch
from trainer.data.catalogue import Catalogue
from trainer.data.item_features import read_content
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.models import SequenceModel
from trainer.tasks.base import Task
from trainer.tasks.loss import wide
from trainer.tasks.user_vector import newest

HEAD = "click"
PAIRS_AT_ONCE = 1 << 16  # of a user and an item, scored by a small network each


class Click(Task):
    """The task; holds settings only."""

    def __init__(self, config: ClickConfig) -> None:
        self.config = config

    @classmethod
    def prepared(cls, config: ClickConfig, release: Release, catalogue: Catalogue, dataset: SequenceDataset) -> Self:
        task, content = cls(config), read_content(release, catalogue, config.content)
        task.content, task.heads = content, {HEAD: PairHeadConfig(content=content.width, layers=config.layers)}
        return task

    def loss(self, model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """(binary cross-entropy summed over pairs, their number) of this rank's slice."""
        is_taken_BT = batch.mask_BT
        if self.config.impressions:
            assert batch.event_types is not None, "kinds are read"
            is_taken_BT = is_taken_BT & (batch.event_types == 0)
        taken_BT = torch.where(is_taken_BT, batch.items, PAD)
        hidden_ND, row_N, place_N = self._asked(model, batch, is_taken_BT)
        items_N, is_taken_N = batch.items[row_N, place_N], is_taken_BT[row_N, place_N]
        logit_N = self.logits(model, hidden_ND, items_N)
        isn_taken_N = (items_N[:, None] != taken_BT[row_N]).all(1)
        row_M, place_M = row_N[is_taken_N], place_N[is_taken_N]
        drawn_MK = self._drawn(batch, model.num_items)[row_M, place_M]
        isn_taken_MK = (drawn_MK[:, :, None] != taken_BT[row_M][:, None]).all(2)
        negative_MK = self.logits(model, hidden_ND[is_taken_N][:, None], drawn_MK)
        loss = F.softplus(-logit_N[is_taken_N]).sum() + F.softplus(logit_N[isn_taken_N]).sum()
        loss = loss + (F.softplus(negative_MK) * isn_taken_MK).sum()
        return loss, is_taken_N.sum() + isn_taken_N.sum() + isn_taken_MK.sum()

    def logits(self, model: SequenceModel, hidden_ND: Tensor, rows: Tensor) -> Tensor:
        """Logits, of the shape of `rows`, that the users of hidden states [..., D] take these catalogue rows."""
        assert model.content_VF is not None, "items have been described"
        hidden = hidden_ND.expand(*rows.shape, hidden_ND.shape[-1])
        return wide(model.task_heads[HEAD](hidden, model.content_VF[rows].to(hidden.dtype)))

    def scores(
        self,
        model: SequenceModel,
        hidden_BD: Tensor,
        rows: slice | Tensor,
        table_VD: Tensor | None,
        bias_V: Tensor | None,
    ) -> Tensor:
        """Logits, some pairs at a time."""
        rows_C = torch.arange(rows.start, rows.stop, device=hidden_BD.device) if isinstance(rows, slice) else rows
        blocks_C = torch.split(rows_C, max(1, PAIRS_AT_ONCE // max(1, len(hidden_BD))))
        logits = [self.logits(model, hidden_BD[:, None], block.expand(len(hidden_BD), -1)) for block in blocks_C]
        return torch.cat(logits, dim=1).float()

    def query(self, model: SequenceModel, batch: Batch, table_VD: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of users after all that is read; impressions, where kinds are known, aren't."""
        begin, end = (CLS, PAD) if self.config.causal else (None, MASK)
        items_BT, lengths_B = batch.items, batch.lengths
        if self.config.impressions and batch.event_types is not None:
            is_taken_BT = batch.mask_BT & (batch.event_types == 0)
            items_BT, lengths_B = newest(items_BT, is_taken_BT, at_most=items_BT.shape[1])
        if begin is not None:
            items_BT = F.pad(items_BT, (1, 0), value=begin)
        lengths_B = lengths_B + 1
        items_BT = F.pad(items_BT, (0, 0 if self.config.causal else 1))
        asked_BT = torch.arange(items_BT.shape[1], device=items_BT.device) == lengths_B[:, None] - 1
        if not self.config.causal:
            items_BT = torch.where(asked_BT, end, items_BT)
        hidden_BD: Tensor = model(
            items_BT, lengths_B, batch.users, asked_BT, causal=self.config.causal, table_VD=table_VD
        )
        return hidden_BD

    def _asked(self, model: SequenceModel, batch: Batch, is_taken_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states [N, D] before events, of what was taken until then; their rows and places)."""
        num_positions = batch.items.shape[1]
        if self.config.causal:
            rank_BT = is_taken_BT.cumsum(1) - is_taken_BT.long()  # taken before
            lengths_B = ((rank_BT + 1) * batch.mask_BT).amax(1)
            taken_BT, _ = newest(batch.items, is_taken_BT, at_most=num_positions)
            read_BT = F.pad(taken_BT, (1, 0), value=CLS)[:, : max(int(lengths_B.amax()), 1)]
            every_BT = torch.arange(read_BT.shape[1], device=read_BT.device) < lengths_B[:, None]
            hidden_ND = model(read_BT * every_BT, lengths_B, batch.users, every_BT, causal=True)
            row_N, place_N = batch.mask_BT.nonzero(as_tuple=True)
            first_B = lengths_B.cumsum(0) - lengths_B
            return hidden_ND[first_B[row_N] + rank_BT[row_N, place_N]], row_N, place_N
        random = np.random.default_rng([*batch.draw, 8])
        uniform_BC = torch.from_numpy(random.random((batch.global_rows, self.config.cuts))[batch.rows])
        has_any_B = batch.lengths > 0
        place_BC = (uniform_BC.to(batch.lengths.device) * batch.lengths[:, None]).long()
        row_N = torch.arange(len(place_BC), device=place_BC.device)[:, None].expand_as(place_BC)[has_any_B].flatten()
        place_N = place_BC[has_any_B].flatten()
        is_before_NT = torch.arange(num_positions, device=place_N.device) < place_N[:, None]
        read_NT, count_N = newest(batch.items[row_N], is_before_NT & is_taken_BT[row_N], at_most=num_positions - 1)
        read_NT = F.pad(read_NT, (0, 1))
        asked_NT = torch.arange(read_NT.shape[1], device=place_N.device) == count_N[:, None]
        read_NT = torch.where(asked_NT, MASK, read_NT)
        hidden_ND = model(read_NT, count_N + 1, batch.users[row_N], asked_NT, causal=False)
        return hidden_ND, row_N, place_N

    def _drawn(self, batch: Batch, num_items: int) -> Tensor:
        """[B, T, K] catalogue rows, drawn for the global batch, then cut to this rank's rows."""
        random = np.random.default_rng([*batch.draw, 7])
        shape = (batch.global_rows, batch.items.shape[1], self.config.negatives)
        drawn = random.integers(FIRST_INDEX, num_items, shape, dtype=np.int32)[batch.rows]
        return torch.from_numpy(drawn).long().to(batch.items.device)
