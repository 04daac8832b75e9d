"""How queries are compared with candidates: one matrix product where the comparison allows it.

The entities of a chunk's negatives are candidates of all its queries (negatives shared as in PyTorch-BigGraph: Lerer et
al. 2019, and DGL-KE: Zheng et al. 2020), so all scores of a chunk are one product [C, D] × [D, K], and so are their
gradients, which are written by hand: autograd would make and keep a tensor [C, K] for each operation.

Shape letters: ``S`` chunks, ``C`` queries of a chunk, ``K`` candidates of a chunk, ``D`` width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_LEAST_SQUARE = 1e-12  # of a distance, whose root has no gradient at 0


@dataclass(frozen=True)
class Queries:
    """What candidates are compared with. `normals`: unit vectors; candidates are first projected onto the hyperplanes
    that these are normal to, one for each query (TransH)."""

    vectors_SCD: Tensor
    normals_SCD: Tensor | None = None

    def detach(self) -> "Queries":
        return Queries(self.vectors_SCD.detach(), None if self.normals_SCD is None else self.normals_SCD.detach())

    def __getitem__(self, chunks: slice) -> "Queries":
        return Queries(self.vectors_SCD[chunks], None if self.normals_SCD is None else self.normals_SCD[chunks])


class Similarity(Protocol):
    """Higher is better; `of_pairs` and `of_all` agree but for rounding."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        """[S, C]: each query with the candidate at its place; by autograd."""

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        """[S, C, K]: each query of a chunk with each candidate of it; without gradients."""

    def gradients(
        self, queries: Queries, candidates_SKD: Tensor, scores_SCK: Tensor, slopes_SCK: Tensor
    ) -> tuple[Queries, Tensor]:
        """Gradients of queries and candidates, where those of the scores `of_all` are `slopes_SCK`; of normals, along
        the sphere."""


class DotProduct:
    """q · c."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        return (queries.vectors_SCD * candidates_SCD).sum(-1)

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        return torch.bmm(queries.vectors_SCD, candidates_SKD.mT)

    def gradients(
        self, queries: Queries, candidates_SKD: Tensor, scores_SCK: Tensor, slopes_SCK: Tensor
    ) -> tuple[Queries, Tensor]:
        return Queries(torch.bmm(slopes_SCK, candidates_SKD)), torch.bmm(slopes_SCK.mT, queries.vectors_SCD)


class Manhattan:
    """-‖q - c‖₁."""

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        lengths_SC: Tensor = torch.linalg.vector_norm(queries.vectors_SCD - candidates_SCD, ord=1, dim=-1)
        return -lengths_SC

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        return torch.cdist(queries.vectors_SCD, candidates_SKD, p=1).neg_()

    def gradients(
        self, queries: Queries, candidates_SKD: Tensor, scores_SCK: Tensor, slopes_SCK: Tensor
    ) -> tuple[Queries, Tensor]:
        vectors_SCD, falls = queries.vectors_SCD, slopes_SCK.neg()
        backward = torch.ops.aten._cdist_backward
        of_queries = backward(falls, vectors_SCD, candidates_SKD, 1.0, scores_SCK)
        return Queries(of_queries), backward(falls.mT.contiguous(), candidates_SKD, vectors_SCD, 1.0, scores_SCK.mT)


class Euclidean:
    """-‖q - c‖₂; with normals w, -‖q - (c - (w · c) w)‖₂.

    The square is ‖q‖² - 2 q · c + ‖c‖², and with normals + (w · c) (2 w · q - w · c).
    """

    def of_pairs(self, queries: Queries, candidates_SCD: Tensor) -> Tensor:
        difference = queries.vectors_SCD - candidates_SCD
        if queries.normals_SCD is not None:
            normals = queries.normals_SCD
            difference = difference + (normals * candidates_SCD).sum(-1, keepdim=True) * normals
        lengths_SC: Tensor = torch.linalg.vector_norm(difference, dim=-1)
        return -lengths_SC

    def of_all(self, queries: Queries, candidates_SKD: Tensor) -> Tensor:
        vectors, normals = queries.vectors_SCD, queries.normals_SCD
        squares_SC1, squares_S1K = _squares(vectors).unsqueeze(-1), _squares(candidates_SKD).unsqueeze(-2)
        squares_SCK = torch.baddbmm(squares_S1K, vectors, candidates_SKD.mT, alpha=-2).add_(squares_SC1)
        if normals is not None:
            along_SCK, own_SC1 = _along(normals, vectors, candidates_SKD)
            squares_SCK.addcmul_(along_SCK, along_SCK.sub(own_SC1, alpha=2), value=-1)
        return squares_SCK.clamp_(min=_LEAST_SQUARE).sqrt_().neg_()

    def gradients(
        self, queries: Queries, candidates_SKD: Tensor, scores_SCK: Tensor, slopes_SCK: Tensor
    ) -> tuple[Queries, Tensor]:
        vectors, normals = queries.vectors_SCD, queries.normals_SCD
        slopes = slopes_SCK / scores_SCK  # twice those of the squared distances
        of_queries = torch.baddbmm(vectors * slopes.sum(-1, keepdim=True), slopes, candidates_SKD, alpha=-1)
        of_candidates = torch.baddbmm(candidates_SKD * slopes.sum(1).unsqueeze(-1), slopes.mT, vectors, alpha=-1)
        if normals is None:
            return Queries(of_queries), of_candidates
        along_SCK, own_SC1 = _along(normals, vectors, candidates_SKD)
        both_SC1 = (slopes * along_SCK).sum(-1, keepdim=True)
        apart = slopes * (own_SC1 - along_SCK)
        of_normals = torch.baddbmm(vectors * both_SC1, apart, candidates_SKD)
        of_queries = of_queries.addcmul_(normals, both_SC1)
        return Queries(of_queries, of_normals), of_candidates.baddbmm_(apart.mT, normals)


def _squares(vectors: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vecdot(vectors, vectors)
    return squares


def _along(normals_SCD: Tensor, vectors_SCD: Tensor, candidates_SKD: Tensor) -> tuple[Tensor, Tensor]:
    """w · c [S, C, K] and w · q [S, C, 1]."""
    own_SC1 = torch.linalg.vecdot(normals_SCD, vectors_SCD).unsqueeze(-1)
    return torch.bmm(normals_SCD, candidates_SKD.mT), own_SC1
