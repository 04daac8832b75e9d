"""The main job: raw log → tables → pre-train → fine-tune by each transfer → evaluate → registry → recommendations.

    python mlflow_projects/pipeline.py --config pipeline/demo [--data FOLDER] [--section.key value …]

Every step is a child of one MLflow run. Trainings run side by side, one process each. A step whose inputs, settings and
code are unchanged says so and is skipped: the recipes decide that themselves. A pipeline has one source domain and any
number of target domains, each with a registered model of its own; without a source domain nothing is transferred, and
models are compared with baselines and champion. Exit codes: 0; 2 for a mistake in settings or data; 3 where the gate
refuses a candidate; 4 where a loss is not a number; 5 where another pipeline is at work in the same folder; 143 stopped
by a signal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cells import Cell
from pydantic import Field, model_validator

from etl.command import CommandParser, configurations, run_command
from etl.config import (
    EtlConfig,
    FileName,
    GraftrecError,
    KnowledgeConfig,
    MovielensSource,
    Section,
    SplitConfig,
    load,
    replaced,
)
from etl.tables import DOMAIN_ALL, RECOMMENDATIONS
from trainer.config import (
    RANKING_TASKS,
    ConfigError,
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

if TYPE_CHECKING:
    from trainer.data.dataset import Release
    from trainer.evaluate import EvaluationReport

SCORE = "validation/NDCG@10"  # chooses the candidate; test numbers choose nothing
SCRATCH: TransferName = "none"
READS_ALL = "all-domains"  # label of the model that reads every domain and predicts the target's items
COLD = "cold-users"  # the same, trained without the target history of some users, on whom it is evaluated
COLD_SHARE = 0.1
REFUSED = 3


class PipelineConfig(Section):
    """A configuration for each step, and the transfers and seeds that fine-tuning is repeated for.

    What flows from one step to the next (lake, release, model folders, names) is set here, whatever the sections say.
    """

    name: FileName = "pipeline"
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
    jobs: int | None = Field(None, ge=1)  # trainings side by side; None: one a core, on a GPU one
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _ranks_items(self) -> "PipelineConfig":
        if others := [part.task.kind for part in (self.pretrain, self.finetune) if part.task.kind not in RANKING_TASKS]:
            raise ValueError(f"expected tasks that rank items for sequences, found {others[0]}; run steps one by one")
        return self

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


@dataclass(frozen=True)
class Outcome:
    """Results of one target domain."""

    target: str
    report: "EvaluationReport"
    table: str
    refusal: str  # "": promoted
    lines: list[str]  # what to do after a refusal; champion, recommendations


# --- the plan ---------------------------------------------------------------------------------------------------------


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
    if source is not None and source not in known:
        raise ConfigError(
            f"source: expected one of the log's domains ({', '.join(known)}), found {source!r}; mend the "
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
    if targets == (source,) and ((config.source is None and len(names) == 1) or set(config.transfers) == {SCRATCH}):
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
    _split_named(splits, config.finetune.data.split, "finetune.data.split")
    if source is not None:
        _split_named(splits, config.pretrain.data.split, "pretrain.data.split")
    joint: dict[str, str] = {}
    cold: dict[str, str] = {}
    if config.reads_all and len(names) > 1:  # of all domains: tables stay as they are where targets change
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
    from trainer.empty_transfer import ADVICE, empty_by_settings

    reasons = {name: empty_by_settings(with_transfer(config.finetune, name, "parent")) for name in transfers}
    left = tuple(name for name in transfers if not reasons[name])
    notes = tuple(f"{name} is left out: {reason}" for name, reason in reasons.items() if reason)
    if notes and set(left) <= {SCRATCH}:
        raise ConfigError(f"transfers: {'; '.join(filter(None, reasons.values()))}; {ADVICE}")
    return left, notes


def without_empty(config: PipelineConfig, planned: Plan, release: "Release") -> Plan:
    """As planned, but for transfers that would copy nothing on this release: a line is printed on each. Raises
    ConfigError where of a target's transfers none but from-scratch would remain."""
    from trainer.empty_transfer import ADVICE, empty_by_data

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
    from trainer.gate import check_gate

    cells_of(config, planned, release=1)

    has_scratch = SCRATCH in planned.transfers and len(planned.transfers) + len(planned.joint_splits) > 1
    check_gate(
        config.promote.gate,
        task=config.finetune.task,
        seeds=config.seeds,
        transferred=planned.source is not None,
        has_scratch=has_scratch,
        baselines=config.promote.baselines,
    )


