"""Settings of the recipe `features`: vectors of items, users and entities from a knowledge graph."""

from typing import Literal

from pydantic import Field, model_validator

from etl.settings import Section

GraphKind = Literal["transe", "transh", "transr", "distmult", "complex", "rotate"]


class GraphModelConfig(Section):
    """An embedding of a knowledge graph."""

    kind: GraphKind = "transe"
    width: int = Field(64, ge=1)  # of entities and relations; complex numbers in `complex` and `rotate`
    norm: Literal[1, 2] = 2  # of the distance; `transe` only has a choice

    @property
    def is_distance(self) -> bool:
        """Whether it scores by a distance, so that its loss needs a margin."""
        return self.kind not in ("distmult", "complex")

    @model_validator(mode="after")
    def _norm_is_known(self) -> "GraphModelConfig":
        if self.norm == 1 and self.kind != "transe":
            raise ValueError(f"norm: expected 2 of {self.kind}, found 1, which only transe has")
        return self


class GraphTrainConfig(Section):
    """Optimisation. `batch_size` is global: triples of all processes together."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(4096, ge=1)
    chunk: int = Field(256, ge=1)  # triples that share their negatives
    negatives: int = Field(256, ge=2)  # of a triple: half of them other heads, half other tails
    margin: float = 9.0  # added to scores in the loss; a distance below it counts as near
    adversarial_temperature: float = Field(1.0, ge=0)  # 0: negatives weigh the same
    learning_rate: float = Field(0.1, gt=0)  # of row-wise Adagrad; falls to none over the epochs
    regularisation: float = Field(0.0, ge=0)  # of cubes of the batch's vectors (N3)
    block_rows: int = Field(1 << 20, ge=1)  # triples that are shuffled together
    seed: int = 0
    checkpoint_seconds: float = Field(60.0, ge=0)  # 0: every step
    keep_checkpoints: int = Field(2, ge=1)
