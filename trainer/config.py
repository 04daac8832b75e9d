"""Every setting of training, as frozen types (composed from conf/ by `etl.config.load`)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from etl.config import ConfigError, FileName, GraftrecError, Place, Section, SparkConfig, load, replaced

__all__ = [
    "BaselinesConfig",
    "BasketPairConfig",
    "Bert4RecConfig",
    "CaserConfig",
    "ClickConfig",
    "ConfigError",
    "DataConfig",
    "DupnConfig",
    "EvaluateConfig",
    "EvaluatedModel",
    "EvaluationConfig",
    "FinetuneConfig",
    "GateConfig",
    "GraftrecError",
    "LossConfig",
    "MaskedItemConfig",
    "MlpConfig",
    "ModelConfig",
    "MultiConfig",
    "NextBasketConfig",
    "NextItemConfig",
    "PairHeadConfig",
    "PatchConfig",
    "PeterRecConfig",
    "PretrainConfig",
    "ProfileConfig",
    "PromoteConfig",
    "PrunerConfig",
    "RangeConfig",
    "RecommendConfig",
    "RuntimeConfig",
    "SearchConfig",
    "TargetItemConfig",
    "TaskConfig",
    "TaskHead",
    "TrackingConfig",
    "TrainConfig",
    "TransferName",
    "WeightsHeadConfig",
    "load",
    "patch_of",
    "ranks_items",
    "reads_baskets",
    "replaced",
    "scores_all",
    "with_transfer",
]


def _each_once(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"expected each {what} once, found {', '.join(names)}")
    return names


class DataConfig(Section):
    """Which snapshot, and how it is read."""

    lake: Place = "lake"
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    split: str = "last-5"
    domain: str = "source"  # whose sequences are read; `all`: those of all domains together
    # Domain whose items are predicted: the loss is taken on them only, and among them only. None: all that are read.
    predicted: str | None = None
    ranked: str | None = None  # domain whose items validation ranks; None: those predicted
    block_rows: int = Field(65_536, ge=1)  # sequences decoded and shuffled together
    cache_bytes: int = Field(256 << 20, ge=0)  # decoded row groups are kept up to this size, others read each epoch
    unknown_users: float = Field(0.05, ge=0, lt=1)  # share of training sequences whose user is hidden
    window: Literal["last", "random"] = "random"  # which part of a sequence longer than the model is trained on
    # Kinds of event (view, purchase…) that are told apart, for a model that reads them or a task that tells them; all
    # others are as one.
    event_types: tuple[str, ...] = Field((), max_length=100)

    @field_validator("event_types")
    @classmethod
    def _event_types_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _each_once(names, "kind")

    @property
    def answered(self) -> str:
        """The domain whose items a model of this data is asked for."""
        return self.ranked or self.predicted or self.domain


class TargetDataConfig(DataConfig):
    """As DataConfig, of the domain that is transferred to."""

    domain: str = "target"


class Bert4RecConfig(Section):
    """BERT4Rec (Sun et al. 2019) with the survey's user and knowledge embeddings (4.3, 4.4)."""

    kind: Literal["bert4rec"] = "bert4rec"
    blocks: int = Field(2, ge=1)
    width: int = Field(64, ge=1)
    heads: int = Field(2, ge=1)
    max_length: int = Field(200, ge=2)  # positions, the asked one included
    # learned: an embedding of each position, as in the paper; rotary: the query and key of each head are turned by
    # their position too, so that attention knows distances (Su et al. 2021).
    positions: Literal["learned", "rotary"] = "rotary"
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(32, ge=0)  # 0: no user embedding
    # relation -> slots; {}: metadata off
    knowledge: dict[str, int] = Field(default_factory=lambda: {"director": 1, "actor": 3})
    knowledge_width: int = Field(16, ge=1)  # of each slot

    @model_validator(mode="after")
    def _heads_fit(self) -> "Bert4RecConfig":
        unit = 2 * self.heads if self.positions == "rotary" else self.heads
        if self.width % unit:
            raise ValueError(f"expected a width that {unit} divides ({self.heads} heads), found {self.width}")
        return self


