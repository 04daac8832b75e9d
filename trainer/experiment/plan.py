"""The rows of an experiment, and the training runs that they need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from etl.config import EtlConfig
from etl.settings import ConfigError, FileName, Place, Section, config_hash, replaced
from etl.tables import DOMAIN_ALL
from trainer.config import (
    BaselinesConfig,
    EvaluationConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    TaskConfig,
    TrackingConfig,
    TransferName,
    with_transfer,
)
from trainer.config.evaluation import ModelField
from trainer.evaluation import evaluators
from trainer.evaluation.class_metrics import signed
from trainer.experiment.rows import GridPlan, RowPlan, rows_of_grid
from trainer.recipes.training_jobs import TrainingJob
from trainer.report.survey import NAMES, row_id
from trainer.training.empty_transfer import ADVICE, empty_by_settings

if TYPE_CHECKING:
    pass


NOT_REQUESTED = "not requested"


class TunedConfig(Section):
    """Settings of the rows of one transfer: the winners of a search that gave each the same budget. Joint models are
    trained from scratch."""

    none: FinetuneConfig | None = None
    shallow: FinetuneConfig | None = None
    deep: FinetuneConfig | None = None
    patch: FinetuneConfig | None = None


class ModelPlan(Section):
    """How one model is trained. The task of `finetune` is that of all its rows; `pretrain_tasks` are the table's."""

    pretrain: PretrainConfig
    finetune: FinetuneConfig
    tuned: TunedConfig = TunedConfig()  # in the place of `finetune`, where given
    pretrain_tasks: tuple[TaskConfig, ...]  # settings of each task, for pre-training and for extra from-scratch rows

    @model_validator(mode="after")
    def _fits(self) -> "ModelPlan":
        kinds = [task.kind for task in self.pretrain_tasks]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"pretrain_tasks: expected different tasks, at least one, found {', '.join(kinds)}")
        if self.pretrain.model.kind != self.finetune.model.kind:
            raise ValueError(
                f"expected pretrain and finetune to name the same model, found {self.pretrain.model.kind} and "
                f"{self.finetune.model.kind}"
            )
        expected = self.finetune.model.kind, self.finetune.task.kind
        for transfer in get_args(TransferName):
            settings = self.settings_of(transfer)
            if (found := (settings.model.kind, settings.task.kind)) != expected:
                raise ValueError(
                    f"tuned.{transfer}: expected {' by '.join(expected)}, as in finetune, found {' by '.join(found)}"
                )
        return self

    def settings_of(self, transfer: TransferName) -> FinetuneConfig:
        """How the rows of a transfer are trained on the target; those of `shallow+features` as those of `shallow`."""
        given: FinetuneConfig | None = getattr(self.tuned, transfer.partition("+")[0])
        return given or self.finetune


