"""TransR: -‖hM + r - tM‖ (Lin et al. 2015, *Learning Entity and Relation Embeddings for Knowledge Graph
Completion*)."""

import torch
from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows, clamp_norm
from trainer.knowledge_graph.similarity import Euclidean, Queries

PROJECTIONS = "projections"


class TransR(GraphModel):
    """A relation is a space of its own, with a projection M of entities into it, and a translation there.

    Entities, relations and projected entities have length `max_norm` at most, 1 in the paper. Projections begin as the
    identity, and entities and relations as TransE's: from a random start it is known to fail (the paper, 4.1). An
    entity's vector means something only after a projection.
    """

    similarity = Euclidean()
    one_relation = True

    @property
    def widths(self) -> dict[str, int]:
        width = self.config.width
        return {ENTITIES: width, RELATIONS: width, PROJECTIONS: width * width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(self.candidates(heads_SCE, relations) + relations[RELATIONS])

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(self.candidates(tails_SCE, relations) - relations[RELATIONS])

    def candidates(self, entities: Tensor, relations: Rows) -> Tensor:
        projections = relations[PROJECTIONS].view(-1, self.config.width, self.config.width)
        return self._clamped(torch.matmul(entities, projections))

    def constrain(self, table: str, rows_UE: Tensor) -> None:
        if table != PROJECTIONS:
            rows_UE.copy_(self._clamped(rows_UE))

    def initialise(self, table: str, rows_RE: Tensor) -> None:
        if table == PROJECTIONS:
            rows_RE.copy_(torch.eye(self.config.width, dtype=rows_RE.dtype).flatten())

    def _clamped(self, rows: Tensor) -> Tensor:
        return rows if self.config.max_norm is None else clamp_norm(rows, self.config.max_norm)