class CaserConfig(Section):
    """Caser (Tang and Wang 2018) with the survey's knowledge embeddings (4.3, 4.4)."""

    kind: Literal["caser"] = "caser"
    window: int = Field(5, ge=1)  # L: items that the filters see
    width: int = Field(64, ge=1)  # of an item's vector, and of the window's
    horizontal: int = Field(16, ge=1)  # filters of each height from 1 to L
    vertical: int = Field(4, ge=1)  # filters
    max_length: int = Field(200, ge=2)  # positions of a sequence that windows slide over, the asked one included
    dropout: float = Field(0.5, ge=0, lt=1)
    user_width: int = Field(64, ge=0)  # 0: no user embedding
    # relation -> slots; {}: metadata off
    knowledge: dict[str, int] = Field(default_factory=lambda: {"director": 1, "actor": 3})
    knowledge_width: int = Field(25, ge=1)  # of each slot


class PeterRecConfig(Section):
    """PeterRec (Yuan et al. 2020), with the survey's user and knowledge embeddings where asked for."""

    kind: Literal["peterrec"] = "peterrec"
    width: int = Field(64, ge=1)
    dilations: tuple[int, ...] = Field((1, 4) * 4, min_length=1)  # one a block; its second convolution's is twice that
    max_length: int = Field(200, ge=2)  # positions, the asked one included
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(0, ge=0)  # 0: no user embedding
    knowledge: dict[str, int] = Field(default_factory=dict)  # relation -> slots; {}: metadata off
    knowledge_width: int = Field(16, ge=1)  # of each slot

    @field_validator("dilations")
    @classmethod
    def _dilations_are_some(cls, dilations: tuple[int, ...]) -> tuple[int, ...]:
        if min(dilations) < 1:
            raise ValueError(f"expected dilations of 1 and more, found {', '.join(map(str, dilations))}")
        return dilations


class DupnConfig(Section):
    """DUPN (Ni et al. 2018): an LSTM over the items, attention over its states by the user's embedding."""

    kind: Literal["dupn"] = "dupn"
    width: int = Field(64, ge=1)  # of items' vectors and of states
    max_length: int = Field(200, ge=2)  # positions, the asked one included
    dropout: float = Field(0.1, ge=0, lt=1)
    user_width: int = Field(32, ge=0)  # 0: no user embedding, attention asks nothing of the user
    event_types: bool = False  # what kind of event each was is read too, of data.event_types
    knowledge: dict[str, int] = Field(default_factory=dict)  # relation -> slots; {}: metadata off
    knowledge_width: int = Field(16, ge=1)  # of each slot