class ExperimentConfig(Section):
    """Which rows, on what data, and how they are compared. Lake, domains, seeds, names and folders are set here, not in
    the sections."""

    LATER: ClassVar = ("across",)

    name: FileName = "experiment"
    preset: str = "cpu"
    runs: str = "runs"  # the experiment's folder is <runs>/<name>
    etl: EtlConfig | None = None  # makes the tables; or, in its place:
    lake: Place | None = None  # … a lake that is there
    release: int | None = None  # of that lake; None: the newest
    source: str = "source"
    target: str = "target"
    split: str = "last-5"
    joint_split: str = "joint-5"  # one whose domain `all` holds the target's hold-out out
    part: Literal["validation", "test"] = "test"
    bert4rec: ModelPlan | None = None
    caser: ModelPlan | None = None
    grid: dict[str, GridPlan] = Field(default_factory=dict)  # more rows, each model by each transfer
    custom: dict[str, RowPlan] = Field(default_factory=dict)  # more rows, by id
    transfers: tuple[TransferName, ...] = ("none", "shallow", "deep")
    knowledge: tuple[bool, ...] = (False, True)
    joint: bool = True  # one model trained on both domains
    extras: bool = True  # from scratch under the tasks of pre-training that are not the one of fine-tuning
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    rows: tuple[str, ...] = ()  # ids of the only rows to train; (): all. The runs of the others are missing
    evaluation: EvaluationConfig = EvaluationConfig()
    across: tuple[ModelField, ...] = ()  # as in `evaluate`: what may differ in the rows' protocol cards
    baselines: BaselinesConfig = BaselinesConfig()
    metric: str | None = None  # that differences are tested in; None: the one of validation, if each user has it
    jobs: int | None = Field(None, ge=1, le=4_096)  # cells at a time; None: cores / threads
    threads: int = Field(1, ge=1, le=4_096)  # of each cell
    tracking: TrackingConfig = TrackingConfig()

    @property
    def plans(self) -> dict[str, ModelPlan]:
        named = [("bert4rec", self.bert4rec), ("caser", self.caser)]
        return {name: plan for name, plan in named if plan is not None}

    @property
    def more_rows(self) -> dict[str, RowPlan]:
        """Rows of `grid` and `custom`, by id."""
        return {**rows_of_grid(self.grid, self.source, self.target, self.split), **self.custom}

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def task(self) -> TaskConfig:
        """Of the first row: all rows' models predict what its models do."""
        return tasks_of(self)[0][1]

    @property
    def tested_metric(self) -> str:
        """A metric that each user has, without a prefix."""
        tested = tested_metrics(self.task)
        own = evaluators.monitor(self.task)
        return self.metric or (own if own in tested else tested[0])

    @property
    def logged_metrics(self) -> list[str]:
        """Without prefixes: those that a table of an evaluation shows."""
        return [metric.rpartition("/")[2] for metric in evaluators.evaluator_of(self.task).metrics_of(self.task).table]

    @model_validator(mode="before")
    @classmethod
    def _own_has_a_new_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "own" in given:
            raise ValueError("own is now custom; rename it")
        return given

    @model_validator(mode="after")
    def _can_be_run(self) -> "ExperimentConfig":
        if not self.plans and not self.grid and not self.custom:
            raise ValueError("expected a section bert4rec, caser, grid or custom, found none")
        gridded = rows_of_grid(self.grid, self.source, self.target, self.split)
        if twice := gridded.keys() & self.custom.keys():
            raise ValueError(f"custom: expected other names than grid makes, found {', '.join(sorted(twice))}; rename")
        for name, plan in self.plans.items():
            if plan.finetune.model.kind != name:
                raise ValueError(f"{name}: expected that model, found {plan.finetune.model.kind}")
        if (self.etl is None) == (self.lake is None):
            raise ValueError("expected one of etl, which makes tables, and lake, where there are some")
        if self.source == self.target:
            raise ValueError(f"expected two domains, found {self.source!r} as source and as target")
        wanted = {self.split} | ({self.joint_split} if self.joint and self.plans else set())
        if self.etl and (missing := wanted - {split.name for split in self.etl.splits}):
            raise ValueError(f"etl.splits: expected {', '.join(sorted(missing))} among them; add it, or mend the name")
        if self.etl and (
            unknown := {self.source, self.target} - {DOMAIN_ALL} - {domain.name for domain in self.etl.domains}
        ):
            raise ValueError(f"etl.domains: expected {', '.join(sorted(unknown))} among them; mend source or target")
        if unknown := set(self.rows) - {row.id for row in rows_of(self)}:
            known = ", ".join(row.id for row in rows_of(self))
            raise ValueError(f"rows: expected some of {known}; found {', '.join(sorted(unknown))}")
        (first, leading), *others = tasks_of(self)
        for name, task in others:
            if task.evaluators[0] != leading.evaluators[0]:
                raise ValueError(
                    f"{name}: expected a task that predicts the same as {leading.kind}, that of {first}, found "
                    f"{task.kind}; compare them in experiments of their own"
                )
        if self.joint and self.plans and not leading.predicts_other_domains:
            raise ValueError(f"joint: expected false for task {leading.kind}, found true; set it")
        if self.metric is not None and self.metric not in tested_metrics(leading):
            raise ValueError(
                f"metric: expected one that each user has under task {leading.kind} "
                f"({', '.join(tested_metrics(leading))}), found {self.metric}"
            )
        ids = [row.id for row in rows_of(self)]
        for name, row in self.custom.items():
            if row.against is not None and (row.against == name or row.against not in ids):
                raise ValueError(
                    f"custom.{name}.against: expected another row, one of {', '.join(ids)}, found {row.against}"
                )
        return self


