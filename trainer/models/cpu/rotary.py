"""Rotary positions (Su et al. 2021, equation 15), written into halves of one tensor: 4 passes over half a tensor, where
autograd's would be about 20.

Part of the step that `tests/benchmarks/train_survey.py` measures. Other devices take it as well: it is the same
arithmetic.
"""

from typing import Any

import torch
from torch import Tensor


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair of coordinates turned by its position's angle, so that a product of two knows their distance only.

    x [B, H, T, E], rotation [T, E] or [B, 1, T, E]: cosines, then sines."""
    if torch.compiler.is_compiling():  # which fuses the passes itself
        cosines, sines = rotation.to(x.dtype).chunk(2, dim=-1)
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cosines - right * sines, right * cosines + left * sines], dim=-1)
    turned: Tensor = _Rotated.apply(x, rotation)  # type: ignore[no-untyped-call]
    return turned


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        cosines, sines = rotation.to(x.dtype).chunk(2, dim=-1)
        return _Rotated._turned(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        cosines, sines = rotation.to(gradients[0].dtype).chunk(2, dim=-1)
        return _Rotated._turned(gradients[0], cosines, -sines), None

    @staticmethod
    def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        turned = torch.empty_like(x)
        new_left, new_right = turned.chunk(2, dim=-1)
        torch.mul(left, cosines, out=new_left).addcmul_(right, sines, value=-1)
        torch.mul(right, cosines, out=new_right).addcmul_(left, sines)
        return turned
