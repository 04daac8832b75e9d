"""ComplEx (Trouillon et al. 2016, *Complex Embeddings for Simple Link Prediction*): Re Σ h r t̄."""

import torch
from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows, halves
from trainer.knowledge_graph.similarity import DotProduct, Queries


class ComplEx(GraphModel):
    """DistMult in complex numbers. The first half of a row is real, the second imaginary."""

    similarity = DotProduct()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: 2 * self.config.width, RELATIONS: 2 * self.config.width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        real, imaginary = halves(relations[RELATIONS])
        return Queries(product(heads_SCE, real, imaginary))

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        real, imaginary = halves(relations[RELATIONS])
        return Queries(product(tails_SCE, real, -imaginary))


def product(rows_SCE: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex products of rows with numbers whose parts are given."""
    of_real, of_imaginary = halves(rows_SCE)
    return torch.cat([of_real * real - of_imaginary * imaginary, of_real * imaginary + of_imaginary * real], dim=-1)
