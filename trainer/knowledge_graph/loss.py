"""The loss with self-adversarial negatives (Sun et al. 2019, equations 5 and 6), and its gradient by hand.

Of a triple with score p and negatives of scores n: ``-log σ(m + p) - Σ w log σ(-n - m)``, m the margin, w the softmax
of the temperature times n, taken as constants. Sums over triples: row-wise Adagrad knows no scale.

Shape letters: ``S`` chunks, ``C`` triples of a chunk, ``K`` negatives of a side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_MASKED = -1e9  # as a score, before the softmax


def of_positives(scores_SC: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """-log σ(m + p) [S, C], and its derivative."""
    shifted = scores_SC + margin
    return F.softplus(-shifted), torch.sigmoid(shifted) - 1


def of_negatives(scores_SCK: Tensor, known: Tensor, margin: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The weights w [S, C, K], and the derivative [S, C, K] of -Σ w log σ(-n - m); `known` are places in [S, C, K] that
    count for nothing."""
    logits = scores_SCK * temperature
    logits.view(-1)[known] = _MASKED
    weights = torch.softmax(logits, dim=-1)
    weights.view(-1)[known] = 0.0  # where all of a triple's are known
    return weights, torch.sigmoid(scores_SCK + margin).mul_(weights)


def summed(scores_SCK: Tensor, weights_SCK: Tensor, margin: float) -> Tensor:
    """-Σ w log σ(-n - m) [S, C]."""
    sums_SC: Tensor = torch.linalg.vecdot(weights_SCK, F.softplus(scores_SCK + margin))
    return sums_SC
