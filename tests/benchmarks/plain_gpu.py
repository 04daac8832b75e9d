"""The plain step that steps on a GPU are measured against. Frozen: a change here is a change of the measure.

What one would write with torch's own modules for a GPU: every sequence padded to 200, a fixed share of positions masked
and drawn on the device, hidden states gathered at these alone, F.cross_entropy, fused AdamW, bf16, the loss compiled.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import FIRST_INDEX, MASK

LENGTH = 200
SHARE = 0.2  # of the positions masked, of each sequence


class PlainGpu(nn.Module):
    """BERT4Rec, layers normalised first, learned positions, a head tied to the item table."""

    def __init__(self, *, num_items: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(num_items, width)
        self.position_embedding = nn.Embedding(LENGTH, width)
        self.input_norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        layer.self_attn.dropout = 0.0  # so that the fused attention may be used
        self.encoder = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output_bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(0.1)

    def forward(self, items_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The mean loss of the masked positions."""
        place_T = torch.arange(LENGTH, device=items_BT.device)
        is_real_BT = place_T < lengths_B[:, None]
        noise_BT = torch.rand(items_BT.shape, device=items_BT.device).masked_fill(~is_real_BT, -1)
        places_BQ = noise_BT.topk(int(SHARE * LENGTH), dim=1).indices
        number_Q = torch.arange(places_BQ.shape[1], device=items_BT.device)
        counts_BQ = number_Q < (SHARE * lengths_B).long().clamp(min=1)[:, None]
        hidden_BT = torch.zeros_like(is_real_BT).scatter(1, places_BQ, counts_BQ)
        x_BTD = self.item_embedding(torch.where(hidden_BT, MASK, items_BT)) + self.position_embedding(place_T)
        x_BTD = self.encoder(self.dropout(self.input_norm(x_BTD)), src_key_padding_mask=~is_real_BT)
        x_BQD = x_BTD.gather(1, places_BQ[:, :, None].expand(-1, -1, x_BTD.shape[2]))
        scores = F.linear(self.head(x_BQD), self.item_embedding.weight, self.output_bias)[:, :, FIRST_INDEX:]
        targets_BQ = torch.where(counts_BQ, items_BT.gather(1, places_BQ) - FIRST_INDEX, -100)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets_BQ.flatten(), ignore_index=-100)


def plain_step(
    *, num_items: int, width: int, blocks: int, heads: int, device: str, compiled: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step on items [B, 200] and lengths [B] on the device; gives the loss, not read back."""
    plain = PlainGpu(num_items=num_items, width=width, blocks=blocks, heads=heads).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    if compiled:
        plain.compile(dynamic=False)

    def step(items_BT: Tensor, lengths_B: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss: Tensor = plain(items_BT, lengths_B)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
