"""The plan of an experiment on features: which features, on which slices, in three arms: none, real, shuffled.

Each split that a slice names is an experiment of its own (`trainer.experiment.plan`), a row for each arm and transfer:
the same model, settings and seeds, that differ in `model.features` alone.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from etl.config import EtlConfig
from etl.settings import FileName, Place, Section, replaced
from trainer.config import (
    BaselinesConfig,
    EvaluationConfig,
    FeaturesConfig,
    ItemFeaturesConfig,
    JoinedFeaturesConfig,
    ModelConfig,
    PretrainConfig,
    TrackingConfig,
    UserFeaturesConfig,
)
from trainer.evaluation.three_arms import LEVEL
from trainer.experiment.plan import ExperimentConfig
from trainer.experiment.rows import LABELS, GridPlan, rows_of_grid

Arm = Literal["none", "real", "shuffled"]
Range = tuple[int, int | None]  # least and most, both included; None: any
ANY: Range = (0, None)
NONE: Arm = "none"


class SliceConfig(Section):
    """Held-out items and users that are looked at by themselves."""

    split: str | tuple[str, ...] = "last-5"  # several (draws of cold items): users of all, side by side
    # cold, warm: of a split with cold items, these among each other; full: all held-out items among all.
    protocol: Literal["full", "cold", "warm"] = "full"
    items: Range = ANY  # interactions of a held-out item in the domain's training part; each is ranked alone
    users: Range = ANY  # events of a user in the domain's training part

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,) if isinstance(self.split, str) else self.split

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> "SliceConfig":
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"split: expected different ones, at least one, found {', '.join(self.splits) or 'none'}")
        for name, (least, most) in (("items", self.items), ("users", self.users)):
            if least < 0 or (most is not None and most < least):
                raise ValueError(f"{name}: expected [least, most], both 0 and more, found [{least}, {most}]")
        return self


class ArmsConfig(Section):
    """What is compared, on what data. Lake, domains, seeds, names and folders are set here, not in the sections."""

    name: FileName = "features"
    runs: str = "runs"  # the experiment's folder is <runs>/<name>
    etl: EtlConfig | None = None  # makes the tables; or, in its place:
    lake: Place | None = None  # … a lake that is there
    release: int | None = None  # of that lake, where no `vectors` are made; None: the newest
    source: str = "source"  # pre-trained on, for transfer
    target: str = "target"  # ranked
    # Domain whose events models read, which predict the target's items (preset.data.predicted); None: the target. `all`
    # is for users who are new in the target.
    reads: str | None = None
    vectors: dict[str, FeaturesConfig] = Field(default_factory=dict)  # encoder -> what makes its vectors
    # What is compared, by name: `model.features` of the arm `real`, whose twin exchanges them among items; and
    # `model.user_features`, exchanged among users.
    features: dict[FileName, ItemFeaturesConfig] = Field(default_factory=dict)
    user_features: dict[FileName, UserFeaturesConfig] = Field(default_factory=dict)
    # (features, those that they are compared with), arms `real` of both.
    pairs: tuple[tuple[str, str], ...] = ()
    preset: PretrainConfig  # of all trainings, without features
    transfers: tuple[Literal["none", "deep"], ...] = ("none",)  # deep: pre-trained on the source with the same features
    slices: dict[str, SliceConfig] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=2)
    part: Literal["validation", "test"] = "test"
    metric: str = "NDCG@10"
    level: float = Field(LEVEL, gt=0, lt=1)  # of each test
    evaluation: EvaluationConfig = EvaluationConfig(protocols=("full",))
    baselines: BaselinesConfig = BaselinesConfig()
    jobs: int | None = Field(None, ge=1, le=4_096)  # trainings at a time; None: cores / threads
    threads: int = Field(1, ge=1, le=4_096)  # of each training
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for one in self.slices.values() for split in one.splits))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Of all items' features, each once."""
        return tuple(dict.fromkeys(name for given in self.features.values() for name in given.encoders))

    @property
    def compared(self) -> dict[str, JoinedFeaturesConfig]:
        """All features by name, of items and of users."""
        return {**self.features, **self.user_features}

    @property
    def arms(self) -> dict[str, ModelConfig]:
        """Name of each arm -> its network."""
        found: dict[str, ModelConfig] = {NONE: self.preset.model}
        for name, given in self.compared.items():
            setting = "features" if name in self.features else "user_features"
            for arm in ("real", "shuffled"):
                own = replaced(given, shuffled=arm == "shuffled")
                found[f"{name}.{arm}"] = replaced(self.preset.model, **{setting: own})
        return found

    @model_validator(mode="after")
    def _can_be_run(self) -> "ArmsConfig":
        if (self.etl is None) == (self.lake is None):
            raise ValueError("expected one of etl, which makes tables, and lake, where there are some")
        if self.preset.model.features.given or self.preset.model.user_features.given:
            raise ValueError("preset.model.features: expected none, which is an arm, found some; move them to features")
        if not self.compared or (
            twice := {NONE} & self.compared.keys() | self.features.keys() & self.user_features.keys()
        ):
            found = ", ".join(sorted(twice)) if self.compared else "none at all"
            raise ValueError(f"features: expected different names, none of them {NONE}, found {found}; name some")
        for name, given in self.compared.items():
            if not given.given or given.shuffled:
                found = "shuffled ones" if given.shuffled else "none"
                raise ValueError(f"features.{name}: expected encoders or a document, unshuffled, found {found}")
        if unknown := {name for pair in self.pairs for name in pair} - set(self.compared):
            raise ValueError(f"pairs: expected names in features ({', '.join(self.compared)}), found {min(unknown)!r}")
        if self.reads is not None and self.transfers != ("none",):
            raise ValueError(
                "reads: expected transfers [none] beside it, which reads one domain; leave one of both out"
            )
        if self.release is not None and self.vectors:
            raise ValueError("release: expected none beside vectors, which make a newer one; leave one of both out")
        if self.etl and (missing := set(self.splits) - {split.name for split in self.etl.splits}):
            raise ValueError(f"etl.splits: expected {', '.join(sorted(missing))} among them; add it, or mend the slice")
        return self


