"""How queries are compared with candidates: one matrix product where the comparison allows it.

The entities of a chunk's negatives are candidates of all its queries (negatives shared as in PyTorch-BigGraph: Lerer et
al. 2019, and DGL-KE: Zheng et al. 2020), so all scores of a chunk are one product [C, D] × [D, K].

Shape letters: ``S`` chunks, ``C`` queries of a chunk, ``K`` candidates of a chunk, ``D`` width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_LEAST_SQUARE = 1e-12  # of a distance, whose root has no gradient at 0


@dataclass(frozen=True)
class Queries:
    """What candidates are compared with. `normals`: unit vectors; candidates are first projected onto the hyperplanes
    that these are normal to, one for each query (TransH)."""

    vectors_SCD: Tensor
    normals_SCD: Tensor | None = None


class Similarity(Protocol):
    """Higher is better; the two methods agree but for rounding."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        """[S, C]: each query with the candidate at its place."""

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        """[S, C, K]: each query of a chunk with each candidate of it."""


class DotProduct:
    """q · c."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        return (queries.vectors_SCD * candidates_SCD).sum(-1)

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        return torch.bmm(queries.vectors_SCD, candidates_SKD.mT)


class Manhattan:
    """-‖q - c‖₁."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        return -(queries.vectors_SCD - candidates_SCD).abs().sum(-1)

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        return -torch.cdist(queries.vectors_SCD, candidates_SKD, p=1)


class Euclidean:
    """-‖q - c‖₂; with normals w, -‖q - (c - (w · c) w)‖₂."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        difference = queries.vectors_SCD - candidates_SCD
        if queries.normals_SCD is not None:
            normals = queries.normals_SCD
            difference = difference + (normals * candidates_SCD).sum(-1, keepdim=True) * normals
        return -difference.square().sum(-1).clamp(min=_LEAST_SQUARE).sqrt()

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        vectors, normals = queries.vectors_SCD, queries.normals_SCD
        squares_SC = vectors.square().sum(-1)
        if normals is not None:  # of the query, only what lies in the hyperplane meets the candidates there
            vectors = vectors - (normals * vectors).sum(-1, keepdim=True) * normals
        result: Tensor = _Distances.apply(vectors, squares_SC, normals, candidates_SKD)
        return result


class _Distances(torch.autograd.Function):
    """-sqrt(‖q‖² - 2 q · c + ‖c‖² - (w · c)²) by products of matrices, with its gradient by hand."""

    @staticmethod
    def forward(
        ctx: Any, vectors_SCD: Tensor, squares_SC: Tensor, normals_SCD: Tensor | None, candidates_SKD: Tensor
    ) -> Tensor:
        lengths_S1K = candidates_SKD.square().sum(-1).unsqueeze(1)
        squares_SCK = torch.baddbmm(lengths_S1K, vectors_SCD, candidates_SKD.mT, alpha=-2).add_(squares_SC[..., None])
        along_SCK = None
        if normals_SCD is not None:
            along_SCK = torch.bmm(normals_SCD, candidates_SKD.mT)
            squares_SCK.addcmul_(along_SCK, along_SCK, value=-1)
        scores = squares_SCK.clamp_(min=_LEAST_SQUARE).sqrt_().neg_()
        ctx.save_for_backward(vectors_SCD, normals_SCD, candidates_SKD, along_SCK, scores)
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vectors, normals, candidates, along, scores = ctx.saved_tensors
        slope_SCK = gradients[0] / scores  # twice that of the squared distance
        of_queries = -torch.bmm(slope_SCK, candidates)
        of_candidates = candidates * slope_SCK.sum(1).unsqueeze(-1) - torch.bmm(slope_SCK.mT, vectors)
        of_normals = None
        if normals is not None:
            slope_along = slope_SCK * along
            of_normals = -torch.bmm(slope_along, candidates)
            of_candidates -= torch.bmm(slope_along.mT, normals)
        return of_queries, slope_SCK.sum(2) / 2, of_normals, of_candidates
