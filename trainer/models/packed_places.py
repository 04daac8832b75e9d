"""Positions of packed rows whose hidden states are wanted: always the same number, so that shapes are static.

Shape letters: ``R`` packed rows, ``T`` their positions, ``M`` all of these, R times T, ``N`` wanted ones.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainer.data.packing import Packing


@dataclass(frozen=True)
class PackedPlaces:
    """N positions of the rows of a packing: `places` [N] int64 in M, None: all M; `is_wanted` [N] bool: those beyond
    what is wanted fill up the number."""

    packing: Packing
    places_N: Tensor | None
    is_wanted_N: Tensor

    @classmethod
    def every(cls, packing: Packing, wanted_BT: Tensor) -> Self:
        """All positions, of which nearly all are wanted."""
        return cls(packing, None, packing.packed(wanted_BT, False).flatten())

    @classmethod
    def of_share(cls, packing: Packing, wanted_BT: Tensor, share: float) -> Self:
        """Room for a `share` of the positions, chosen one by one by chance, and one a sequence besides: six standard
        deviations above what there will be. Beyond it, the last ones are dropped."""
        wanted_M = packing.packed(wanted_BT, False).flatten()
        M = len(wanted_M)
        spread = 6 * (M * share * (1 - share)) ** 0.5
        N = min(M, int(M * share + spread) + len(wanted_BT) + 1)
        # Place n of the wanted ones is the first up to which there are n + 1: no nonzero, whose shape would be read.
        count_M = wanted_M.cumsum(0)
        number_N = torch.arange(1, N + 1, device=wanted_M.device)
        places_N = torch.searchsorted(count_M, number_N).clamp(max=M - 1)
        return cls(packing, places_N, number_N <= count_M[-1])

    def of_events(self, values_BT: Tensor) -> Tensor:
        """[N] of what the padded batch has for each event."""
        values_M = self.packing.packed(values_BT).flatten()
        return values_M if self.places_N is None else values_M[self.places_N]

    def taken(self, values: Tensor) -> Tensor:
        """[N, D] of [R, T, D]."""
        flat = values.flatten(0, 1)
        return flat if self.places_N is None else flat.index_select(0, self.places_N)
