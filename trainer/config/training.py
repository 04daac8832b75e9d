"""Settings of a training run."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from etl.settings import MAX_SECONDS, FileName, Section
from trainer.config.data import DataConfig
from trainer.config.model import Bert4RecConfig, DupnConfig, MlpConfig, ModelConfig
from trainer.config.task import MaskedItemConfig, TaskConfig


class TrainConfig(Section):
    """Optimisation and stopping. `batch_size` is global: over all processes together."""

    batch_size: int = Field(128, ge=1, le=100_000_000)
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
    seed: int = Field(0, ge=0, lt=2**63)
    validation_users: int = Field(20_000, ge=1)  # at most, the same ones every epoch and run
    checkpoint_seconds: float = Field(60.0, ge=0, le=MAX_SECONDS)  # 0: every step
    keep_checkpoints: int = Field(2, ge=1, le=1_000_000)


Compile = Literal["auto", "on", "off"]


class RuntimeConfig(Section):
    """Where training runs: one process, or as many as `torchrun` started."""

    LATER: ClassVar = ("static_shapes", "compile")

    device: str = "auto"
    precision: Literal["auto", "fp64", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    # Per process; None: the usable cores, divided by the processes that `torchrun` started here
    threads: int | None = Field(None, ge=1, le=4_096)
    progress: bool = True  # bars, on terminals only
    # Steps of a few shapes, with draws on the device and nothing read back, of the Transformer by next_item (one
    # target) and masked_item: made for GPUs, and not measured on one yet. Masks, negatives and dropout are others than
    # those of other steps.
    static_shapes: bool = False
    compile: Compile = "auto"  # by torch.compile, steps of static shapes only; auto: on GPUs, runs of many steps
    # How long a process waits for the others of `torchrun` before it ends with the state of each
    collective_seconds: float = Field(600.0, gt=0, le=MAX_SECONDS)


class TrackingConfig(Section):
    """MLflow. The server comes from MLFLOW_TRACKING_URI; without it, an SQLite store in the working directory."""

    LATER: ClassVar = ("unsent",)

    experiment: str = "graftrec"
    enabled: bool = True
    system_metrics: bool = True
    system_metrics_seconds: float = Field(10.0, gt=0, le=MAX_SECONDS)  # between two samples
    # How long a run waits, at its end, for a server that does not answer
    close_seconds: float = Field(20.0, ge=0, le=MAX_SECONDS)
    unsent: str = "mlflow-unsent"  # folder for what no server took, until a later command sends it


class EvaluationConfig(Section):
    """How held-out items are ranked."""

    # A split with cold items is ranked by cold (cold items among cold ones), warm (warm ones among warm) and full, in
    # that order, unless this names cold or warm. Training stops by the first of these two.
    protocols: tuple[Literal["full", "cold", "warm", "uniform-100", "popular-100", "top-100"], ...] = (
        "full",
        "uniform-100",
        "popular-100",
    )
    # Whether what a user has had is ranked too (music, groceries, news); false: only items that are new to the user.
    # None: true of next baskets, false of items; in `evaluate` and `promote` the models' own setting. With true, items
    # are ranked in full only: fixed negatives are never what a user has had.
    repeats: bool | None = None
    batch_size: int = Field(256, ge=1, le=100_000_000)
    max_users: int | None = Field(None, ge=2)  # about so many, the same for every model; None: all

    def ranks_repeats(self, by_default: bool) -> bool:
        return by_default if self.repeats is None else self.repeats


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

    @property
    def ranks_repeats(self) -> bool:
        """Whether what a user has had is a candidate too."""
        return self.evaluation.ranks_repeats(self.task.needs.repeats)

    @property
    def reads_times(self) -> bool:
        """Whether the model reads when events were."""
        return self.model.reads_times

    @property
    def reads_request_time(self) -> bool:
        """Whether the model reads when the request is made: at evaluation, when the held-out event was."""
        return self.model.reads_request_time

    @model_validator(mode="after")
    def _rows_are_few(self) -> "PretrainConfig":
        if self.train.table_optimizer == "rowwise" and self.task.scores_catalogue:
            raise ValueError(
                "train.table_optimizer rowwise needs a loss that reads few rows, and task.loss.kind full reads all; "
                "set task.loss.kind=sampled, or train.table_optimizer=adamw"
            )
        return self

    @property
    def packs(self) -> bool:
        """Whether its steps can have static shapes."""
        model, rowwise = self.model, self.train.table_optimizer == "rowwise"
        featured = model.features.given or model.user_features.given
        return isinstance(model, Bert4RecConfig) and self.task.packs and not rowwise and not featured

    @model_validator(mode="after")
    def _shapes_can_be_static(self) -> "PretrainConfig":
        if self.runtime.static_shapes and not self.packs:
            raise ValueError(
                "runtime.static_shapes: expected model bert4rec without features, task next_item of one target or "
                f"masked_item, and train.table_optimizer adamw, found {self.model.kind}, {self.task.kind}, "
                f"{self.train.table_optimizer}; set static_shapes to false"
            )
        if self.runtime.compile == "on" and not self.packs:
            raise ValueError(
                f"runtime.compile: expected a run that static_shapes are for, found {self.model.kind} and "
                f"{self.task.kind}; set compile to auto"
            )
        return self

    @model_validator(mode="after")
    def _squares_are_of_users(self) -> "PretrainConfig":
        loss = getattr(self.task, "loss", None)
        if loss is None or loss.kind != "squared":
            return self
        one_query = isinstance(self.model, MlpConfig) and self.model.score != "mlp"
        if not one_query or not self.task.is_next_item:
            raise ValueError(
                f"task.loss.kind squared: expected task next_item of one target and a model of kind mlp with score dot "
                f"or fm, found {self.task.kind} and {self.model.kind}; set those, or another loss"
            )
        return self

    @model_validator(mode="after")
    def _task_can_train_the_model(self) -> "PretrainConfig":
        networks = self.task.networks
        if networks and self.model.kind not in networks:
            raise ValueError(
                f"task {self.task.kind}: expected a model of kind {', '.join(networks)}, found {self.model.kind}"
            )
        self.task.check_data(self.data)
        return self

    @model_validator(mode="after")
    def _mlp_scores_pairs(self) -> "PretrainConfig":
        if isinstance(self.model, MlpConfig) and self.model.score == "mlp" and self.task.scores_catalogue:
            raise ValueError(
                "model mlp scores every pair of user and item by a network, too dear for task.loss.kind full; set that "
                "to bce or sampled, or model.score to dot or fm"
            )
        return self

    @model_validator(mode="after")
    def _dupn_reads_left_to_right(self) -> "PretrainConfig":
        if self.model.kind == "dupn" and not self.task.reads_left_to_right:
            raise ValueError(
                f"model dupn reads from left to right, found task {self.task.kind}, which looks ahead; take next_item, "
                "or a task with causal: true"
            )
        return self

    @model_validator(mode="after")
    def _task_reads_times(self) -> "PretrainConfig":
        if self.reads_times and not self.task.reads_times:
            raise ValueError(
                f"model.time: expected task next_item, masked_item or multi, found {self.task.kind}, which reads no "
                "times; leave model.time out"
            )
        return self

    @model_validator(mode="after")
    def _one_domain_of_several_is_asked(self) -> "PretrainConfig":
        if not self.model.domain_asked:
            return self
        if not self.task.is_next_item:
            raise ValueError(
                f"model.domain_asked: expected task next_item of one target, found {self.task.kind}; leave it out"
            )
        if self.data.ranked is None or self.data.predicted is not None:
            raise ValueError(
                "model.domain_asked: expected a model that predicts items of several domains and is asked for those of "
                f"one, found data.ranked {self.data.ranked or 'null'}, data.predicted {self.data.predicted or 'null'}; "
                "set the first alone, or leave domain_asked out"
            )
        return self

    @model_validator(mode="after")
    def _event_types_are_of_use(self) -> "PretrainConfig":
        names = self.data.event_types
        reads = isinstance(self.model, DupnConfig) and self.model.event_types
        tells = self.task.predicts_event_types
        if reads and not names:
            raise ValueError("model.event_types: expected names of kinds of event, found none; set data.event_types")
        if reads and not self.task.reads_event_types:
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


def event_types_read(config: PretrainConfig) -> tuple[str, ...]:
    """The kinds of event that a run's model reads, in the order of its rows for them from 1 on; or passes over."""
    if config.task.negative_events:
        return config.task.negative_events
    reads = isinstance(config.model, DupnConfig) and config.model.event_types
    return config.data.event_types if reads else ()
