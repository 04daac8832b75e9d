"""Cross-entropy over a whole catalogue at positions of which some count, for steps of static shapes.

As `trainer.tasks.softmax`: a block of positions at a time, gradients along with the loss. As one operation of torch's:
`torch.compile` takes it as it is, and traces no loop over blocks.

Shape letters: ``N`` positions, ``D`` width, ``V`` classes.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.tasks.softmax import DEVICE_BLOCK_SCORES, dtypes_of, loss_and_slopes


def cross_entropy(
    query_ND: Tensor, table_VD: Tensor, bias_V: Tensor, targets_N: Tensor, counts_N: Tensor, label_smoothing: float
) -> Tensor:
    """Sum over the positions that count (bool) of F.cross_entropy(query @ table.T + bias, targets): products in
    autocast's type, the softmax in fp32 at least."""
    dtype, _ = dtypes_of(table_VD)
    found: tuple[Tensor, ...] = _cross_entropy(query_ND, table_VD, bias_V, targets_N, counts_N, label_smoothing, dtype)
    return found[0]


def in_blocks(
    query_ND: Tensor,
    table_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    counts_N: Tensor,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients by query, table and bias)."""
    wide = torch.promote_types(dtype, torch.float32)
    table, bias = table_VD.to(dtype), bias_V.to(dtype)
    rows = max(1, DEVICE_BLOCK_SCORES // len(table))
    of_query, of_table, of_bias = [], torch.zeros_like(table_VD, dtype=wide), torch.zeros_like(bias_V, dtype=wide)
    loss = torch.zeros((), dtype=wide, device=query_ND.device)
    parts = [torch.split(x, rows) for x in (query_ND, targets_N, counts_N)]
    for query, targets, counts in zip(*parts, strict=True):
        more, slope, table_slope, bias_slope = loss_and_slopes(
            query.to(dtype), targets[:, None], table, bias, label_smoothing, trained=True, counts_N1=counts[:, None]
        )
        loss = loss + more
        of_query.append(slope)
        of_table += table_slope
        of_bias += bias_slope
    slopes = (torch.cat(of_query).to(query_ND.dtype), of_table.to(table_VD.dtype), of_bias.to(bias_V.dtype))
    return loss, *slopes


_cross_entropy = torch.library.custom_op("graftrec::cross_entropy", in_blocks, mutates_args=())
_cross_entropy.register_fake(in_blocks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *((slope * gradients[0]).to(slope.dtype) for slope in ctx.saved_tensors), None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_keep)
