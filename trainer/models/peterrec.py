"""PeterRec (Yuan et al. 2020; survey 3.3): residual blocks of two dilated convolutions over an item sequence, as in
NextItNet (Yuan et al. 2019), with the survey's user and knowledge embeddings where they are requested (4.3, 4.4).

Shape letters: ``B`` sequences, ``T`` positions, ``D`` width, ``N`` any number of positions.

A block of dilation d: convolution (kernel 3, dilation d), LayerNorm, ReLU, convolution (2 d), LayerNorm, ReLU, and its
input added. Causal, a position reads itself and what stands 1 and 2 dilations before it; else itself and one dilation
to either side. Where we leave the paper: items are scored with the vectors that they are read by, as everywhere here,
through `head` (the released code has a second table); layers are drawn at 1 / sqrt(inputs), as in `bert4rec`, not at
0.02; dropout is a setting, and there are two LayerNorms more, at both ends.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import PeterRecConfig
from trainer.models.adapters import Patches, patched, weight_of
from trainer.models.base import ModelSizes
from trainer.models.cpu.dropout import Dropout
from trainer.models.item_encoder import TiedModel
from trainer.models.row_table import RowTables

KERNEL = 3


class Block(nn.Module):
    """[B, T, D] to [B, T, D]."""

    def __init__(self, config: PeterRecConfig, dilation: int) -> None:
        super().__init__()
        width = config.width
        self.dilation = dilation
        # A convolution as one product over the positions that it reads, side by side, oldest first.
        self.first = nn.Linear(KERNEL * width, width)
        self.first_norm = nn.LayerNorm(width)
        self.second = nn.Linear(KERNEL * width, width)
        self.second_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        real_BT1: Tensor | None,
        *,
        causal: bool,
        random: torch.Generator | None = None,
        patches: Patches = None,
    ) -> Tensor:
        """`real` [B, T, 1]: which positions there are; None: all, or, with `causal`, it doesn't matter."""
        h_BTD = x_BTD
        layers = (("first", self.first, self.first_norm, 1), ("second", self.second, self.second_norm, 2))
        for name, layer, norm, times in layers:
            around_BTX = _around(h_BTD, times * self.dilation, causal=causal)
            convolved_BTD = F.linear(around_BTX, weight_of(layer, patches, name), layer.bias)
            h_BTD = F.relu(norm(patched(patches, name, h_BTD, convolved_BTD)))
            if real_BT1 is not None:
                h_BTD = h_BTD * real_BT1
        out_BTD: Tensor = x_BTD + self.dropout(h_BTD, random)
        return out_BTD


class PeterRec(TiedModel):
    """Items are scored with the same knowledge-enhanced vectors that they are embedded with."""

    linears = ("first", "second")

    config: PeterRecConfig

    def __init__(self, config: PeterRecConfig, sizes: ModelSizes, tables: RowTables | None = None) -> None:
        super().__init__(config, sizes, tables)
        self.input_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config, dilation) for dilation in config.dilations)
        self.output_norm = nn.LayerNorm(config.width)
        self._add_head()

    def _placed(self, vectors_BTD: Tensor) -> Tensor:
        return vectors_BTD  # a convolution knows what stands where

    def _network(self) -> Sequence[nn.Parameter]:
        return [*self.input_norm.parameters(), *self.blocks.parameters(), *self.output_norm.parameters()]

    def _chunk(
        self, x_BTD: Tensor, lengths_B: Tensor, wanted_BT: Tensor, random: torch.Generator | None, *, causal: bool
    ) -> Tensor:
        T = int(lengths_B.amax()) if len(lengths_B) else x_BTD.shape[1]
        x_BTD, wanted_BT = self.dropout(self.input_norm(x_BTD[:, :T]), random), wanted_BT[:, :T]
        real_BT1 = None
        if not causal:  # a causal position never reads what stands behind it
            real_BT1 = (torch.arange(T, device=x_BTD.device) < lengths_B[:, None])[:, :, None]
            x_BTD = x_BTD * real_BT1
        for block, patches in zip(self.blocks, self.patches_of_blocks(), strict=True):
            x_BTD = block(x_BTD, real_BT1, causal=causal, random=random, patches=patches)
        hidden_ND: Tensor = self.output_norm(x_BTD[wanted_BT])
        return hidden_ND


def _around(x_BTD: Tensor, dilation: int, *, causal: bool) -> Tensor:
    """[B, T, 3 D]: what a convolution reads at each position, oldest first; zero where there is nothing."""
    T = x_BTD.shape[1]
    wide = F.pad(x_BTD, (0, 0, 2 * dilation, 0) if causal else (0, 0, dilation, dilation))
    return torch.cat([wide[:, at : at + T] for at in (0, dilation, 2 * dilation)], dim=2)