class MlpConfig(Section):
    """User and item embeddings and layers over both (Hu et al. 2018's baseline; He et al. 2017)."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(64, ge=1)  # of an item's embedding
    user_width: int = Field(64, ge=1)
    layers: tuple[int, ...] = Field((64, 32), min_length=1)  # widths
    max_length: int = Field(200, ge=2)  # items of a user that a step trains
    dropout: Literal[0] = 0
    knowledge: dict[str, int] = Field(default_factory=dict, max_length=0)  # none
    knowledge_width: int = Field(16, ge=1)

    @field_validator("layers")
    @classmethod
    def _layers_are_some(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if min(layers) < 1:
            raise ValueError(f"expected widths of 1 and more, found {', '.join(map(str, layers))}")
        return layers


def _kind_of(given: Any) -> str:
    """Where none is given: BERT4Rec."""
    return str(given.get("kind", "bert4rec") if isinstance(given, dict) else getattr(given, "kind", ""))


ModelConfig = Annotated[
    Annotated[Bert4RecConfig, Tag("bert4rec")]
    | Annotated[CaserConfig, Tag("caser")]
    | Annotated[PeterRecConfig, Tag("peterrec")]
    | Annotated[DupnConfig, Tag("dupn")]
    | Annotated[MlpConfig, Tag("mlp")],
    Discriminator(_kind_of),
]


class LossConfig(Section):
    """full: softmax over the catalogue. sampled: over the targets and sampled negatives, with the logQ correction. bce:
    each target and each negative by itself, as yes or no. All positions of a batch share the negatives: scoring them is
    one product of matrices then, and costs a row of the table each, not one for each position.
    """

    kind: Literal["full", "sampled", "bce"] = "full"
    num_negatives: int = Field(1_024, ge=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _smoothing_has_a_catalogue(self) -> "LossConfig":
        if self.kind != "full" and self.label_smoothing:
            raise ValueError("label_smoothing is of the whole catalogue's softmax; set it to 0, or kind to full")
        return self


class MaskedItemConfig(Section):
    """Masked item prediction (3.2.1), masked as in 4.4."""

    kind: Literal["masked_item"] = "masked_item"
    mask_probability: float = Field(0.2, gt=0, lt=1)
    last_only_probability: float = Field(0.15, ge=0, le=1)  # samples in which only the last position is masked
    loss: LossConfig = LossConfig()


class NextItemConfig(Section):
    """Next item prediction: each position predicts the item after it, or the next `targets`, from those before."""

    kind: Literal["next_item"] = "next_item"
    targets: int = Field(1, ge=1)  # Caser's T (Tang and Wang 2018)
    loss: LossConfig = LossConfig()


class PairHeadConfig(Section):
    """f(u, v) of content-based click prediction: a user's vector and an item's content to a score."""

    content: int = Field(ge=1)  # width
    layers: tuple[int, ...]


class WeightsHeadConfig(Section):
    """Weights of several losses, learned with the model (Kendall, Gal and Cipolla 2018)."""

    losses: int = Field(ge=1)


TaskHead = int | PairHeadConfig | WeightsHeadConfig  # so many outputs, a score of pairs, or weights


class TargetItemConfig(Section):
    """Items of another domain told by a user's vector (PeterRec's fine-tuning: Yuan et al. 2020): what is read is all
    but the items of `data.predicted`, with a CLS behind, and each of those is a target."""

    kind: Literal["target_item"] = "target_item"
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not (a CLS at both ends then)
    loss: LossConfig = LossConfig()


class ProfileConfig(Section):
    """What a user is told by the user's vector (PeterRec's user-profile prediction: Yuan et al. 2020; survey 3.3): an
    attribute of the table `users`, as one of the values that it has there."""

    kind: Literal["profile"] = "profile"
    attribute: str  # gender, age, occupation…
    causal: bool = True  # as of target_item
    # Shares of the users whose attribute is held out, chosen by a hash of their index, the same for every model.
    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    min_users: int = Field(1, ge=1)  # who has a value that fewer have counts as having none

    @model_validator(mode="after")
    def _some_train(self) -> "ProfileConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"expected validation and test to leave users to train on, found {self.validation} and {self.test}; "
                "lower them"
            )
        return self


class NextBasketConfig(Section):
    """The items of a user's next basket (survey 3.2.2; Yang et al. 2019), told by a MASK behind the baskets before."""

    kind: Literal["next_basket"] = "next_basket"
    context: int = Field(10, ge=1)  # baskets that are read
    baskets: int = Field(4, ge=1)  # of a user, told in one step
    loss: LossConfig = LossConfig()


class BasketPairConfig(Section):
    """Pre-training on pairs of baskets (Yang et al. 2019; survey 3.2.2): masked items of both, and whether the second
    comes next after the first or is another user's."""

    kind: Literal["basket_pair"] = "basket_pair"
    context: int = Field(1, ge=1)  # baskets on the first side
    baskets: int = Field(4, ge=1)  # pairs of a user in one step
    adjacent: float = Field(0.5, gt=0, lt=1)  # share of pairs that are
    mask_probability: float = Field(0.2, gt=0, lt=1)  # of an item
    asked_probability: float = Field(0.15, ge=0, le=1)  # of adjacent pairs: the second is one MASK, as when asked
    weight: float = Field(1.0, ge=0)  # of a pair's answer, where a masked item weighs 1
    loss: LossConfig = LossConfig()


