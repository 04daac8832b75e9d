"""TransE (Bordes et al. 2013, *Translating Embeddings for Modeling Multi-relational Data*): -‖h + r - t‖."""

from torch import Tensor

from trainer.config.graph import GraphModelConfig
from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows
from trainer.knowledge_graph.similarity import Euclidean, Manhattan, Queries


class TransE(GraphModel):
    """A relation is a translation. Lengths of vectors are free, as in Sun et al. 2019: the loss has a margin."""

    def __init__(self, config: GraphModelConfig) -> None:
        super().__init__(config)
        self.similarity = Manhattan() if config.norm == 1 else Euclidean()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: self.config.width, RELATIONS: self.config.width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(heads_SCE + relations[RELATIONS])

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(tails_SCE - relations[RELATIONS])