def tasks_of(config: ExperimentConfig) -> list[tuple[str, TaskConfig]]:
    """(where it is set, task) of each model that is scored."""
    found: list[tuple[str, TaskConfig]] = []
    for name, plan in config.plans.items():
        found.append((f"{name}.finetune", plan.finetune.task))
        if config.extras and "none" in config.transfers:
            found += [(f"{name}.pretrain_tasks", task) for task in plan.pretrain_tasks]
    gridded = config.more_rows.keys() - config.custom.keys()
    for name, row in config.more_rows.items():
        found.append((f"{'grid' if name in gridded else 'custom'}.{name}", row.trained.task))
    return found


def tested_metrics(task: TaskConfig) -> tuple[str, ...]:
    """Metrics that each user has, so that users can be paired, and of which more is better; without prefixes."""
    given = [metric.rpartition("/")[2] for metric in evaluators.evaluator_of(task).metrics_of(task).per_user]
    return tuple(dict.fromkeys(metric for metric in given if signed(1.0, metric) > 0))


@dataclass
class Row:
    """One row of the table: the same training over seeds."""

    id: str
    kind: Literal["model", "joint", "extra", "custom"]
    model: str
    transfer: TransferName
    pretrain_task: str | None
    task: str
    knowledge: bool
    label: str
    against: str | None = None  # what its gain is counted over, of kind `custom`
    reason: str = ""  # why it can't be trained at all
    trainings: dict[int, TrainingJob] = field(default_factory=dict)  # by seed


def rows_of(config: ExperimentConfig) -> list[Row]:
    """The rows of the experiment, without cells."""
    found = []
    for model, plan in config.plans.items():
        task = plan.finetune.task.kind
        for transfer in config.transfers:
            for pretrained in [None] if transfer == "none" else [one.kind for one in plan.pretrain_tasks]:
                for known in config.knowledge:
                    row = row_id(model, transfer, pretrained, known)
                    label = " ".join(filter(None, (model, transfer, pretrained, "+ metadata" if known else "")))
                    found.append(Row(row, "model", model, transfer, pretrained, task, known, label))
    for model, plan in config.plans.items():
        for known in config.knowledge:
            also = " + metadata" if known else ""
            name = "knowledge" if known else "plain"
            if config.extras and "none" in config.transfers:
                for kind in [one.kind for one in plan.pretrain_tasks if one.kind != plan.finetune.task.kind]:
                    row = f"{row_id(model, 'none', None, known)}/{kind}"
                    label = f"{NAMES[model]} from scratch by {kind.replace('_', ' ')}{also}"
                    found.append(Row(row, "extra", model, "none", None, kind, known, label))
            if config.joint:
                row, task = f"joint/{model}/{name}", plan.finetune.task.kind
                found.append(
                    Row(row, "joint", model, "none", None, task, known, f"{NAMES[model]} of both domains{also}")
                )
    for name, custom in config.more_rows.items():
        found.append(_custom_row(name, custom))
    return found


def _custom_row(name: str, plan: RowPlan) -> Row:
    task, network, label, against = plan.trained.task.kind, plan.trained.model, plan.label, plan.against
    transfer: TransferName = "none"
    before = None
    if plan.finetune is not None and plan.pretrain is not None:
        transfer, before = plan.finetune.transfer, plan.pretrain.task.kind
    return Row(name, "custom", network.kind, transfer, before, task, bool(network.knowledge), label, against)


def planned(config: ExperimentConfig, lake: str, release: int) -> list[Row]:
    """The rows with their cells. Rows that need the same pre-trained model share its cell, seed by seed."""
    pretrained: dict[str, TrainingJob] = {}
    rows = rows_of(config)
    for row in rows:
        if config.rows and row.id not in config.rows:
            row.reason = f"{NOT_REQUESTED} (`rows`)"
            continue
        if row.kind == "custom":
            row.trainings = {seed: _custom_cell(config, row, seed, lake, release, pretrained) for seed in config.seeds}
            continue
        plan = config.plans[row.model]
        for seed in config.seeds:
            parent = None
            if row.transfer != "none":
                known = "knowledge" if row.knowledge else "plain"
                name = f"{row.model}-pretrain-{row.pretrain_task}-{known}-{seed}"
                if name not in pretrained:
                    trained = replaced(
                        plan.pretrain,
                        task=_task(plan, row.pretrain_task),
                        model=_network(plan.pretrain, row),
                        data=replaced(plan.pretrain.data, domain=config.source, split=config.split),
                    )
                    pretrained[name] = TrainingJob(
                        name, "pretrain", _placed(trained, config, name, seed, lake, release)
                    )
                parent = pretrained[name]
            row.trainings[seed] = _cell(config, plan, row, seed, lake, release, parent)
    for row in rows:
        training = next(iter(row.trainings.values()), None)
        if training is not None and isinstance(training.config, FinetuneConfig):
            row.reason = empty_by_settings(training.config)
        row.trainings = {} if row.reason else row.trainings
    return rows


