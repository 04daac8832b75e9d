"""RotatE (Sun et al. 2019, *RotatE: Knowledge Graph Embedding by Relational Rotation in Complex Space*): -‖h r - t‖."""

import torch
from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows, as_complex, as_real
from trainer.knowledge_graph.similarity import Euclidean, Queries


class RotatE(GraphModel):
    """A relation turns each complex number of the head by an angle. The Euclidean length of the difference, as in
    pykeen and the paper's equation; the authors' code sums moduli."""

    similarity = Euclidean()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: 2 * self.config.width, RELATIONS: self.config.width}  # angles

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(as_real(as_complex(heads_SCE) * _turns(relations[RELATIONS])))

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(as_real(as_complex(tails_SCE) * _turns(relations[RELATIONS]).conj()))  # turned back

    def initial_scale(self, table: str, margin: float) -> float:
        return 1.8 if table == RELATIONS else super().initial_scale(table, margin)  # about as even as a circle's angles


def _turns(angles: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([angles.cos(), angles.sin()], dim=-1))
