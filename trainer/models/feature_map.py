"""Vectors for items that nobody has had, as ridge regression from features predicts them of the items that somebody
has had (attribute-to-factor mapping, Gantner et al. 2010): `features.aggregate: ridge`.

The network is trained as one without features, so what it says of trained items is the same to the bit. The map is
fitted in closed form at the end of every epoch, before validation. Beside projections that are learned with the
network it shrinks: of thousands of items, each with hundreds of features, a learned projection remembers the trained
ones, and tells less of others than ridge regression on plain factors does.

Shape letters: ``N`` any number of rows, ``V`` rows of the catalogue, ``F`` width of all features side by side, ``D``
width of an item's vector.
"""

import numpy as np
import torch
from torch import Tensor, nn

from etl.tables import FIRST_INDEX
from trainer.models.features import FeatureTable
from trainer.ridge import Ridge

MAX_FITTED = 100_000  # items: more are sampled at even distances


class FeatureMap(nn.Module):
    """Catalogue rows [N] -> vectors [N, D] and biases [N]. The map is kept in buffers: the optimizer has no part in
    it. Of features that an item lacks it takes the mean; an item without any gets the mean of all items."""

    centre_F: Tensor
    weight_FK: Tensor
    mean_K: Tensor

    def __init__(self, width: int, tables: tuple[FeatureTable, ...]) -> None:
        super().__init__()
        self.widths = [table.vectors_VF.shape[1] for table in tables]
        for place, table in enumerate(tables):
            lacks_V = ~table.has_V
            self.register_buffer(f"vectors_{place}", table.vectors_VF.float(), persistent=False)
            self.register_buffer(f"lacks_{place}", lacks_V, persistent=False)
        self.register_buffer("centre_F", torch.zeros(sum(self.widths)))
        self.register_buffer("weight_FK", torch.zeros(sum(self.widths), width + 1))  # the last: biases
        self.register_buffer("mean_K", torch.zeros(width + 1))

    def vectors(self, rows: Tensor | None) -> Tensor:
        """[N, D]; of all rows where None."""
        return self._predicted(rows, slice(None, -1))

    def biases(self, rows: Tensor | None) -> Tensor:
        """[N]; of all rows where None."""
        return self._predicted(rows, slice(-1, None)).squeeze(-1)

    def fit(self, rows_N: Tensor, vectors_ND: Tensor, biases_N: Tensor) -> None:
        """To what trained rows have."""
        known_NF = self._centred(rows_N, torch.zeros_like(self.centre_F)).double()
        targets_NK = torch.cat([vectors_ND, biases_N[:, None]], dim=1).double()
        found = Ridge(known_NF.cpu().numpy()).fit(targets_NK.cpu().numpy())
        for name, value in (("centre_F", found.centre_F), ("weight_FK", found.weight_FK), ("mean_K", found.mean_K)):
            buffer = self.get_buffer(name)
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def _predicted(self, rows: Tensor | None, outputs: slice) -> Tensor:
        found: Tensor = self._centred(rows, self.centre_F) @ self.weight_FK[:, outputs] + self.mean_K[outputs]
        return found

    def _centred(self, rows: Tensor | None, centre_F: Tensor) -> Tensor:
        """[N, F]; zero where a row lacks an encoder's vector."""
        parts = []
        for place, centre in enumerate(torch.split(centre_F, self.widths)):
            vectors, lacks = self.get_buffer(f"vectors_{place}"), self.get_buffer(f"lacks_{place}")
            if rows is not None:
                vectors, lacks = vectors[rows], lacks[rows]
            parts.append((vectors - centre) * ~lacks[..., None])
        return torch.cat(parts, dim=-1)


def fitted_rows(untrained_V: Tensor) -> Tensor:
    """[N] trained catalogue rows, MAX_FITTED at most."""
    trained = (~untrained_V[FIRST_INDEX:]).nonzero()[:, 0] + FIRST_INDEX
    if len(trained) <= MAX_FITTED:
        return trained
    places = torch.arange(MAX_FITTED, device=trained.device) * len(trained) // MAX_FITTED
    return trained[places]