def arm_of(features: str, arm: Arm) -> str:
    return NONE if arm == NONE else f"{features}.{arm}"


def row_of(arm: str, transfer: str) -> str:
    """Id of an arm's row."""
    return arm if transfer == "none" else f"{arm}-{transfer}"


def experiment_of(config: ArmsConfig, split: str, lake: str, release: int) -> ExperimentConfig:
    """The trainings on one split."""
    grid = {
        name: GridPlan(
            label=name,
            preset=replaced(config.preset, model=model),
            transfers=config.transfers,
        )
        for name, model in config.arms.items()
    }
    return ExperimentConfig(
        name=split,
        runs=str(config.folder),
        lake=lake,
        release=release,
        source=config.source,
        target=config.target,
        split=split,
        part=config.part,
        joint=False,
        custom=rows_of_grid(grid, config.source, config.reads or config.target, split),
        seeds=config.seeds,
        evaluation=config.evaluation,
        baselines=replaced(config.baselines, encoders=config.baselines.encoders or config.encoders),
        jobs=config.jobs,
        threads=config.threads,
        tracking=config.tracking,
    )


def placed_vectors(config: ArmsConfig, lake: str) -> list[FeaturesConfig]:
    """What makes the vectors, in the lake and under the names that the settings give."""
    found = []
    for name, given in config.vectors.items():
        run = given.graph or given.social
        if run is None:
            own = {"name": given.name or name, "lake": lake, "release": None}
            found.append(replaced(given, **own, tracking=config.tracking))
            continue
        placed = replaced(
            run,
            name=name if run.name == type(run)().name else run.name,
            data=replaced(run.data, lake=lake, release=None),
            output=str(config.folder / "vectors" / name),
            tracking=config.tracking,
        )
        found.append(replaced(given, **{"social" if given.graph is None else "graph": placed}))
    return found


def title_of(transfer: str) -> str:
    return LABELS["deep"] if transfer == "deep" else LABELS["none"]
