"""What every embedding of a knowledge graph has in common: tables of vectors, queries and candidates.

A triple without its tail is a *query*: a vector made of head and relation, that all entities as tails are compared
with. A triple without its head is one in the same way. So a model is three short functions, and scoring, training and
ranking are the same for all.

Shape letters: ``S`` chunks, ``C`` triples of a chunk, ``K`` candidates of a chunk, ``E`` width of an entity's row.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trainer.config.graph import GraphModelConfig
from trainer.knowledge_graph.similarity import Queries, Similarity

ENTITIES, RELATIONS = "entities", "relations"
Rows = Mapping[str, Tensor]  # name of a relation table -> rows [S, C, *], or [S, 1, *] where a chunk has one relation


class GraphModel(ABC):
    """Scores of triples from rows of tables. It holds settings only; whoever calls it holds the tables."""

    similarity: Similarity
    # Whether all triples of a chunk are of one relation, since candidates depend on it.
    one_relation: ClassVar[bool] = False

    def __init__(self, config: GraphModelConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Name -> width of the rows of each table: ENTITIES, RELATIONS, and others by relation."""

    @abstractmethod
    def tail_queries(self, heads_SCE: Tensor, relations: Rows) -> Queries:
        """(h, r, ?)."""

    @abstractmethod
    def head_queries(self, tails_SCE: Tensor, relations: Rows) -> Queries:
        """(?, r, t)."""

    def candidates(self, entities: Tensor, relations: Rows) -> Tensor:
        """Vectors [S, *, D] that queries are compared with, of entities [S, *, E] of the same chunks."""
        return entities

    def constrain(self, table: str, rows_UE: Tensor) -> None:
        """Bring rows of a table back to where the paper keeps them, in place, after a step that changed them."""
        return

    def initial_scale(self, table: str, margin: float) -> float:
        """Standard deviation of the numbers that a table begins with."""
        # A distance, of a sum of three vectors, begins at about the margin, so that neither side of the loss is flat.
        width = self.widths[ENTITIES]
        if not self.config.is_distance:
            scale: float = width**-0.5
            return scale
        return (margin + 2) / ((3 * width) ** 0.5 if self.config.norm == 2 else 1.4 * width)

    def initialise(self, table: str, rows_RE: Tensor) -> None:
        """Fill a table by relation that does not begin with chance, in place."""
        return

    def scores(self, heads_SCE: Tensor, relations: Rows, tails_SCE: Tensor) -> Tensor:
        """[S, C]: of each triple, higher is truer."""
        queries = self.tail_queries(heads_SCE, relations)
        return self.similarity.of_pairs(queries, self.candidates(tails_SCE, relations))


def as_complex(rows: Tensor) -> Tensor:
    """Rows of numbers whose real and imaginary parts alternate, as complex numbers."""
    return torch.view_as_complex(rows.reshape(*rows.shape[:-1], -1, 2))


def as_real(rows: Tensor) -> Tensor:
    """The reverse of `as_complex`."""
    return torch.view_as_real(rows).flatten(-2)


def clamp_norm(rows: Tensor, most: float) -> Tensor:
    """Rows longer than `most` shortened to it."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    shortened: Tensor = rows / (lengths / most).clamp(min=1)
    return shortened
