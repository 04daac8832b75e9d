"""Cross-entropy over a whole catalogue, a block of positions at a time.

The scores [N, V] of all positions would be the largest thing in a training step. Here those of a block are turned into
the block's loss and its gradients while they are in the processor's caches, and dropped: memory doesn't grow with N,
and nothing is read twice (as in Liger Kernel's fused linear cross-entropy: Hsu et al. 2024).

Shape letters: ``N`` positions, ``D`` width, ``V`` classes.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.models.chunks import on_threads

BLOCK_SCORES = 1 << 19  # numbers that a thread computes at once, about
DEVICE_BLOCK_SCORES = 1 << 25  # and a GPU: 128 MB, enough to keep it busy
BLOCK_ROWS = 64  # but never fewer positions: the table is read once a block


def summed_cross_entropy(
    query_ND: Tensor, table_VD: Tensor, bias_V: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over positions of F.cross_entropy(query @ table.T + bias, targets): products in autocast's type, the
    softmax in fp32 at least."""
    loss: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        query_ND, table_VD, bias_V, targets_N, label_smoothing
    )
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradients are taken along with the loss, and only scaled afterwards. On a CPU each thread has its part of the
    positions, from start to end."""

    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, table_VD: Tensor, bias_V: Tensor, targets_N: Tensor, smoothing: float
    ) -> Tensor:
        device = query_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table_VD.dtype
        trained = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            table_VD, bias_V = table_VD.to(dtype), bias_V.to(dtype)
            num_parts = torch.get_num_threads() if device == "cpu" else 1
            parts = list(zip(query_ND.chunk(num_parts), targets_N.chunk(num_parts), strict=True))

            def part(number: int) -> tuple[Tensor, list[Tensor]]:
                return _loss_and_slopes(*parts[number], table_VD, bias_V, smoothing, trained=trained)

            losses, slopes = zip(*on_threads(part, len(parts)), strict=True)
        if trained:
            of_query, of_table, of_bias = zip(*slopes, strict=True)
            ctx.save_for_backward(torch.cat(of_query), torch.stack(of_table).sum(0), torch.stack(of_bias).sum(0))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(slope * gradients[0] for slope in ctx.saved_tensors), None, None


def _loss_and_slopes(
    query_ND: Tensor, targets_N: Tensor, table_VD: Tensor, bias_V: Tensor, smoothing: float, *, trained: bool
) -> tuple[Tensor, list[Tensor]]:
    """The summed loss, and its gradients by query, table and bias where they are asked for."""
    wide = torch.promote_types(table_VD.dtype, torch.float32)
    total, num_classes = torch.zeros((), dtype=wide, device=query_ND.device), len(table_VD)
    slopes = [torch.zeros_like(x, dtype=wide) for x in (query_ND, table_VD, bias_V)] if trained else []
    scores_at_once = BLOCK_SCORES if query_ND.device.type == "cpu" else DEVICE_BLOCK_SCORES
    rows = max(BLOCK_ROWS, scores_at_once // num_classes)
    for first in range(0, len(query_ND), rows):
        query, targets = query_ND[first : first + rows].to(table_VD.dtype), targets_N[first : first + rows, None]
        scores = torch.addmm(bias_V, query, table_VD.T).to(wide)
        scores -= scores.amax(1, keepdim=True)
        total -= (1 - smoothing) * scores.gather(1, targets).sum()
        if smoothing:
            total -= smoothing * scores.mean(1).sum()
        sums = scores.exp_().sum(1, keepdim=True)
        total += sums.log().sum()
        if trained:
            excess = scores.mul_(1 / sums)  # what each class is given beyond what it is due
            if smoothing:
                excess -= smoothing / num_classes
            excess.scatter_add_(1, targets, excess.new_full(targets.shape, smoothing - 1))
            slopes[2] += excess.sum(0)
            excess = excess.to(table_VD.dtype)
            slopes[0][first : first + rows] = excess @ table_VD
            slopes[1] += excess.T @ query
    return total, slopes