def detectable_gains(config: PipelineConfig, planned: Plan, release: "Release") -> list[str]:
    """A line for each target: the smallest gain that its seeds and users can show."""
    from trainer.data.dataset import SequenceDataset
    from trainer.stats import detectable_text

    lines = []
    for target in planned.targets:
        users = SequenceDataset(release, config.finetune.data.split, target).num_rows
        text = detectable_text(len(config.seeds), max(users, 2), level=config.promote.gate.level)
        lines.append(f"{target}: {text} (typical spreads; p ≤ {config.promote.gate.level:g})")
    return lines


# --- the steps --------------------------------------------------------------------------------------------------------


def run(config: PipelineConfig) -> int:
    """Run all steps and print the results. Returns the exit code: 0, or 3 if the gate refuses a candidate.

    Raises RunAgain where another pipeline is at work in the same folder.
    """
    from alone import alone

    config, planned = plan(config)
    check_plan(config, planned)
    with alone(Path(config.runs), "pipeline"):
        return _run(config, planned)


def _run(config: PipelineConfig, planned: Plan) -> int:
    import cells as runner

    from trainer import evaluate as evaluation
    from trainer import tracking
    from trainer.data.dataset import pin

    begun = time.monotonic()
    runner.prepare()
    if planned.source is None:
        print("nothing is transferred: models are compared with the simple baselines and the champion", flush=True)
    for note in planned.notes:
        print(note, flush=True)
    tags = {"graftrec.recipe": "pipeline"}
    with tracking.start_run(config.tracking, name=config.name, resolved=config, tags=tags) as tracked:
        release = build_tables(config)
        pinned = pin(config.etl.lake, release)
        tracked.log_release(pinned, context="evaluation", tables=("sequences", "negatives"))
        planned = without_empty(config, planned, pinned)
        for line in detectable_gains(config, planned, pinned):
            print(line, flush=True)
        trained = train_all(config, planned, release, tracking.child_environment(tracked))
        outcomes = [conclude(config, planned, target, release, trained[target]) for target in planned.targets]
        for outcome in outcomes:
            tracked.set_tags({f"graftrec.gate.{outcome.target}": outcome.refusal or "promoted"})
        evaluation.show(
            tracked, {outcome.target: outcome.report for outcome in outcomes},
            notes={outcome.target: f"Gate: {outcome.refusal or 'passed'}." for outcome in outcomes},
        )  # fmt: skip
    print(f"\n== {config.name}, in {time.monotonic() - begun:.0f} s")
    for outcome in outcomes:
        print(f"\n{outcome.target}\n{outcome.table}\n")
        print(f"gate             {f'refused: {outcome.refusal}' if outcome.refusal else 'passed'}")
        for line in outcome.lines:
            print(line)
    print(f"MLflow page      {page_command()}", flush=True)
    return REFUSED if any(outcome.refusal for outcome in outcomes) else 0


def build_tables(config: PipelineConfig) -> int:
    """Run the ETL; gives the release that everything after reads."""
    import run_etl

    with step("tables"):
        return run_etl.run(config.etl, config.tracking)


