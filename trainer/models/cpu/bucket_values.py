"""A number of each bucket for each pair of positions, and back: the sums of the gradients of a bucket's pairs.

Neighbouring pairs are mostly of one bucket, and adding to one place again and again waits for the addition before.
Eight partial sums, taken in turn, take a quarter of the time: 0.25 ms for 200,000 pairs and 2 heads, where `index_add_`
takes 0.92 ms, autograd's gradient of an index more, a product with the buckets as flags 90 ms (Zen 4, one thread). Sums
are taken in the order of pairs, so that the same bits come out each time. `tests/benchmarks/train_time.py` measures the
step.
"""

from typing import Any

import torch
from torch import Tensor

LANES = 8


def bucket_values(table_HK: Tensor, buckets: Tensor) -> Tensor:
    """[H, *buckets.shape] of a table [H, K] and buckets int32, 0 to K - 1."""
    values: Tensor = _BucketValues.apply(table_HK, buckets)  # type: ignore[no-untyped-call]
    return values


class _BucketValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_HK: Tensor, buckets: Tensor) -> Tensor:
        ctx.save_for_backward(buckets)
        ctx.num_buckets = table_HK.shape[1]
        return table_HK.index_select(1, buckets.flatten()).view(len(table_HK), *buckets.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (buckets,) = ctx.saved_tensors
        of_HN, num_buckets = gradients[0].flatten(1), ctx.num_buckets
        if of_HN.device.type != "cpu":  # where additions to one place come in any order
            sums = [of_HN.masked_fill(buckets.flatten() != place, 0).sum(1) for place in range(num_buckets)]
            return torch.stack(sums, 1), None
        size = buckets.numel()
        lanes_N = (torch.arange(LANES) * num_buckets).repeat(-(-size // LANES))[:size]
        spread = of_HN.new_zeros(len(of_HN), LANES * num_buckets)
        spread.index_add_(1, lanes_N + buckets.flatten(), of_HN)  # by int64: by int32 it takes 60 times as long
        return spread.view(len(of_HN), LANES, num_buckets).sum(1), None