class MultiConfig(Section):
    """Several things about what comes next, told together (DUPN: Ni et al. 2018; survey 3.1): the item, its category
    (there: the shop), the event's kind (there: the click), its value as one of its levels (there: the price)."""

    kind: Literal["multi"] = "multi"
    tells: tuple[Literal["next_item", "category", "event_type", "value"], ...] = Field(
        ("next_item", "category"), min_length=1
    )
    weighting: Literal["fixed", "uncertainty"] = "fixed"  # uncertainty: learned (Kendall, Gal and Cipolla 2018)
    weights: dict[str, float] = Field(default_factory=dict)  # of fixed: by what is told; 1 where not named
    max_levels: int = Field(20, ge=2)  # different values that are still levels
    loss: LossConfig = LossConfig()  # of the item

    @model_validator(mode="after")
    def _is_sound(self) -> "MultiConfig":
        if len(set(self.tells)) < len(self.tells):
            raise ValueError(f"tells: expected each once, found {', '.join(self.tells)}")
        if unknown := set(self.weights) - set(self.tells):
            raise ValueError(
                f"weights: expected names among {', '.join(self.tells)}, found {', '.join(sorted(unknown))}"
            )
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights: expected none below 0, found {self.weights}")
        if self.weights and self.weighting != "fixed":
            raise ValueError("weights are of weighting fixed; leave them out")
        return self


class ClickConfig(Section):
    """Whether a user takes an item, told by the user's vector and by what the item is (Chen et al. 2019; survey 3.2.2,
    equation 2)."""

    kind: Literal["click"] = "click"
    content: tuple[Literal["text", "categories"], ...] = Field(("text", "categories"), min_length=1)
    layers: tuple[int, ...] = Field((64,), min_length=1)  # widths of f's hidden layers
    negatives: int = Field(4, ge=0, le=20)  # drawn for each item taken, in training and when asked
    # Kinds of event in the log that say an item was shown and not taken: noes too, and never read as taken.
    impressions: tuple[str, ...] = Field((), max_length=100)
    causal: bool = True  # as the parent was pre-trained: next item, causal; masked item, not
    cuts: int = Field(8, ge=1)  # of a sequence in a step, where not causal

    @model_validator(mode="after")
    def _there_are_noes(self) -> "ClickConfig":
        if not self.negatives and not self.impressions:
            raise ValueError("negatives 0 leaves no noes; raise it, or name the kinds of event that are impressions")
        return self

    @field_validator("content")
    @classmethod
    def _parts_differ(cls, content: tuple[str, ...]) -> tuple[str, ...]:
        return _each_once(content, "part")


TaskConfig = Annotated[
    MaskedItemConfig
    | NextItemConfig
    | TargetItemConfig
    | ProfileConfig
    | NextBasketConfig
    | BasketPairConfig
    | MultiConfig
    | ClickConfig,
    Field(discriminator="kind"),
]
RANKING_TASKS = ("masked_item", "next_item", "target_item")  # of items, for sequences


def ranks_items(task: TaskConfig) -> bool:
    """Whether a task's models score items: for sequences or baskets. Others tell something of a user, or of a pair."""
    if isinstance(task, MultiConfig):
        return "next_item" in task.tells
    return not isinstance(task, ProfileConfig | ClickConfig)


def looks_back_only(task: TaskConfig) -> bool:
    """Whether a position never reads what stands behind it."""
    return task.kind in ("next_item", "multi") or bool(getattr(task, "causal", False))


def reads_baskets(task: TaskConfig) -> bool:
    """Whether a task reads the table `baskets` in the place of `sequences`."""
    return task.kind in ("next_basket", "basket_pair")


def scores_all(task: TaskConfig) -> bool:
    """Whether a step scores the whole catalogue."""
    if isinstance(task, ProfileConfig | ClickConfig):
        return False
    return task.loss.kind == "full" and not (isinstance(task, MultiConfig) and "next_item" not in task.tells)


class TrainConfig(Section):
    """Optimisation and stopping. `batch_size` is global: over all processes together."""

    batch_size: int = Field(128, ge=1)
    epochs: int = Field(60, ge=1)
    min_epochs: int = Field(10, ge=0)  # before the tenth the loss sits at the popularity plateau
    patience: int = Field(8, ge=1)  # epochs without a better validation NDCG@10
    learning_rate: float = Field(1e-3, gt=0)
    # Of item, user and entity tables. adamw: dense, as all else. rowwise: a step reads, changes and keeps state for the
    # rows of its batch only, and the tables are shared out over the processes; for catalogues past memory's comfort.
    table_optimizer: Literal["adamw", "rowwise"] = "adamw"
    table_learning_rate: float = Field(0.02, gt=0)  # of rowwise; warms up and falls as learning_rate does
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after warm-up, over `epochs`
    final_rate: float = Field(0.0, ge=0, le=1)  # least share of the learning rate that a schedule falls to
    clip_norm: float = Field(5.0, gt=0)
    seed: int = 0
    validation_users: int = Field(20_000, ge=1)  # at most, the same ones every epoch and run
    checkpoint_seconds: float = Field(60.0, ge=0)  # 0: every step
    keep_checkpoints: int = Field(2, ge=1)


