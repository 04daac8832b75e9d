"""Settings of an embedding of the knowledge graph, which the recipe `features` trains (survey 2.2)."""

from typing import Literal

from pydantic import Field, model_validator

from etl.settings import MAX_SECONDS, FileName, Place, Section, Seed
from trainer.config.training import RuntimeConfig, TrackingConfig

GraphKind = Literal["transe", "transh", "transr", "distmult", "complex", "rotate"]


class GraphModelConfig(Section):
    """An embedding of a knowledge graph."""

    kind: GraphKind = "transe"
    width: int = Field(64, ge=1, le=65_536)  # of entities and relations; complex numbers in `complex` and `rotate`
    norm: Literal[1, 2] = 2  # of the distance; `transe` only has a choice
    max_norm: float | None = Field(1.0, gt=0)  # of `transr`: of entities, relations and projections. None: any

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
    batch_size: int = Field(4096, ge=1, le=100_000_000)
    chunk: int = Field(256, ge=1, le=1_000_000)  # triples that share their negatives
    negatives: int = Field(256, ge=2, le=1_000_000)  # of a triple: half of them other heads, half other tails
    margin: float = 9.0  # added to scores in the loss; a distance below it counts as near
    adversarial_temperature: float = Field(1.0, ge=0)  # 0: negatives weigh the same
    learning_rate: float = Field(0.5, gt=0)  # of row-wise Adagrad; falls to none over the epochs
    block_rows: int = Field(1 << 20, ge=1)  # triples that are shuffled together
    seed: Seed = 0
    checkpoint_seconds: float = Field(60.0, ge=0, le=MAX_SECONDS)  # 0: every step
    keep_checkpoints: int = Field(2, ge=1)


class GraphDataConfig(Section):
    """Which triples are read."""

    lake: Place = "lake"
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    relations: tuple[str, ...] | None = None  # of the table `knowledge`; None: all there are
    # Events of users with items as edges of the graph, a relation for each event type: those of the training part of
    # one split and domain, and no others. None: no events.
    events: str | None = None  # the split
    domain: str = "all"
    event_types: tuple[str, ...] = ()  # distinguished; all others are one relation
    validation: float = Field(0.02, ge=0, lt=1)  # share of triples that validation ranks
    test: float = Field(0.02, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> "GraphDataConfig":
        if self.validation + self.test >= 1:
            raise ValueError(f"expected validation and test below 1 together, found {self.validation + self.test:g}")
        if self.relations == () and self.events is None:
            raise ValueError("expected relations or events, found neither; name relations, or set events to a split")
        return self


class GraphConfig(Section):
    """One run: an embedding of the knowledge graph of a release."""

    name: FileName = "features"
    output: str = "runs"  # the run's folder is <output>/<name>
    data: GraphDataConfig = GraphDataConfig()
    model: GraphModelConfig = GraphModelConfig()
    train: GraphTrainConfig = GraphTrainConfig()
    parent: str | None = None  # folder of a run of `transe` of the same width, which `transr` begins from
    validation_triples: int = Field(2_000, ge=0)  # ranked after each epoch, at most
    runtime: RuntimeConfig = RuntimeConfig()  # computed on the CPU, whatever the device
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _transr_has_a_parent(self) -> "GraphConfig":
        if (self.model.kind == "transr") != (self.parent is not None):
            found = "none" if self.parent is None else f"one of {self.model.kind}"
            raise ValueError(
                f"parent: expected one of transr only, which fails from a random start, found {found}; run features "
                "with model.kind transe first, and name its folder"
            )
        return self