def train_all(
    config: PipelineConfig, planned: Plan, release: int, environment: dict[str, str]
) -> dict[str, list[Trained]]:
    """Pre-train, and fine-tune by every transfer and seed, side by side; gives the models of each target.

    The model that is measured on users new in the target is left out where the log has too few of them. Raises
    TrainingFailed for any other training without a model.
    """
    import cells as runner

    cells, of_target = cells_of(config, planned, release)
    with step("train"):
        runner.run(cells, folder=Path(config.runs), jobs=jobs_of(config, len(cells)), environment=environment)
    unmeasured = {
        id(cell)
        for of_label in of_target.values()
        for (label, _), cell in of_label.items()
        if label == COLD and cell.exit_code == GraftrecError.exit_code  # the log has no such users, or too few
    }
    if failed := next((cell for cell in cells if cell.failure and id(cell) not in unmeasured), None):
        raise TrainingFailed(f"{failed.name}: {failed.failure}", failed.exit_code)
    return {
        target: [
            Trained(label, seed, cell.model, cell.metrics[SCORE])
            for (label, seed), cell in of_label.items()
            if cell.metrics is not None
        ]
        for target, of_label in of_target.items()
    }


class TrainingFailed(GraftrecError):
    """A training of the pipeline that gave no model; ends with that training's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def cells_of(
    config: PipelineConfig, planned: Plan, release: int
) -> tuple[list[Cell], dict[str, dict[tuple[str, int], Cell]]]:
    """All trainings, parents first; and those of each target by label and seed."""
    parents: dict[int, Cell] = {}
    if planned.source is not None:
        for seed in config.seeds if config.pretrain_each_seed else config.seeds[:1]:
            parents[seed] = Cell(f"pretrain-{seed}", "pretrain", pretrain_config(config, planned, release, seed))
    of_target: dict[str, dict[tuple[str, int], Cell]] = {}
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
                found[label, seed] = Cell(made.name, "finetune", made, parent)
    fine_tuned = [cell for of_label in of_target.values() for cell in of_label.values()]
    return [*parents.values(), *fine_tuned], of_target


def jobs_of(config: PipelineConfig, trainings: int) -> int:
    """How many trainings run side by side."""
    import torch

    from trainer.cores import usable_cores

    device = config.finetune.runtime.device
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return config.jobs or 1
    return config.jobs or max(1, min(trainings, usable_cores() // (config.finetune.runtime.threads or 1)))


def conclude(config: PipelineConfig, planned: Plan, target: str, release: int, every: Sequence[Trained]) -> Outcome:
    """Evaluate the models of one target domain, ask the gate, write recommendations."""
    heading = f" {target}" if len(planned.targets) > 1 else ""
    trained = [model for model in every if model.label != COLD]
    with step(f"evaluate{heading}"):
        report = evaluate(config, target, release, trained)
    with step(f"promote{heading}"):
        refusal, steps = promote(config, target, release, trained, results=report.folder)
    lines = [f"{'what now' if not place else '':<17}{line}" for place, line in enumerate(steps)]
    if target in planned.cold_splits:
        with step(f"users new in {target}"):
            cold = next((model for model in every if model.label == COLD), None)
            lines += companion(config, planned, target, release, cold, trained)
    lines += recommend(config, target, release)
    return Outcome(target, report, gain_table(report.rows), refusal, lines)


def companion(
    config: PipelineConfig, planned: Plan, target: str, release: int, cold: Trained | None, trained: Sequence[Trained]
) -> list[str]:
    """Evaluate a model that reads all domains on users whose whole target history was held out. If it is significantly
    better than popularity, which they are served otherwise, register the model trained on all users at the alias
    `companion`. Returns lines on the result."""
    import pyarrow.parquet as pq
    from companion import over_popularity

    from trainer import evaluate
    from trainer.ranking import convention_of
    from trainer.registry import COMPANION, Registry

    heading = f"new in {target:<9}"
    if cold is None:
        return [f"{heading} not measured: the log has too few users whose first events are in other domains"]
    report = evaluate.run(cold_config(config, planned, target, release, cold))
    gate = config.promote.gate
    found = pq.read_table(report.folder / evaluate.USERS).to_pandas()
    convention, metric = convention_of(gate.metric)
    found = found[(found["protocol"] == gate.protocol) & (found["convention"] == convention)]
    by_label = {label: part.set_index("user")[metric] for label, part in found.groupby("label")}
    own = by_label[READS_ALL]
    baselines = dict.fromkeys(row["label"] for row in report.rows if not row["is_model"])  # of equal ones the first
    verdict = over_popularity(
        own.to_numpy(), {label: by_label[label].loc[own.index].to_numpy() for label in baselines}, gate
    )
    text = f"{heading} {verdict.text}"
    beside = [f"{'':<17}{verdict.beside}"] if verdict.beside else []
    if not config.tracking.enabled:
        return [text, *beside]
    registry = Registry(registered_model(config, target), family=config.registered_model)
    if not verdict.is_better:
        if registry.find(COMPANION) is not None:
            registry.drop_alias(COMPANION)
        return [f"{text}: popular items", *beside]
    model = max((one for one in trained if one.label == READS_ALL), key=lambda one: one.score)
    version = registry.register(model.model, alias=COMPANION)
    return [f"{text}: {version.label}, @{COMPANION}", *beside]


def evaluate(config: PipelineConfig, target: str, release: int, trained: Sequence[Trained]) -> "EvaluationReport":
    """Score all models beside the baselines."""
    from trainer import evaluate

    return evaluate.run(evaluate_config(config, target, release, trained))


def promote(
    config: PipelineConfig, target: str, release: int, trained: Sequence[Trained], *, results: Path
) -> tuple[str, Sequence[str]]:
    """Register the candidate and ask the gate; gives its reason to refuse, "" where it agrees, and what to do then."""
    from trainer import promote
    from trainer.gate import next_steps
    from trainer.hints import recommend_command

    try:
        promote.run(promote_config(config, target, release, trained))
    except promote.GateRefused as refusal:
        again = replaced(
            recommend_config(config, target, release), model=refusal.model, release=None,
            replace=refusal.champion is not None,
        )  # fmt: skip
        steps = next_steps(
            refusal.decision, recommend=recommend_command(again), champion=refusal.champion, results=str(results)
        )
        return str(refusal), steps
    return "", ()


def recommend(config: PipelineConfig, target: str, release: int) -> list[str]:
    """Write the champion's recommendations; gives lines on the champion and on what was written."""
    from trainer import recommend
    from trainer.registry import CHAMPION, Registry

    if not config.tracking.enabled:
        return []
    champion = Registry(registered_model(config, target)).find(CHAMPION)
    if champion is None:
        return ["champion         none yet, so no recommendations are written"]
    with step(f"recommend {target}"):
        written = recommend.run(recommend_config(config, target, release))
    made = f"{written.rows:,} rows" if written.committed else "unchanged"
    return [
        f"champion         {champion.label} (models:/{champion.name}@{CHAMPION})",
        f"recommendations  {config.etl.lake}/{RECOMMENDATIONS.name}, version {written.version}: {made}",
    ]


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


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Models, best baseline and popularity under the first protocol: the gate's metric with its gain over from-scratch
    and p-value, then the means of the other metrics."""
    from trainer.baseline_names import POPULARITY
    from trainer.stats import gain_text, p_text

    shown = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
    first, *others = dict.fromkeys(row["metric"] for row in shown)
    cells = {(row["label"], row["metric"]): row for row in shown}
    labels = [row["label"] for row in shown if row["is_model"] and row["metric"] == first]
    baselines = [row for row in shown if not row["is_model"] and row["metric"] == first]
    best = max(baselines, key=lambda row: row["mean"], default=None)
    labels += [best["label"]] if best is not None else []
    labels += [row["label"] for row in baselines if row["label"] == POPULARITY and row is not best]
    table = [["model", first, "gain", "p", *others]]
    for label in labels:
        row = cells[label, first]
        gain = gain_text(row["gain"]["gain"], row["gain"]["relative_gain"]) if row["gain"] else ""
        means = [f"{cells[label, name]['mean']:.4f}" for name in others]
        name = label + (" *" if row["is_candidate"] else "")
        table.append([name, f"{row['mean']:.4f}", gain, p_text(row["p_value"]), *means])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "    ".join(
            [f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(line, widths[1:], strict=True))]
        )
        for name, *line in table
    ]
    lines = [line.rstrip() for line in lines]
    if any(row["is_candidate"] for row in shown):
        lines.append("* candidate: best on the validation part; its p is the gate's, the others' are adjusted (Holm)")
    return "\n".join(lines)


def page_command() -> str:
    """What opens the MLflow page of the store in use."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        return f"it is served at {uri}"
    return "make page, then http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


