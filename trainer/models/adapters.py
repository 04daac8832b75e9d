"""Model patches: small layers beside those of a frozen network, which alone are trained (survey 3.3).

adapter  Two products with a bottleneck between, down and up again (PeterRec: Yuan et al. 2020; Figure 2 b to e):
         *serial*, behind a layer of the network, or *parallel* to it; of both layers of a block, or the second only.
lora     Low-rank changes of the network's own matrices (Hu et al. 2022).

As it is made, a patched network gives bit for bit what it gave before: the last product of each patch is zero. In
PeterRec's released code it isn't, and the parallel patch adds its input once more by a skip of its own; that is
`variant: paper`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import PatchConfig

PAPER_STD = 0.02
Patches = nn.ModuleDict | None  # of one block: the place, or the layer's name -> patch


class Adapter(nn.Module):
    """x [..., D] into a layer and [..., D] out of it -> [..., D]."""

    def __init__(self, config: PatchConfig, width: int) -> None:
        super().__init__()
        self.is_parallel, self.is_papers = config.place == "parallel", config.variant == "paper"
        self.down = nn.Linear(width, config.channels(width))
        self.up = nn.Linear(config.channels(width), width)
        std = PAPER_STD if self.is_papers else width**-0.5
        nn.init.trunc_normal_(self.down.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if self.is_papers:
            nn.init.trunc_normal_(self.up.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        read = x if self.is_parallel else out
        changed: Tensor = out + self.up(F.gelu(self.down(read), approximate="tanh"))
        return changed + x if self.is_parallel and self.is_papers else changed


class LowRank(nn.Module):
    """A matrix [O, I] -> the same plus the product of [O, R] and [R, I] (Hu et al. 2022, equation 3; alpha = R)."""

    def __init__(self, rank: int, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, weight: Tensor) -> Tensor:
        changed: Tensor = weight + self.up.weight @ self.down.weight
        return changed


def new_patches(config: PatchConfig, width: int, blocks: nn.ModuleList, linears: Sequence[str]) -> nn.ModuleList:
    """Patches of every block. `linears`: names of a block's layers that LoRA changes."""

    def beside(block: nn.Module) -> dict[str, nn.Module]:
        if config.kind == "lora":
            return {name: LowRank(config.rank, block.get_submodule(name)) for name in linears}  # type: ignore[arg-type]
        return {place: Adapter(config, width) for place in ("first", "second")[-config.per_block :]}

    return nn.ModuleList(nn.ModuleDict(beside(block)) for block in blocks)


def patched(patches: Patches, place: str, x: Tensor, out: Tensor) -> Tensor:
    """What a layer gave, `out`, for `x`, as its adapter changes it, where there is one."""
    adapter = patches[place] if patches is not None and place in patches else None
    if not isinstance(adapter, Adapter):
        return out
    changed: Tensor = adapter(x, out)
    return changed


def weight_of(layer: nn.Linear, patches: Patches, name: str) -> Tensor:
    """A layer's matrix, as LoRA changes it, where it does."""
    low_rank = patches[name] if patches is not None and name in patches else None
    if not isinstance(low_rank, LowRank):
        return layer.weight
    changed: Tensor = low_rank(layer.weight)
    return changed
