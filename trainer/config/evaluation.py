"""Settings of evaluation, gate, registry and recommendations."""

import datetime as dt
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from etl.config import SparkConfig
from etl.settings import MAX_SECONDS, FileName, Place, Section
from trainer.config.data import each_once
from trainer.config.metrics import known_metric
from trainer.config.training import EvaluationConfig, RuntimeConfig, TrackingConfig

# Fields of the protocol card that are a model's: `across` names those in which compared models may differ.
ModelField = Literal["trained_on", "request_time"]


class EvaluatedModel(Section):
    """A model folder, the row of the table it belongs to, and the seed it was trained with."""

    model: str
    label: str | None = None  # None: the run's transfer, e.g. `deep`; several seeds share a label
    seed: int | None = None  # None: the run's


class BaselinesConfig(Section):
    """The simple baselines beside the models."""

    enabled: bool = True
    last: int = Field(5, ge=1, le=100_000)  # items of a history that item-to-item reads
    decay: float = Field(0.6, gt=0, le=1)  # of the variant that reads all: the n-th last item weighs decay**n
    transition_steps: int = Field(
        8, ge=1, le=10_000
    )  # how far apart two items are still counted as following each other
    transition_decay: float = Field(0.8, gt=0, le=1)  # of a transition over d steps: it weighs decay**(d - 1)
    # Of a split with cold items: encoders of the table `features` whose vectors are read; (): those that models read.
    encoders: tuple[str, ...] = ()
    factors: int = Field(64, ge=1, le=65_536)  # that features are mapped to
    friends_last: int = Field(100, ge=1)  # items of a friend that are counted, where the lake has friendships
    max_users: int = Field(1_000_000, ge=2)  # whose training parts are counted, about


class EvaluateConfig(Section):
    """Score model folders on one pinned release, beside the simple baselines."""

    LATER: ClassVar = ("ranks", "across")

    # Results go to <output>/<name>/evaluation. None: named after the models, without replacing other evaluations.
    name: FileName | None = None
    output: str = "runs"
    model: str | None = None  # one model folder…
    models: tuple[EvaluatedModel, ...] = ()  # … or several
    # Parquet files of other software's scores (user, item, score), rows beside models or alone; then lake, split and
    # domain are named here.
    ranks: tuple[str, ...] = ()
    lake: Place | None = None  # None, here and below: the first model's own
    release: int | None = None
    split: str | None = None
    domain: str | None = None
    part: Literal["validation", "test"] = "test"
    against: str = "none"  # the label that gains are over
    # The label that was chosen before `part` was read. Its gain in the first metric under the first protocol is the one
    # planned test: its p-value is not adjusted, and the gate makes the same test.
    candidate: str | None = None
    # What may differ in the models' protocol cards (trainer/evaluation/README.md), where that is what is measured.
    across: tuple[ModelField, ...] = ()
    metrics: tuple[str, ...] = ()  # of the comparison table; (): NDCG@10, Recall@10, MRR, or those of baskets
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("ranks", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(known_metric, names))


class GateConfig(Section):
    """What a model version must show before the alias moves to it. Margins are shares of a mean."""

    protocol: Literal["full", "cold", "warm", "uniform-100", "popular-100", "top-100"] = "full"
    metric: str = "NDCG@10"
    # A difference with a larger p-value is taken for chance.
    level: float = Field(0.05, gt=0, lt=1)
    min_gain: float = Field(0.0, ge=0)  # over from-scratch, beyond being significant
    min_seeds: int = Field(3, ge=1)  # of from-scratch: with two, the test has almost no power
    min_users: int = Field(100, ge=2)  # evaluated; with fewer, the gate refuses
    champion_margin: float = Field(0.0, ge=0)  # how far below the champion is let pass
    # How far below the champion (without one: from-scratch) in a slice.
    slice_margin: float = Field(0.1, ge=0)
    min_slice_users: int = Field(100, ge=2)  # a slice with fewer users is not compared, and refuses nothing
    cold_user_items: int = Field(10, ge=0)  # cold users: at most so many items of the domain in the training part
    # Rare items: at least one training interaction, and at most so many. Cold items have none.
    rare_item_interactions: int = Field(20, ge=1)
    must_beat: tuple[str, ...] = ("best",)  # simple baselines, by name; best: the one with the highest mean

    @model_validator(mode="before")
    @classmethod
    def _old_names_are_refused(cls, given: Any) -> Any:
        if isinstance(given, dict) and "above" in given:
            raise ValueError("above is now must_beat; rename it (`best` is the simple baseline with the highest mean)")
        if isinstance(given, dict) and "cold_item_interactions" in given:
            raise ValueError("cold_item_interactions is now rare_item_interactions; rename it (cold items have none)")
        return given

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, name: str) -> str:
        return known_metric(name)

    @field_validator("must_beat")
    @classmethod
    def _baselines_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(names, "simple baseline")


class PromoteConfig(Section):
    """Judge a candidate, and move the registry's alias to it if it passes."""

    LATER: ClassVar = ("across",)

    name: FileName = "promote"
    output: str = "runs"  # the decision goes to <output>/<name>/decision.json
    registered_model: FileName = "graftrec"
    family: str = ""  # registered models of the same log, <family>-<domain>: they share parents of patches
    candidate: str | None = None  # a version's number, or a model folder (registered then); None: alias `candidate`
    replicas: tuple[str, ...] = ()  # the candidate's recipe with other seeds
    from_scratch: tuple[str, ...] = ()  # model folders of transfer `none`, one a seed
    release: int | None = None  # None: the newest
    lake: Place | None = None  # None, here and below: the candidate's own
    split: str | None = None
    domain: str | None = None
    part: Literal["validation", "test"] = "test"
    across: tuple[ModelField, ...] = ()  # as in `evaluate`
    gate: GateConfig = GateConfig()
    rollback: bool = False  # no judgement: the previous champion is champion again
    evaluation: EvaluationConfig = EvaluationConfig(protocols=("full",))
    baselines: BaselinesConfig = BaselinesConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()


class RecommendConfig(Section):
    """Write the top-k of every user to the Delta table `recommendations`, of one domain's items."""

    LATER: ClassVar = ("friends", "time", "changed_only")

    name: FileName = "recommend"
    registered_model: FileName = "graftrec"
    model: str = "champion"  # an alias or the number of a registered version, or a model folder
    lake: Place | None = None  # None: the model's own
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    split: str | None = None  # None, here and below: the model's own
    domain: str | None = None
    # For users of whom the model knows no item: a version or folder, as `model`. None: the alias `companion`, if any.
    companion: str | None = None
    # For users of whom neither knows an item, by what their friends have: a version or folder of the recipe `friends`.
    # None: the alias `friends`, if any.
    friends: str | None = None
    # When requests are made, for models that read that: ISO 8601, in UTC unless it gives an offset. None: now.
    time: dt.datetime | None = None
    replace: bool = False  # whether a model folder may replace the rows of a registered version
    # Only users whose histories have changed since the table's rows were made are scored, where all else is as it was.
    changed_only: bool = False
    k: int = Field(10, ge=1, le=1_000_000)  # items a user
    batch_size: int = Field(256, ge=1, le=1_000_000)  # users scored at once
    # For another process that writes to the lake; then exit code 5
    wait_seconds: float = Field(120, ge=0, le=MAX_SECONDS)
    spark: SparkConfig = SparkConfig()
    tracking: TrackingConfig = TrackingConfig()