# --- what each step is given ------------------------------------------------------------------------------------------


def pretrain_config(config: PipelineConfig, planned: Plan, release: int, seed: int) -> PretrainConfig:
    placed = _placed(config.pretrain, config, release, f"pretrain-{seed}", seed, {"domain": planned.source})
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
    placed = _placed(config.finetune, config, release, f"{target}/{label}-{seed}", seed, data)
    return with_transfer(config.finetune, transfer, str(parent) if parent else None, **placed)


def _placed(
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
    from trainer.evaluate import ITEM_METRICS

    models = tuple(EvaluatedModel(model=str(one.model), label=one.label, seed=one.seed) for one in trained)
    candidate, gate = choose(trained)[0].label, config.promote.gate
    protocols = tuple(dict.fromkeys([gate.protocol, *config.evaluate.evaluation.protocols]))
    return replaced(
        config.evaluate,
        model=None,
        models=models,
        candidate=candidate if candidate != SCRATCH else None,
        metrics=tuple(dict.fromkeys([gate.metric, *(config.evaluate.metrics or ITEM_METRICS)])),
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


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print a heading, and how long the step took."""
    print(f"\n== {name}", flush=True)
    begun = time.monotonic()
    yield
    print(f"-- {name}: {time.monotonic() - begun:.0f} s", flush=True)


def movielens_in(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """Take the log from `folder`, and of the knowledge files those that are there; without any, models do without."""
    if not isinstance(config.etl.source, MovielensSource):
        raise GraftrecError(
            f"--data is for MovieLens-1M, found a source {config.etl.source.kind}; set --etl.source.root"
        )
    etl = movielens_etl(config.etl, folder)
    update: dict[str, Section] = {"etl": etl}
    if not etl.knowledge.files:
        for name, section in (("pretrain", config.pretrain), ("finetune", config.finetune)):
            update[name] = replaced(section, model=replaced(section.model, knowledge={}))
    return replaced(config, **update)


def movielens_etl(etl: EtlConfig, folder: Path) -> EtlConfig:
    """The log in `folder`, and of the knowledge files those that are there."""
    files = []
    for file in etl.knowledge.files:
        places = [folder / Path(file.path).name, folder.parent / file.path]
        if found := next((place for place in places if place.is_file()), None):
            files.append(replaced(file, path=str(found.resolve())))
        else:
            print(f"no {places[1]}: the models get no directors and actors from {file.name}")
    source = replaced(etl.source, root=str(folder))
    return replaced(etl, source=source, knowledge=KnowledgeConfig(root=str(folder), files=tuple(files)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        "pipeline.py",
        description=f"From a raw log to recommendations.\n\n{configurations('pipeline')}",
        settings=PipelineConfig,
    )
    parser.add_argument("--config", required=True, help="a name under conf/ or a YAML file, e.g. pipeline/demo")
    parser.add_argument("--data", type=Path, help="MovieLens-1M: the folder of ratings.dat, movies.dat, users.dat")
    known, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        config = load(PipelineConfig, known.config, overrides)
        return run(movielens_in(config, known.data) if known.data else config)

    return run_command("pipeline", work)


if __name__ == "__main__":
    stopping.leave(main())