def check_rows(rows: Sequence[Row]) -> None:
    """Print a line on each row whose transfer would copy nothing. Raises ConfigError where no other row is
    requested."""
    requested = [row for row in rows if not row.reason.startswith(NOT_REQUESTED)]
    if empty := [row for row in requested if row.reason]:
        if len(empty) == len(requested):
            raise ConfigError(f"rows: {empty[0].id}: {empty[0].reason}; {ADVICE}")
        for row in empty:
            print(f"{row.id} is left out: {row.reason}", flush=True)


def _cell(
    config: ExperimentConfig, plan: ModelPlan, row: Row, seed: int, lake: str, release: int, parent: TrainingJob | None
) -> TrainingJob:
    where: dict[str, str | None] = {"domain": config.target, "split": config.split}
    given = plan.settings_of(row.transfer)
    changed: dict[str, Any] = {"freeze": (), "model": _network(given, row)}
    if row.kind == "extra":
        changed["task"] = _task(plan, row.task)
    if row.kind == "joint":  # of both domains' size: trained as long as pre-training is
        where = {"domain": DOMAIN_ALL, "split": config.joint_split, "ranked": config.target}
        changed["train"] = plan.pretrain.train
    changed["data"] = replaced(given.data, **where)
    settings = with_transfer(given, row.transfer, str(parent.folder / "model") if parent else None, **changed)
    name = _cell_name(row, seed)
    return TrainingJob(name, "finetune", _placed(settings, config, name, seed, lake, release), parent)


def _custom_cell(
    config: ExperimentConfig, row: Row, seed: int, lake: str, release: int, pretrained: dict[str, TrainingJob]
) -> TrainingJob:
    """The cell of a row of `grid` or `custom`; rows whose sections `pretrain` are equal share that cell."""
    plan, parent = config.more_rows[row.id], None
    if plan.pretrain is not None:
        name = f"custom-pretrain-{config_hash(plan.pretrain)[:8]}-{seed}"
        if name not in pretrained:
            pretrained[name] = TrainingJob(name, "pretrain", _placed(plan.pretrain, config, name, seed, lake, release))
        parent = pretrained[name]
    if plan.finetune is None:
        assert parent is not None
        return parent
    folder = str(parent.folder / "model") if parent else None
    settings = replaced(plan.finetune, parent=folder)
    name = _cell_name(row, seed)
    return TrainingJob(name, "finetune", _placed(settings, config, name, seed, lake, release), parent)


def _cell_name(row: Row, seed: int) -> str:
    return f"{row.id.replace('/', '-').replace('---', '-')}-{seed}"


def _network(section: PretrainConfig, row: Row) -> ModelConfig:
    """The section's model as it is, or without metadata."""
    return section.model if row.knowledge else replaced(section.model, knowledge={})


def _task(plan: ModelPlan, kind: str | None) -> TaskConfig:
    return next(task for task in plan.pretrain_tasks if task.kind == kind)


def _placed(
    section: PretrainConfig, config: ExperimentConfig, name: str, seed: int, lake: str, release: int
) -> PretrainConfig:
    data = replaced(section.data, lake=lake, release=release)
    runtime = replaced(section.runtime, threads=config.threads, progress=False)
    return replaced(
        section,
        name=name,
        output=str(config.folder / "cells"),
        data=data,
        runtime=runtime,
        train=replaced(section.train, seed=seed),
        tracking=config.tracking,
    )


def training_jobs(rows: Sequence[Row]) -> list[TrainingJob]:
    """Every cell once: pre-training before the fine-tuning that needs it, and the first seed of all rows before the
    second, so that an interrupted experiment has complete tables of fewer seeds."""
    found: dict[int, TrainingJob] = {}
    for seed in sorted({seed for row in rows for seed in row.trainings}):
        own = [row.trainings[seed] for row in rows if seed in row.trainings]
        for training in [*(training.parent for training in own if training.parent), *own]:
            found.setdefault(id(training), training)
    return list(found.values())
