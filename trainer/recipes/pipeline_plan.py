"""What a pipeline will do: its settings, and the configuration of each step."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from etl.config import EtlConfig, SplitConfig
from etl.settings import ConfigError, FileName, Section, replaced
from etl.tables import DOMAIN_ALL
from trainer.config import (
    EvaluateConfig,
    EvaluatedModel,
    FinetuneConfig,
    PretrainConfig,
    PromoteConfig,
    RecommendConfig,
    RuntimeConfig,
    TrackingConfig,
    TransferName,
    with_transfer,
)
from trainer.config.data import READS_ALL
from trainer.recipes.training_jobs import TrainingJob

if TYPE_CHECKING:
    from trainer.data.release import Release


SCRATCH: TransferName = "none"
COLD = "cold-users"  # the same, trained without the target history of some users, on whom it is evaluated
COLD_SHARE = 0.1
CONTINUED = "continued"  # label of a model that went on from the champion's weights


class DailyConfig(Section):
    """What `mode: daily` does beside tables and recommendations: training goes on from the champion's weights."""

    # So many days after the release that the champion was trained on was made; None: never.
    retrain_days: float | None = Field(7, ge=0)
    epochs: int = Field(2, ge=1)  # over the newest release: users' earlier events are replayed beside their new ones
    learning_rate_factor: float = Field(0.5, gt=0, le=1)  # of finetune.train's: the weights are near where they will be