class RuntimeConfig(Section):
    """Where training runs: one process, or as many as `torchrun` started."""

    device: str = "auto"
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    # Per process; None: the usable cores, divided by the processes that `torchrun` started here (trainer/cores.py)
    threads: int | None = Field(None, ge=1)
    progress: bool = True  # bars, on terminals only
    # How long a process waits for the others of `torchrun` before it ends with the state of each
    collective_seconds: float = Field(600.0, gt=0)


class TrackingConfig(Section):
    """MLflow. The server comes from MLFLOW_TRACKING_URI; without it, an SQLite store in the working directory."""

    experiment: str = "graftrec"
    enabled: bool = True
    system_metrics: bool = True
    system_metrics_seconds: float = Field(10.0, gt=0)  # between two samples
    close_seconds: float = Field(20.0, ge=0)  # how long a run waits, at its end, for a server that does not answer


class EvaluationConfig(Section):
    """How held-out items are ranked."""

    protocols: tuple[Literal["full", "uniform-100", "popular-100", "top-100"], ...] = (
        "full",
        "uniform-100",
        "popular-100",
    )
    # Of next baskets: whether what a user has had is a candidate too; not in a log where nothing is taken twice.
    # None: true in training; in `evaluate` and `promote` the models' own setting.
    repeats: bool | None = None
    batch_size: int = Field(256, ge=1)
    max_users: int | None = Field(None, ge=2)  # about so many, the same for every model; None: all

    @property
    def ranks_repeats(self) -> bool:
        return self.repeats is not False


