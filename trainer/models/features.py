"""Vectors from outside the log beside an item's or a user's own (survey 2, Eq. 1: u = g(own, outside), v likewise).

Whatever the aggregate, it adds to the own vector what a matrix of zeros makes of the rest, so that a new model, or a
pre-trained one that is given features, begins as the same model without them.

========== ==========================================================================================================
concat     a projection of the own vector and the features side by side (as the survey's knowledge, 4.3)
sum        a projection of the features' sum
gate       the same, each coordinate weighed by a sigmoid of both (as in Cho et al. 2014)
attention  the features weighed by a softmax of their products with a query of the own vector, beside nothing at all
========== ==========================================================================================================

Shape letters: ``N`` any number of rows, ``V`` rows of the catalogue, or of the user table, ``F`` width of an encoder's
vectors, ``W`` width that they are projected to, ``K`` encoders, ``D`` width of an own vector.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etl.tables import FIRST_INDEX
from trainer.config import ItemFeaturesConfig, JoinedFeaturesConfig
from trainer.models.documents import DocumentEncoder, DocumentTable


class FeatureTable(NamedTuple):
    """One encoder's vectors [V, F] of catalogue rows, or of users, and which rows have one, bool [V]."""

    vectors_VF: Tensor
    has_V: Tensor


class Features(nn.Module):
    """Vectors of items or users [N, D] and their rows -> such vectors [N, D]. Drawn from the global random
    state."""

    def __init__(
        self,
        config: JoinedFeaturesConfig,
        width: int,
        tables: tuple[FeatureTable, ...],
        documents: DocumentTable | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        lacking = [~table.has_V for table in tables]
        self.document: DocumentEncoder | None = None
        if documents is not None:
            lacking.append(~(documents.words_VL != 0).any(1))
            assert isinstance(config, ItemFeaturesConfig)
            assert config.document is not None
            self.document = DocumentEncoder(documents, config.width, config.document.window)
        for place, table in enumerate(tables):
            self.register_buffer(f"vectors_{place}", table.vectors_VF.float(), persistent=False)
        for place, lacks_V in enumerate(lacking):
            lacks_V[:FIRST_INDEX] = False  # reserved rows lack nothing
            self.register_buffer(f"lacks_{place}", lacks_V, persistent=False)
        W, K = config.width, len(lacking)
        self.projections = nn.ModuleList(nn.Linear(table.vectors_VF.shape[1], W, bias=False) for table in tables)
        self.missing = nn.Parameter(torch.empty(K, W)) if config.missing == "learned" else None
        match config.aggregate:
            case "concat":
                self.out = nn.Linear(width + K * W, width, bias=False)
            case "sum":
                self.out = nn.Linear(W, width, bias=False)
            case "gate":
                self.gate = nn.Linear(width + K * W, width)
                self.out = nn.Linear(K * W, width, bias=False)
            case "attention":
                self.query = nn.Linear(width, W)
                self.out = nn.Linear(W, width, bias=False)
        self._draw()

    def _draw(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                std = layer.in_features**-0.5
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        if self.missing is not None:
            nn.init.trunc_normal_(self.missing, std=self.config.width**-0.5)

    def forward(self, own_ND: Tensor, rows: Tensor | None) -> Tensor:
        """`rows` of any shape [N]; None: all, in order."""
        features_NKW = self.projected(rows)
        match self.config.aggregate:
            case "concat":
                added = self.out(torch.cat([own_ND, features_NKW.flatten(-2)], dim=-1))
            case "sum":
                added = self.out(features_NKW.sum(-2))
            case "gate":
                flat = features_NKW.flatten(-2)
                added = torch.sigmoid(self.gate(torch.cat([own_ND, flat], dim=-1))) * self.out(flat)
            case "attention":
                product_NK = (features_NKW @ self.query(own_ND)[..., None]).squeeze(-1) * self.config.width**-0.5
                weight_NK = torch.softmax(F.pad(product_NK, (1, 0)), dim=-1)[..., 1:]
                added = self.out((weight_NK[..., None] * features_NKW).sum(-2))
        vectors_ND: Tensor = own_ND + added
        return vectors_ND

    def has_any(self) -> Tensor:
        """[V] bool: which rows have a vector by any encoder; reserved ones count as if they had."""
        kinds = range(len(self.projections) + (self.document is not None))
        return ~torch.stack([self._buffer("lacks", place) for place in kinds]).all(0)

    def parts(self, rows: Tensor | None) -> Tensor:
        """What each encoder adds to an item's vector, [N, K, D], where their sum is what is added."""
        assert self.config.aggregate == "sum"
        added: Tensor = self.out(self.projected(rows))
        return added

    def projected(self, rows: Tensor | None) -> Tensor:
        """[N, K, W]. Of more rows than there are, those of all are looked up."""
        if rows is not None and rows.numel() > len(self._buffer("lacks", 0)):
            whole_VKW = self.projected(None)
            return F.embedding(rows, whole_VKW.flatten(1)).unflatten(-1, whole_VKW.shape[1:])  # type: ignore[no-untyped-call, no-any-return]
        found = []
        for place, projection in enumerate(self.projections):
            vectors = self._buffer("vectors", place)
            vectors = vectors if rows is None else vectors[rows]
            found.append(projection(F.dropout(vectors, self.config.dropout, self.training)))
        if self.document is not None:
            found.append(self.document(rows))
        if self.missing is not None:
            for place, missing_W in enumerate(self.missing):
                lacks = self._buffer("lacks", place)
                found[place] = found[place] + (lacks if rows is None else lacks[rows])[..., None] * missing_W
        return torch.stack(found, dim=-2)

    def _buffer(self, name: str, place: int) -> Tensor:
        return self.get_buffer(f"{name}_{place}")


def kept_ids(rows: Tensor, share: float) -> Tensor:
    """Which rows a step of training sees with more than their features, bool: all but a `share` of items
    or users, which are as if they had no past (Volkovs et al. 2017, DropoutNet). Reserved rows are kept.

    By a hash of the row and of the seed of the global random state, which each step has one of: an item is known or
    not in the whole step, read or predicted. The hash is SplitMix64's finaliser (Steele et al. 2014).
    """
    if not share:
        return torch.ones_like(rows, dtype=torch.bool)
    z = rows.long() * _signed(0x9E3779B97F4A7C15) + _signed(torch.initial_seed())
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    uniform = ((z >> 11) & ((1 << 53) - 1)).double() / 2.0**53
    return (uniform >= share) | (rows < FIRST_INDEX)


def _signed(number: int) -> int:
    """The 64-bit integer of the same bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