class PipelineConfig(Section):
    """A configuration for each step, and the transfers and seeds that fine-tuning is repeated for.

    What flows from one step to the next (lake, release, model folders, names) is set here, whatever the sections say.
    """

    LATER: ClassVar = ("mode", "daily")

    name: FileName = "pipeline"
    # full: tables, trainings, gate, recommendations. daily: tables, recommendations by the present champion for users
    # with new events, and, when it is due, continued training.
    mode: Literal["full", "daily"] = "full"
    daily: DailyConfig = DailyConfig()
    runs: str = "runs"  # folder of the training runs, their evaluation and the gate's decision
    registered_model: FileName = "graftrec"  # each target domain's is <registered_model>-<domain>
    etl: EtlConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    promote: PromoteConfig  # no default: the gate's thresholds are data in conf/
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()
    source: str | None = None  # domain that is pre-trained on; None: pretrain.data.domain
    targets: tuple[str, ...] = ()  # domains that are transferred to; (): finetune.data.domain, or the only one there is
    transfers: tuple[TransferName, ...] = ("none", "shallow", "deep")
    reads_all: bool = True  # beside them a model that reads all domains and predicts the target's items
    # Evaluate that on users who are new in the target; if it beats popularity there, it answers for them.
    cold_users: bool = True
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pretrain_each_seed: bool = False  # False: one pre-trained model, of the first seed, under all of them
    jobs: int | None = Field(None, ge=1, le=4_096)  # trainings side by side; None: one a core, on a GPU one
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _each_once(self) -> "PipelineConfig":
        for name, given in (("targets", self.targets), ("transfers", self.transfers), ("seeds", self.seeds)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, found {', '.join(map(str, given))}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one, found none")
        return self


@dataclass(frozen=True)
class Plan:
    """Which domains are read, and which predicted."""

    source: str | None  # None: nothing is transferred
    targets: tuple[str, ...]
    transfers: tuple[TransferName, ...]
    # Of each domain but the source: the split whose domain `all` holds out its items, and the one that holds out users.
    joint_splits: dict[str, str]
    cold_splits: dict[str, str]
    empty: frozenset[tuple[str, str]] = frozenset()  # target and transfer: those that would copy nothing
    notes: tuple[str, ...] = ()  # on transfers that are left out


@dataclass(frozen=True)
class Trained:
    """One fine-tuned model. `label`: its transfer, READS_ALL or COLD."""

    label: str
    seed: int
    model: Path
    score: float  # on the validation part


def plan(config: PipelineConfig) -> tuple[PipelineConfig, Plan]:
    """Check source and targets against the log's domains; add the splits that they need to the configuration. Raises
    ConfigError."""
    names = [domain.name for domain in config.etl.domains]
    wanted = config.source or config.pretrain.data.domain
    source = wanted if len(names) > 1 or wanted in names else None
    if not names:
        targets = config.targets or (DOMAIN_ALL,)
    elif config.targets or config.finetune.data.domain in names:
        targets = config.targets or (config.finetune.data.domain,)
    elif len(names) == 1:
        targets = (names[0],)
    else:
        targets = (config.finetune.data.domain,)
    known = [*names, DOMAIN_ALL]
    named = config.source if names and source is None else source
    if named is not None and named not in known:
        raise ConfigError(
            f"source: expected one of the log's domains ({', '.join(known)}), found {named!r}; mend the "
            "name, or set transfers to [none]"
        )
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(
            f"targets: expected domains of the log ({', '.join(known)}), found {', '.join(unknown)}; mend the names"
        )
    if unfit := [name for name in targets if not re.fullmatch(r"[^/:@\x00]{1,100}", name) or name in (".", "..")]:
        raise ConfigError(
            "targets: expected names that a folder and a registered model can have (none of / : @), found "
            f"{unfit[0]!r}; rename the domain"
        )
    if targets == (source,) and (len(names) == 1 or set(config.transfers) == {SCRATCH}):
        source = None  # the only domain there is, or nothing is to be transferred
    if source in targets:
        raise ConfigError(
            f"targets: expected domains other than {source!r}, which is pre-trained on, found {', '.join(targets)}; "
            "leave it out, or set source to another"
        )
    transfers = config.transfers if source is not None else (SCRATCH,)
    transfers, notes = _without_empty(config, transfers)
    if set(transfers) == {SCRATCH}:
        source = None
    splits: list[SplitConfig] = list(config.etl.splits)
    chooses = _split_named(splits, config.finetune.data.split, "finetune.data.split")
    if not chooses.has_validation:
        raise ConfigError(
            f"finetune.data.split: expected a split with a validation part, which chooses the candidate, found "
            f"{chooses.name!r}, which has none; name another one"
        )
    if source is not None:
        _split_named(splits, config.pretrain.data.split, "pretrain.data.split")
    joint: dict[str, str] = {}
    cold: dict[str, str] = {}
    if (
        config.reads_all and config.finetune.task.predicts_other_domains and len(names) > 1
    ):  # of all domains: tables stay as they are where targets change
        joint = {name: _joint_split(splits, config.finetune.data.split, name) for name in names if name != source}
        if config.cold_users:
            cold = {name: _cold_split(splits, name) for name in joint}
    etl = replaced(config.etl, splits=tuple(splits))
    return replaced(config, etl=etl), Plan(source, targets, transfers, joint, cold, notes=notes)


def _without_empty(
    config: PipelineConfig, transfers: tuple[TransferName, ...]
) -> tuple[tuple[TransferName, ...], tuple[str, ...]]:
    """The transfers that this model's settings leave something to copy for, and a note on each of the others. Raises
    ConfigError where none but from-scratch would remain."""
    from trainer.training.empty_transfer import ADVICE, empty_by_settings

    reasons = {name: empty_by_settings(with_transfer(config.finetune, name, "parent")) for name in transfers}
    left = tuple(name for name in transfers if not reasons[name])
    notes = tuple(f"{name} is left out: {reason}" for name, reason in reasons.items() if reason)
    if notes and set(left) <= {SCRATCH}:
        raise ConfigError(f"transfers: {'; '.join(filter(None, reasons.values()))}; {ADVICE}")
    return left, notes


def without_empty(config: PipelineConfig, planned: Plan, release: "Release") -> Plan:
    """As planned, but for transfers that would copy nothing on this release: a line is printed on each. Raises
    ConfigError where of a target's transfers none but from-scratch would remain."""
    from trainer.training.empty_transfer import ADVICE, empty_by_data

    empty = set()
    for target in planned.targets:
        reasons = {}
        for label in planned.transfers if planned.source is not None else ():
            made = finetune_config(config, planned, target, release.number, label, config.seeds[0], Path("parent"))
            if reason := empty_by_data(made, release, planned.source or ""):
                reasons[label] = reason
        left = set(planned.transfers) - set(reasons)
        if reasons and left <= {SCRATCH}:
            raise ConfigError(f"transfers: {'; '.join(reasons.values())}; {ADVICE}")
        for label, reason in reasons.items():
            print(f"{target}/{label} is left out: {reason}", flush=True)
            empty.add((target, label))
    return replace(planned, empty=frozenset(empty))


def _split_named(splits: list[SplitConfig], name: str, setting: str) -> SplitConfig:
    """Raises ConfigError where there is none of that name."""
    found = next((split for split in splits if split.name == name), None)
    if found is None:
        known = ", ".join(split.name for split in splits)
        raise ConfigError(f"{setting}: expected one of etl.splits ({known}), found {name!r}; mend the name")
    return found


def _joint_split(splits: list[SplitConfig], name: str, target: str) -> str:
    """The split like `name` with `joint_target`; added where there is none."""
    wanted = replaced(_split_named(splits, name, "finetune.data.split"), joint_target=target)
    for split in splits:
        if replaced(split, name=name) == wanted:
            return split.name
    splits.append(replaced(wanted, name=f"{name}-joint-{target}"))
    return splits[-1].name


def _cold_split(splits: list[SplitConfig], target: str) -> str:
    """The causal split that holds out whole users of the target; added where there is none."""
    for split in splits:
        if split.cold_users is not None and split.joint_target == split.causal_target == target:
            return split.name
    name = f"{COLD}-{target}"
    splits.append(SplitConfig(name=name, cold_users=COLD_SHARE, joint_target=target, causal_target=target))
    return name


def check_plan(config: PipelineConfig, planned: Plan) -> None:
    """Check every training's settings, and the gate's, before anything is done. Raises GraftrecError where settings
    don't go together, or the gate could never pass."""
    from trainer.evaluation.gate import check_gate

    training_jobs(config, planned, release=1)

    has_scratch = SCRATCH in planned.transfers and len(planned.transfers) + len(planned.joint_splits) > 1
    check_gate(
        config.promote.gate,
        task=config.finetune.task,
        seeds=config.seeds,
        transferred=planned.source is not None,
        has_scratch=has_scratch,
        baselines=config.promote.baselines,
    )


def training_jobs(
    config: PipelineConfig, planned: Plan, release: int
) -> tuple[list[TrainingJob], dict[str, dict[tuple[str, int], TrainingJob]]]:
    """All trainings, parents first; and those of each target by label and seed."""
    parents: dict[int, TrainingJob] = {}
    if planned.source is not None:
        for seed in config.seeds if config.pretrain_each_seed else config.seeds[:1]:
            parents[seed] = TrainingJob(f"pretrain-{seed}", "pretrain", pretrain_config(config, planned, release, seed))
    of_target: dict[str, dict[tuple[str, int], TrainingJob]] = {}
    for target in planned.targets:
        labels: list[str] = [label for label in planned.transfers if (target, label) not in planned.empty]
        labels += [*([READS_ALL] if target in planned.joint_splits else [])]
        labels += [COLD] if target in planned.cold_splits else []
        found = of_target.setdefault(target, {})
        for label in labels:
            for seed in config.seeds if label != COLD else config.seeds[:1]:
                parent = None
                if label not in (SCRATCH, READS_ALL, COLD):
                    parent = parents.get(seed, parents[config.seeds[0]])
                made = finetune_config(config, planned, target, release, label, seed, parent.model if parent else None)
                found[label, seed] = TrainingJob(made.name, "finetune", made, parent)
    fine_tuned = [training for of_label in of_target.values() for training in of_label.values()]
    return [*parents.values(), *fine_tuned], of_target


def registered_model(config: PipelineConfig, target: str) -> str:
    return f"{config.registered_model}-{target}"


def choose(trained: Sequence[Trained]) -> list[Trained]:
    """The candidate, and then its replicas: the label with the best mean validation score, its best seed first.

    From-scratch is chosen only where there is nothing else; the gate then compares with baselines and champion.
    """
    by_label: dict[str, list[Trained]] = {}
    for model in [model for model in trained if model.label != SCRATCH] or trained:
        by_label.setdefault(model.label, []).append(model)
    best = max(by_label.values(), key=lambda models: sum(model.score for model in models) / len(models))
    return sorted(best, key=lambda model: -model.score)


def pretrain_config(config: PipelineConfig, planned: Plan, release: int, seed: int) -> PretrainConfig:
    placed = placed_section(config.pretrain, config, release, f"pretrain-{seed}", seed, {"domain": planned.source})
    return replaced(config.pretrain, **placed)


def finetune_config(
    config: PipelineConfig, planned: Plan, target: str, release: int, label: str, seed: int, parent: Path | None
) -> FinetuneConfig:
    """`label`: a transfer, or READS_ALL or COLD, which are trained from scratch."""
    data: dict[str, Any] = {"domain": target}
    transfer = label
    if label in (READS_ALL, COLD):
        split = (planned.joint_splits if label == READS_ALL else planned.cold_splits)[target]
        data = {"domain": DOMAIN_ALL, "predicted": target, "split": split}
        transfer = SCRATCH
    placed = placed_section(config.finetune, config, release, f"{target}/{label}-{seed}", seed, data)
    return with_transfer(config.finetune, transfer, str(parent) if parent else None, **placed)


def placed_section(
    section: PretrainConfig, config: PipelineConfig, release: int, name: str, seed: int, data: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a training that the pipeline sets."""
    return {
        "name": name,
        "output": config.runs,
        "data": replaced(section.data, lake=config.etl.lake, release=release, **data),
        "train": replaced(section.train, seed=seed),
        "runtime": replaced(section.runtime, progress=False, threads=section.runtime.threads or 1),
        "tracking": config.tracking,
    }


def _evaluated(
    config: PipelineConfig, release: int, name: str, split: str, target: str, runtime: RuntimeConfig
) -> dict[str, Any]:
    """Settings of an evaluation or promotion that the pipeline sets. Progress bars are for terminals."""
    return {
        "name": f"{target}/{name}",
        "output": config.runs,
        "lake": config.etl.lake,
        "release": release,
        "split": split,
        "domain": target,
        "runtime": replaced(runtime, progress=runtime.progress and sys.stderr.isatty()),
        "tracking": config.tracking,
    }


def evaluate_config(config: PipelineConfig, target: str, release: int, trained: Sequence[Trained]) -> EvaluateConfig:
    """The candidate's gain in the gate's metric is the one planned test."""
    from trainer.evaluation.evaluators import evaluator_of

    models = tuple(EvaluatedModel(model=str(one.model), label=one.label, seed=one.seed) for one in trained)
    candidate, gate = choose(trained)[0].label, config.promote.gate
    protocols = tuple(dict.fromkeys([gate.protocol, *config.evaluate.evaluation.protocols]))
    shown = evaluator_of(config.finetune.task).metrics_of(config.finetune.task).table
    return replaced(
        config.evaluate,
        model=None,
        models=models,
        candidate=candidate if candidate != SCRATCH else None,
        metrics=tuple(dict.fromkeys([gate.metric, *(config.evaluate.metrics or shown)])),
        evaluation=replaced(config.evaluate.evaluation, protocols=protocols),
        **_evaluated(config, release, "evaluate", config.finetune.data.split, target, config.evaluate.runtime),
    )


def cold_config(config: PipelineConfig, planned: Plan, target: str, release: int, cold: Trained) -> EvaluateConfig:
    model = EvaluatedModel(model=str(cold.model), label=READS_ALL, seed=cold.seed)
    protocols = (config.promote.gate.protocol,)
    return replaced(
        config.evaluate,
        model=None,
        models=(model,),
        evaluation=replaced(config.evaluate.evaluation, protocols=protocols),
        baselines=replaced(config.evaluate.baselines, enabled=True),
        **_evaluated(config, release, COLD, planned.cold_splits[target], target, config.evaluate.runtime),
    )


def promote_config(config: PipelineConfig, target: str, release: int, trained: Sequence[Trained]) -> PromoteConfig:
    candidate, *replicas = choose(trained)
    scratch = [one for one in trained if one.label == SCRATCH] if candidate.label != SCRATCH else []
    return replaced(
        config.promote,
        registered_model=registered_model(config, target),
        family=config.registered_model,
        candidate=str(candidate.model),
        replicas=tuple(str(one.model) for one in replicas),
        from_scratch=tuple(str(one.model) for one in scratch),
        **_evaluated(config, release, "promote", config.finetune.data.split, target, config.promote.runtime),
    )


def recommend_config(config: PipelineConfig, target: str, release: int) -> RecommendConfig:
    return replaced(
        config.recommend,
        registered_model=registered_model(config, target),
        model="champion",
        lake=config.etl.lake,
        release=release,
        domain=target,
        spark=config.etl.spark,
        tracking=config.tracking,
    )
