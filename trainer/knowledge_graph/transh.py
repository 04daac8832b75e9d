"""TransH (Wang et al. 2014, *Knowledge Graph Embedding by Translating on Hyperplanes*): -‖h⊥ + d - t⊥‖."""

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows
from trainer.knowledge_graph.similarity import Euclidean, Queries

NORMALS = "normals"


class TransH(GraphModel):
    """A relation is a hyperplane, with normal w, and a translation d in it; x⊥ = x - (w · x) w.

    Of the paper's soft constraints, w has unit length exactly. d is free to leave the plane, as in pykeen.
    """

    similarity = Euclidean()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: self.config.width, RELATIONS: self.config.width, NORMALS: self.config.width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        normals = F.normalize(relations[NORMALS], dim=-1)
        return Queries(_projected(heads_SCE, normals) + relations[RELATIONS], normals)

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        normals = F.normalize(relations[NORMALS], dim=-1)
        return Queries(_projected(tails_SCE, normals) - relations[RELATIONS], normals)

    def constrain(self, table: str, rows_UE: Tensor) -> None:
        if table == NORMALS:
            torch.nn.functional.normalize(rows_UE, dim=-1, out=rows_UE)


def _projected(entities_SCE: Tensor, normals_SCE: Tensor) -> Tensor:
    return entities_SCE - (normals_SCE * entities_SCE).sum(-1, keepdim=True) * normals_SCE
