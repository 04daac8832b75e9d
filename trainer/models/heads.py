"""What stands behind a hidden state: cosines of items, weights of losses, and a score of an item's content by a small
network, f(u, v) of content-based click prediction (survey equation 2; Chen et al. 2019, *BERT4SessRec*).

Shape letters: ``N`` pairs, ``D`` width of a hidden state, ``F`` width of content.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SQUARE = 1e-8  # of a length: an item of which nothing is known has a vector of zeros, and no direction


class PairHead(nn.Module):
    """Hidden states [N, D] and contents [N, F] -> logits [N]. The layers read both, and their product."""

    def __init__(self, hidden_width: int, content_width: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.content = nn.Linear(content_width, hidden_width)
        sizes = [3 * hidden_width, *layers, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        for layer in (self.content, *self.layers):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden_ND: Tensor, content_NF: Tensor) -> Tensor:
        item_ND = self.content(content_NF)
        x = torch.cat([hidden_ND, item_ND, hidden_ND * item_ND], dim=-1)
        for place, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if place else x)
        logits: Tensor = x.squeeze(-1)
        return logits


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] at length 1, in fp32 at least; those of zeros stay so."""
    wide = vectors.float() if vectors.dtype == torch.bfloat16 else vectors
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + SMALLEST_SQUARE)


class CosineQuery(nn.Module):
    """Users' vectors [..., D] at length 1, divided by a temperature: their product with items' vectors of length 1 is
    the cosine over the temperature, as HSTU scores (Zhai et al. 2024)."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return unit(x) / self.temperature


class LossWeights(nn.Module):
    """The logarithms s of several losses' variances, learned with the model: a loss L weighs ``exp(-s) L + s / 2``
    (Kendall, Gal and Cipolla 2018, equation 10)."""

    def __init__(self, num_losses: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(num_losses))

    def forward(self, place: int, loss: Tensor, count: Tensor) -> Tensor:
        """Of a loss that is summed over `count` things."""
        weighed: Tensor = torch.exp(-self.log_variance[place]) * loss + self.log_variance[place] / 2 * count
        return weighed
