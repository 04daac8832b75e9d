"""ComplEx (Trouillon et al. 2016, *Complex Embeddings for Simple Link Prediction*): Re Σ h r t̄."""

from torch import Tensor

from trainer.knowledge_graph.base import ENTITIES, RELATIONS, GraphModel, Rows, as_complex, as_real
from trainer.knowledge_graph.similarity import DotProduct, Queries


class ComplEx(GraphModel):
    """DistMult in complex numbers. Real and imaginary parts of a row alternate."""

    similarity = DotProduct()

    @property
    def widths(self) -> dict[str, int]:
        return {ENTITIES: 2 * self.config.width, RELATIONS: 2 * self.config.width}

    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(as_real(as_complex(heads_SCE) * as_complex(relations[RELATIONS])))

    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        return Queries(as_real(as_complex(tails_SCE) * as_complex(relations[RELATIONS]).conj()))
