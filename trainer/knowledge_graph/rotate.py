"""RotatE (Sun et al. 2019, *RotatE: Knowledge Graph Embedding by Relational Rotation in Complex Space*): -‖h r - t‖."""

from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows
from trainer.knowledge_graph.complex import product
from trainer.knowledge_graph.similarity import Euclidean, Queries


class RotatE(GraphModel):
    """A relation turns each complex number of the head by an angle. The Euclidean length of the difference, as in
    pykeen and the paper's equation; the authors' code sums moduli."""

    similarity = Euclidean()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: 2 * self.config.width, RELATIONS: self.config.width}  # angles

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        angles = relations[RELATIONS]
        return Queries(product(heads_SCE, angles.cos(), angles.sin()))

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        angles = relations[RELATIONS]
        return Queries(product(tails_SCE, angles.cos(), -angles.sin()))  # turned back

    def initial_scale(self, table: str, margin: float) -> float:
        return 1.8 if table == RELATIONS else super().initial_scale(table, margin)  # about as even as a circle's angles
