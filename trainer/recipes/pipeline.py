"""The main job: raw log → tables → pre-train → fine-tune by each transfer → evaluate → registry → recommendations.

    graftrec pipeline --config pipeline/demo [--data FOLDER] [--section.key value …]

Every step is a child of one MLflow run. Trainings run side by side, one process each. A step whose inputs, settings and
code are unchanged says so and is skipped: the recipes decide that themselves. A pipeline has one source domain and any
number of target domains, each with its registered model; without a source domain nothing is transferred, and
models are compared with baselines and champion. Exit codes: 0; 2 for a mistake in settings or data; 3 where the gate
refuses a candidate; 4 where a loss is not a number; 5 where another pipeline is running in the same folder; 143 stopped
by a signal.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.command import CommandParser, configurations, run_command
from etl.config import EtlConfig, KnowledgeConfig, MovielensSource, check_root
from etl.settings import GraftrecError, Section, load, replaced
from etl.tables import RECOMMENDATIONS
from etl.text_table import aligned
from trainer.config import RuntimeConfig
from trainer.config.data import READS_ALL

if TYPE_CHECKING:
    from trainer.data.release import Release
    from trainer.recipes.evaluate import EvaluationReport
from trainer.recipes.pipeline_plan import (
    COLD,
    PipelineConfig,
    Plan,
    Trained,
    check_plan,
    cold_config,
    evaluate_config,
    plan,
    promote_config,
    recommend_config,
    registered_model,
    training_jobs,
    without_empty,
)

REFUSED = 3


@dataclass(frozen=True)
class Outcome:
    """Results of one target domain."""

    target: str
    report: "EvaluationReport"
    table: str
    refusal: str  # "": promoted
    lines: list[str]  # what to do after a refusal; champion, recommendations


def detectable_gains(config: PipelineConfig, planned: Plan, release: "Release") -> list[str]:
    """A line for each target: the smallest gain that its seeds and users can show."""
    from trainer.data.baskets import open_dataset
    from trainer.data.held_out import num_evaluated
    from trainer.data.sequences import SequenceDataset
    from trainer.evaluation.significance import detectable_text

    lines, task, split = [], config.finetune.task, config.finetune.data.split
    for target in planned.targets:
        if task.scores_items and open_dataset(task.needs.table, release, split, target).has_negatives:
            users = num_evaluated(release, split, target, config.promote.part)
        else:
            users = SequenceDataset(release, split, target).num_rows
        text = detectable_text(len(config.seeds), max(users, 2), level=config.promote.gate.level)
        lines.append(f"{target}: {text} (typical spreads; p ≤ {config.promote.gate.level:g})")
    return lines


def run(config: PipelineConfig) -> int:
    """Run all steps and print the results. Returns the exit code: 0, or 3 if the gate refuses a candidate.

    Raises RunAgain where another pipeline is running in the same folder.
    """
    from trainer.recipes.alone import alone

    config, planned = plan(config)
    if config.mode == "full":
        check_plan(config, planned)
    check_root(config.etl.source, "etl.source.root")
    with alone(Path(config.runs), "pipeline"):
        if config.mode == "daily":
            from trainer.recipes import daily

            return daily.run(config, planned)
        return _run(config, planned)


def _run(config: PipelineConfig, planned: Plan) -> int:
    from trainer import tracking
    from trainer.data.release import pin
    from trainer.recipes import evaluate as evaluation
    from trainer.recipes import training_jobs as runner

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
            tracked,
            {outcome.target: outcome.report for outcome in outcomes},
            notes={outcome.target: f"Gate: {outcome.refusal or 'passed'}." for outcome in outcomes},
        )
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
    from trainer.recipes import run_etl

    with step("tables"):
        return run_etl.run(config.etl, config.tracking)


def train_all(
    config: PipelineConfig, planned: Plan, release: int, environment: dict[str, str]
) -> dict[str, list[Trained]]:
    """Pre-train, and fine-tune by every transfer and seed, side by side; gives the models of each target.

    The model that is measured on users new in the target is left out where the log has too few of them. Raises
    TrainingFailed for any other training without a model.
    """
    from trainer.evaluation.evaluators import monitor
    from trainer.recipes import training_jobs as runner

    score = f"validation/{monitor(config.finetune.task)}"  # chooses the candidate; test numbers choose nothing
    trainings, of_target = training_jobs(config, planned, release)
    jobs = jobs_of(config.jobs, config.finetune.runtime, len(trainings))
    with step("train"):
        runner.run(trainings, folder=Path(config.runs), jobs=jobs, environment=environment)
    unmeasured = {
        id(training)
        for of_label in of_target.values()
        for (label, _), training in of_label.items()
        if label == COLD and training.exit_code == GraftrecError.exit_code  # the log has no such users, or too few
    }
    if failed := next(
        (training for training in trainings if training.failure and id(training) not in unmeasured), None
    ):
        raise TrainingFailed(f"{failed.name}: {failed.failure}", failed.exit_code)
    return {
        target: [
            Trained(label, seed, training.model, training.metrics[score])
            for (label, seed), training in of_label.items()
            if training.metrics is not None
        ]
        for target, of_label in of_target.items()
    }


class TrainingFailed(GraftrecError):
    """A training of the pipeline that gave no model; ends with that training's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def jobs_of(jobs: int | None, runtime: RuntimeConfig, trainings: int) -> int:
    """How many trainings run side by side. `jobs`: as configured."""
    import torch

    from trainer.parallel.cores import usable_cores

    if runtime.device == "cuda" or (runtime.device == "auto" and torch.cuda.is_available()):
        return jobs or 1
    return jobs or max(1, min(trainings, usable_cores() // (runtime.threads or 1)))


def conclude(config: PipelineConfig, planned: Plan, target: str, release: int, every: Sequence[Trained]) -> Outcome:
    """Evaluate the models of one target domain, promote the best if the gate passes, write recommendations."""
    from trainer.evaluation import card

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
    table = "\n".join([gain_table(report.rows), *card.lines(report.cards[:1])])
    return Outcome(target, report, table, refusal, lines)


def companion(
    config: PipelineConfig, planned: Plan, target: str, release: int, cold: Trained | None, trained: Sequence[Trained]
) -> list[str]:
    """Evaluate a model that reads all domains on users whose whole target history was held out. If it is significantly
    better than popularity, which they are served otherwise, register the model trained on all users at the alias
    `companion`. Returns lines on the result."""
    import pyarrow.parquet as pq

    from trainer.evaluation.item_ranking import convention_of
    from trainer.recipes import evaluate
    from trainer.recipes.companion import over_popularity
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
    from trainer.recipes import evaluate

    return evaluate.run(evaluate_config(config, target, release, trained))


def promote(
    config: PipelineConfig, target: str, release: int, trained: Sequence[Trained], *, results: Path
) -> tuple[str, Sequence[str]]:
    """Register the candidate and promote it if the gate passes; gives the reason of a refusal, else "", and what to
    do."""
    from trainer.evaluation.gate import next_steps
    from trainer.recipes import promote

    recommend = recommend_config(config, target, release)
    try:
        promote.run(promote_config(config, target, release, trained), recommend)
    except promote.GateRefused as refusal:
        command = promote.refused_command(refusal, recommend) if config.finetune.task.scores_items else None
        steps = next_steps(refusal.decision, recommend=command, champion=refusal.champion, results=str(results))
        return str(refusal), steps
    return "", ()


def recommend(config: PipelineConfig, target: str, release: int) -> list[str]:
    """Write the champion's recommendations; gives lines on the champion and on what was written."""
    from trainer.recipes import recommend
    from trainer.registry import CHAMPION, Registry

    if not config.tracking.enabled or not config.finetune.task.scores_items:
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


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Models, best baseline and popularity under the first protocol: the gate's metric with its gain over from-scratch
    and p-value, then the means of the other metrics."""
    from trainer.evaluation.baselines.names import POPULARITY
    from trainer.evaluation.class_metrics import signed
    from trainer.evaluation.significance import gain_text, p_text

    shown = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
    first, *others = dict.fromkeys(row["metric"] for row in shown)
    trainings = {(row["label"], row["metric"]): row for row in shown}
    labels = [row["label"] for row in shown if row["is_model"] and row["metric"] == first]
    baselines = [row for row in shown if not row["is_model"] and row["metric"] == first]
    best = max(baselines, key=lambda row: signed(row["mean"], first), default=None)
    labels += [best["label"]] if best is not None else []
    labels += [row["label"] for row in baselines if row["label"] == POPULARITY and row is not best]
    table = [["model", first, "gain", "p", *others]]
    for label in labels:
        row = trainings[label, first]
        gain = gain_text(row["gain"]["gain"], row["gain"]["relative_gain"]) if row["gain"] else ""
        means = [f"{trainings[label, name]['mean']:.4f}" for name in others]
        name = label + (" *" if row["is_candidate"] else "")
        table.append([name, f"{row['mean']:.4f}", gain, p_text(row["p_value"]), *means])
    lines = aligned(table, gap=4)
    if any(row["is_candidate"] for row in shown):
        lines.append("* candidate: best on the validation part; its p is the gate's, the others' are adjusted (Holm)")
    return "\n".join(lines)


def page_command() -> str:
    """What opens the MLflow page of the store in use."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        return f"it is served at {uri}"
    return "make page, then http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


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
    """The log in `folder`, and of the knowledge files those that are there. Raises GraftrecError where it is none."""
    if not folder.expanduser().is_dir():
        raise GraftrecError(
            f"--data (make: DATA): expected a folder with ratings.dat, movies.dat and users.dat, found none at "
            f"{folder}; mend it"
        )

    def found(path: str) -> str | None:
        places = (folder / Path(path).name, folder.parent / path)
        return next((str(place.resolve()) for place in places if place.is_file()), None)

    files = []
    for file in etl.knowledge.files:
        path, link = found(file.path), file.link and found(file.link.path)
        if path is None or (file.link is not None and link is None):
            print(f"no {folder.parent / file.path}: the models get no knowledge from {file.name}")
        elif file.link is None or link is None:
            files.append(replaced(file, path=path))
        else:
            files.append(replaced(file, path=path, link=replaced(file.link, path=link)))
    source = replaced(etl.source, root=str(folder))
    return replaced(etl, source=source, knowledge=KnowledgeConfig(root=str(folder), files=tuple(files)))


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec pipeline") -> int:
    parser = CommandParser(
        program,
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
