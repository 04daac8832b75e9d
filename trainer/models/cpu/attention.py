"""Attention in bf16 as two products and a softmax: on a CPU the fused kernel's backward pass takes three times as long.

Measured in the bf16 step of `tests/benchmarks/train_survey.py`, which takes 1.5 to 1.7 times as long with the fused
kernel. In fp32 the fused kernel is the faster one, but for a mask that is trained: its kernel takes no such one, and
torch's other way takes up to three times as long as the products (`tests/benchmarks/train_time.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """`F.scaled_dot_product_attention` on a CPU, [B, H, Q, E]; a floating `mask` is added, and may be trained."""
    if mask is not None and mask.is_floating_point():
        if torch.is_grad_enabled() and mask.requires_grad:
            with torch.autocast("cpu", enabled=False):
                scores = query @ (key * key.shape[-1] ** -0.5).transpose(-1, -2) + mask
                summed: Tensor = scores.softmax(-1) @ value
                return summed
        return F.scaled_dot_product_attention(query, key, value, mask)
    if query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        scores = query @ (key * key.shape[-1] ** -0.5).transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
        weighted: Tensor = scores.softmax(-1) @ value
        return weighted
