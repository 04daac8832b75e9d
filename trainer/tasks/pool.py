"""Losses over a pool of negatives that all positions share, a block of positions at a time.

As `trainer.tasks.softmax` does for a whole catalogue: the scores [N, K] are never there at once, and what a block gives
is summed in the order of blocks, the same bits whatever the threads.

Shape letters: ``N`` positions, ``D`` width, ``K`` negatives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.tasks.softmax import block_rows, dtypes_of, summed_in_blocks


def softmax_over_pool(
    query_ND: Tensor, own_N: Tensor, pool: tuple[Tensor, Tensor], hit_NK: "Hits", log_expected: float
) -> Tensor:
    """Sum over positions of log(exp(own) + sum of exp(score - log_expected)) - own, over the negatives that are no
    hits. `pool`: their vectors [K, D] and biases [K]."""
    own_N = own_N + log_expected  # the same difference as from all others, and cheaper
    loss: Tensor = _OverPool.apply(  # type: ignore[no-untyped-call]
        query_ND, *pool, own_N, None, hit_NK
    )
    return loss


def softplus_over_pool(query_ND: Tensor, pool: tuple[Tensor, Tensor], hit_NK: "Hits", weight_N: Tensor) -> Tensor:
    """Sum over positions of weight times the sum of -log(1 - s(negative)) over the negatives that are no hits; s is the
    logistic function."""
    loss: Tensor = _OverPool.apply(  # type: ignore[no-untyped-call]
        query_ND, *pool, None, weight_N, hit_NK
    )
    return loss


class Hits:
    """Which negatives are a position's target: those are left out."""

    def __init__(self, targets_N: Tensor, negatives_K: Tensor) -> None:
        self.targets_N, self.negatives_K = targets_N, negatives_K

    def __getitem__(self, positions: slice) -> Tensor:
        """Bool [n, K] of some positions."""
        return self.negatives_K == self.targets_N[positions, None]

    def others(self) -> Tensor:
        """How many negatives each position has besides, [N]."""
        pool_K = self.negatives_K.sort().values
        after_N, before_N = (torch.searchsorted(pool_K, self.targets_N, right=right) for right in (True, False))
        return len(pool_K) - (after_N - before_N)


class _OverPool(torch.autograd.Function):
    """A softmax where targets' own scores are given, else softplus with a weight for each position. The gradients are
    taken along with the loss, and only scaled afterwards."""

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        table_KD: Tensor,
        bias_K: Tensor,
        own_N: Tensor | None,
        weight_N: Tensor | None,
        hit_NK: Hits,
    ) -> Tensor:
        device, trained = query_ND.device.type, any(ctx.needs_input_grad)
        dtype, wide = dtypes_of(table_KD)
        rows = block_rows(device, len(table_KD))
        given = [x for x in (query_ND, table_KD, bias_K, own_N) if x is not None]
        totals = [torch.zeros_like(x, dtype=wide) for x in given] if trained else []
        with torch.autocast(device, enabled=False):
            table, bias = table_KD.to(dtype), bias_K.to(dtype)

            def block(number: int) -> tuple[Tensor, ...]:
                here = slice(number * rows, (number + 1) * rows)
                query = query_ND[here].to(dtype)
                scores = torch.addmm(bias, query, table.T).to(wide).masked_fill_(hit_NK[here], -torch.inf)
                if own_N is not None:
                    loss, excess, more = _softmax(scores, own_N[here].to(wide))
                else:
                    assert weight_N is not None
                    loss, excess, more = _softplus(scores, weight_N[here].to(wide))
                if not trained:
                    return (loss,)
                of_bias_K = excess.sum(0)
                excess = excess.to(dtype)
                return loss, excess @ table, excess.T @ query, of_bias_K, *more

            loss = summed_in_blocks(block, len(query_ND), rows, totals, device=device, per_row=(0, 3))
        ctx.save_for_backward(*totals)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = [slope * gradients[0] for slope in ctx.saved_tensors]
        return *slopes, *[None] * (6 - len(slopes))


def _softmax(scores_NK: Tensor, own_N: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A block's summed loss, its slopes by the scores, which are overwritten, and by the targets' own."""
    top_N1 = torch.maximum(scores_NK.amax(1), own_N)[:, None]
    own_exp_N1 = (own_N[:, None] - top_N1).exp_()
    exp_NK = scores_NK.sub_(top_N1).exp_()
    sum_N1 = exp_NK.sum(1, keepdim=True) + own_exp_N1
    loss = (sum_N1.log() + top_N1).sum() - own_N.sum()
    return loss, exp_NK.div_(sum_N1), ((own_exp_N1 / sum_N1)[:, 0] - 1,)


def _softplus(scores_NK: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `_softmax`; a score of -inf gives nothing."""
    loss = (F.softplus(scores_NK).sum(1) * weight_N).sum()
    return loss, scores_NK.sigmoid_().mul_(weight_N[:, None]), ()
