"""Cross-entropy over a whole catalogue, a block of positions at a time.

The scores [N, V] of all positions would be the largest thing in a training step. Here those of a block are turned into
the block's loss and its gradients while they are in the processor's caches, and dropped: memory doesn't grow with N,
and nothing is read twice (as in Liger Kernel's fused linear cross-entropy: Hsu et al. 2024).

Shape letters: ``N`` positions, ``D`` width, ``V`` classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.parallel.cores import on_threads

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


def dtypes_of(table_VD: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of products, autocast's where that is on, and of sums and exponentials."""
    device = table_VD.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_on else table_VD.dtype
    return dtype, torch.promote_types(dtype, torch.float32)


def block_rows(device: str, num_classes: int) -> int:
    """Positions of a block."""
    return max(BLOCK_ROWS, (BLOCK_SCORES if device == "cpu" else DEVICE_BLOCK_SCORES) // num_classes)


def summed_in_blocks(
    block: Callable[[int], tuple[Tensor, ...]],
    num_positions: int,
    rows: int,
    totals: Sequence[Tensor],
    *,
    device: str,
    per_row: tuple[int, ...],
) -> Tensor:
    """The sum of the losses of blocks of `rows` positions; `block` gives one's, and its slopes, which are added up in
    `totals` in the order of blocks: those `per_row` are a position's each."""
    count = max(1, -(-num_positions // rows))
    done = on_threads(block, count) if device == "cpu" else map(block, range(count))
    losses = []
    for number, (loss, *slopes) in enumerate(done):
        losses.append(loss)
        for place, (total, slope) in enumerate(zip(totals, slopes, strict=False)):
            if place in per_row:
                total[number * rows : (number + 1) * rows] = slope
            else:
                total += slope
    return sum(losses[1:], start=losses[0])


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradients are taken along with the loss, and only scaled afterwards. On a CPU threads take a block each; what
    blocks give is summed in their order, so that the same bits come out however many threads there are."""

    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, table_VD: Tensor, bias_V: Tensor, targets_N: Tensor, smoothing: float
    ) -> Tensor:
        device, trained = query_ND.device.type, any(ctx.needs_input_grad)
        dtype, wide = dtypes_of(table_VD)
        totals = [torch.zeros_like(x, dtype=wide) for x in (query_ND, table_VD, bias_V)] if trained else []
        with torch.autocast(device, enabled=False):
            table, bias = table_VD.to(dtype), bias_V.to(dtype)
            rows = block_rows(device, len(table))
            blocks = list(zip(torch.split(query_ND, rows), torch.split(targets_N, rows), strict=True))

            def block(number: int) -> tuple[Tensor, ...]:
                query, targets = blocks[number]
                return loss_and_slopes(query.to(dtype), targets[:, None], table, bias, smoothing, trained=trained)

            loss = summed_in_blocks(block, len(query_ND), rows, totals, device=device, per_row=(0,))
        ctx.save_for_backward(*totals)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(slope * gradients[0] for slope in ctx.saved_tensors), None, None


def loss_and_slopes(
    query_ND: Tensor,
    targets_N1: Tensor,
    table_VD: Tensor,
    bias_V: Tensor,
    smoothing: float,
    *,
    trained: bool,
    counts_N1: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A block's summed loss; where they are requested, its gradients by query, table and bias too. `counts` bool: the
    positions that count; None: all."""
    wide, num_classes = torch.promote_types(table_VD.dtype, torch.float32), len(table_VD)
    scores = torch.addmm(bias_V, query_ND, table_VD.T).to(wide)
    scores -= scores.amax(1, keepdim=True)
    loss = -(1 - smoothing) * _counted(scores.gather(1, targets_N1), counts_N1).sum()
    if smoothing:
        loss -= smoothing * _counted(scores.mean(1, keepdim=True), counts_N1).sum()
    sums = scores.exp_().sum(1, keepdim=True)
    loss += _counted(sums.log(), counts_N1).sum()
    if not trained:
        return (loss,)
    excess = scores.mul_(1 / sums)  # what each class is given beyond what it is due
    if smoothing:
        excess -= smoothing / num_classes
    if counts_N1 is None:
        excess.scatter_add_(1, targets_N1, excess.new_full(targets_N1.shape, smoothing - 1))
    else:  # on a GPU, additions to single places come last, one by one
        is_target = (targets_N1 == torch.arange(num_classes, device=excess.device)).to(wide)
        excess = (excess + is_target * (smoothing - 1)) * counts_N1
    of_bias_V = excess.sum(0)
    excess = excess.to(table_VD.dtype)
    return loss, excess @ table_VD, excess.T @ query_ND, of_bias_V


def _counted(loss_N1: Tensor, counts_N1: Tensor | None) -> Tensor:
    return loss_N1 if counts_N1 is None else loss_N1 * counts_N1
