"""DistMult (Yang et al. 2015, *Embedding Entities and Relations for Learning and Inference in Knowledge Bases*)."""

from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows
from trainer.knowledge_graph.similarity import DotProduct, Queries


class DistMult(GraphModel):
    """Σ h r t: symmetric in head and tail."""

    similarity = DotProduct()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: self.config.width, RELATIONS: self.config.width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(heads_SCE * relations[RELATIONS])

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        return self.tail_queries(tails_SCE, relations)