class PretrainConfig(Section):
    """One training run from scratch on one domain."""

    name: FileName = "pretrain"
    output: str = "runs"  # the run's folder is <output>/<name>
    data: DataConfig = DataConfig()
    model: ModelConfig = Bert4RecConfig()
    task: TaskConfig = MaskedItemConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _rows_are_few(self) -> "PretrainConfig":
        if self.train.table_optimizer == "rowwise" and scores_all(self.task):
            raise ValueError(
                "train.table_optimizer rowwise needs a loss that reads few rows, and task.loss.kind full reads all; "
                "set task.loss.kind=sampled, or train.table_optimizer=adamw"
            )
        return self

    @model_validator(mode="after")
    def _mlp_scores_pairs(self) -> "PretrainConfig":
        if self.model.kind == "mlp" and self.task.kind in ("profile", "click", "multi"):
            raise ValueError(
                f"model mlp reads no items, so there is nothing to tell task {self.task.kind} by; take bert4rec, caser "
                "or peterrec"
            )
        if self.model.kind == "mlp" and scores_all(self.task):
            raise ValueError(
                "model mlp scores every pair of user and item by a network, too dear for task.loss.kind full; set that "
                "to bce or sampled"
            )
        return self

    @model_validator(mode="after")
    def _dupn_reads_left_to_right(self) -> "PretrainConfig":
        if self.model.kind == "dupn" and not looks_back_only(self.task):
            raise ValueError(
                f"model dupn reads from left to right, found task {self.task.kind}, which looks ahead; take next_item, "
                "or a task with causal: true"
            )
        return self

    @model_validator(mode="after")
    def _event_types_are_of_use(self) -> "PretrainConfig":
        names = self.data.event_types
        reads = isinstance(self.model, DupnConfig) and self.model.event_types
        tells = isinstance(self.task, MultiConfig) and "event_type" in self.task.tells
        if reads and not names:
            raise ValueError("model.event_types: expected names of kinds of event, found none; set data.event_types")
        if reads and self.task.kind not in ("next_item", "multi"):
            raise ValueError(
                f"model.event_types: expected task next_item or multi, found {self.task.kind}, which reads items only"
            )
        if tells and len(names) < 2:
            raise ValueError(
                f"task.tells event_type: expected two kinds of event at least in data.event_types, found "
                f"{', '.join(names) or 'none'}"
            )
        if names and not (reads or tells):
            raise ValueError(
                "data.event_types: expected a model that reads kinds of event (dupn, event_types: true) or a task that "
                "tells them (multi), found neither; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _clicks_are_of_one_domain(self) -> "PretrainConfig":
        if self.task.kind in ("click", "multi") and (self.data.predicted is not None or self.data.ranked is not None):
            raise ValueError(
                f"task {self.task.kind} is asked about the domain that it reads, found data.predicted or data.ranked; "
                "leave them out"
            )
        return self

    @model_validator(mode="after")
    def _baskets_are_read_whole(self) -> "PretrainConfig":
        if not reads_baskets(self.task):
            return self
        if self.model.kind not in ("bert4rec", "peterrec"):
            raise ValueError(
                f"task {self.task.kind}: expected a model that reads whole sequences (bert4rec, peterrec), found "
                f"{self.model.kind}"
            )
        if self.data.predicted is not None or self.data.ranked is not None:
            raise ValueError(
                f"task {self.task.kind} predicts the domain that it reads, found data.predicted or data.ranked; leave "
                "them out"
            )
        return self

    @model_validator(mode="after")
    def _target_items_are_of_a_domain(self) -> "PretrainConfig":
        if self.task.kind == "target_item" and self.data.predicted in (None, self.data.domain):
            raise ValueError(
                "task target_item tells one domain's items by what was done elsewhere, found no data.predicted beside "
                "data.domain; set data.domain=all and data.predicted to a domain"
            )
        return self


def event_types_read(config: PretrainConfig) -> tuple[str, ...]:
    """The kinds of event that a run's model reads, in the order of its rows for them from 1 on; or passes over."""
    if isinstance(config.task, ClickConfig):
        return config.task.impressions
    reads = isinstance(config.model, DupnConfig) and config.model.event_types
    return config.data.event_types if reads else ()


TransferName = Literal["none", "shallow", "deep", "patch"]


class PatchConfig(Section):
    """Model patches (survey 3.3), for transfer `patch`."""

    kind: Literal["adapter", "lora"] = "adapter"
    bottleneck: int | None = Field(None, ge=1)  # of an adapter: channels in its middle; None: an eighth of the width
    place: Literal["serial", "parallel"] = "serial"  # behind a layer, or beside it
    per_block: Literal[1, 2] = 2  # beside both layers of a block, or the second only
    # identity: begins as no change at all. paper: as in PeterRec's released code, drawn at random, and parallel with a
    # skip of its own.
    variant: Literal["identity", "paper"] = "identity"
    rank: int = Field(4, ge=1)  # of lora
    layer_norm: bool = False  # the network's own LayerNorms are trained too

    def channels(self, width: int) -> int:
        return max(1, width // 8) if self.bottleneck is None else self.bottleneck


class FinetuneConfig(PretrainConfig):
    """One training run on a target domain, started from a pre-trained model by `transfer`."""

    name: FileName = "finetune"
    data: TargetDataConfig = TargetDataConfig()
    transfer: TransferName = "deep"
    parent: str | None = None  # folder of the pre-trained model; not needed by transfer `none`
    freeze: tuple[str, ...] = ()  # parameter groups that do not train
    # Items that the parent knows too (by raw id) keep its rows, whatever `transfer`; for a model that reads its domain.
    shared_items: bool = False
    patch: PatchConfig = PatchConfig()  # of transfer `patch`

    @model_validator(mode="after")
    def _patch_fits(self) -> "FinetuneConfig":
        if self.transfer != "patch":
            return self
        if self.model.kind not in ("bert4rec", "peterrec"):
            raise ValueError(
                f"transfer patch: expected a model with blocks (bert4rec, peterrec), found {self.model.kind}; set deep"
            )
        width, patch = self.model.width, self.patch
        middle, name = (patch.rank, "rank") if patch.kind == "lora" else (patch.channels(width), "bottleneck")
        if middle >= width:
            raise ValueError(f"patch.{name}: expected less than the model's width, {width}, found {middle}; lower it")
        if self.shared_items and self.train.table_optimizer == "rowwise":
            raise ValueError(
                "transfer patch with shared_items freezes rows, which row-wise tables don't; set "
                "train.table_optimizer=adamw"
            )
        return self

    @model_validator(mode="after")
    def _items_come_from_a_parent(self) -> "FinetuneConfig":
        if self.shared_items and self.transfer == "none":
            raise ValueError("shared_items: transfer none takes nothing from a parent; set it to false, or transfer")
        return self


def patch_of(config: PretrainConfig) -> PatchConfig | None:
    """The patches that the run's model has, if any."""
    return config.patch if isinstance(config, FinetuneConfig) and config.transfer == "patch" else None


def with_transfer(config: FinetuneConfig, transfer: str, parent: str | None, **changes: Any) -> FinetuneConfig:
    """The run with another transfer; from scratch, no items are shared with a parent. Raises ConfigError where its
    settings don't go with it."""
    shared = config.shared_items and transfer != "none"
    return replaced(config, transfer=transfer, parent=parent, shared_items=shared, **changes)


class RangeConfig(Section):
    """Numbers from `low` to `high`, both included; whole numbers where both are written as such."""

    low: int | float
    high: int | float
    log: bool = False  # as many between 0.001 and 0.01 as between 0.01 and 0.1

    @model_validator(mode="after")
    def _is_a_range(self) -> "RangeConfig":
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected low > 0 of a logarithmic range, found {self.low}")
        return self


Choice = bool | int | float | str


class PrunerConfig(Section):
    """When a trial is given up: where its best validation score so far is below the median of those that earlier trials
    had at the same epoch (`median`), or by Hyperband's brackets (Li et al. 2018)."""

    kind: Literal["median", "hyperband", "none"] = "median"
    full_trials: int = Field(4, ge=1)  # of median: so many are trained to their end before any is given up
    warmup_epochs: int = Field(10, ge=1)  # no trial is given up before; until the tenth all look alike
    reduction: int = Field(3, ge=2)  # of hyperband: one in so many goes on from each rung


# What decides what a score means, or where a run lies, and so is not for a search to choose.
_FIXED = (
    "name", "output", "parent", "transfer", "runtime", "tracking", "evaluation", "data.lake", "data.release",
    "data.split", "data.domain", "data.predicted", "data.ranked", "train.seed", "train.validation_users",
)  # fmt: skip


class SearchConfig(Section):
    """Search the settings of one recipe, `pretrain` or `finetune`, for the best validation score.

    Of `finetune` each of `transfers` is searched by itself, from-scratch and transfer alike: in the same space, with
    the same budget, in turns.
    """

    name: FileName = "search"
    output: str = "runs"  # the search's folder is <output>/<name>
    pretrain: PretrainConfig | None = None  # one of these two: the settings that are not searched, and the first trial
    finetune: FinetuneConfig | None = None
    transfers: tuple[TransferName, ...] = ()  # (): finetune's own
    # setting (train.learning_rate) -> a range, or a list of values; a section's values are names of files in conf/
    space: dict[str, RangeConfig | tuple[Choice, ...]]
    trials: int | None = Field(20, ge=1)  # of each transfer, those given up or failed counted
    seconds: float | None = Field(None, gt=0)  # of each transfer's training; a trial under way is finished
    seed: int = 0
    random_trials: int = Field(6, ge=1)  # drawn at random, before earlier ones say where to look
    pruner: PrunerConfig = PrunerConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("space")
    @classmethod
    def _space_is_sound(cls, space: dict[str, RangeConfig | tuple[Choice, ...]]) -> dict[str, Any]:
        if not space:
            raise ValueError("expected at least one setting to search, found none")
        for key, values in space.items():
            if fixed := next(
                (name for name in _FIXED if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")), None
            ):
                raise ValueError(f"{key}: {fixed} can't be searched, scores would not be comparable; remove it")
            if isinstance(values, tuple) and not values:
                raise ValueError(f"{key}: expected values to choose from, found an empty list")
        return {key: _numbers(values) for key, values in space.items()}

    @model_validator(mode="after")
    def _one_recipe_and_a_budget(self) -> "SearchConfig":
        if (self.pretrain is None) == (self.finetune is None):
            raise ValueError(
                "expected one of the sections pretrain and finetune: the recipe whose settings are searched"
            )
        if self.pretrain is not None and self.transfers:
            raise ValueError("transfers are of the recipe finetune; remove them, or search finetune")
        if len(set(self.transfers)) < len(self.transfers):
            raise ValueError(f"expected each of transfers once, found {', '.join(self.transfers)}")
        if self.trials is None and self.seconds is None:
            raise ValueError("expected a budget: set trials, seconds, or both")
        return self


def _numbers(values: RangeConfig | tuple[Choice, ...]) -> RangeConfig | tuple[Choice, ...]:
    """YAML takes 1e-3 for a text: numbers among the values, as numbers."""
    return values if isinstance(values, RangeConfig) else tuple(map(_number, values))


def _number(value: Choice) -> Choice:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"expected finite numbers, found {value}; remove it")
    return number


class EvaluatedModel(Section):
    """A model folder, the row of the table it belongs to, and the seed it was trained with."""

    model: str
    label: str | None = None  # None: the run's transfer, e.g. `deep`; several seeds share a label
    seed: int | None = None  # None: the run's


class BaselinesConfig(Section):
    """The simple baselines beside the models."""

    enabled: bool = True
    last: int = Field(5, ge=1)  # items of a history that item-to-item reads
    decay: float = Field(0.6, gt=0, le=1)  # of the variant that reads all: the n-th last item weighs decay**n
    transition_steps: int = Field(8, ge=1)  # how far apart two items are still counted as following each other
    transition_decay: float = Field(0.8, gt=0, le=1)  # of a transition over d steps: it weighs decay**(d - 1)
    max_users: int = Field(1_000_000, ge=2)  # whose training parts are counted, about


class EvaluateConfig(Section):
    """Score model folders on one pinned release, beside the simple baselines."""

    # Results go to <output>/<name>/evaluation. None: named after the models, without replacing other evaluations.
    name: FileName | None = None
    output: str = "runs"
    model: str | None = None  # one model folder…
    models: tuple[EvaluatedModel, ...] = ()  # … or several
    lake: Place | None = None  # None, here and below: the first model's own
    release: int | None = None
    split: str | None = None
    domain: str | None = None
    part: Literal["validation", "test"] = "test"
    against: str = "none"  # the label that gains are over
    # The label that was chosen before `part` was read. Its gain in the first metric under the first protocol is the one
    # planned test: its p-value is not adjusted, and the gate makes the same test.
    candidate: str | None = None
    metrics: tuple[str, ...] = ()  # of the comparison table; (): NDCG@10, Recall@10, MRR, or those of baskets
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()


class GateConfig(Section):
    """What a model version must show before the alias moves to it. Margins are shares of a mean."""

    protocol: Literal["full", "uniform-100", "popular-100", "top-100"] = "full"
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
    cold_item_interactions: int = Field(20, ge=0)  # cold items: at most so many training interactions
    must_beat: tuple[str, ...] = ("best",)  # simple baselines, by name; best: the one with the highest mean

    @model_validator(mode="before")
    @classmethod
    def _above_has_a_new_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "above" in given:
            raise ValueError("above is now must_beat; rename it (`best` is the simple baseline with the highest mean)")
        return given

    @field_validator("must_beat")
    @classmethod
    def _baselines_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _each_once(names, "simple baseline")


class PromoteConfig(Section):
    """Judge a candidate, and move the registry's alias to it if it passes."""

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
    gate: GateConfig = GateConfig()
    rollback: bool = False  # no judgement: the previous champion is champion again
    evaluation: EvaluationConfig = EvaluationConfig(protocols=("full",))
    baselines: BaselinesConfig = BaselinesConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()


class RecommendConfig(Section):
    """Write the top-k of every user to the Delta table `recommendations`, of one domain's items."""

    name: FileName = "recommend"
    registered_model: FileName = "graftrec"
    model: str = "champion"  # an alias or the number of a registered version, or a model folder
    lake: Place | None = None  # None: the model's own
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    split: str | None = None  # None, here and below: the model's own
    domain: str | None = None
    # For users of whom the model knows no item: a version or folder, as `model`. None: the alias `companion`, if any.
    companion: str | None = None
    replace: bool = False  # whether a model folder may replace the rows of a registered version
    k: int = Field(10, ge=1)  # items a user
    batch_size: int = Field(256, ge=1)  # users scored at once
    wait_seconds: float = Field(120, ge=0)  # for another process that writes to the lake; then exit code 5
    spark: SparkConfig = SparkConfig()
    tracking: TrackingConfig = TrackingConfig()
