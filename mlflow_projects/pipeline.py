"""The main job: raw log → tables → pre-train → fine-tune by each transfer → evaluate → registry → recommendations.

    python mlflow_projects/pipeline.py --config pipeline/demo [--data FOLDER] [--section.key value …]

One process runs the steps one after the other, each a child of one MLflow run. A step whose inputs, settings and code
are unchanged says so and is skipped: the recipes decide that themselves. Exit codes: 0; 2 for a mistake in settings or
data; 3 where the gate refuses the candidate.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from pydantic import model_validator

from etl.config import EtlConfig, GraftrecError, KnowledgeConfig, MovielensSource, Section, load
from etl.tables import RECOMMENDATIONS
from trainer.config import (
    RANKING_TASKS,
    EvaluateConfig,
    EvaluatedModel,
    FinetuneConfig,
    PretrainConfig,
    PromoteConfig,
    RecommendConfig,
    RuntimeConfig,
    TrackingConfig,
    TransferName,
)

SCORE = "validation/NDCG@10"  # chooses the candidate; test numbers choose nothing
SCRATCH: TransferName = "none"
REFUSED = 3


class PipelineConfig(Section):
    """A configuration for each step, and the transfers and seeds that fine-tuning is repeated for.

    What flows from one step to the next (lake, release, model folders, names) is set here, whatever the sections say.
    """

    name: str = "pipeline"
    runs: str = "runs"  # folder of the training runs, their evaluation and the gate's decision
    registered_model: str = "graftrec"
    etl: EtlConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    promote: PromoteConfig  # no default: the gate's thresholds are data in conf/
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()
    transfers: tuple[TransferName, ...] = ("none", "shallow", "deep")
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_each_seed: bool = False  # False: one pre-trained model, of the first seed, under all of them
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _ranks_items(self) -> "PipelineConfig":
        if others := [part.task.kind for part in (self.pretrain, self.finetune) if part.task.kind not in RANKING_TASKS]:
            raise ValueError(f"expected tasks that rank items for sequences, found {others[0]}; run steps one by one")
        return self


@dataclass(frozen=True)
class Trained:
    """One fine-tuned model."""

    transfer: TransferName
    seed: int
    model: Path
    score: float  # on the validation part


# --- the steps --------------------------------------------------------------------------------------------------------


def run(config: PipelineConfig) -> int:
    """All steps, then what came of them. Gives the exit code: 0, or 3 where the gate refuses."""
    from trainer import tracking

    begun = time.monotonic()
    tags = {"graftrec.recipe": "pipeline"}
    with tracking.start_run(config.tracking, name=config.name, resolved=config, tags=tags) as tracked:
        release = build_tables(config)
        tracked.set_tags({"graftrec.release": release, "graftrec.lake": config.etl.lake})
        trained = train_all(config, release)
        table = gain_table(evaluate(config, release, trained))
        tracked.log_text(table, "table.txt")
        refusal = promote(config, release, trained)
        tracked.set_tags({"graftrec.gate": refusal or "promoted"})
        written = recommend(config, release)
    print(f"\n== {config.name}, in {time.monotonic() - begun:.0f} s\n\n{table}\n")
    print(f"gate             {f'refused: {refusal}' if refusal else 'passed'}")
    for line in written:
        print(line)
    print(f"MLflow page      {page_command()}", flush=True)
    return REFUSED if refusal else 0


def build_tables(config: PipelineConfig) -> int:
    """Run the ETL; gives the release that everything after reads."""
    import run_etl

    with step("tables"):
        return run_etl.run(config.etl, config.tracking)


def train_all(config: PipelineConfig, release: int) -> list[Trained]:
    """Pre-train, then fine-tune by every transfer and seed."""
    from trainer import finetune, pretrain

    parents: dict[int, Path] = {}
    if set(config.transfers) - {SCRATCH}:
        with step("pre-train"):
            for seed in config.seeds if config.pretrain_each_seed else config.seeds[:1]:
                parents[seed] = pretrain.run(pretrain_config(config, release, seed)).model
    trained = []
    with step("fine-tune"):
        for transfer in config.transfers:
            for seed in config.seeds:
                parent = None if transfer == SCRATCH else parents.get(seed, parents[config.seeds[0]])
                done = finetune.run(finetune_config(config, release, transfer, seed, parent))
                trained.append(Trained(transfer, seed, done.model, done.metrics[SCORE]))
    return trained


def evaluate(config: PipelineConfig, release: int, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Score all models beside the baselines; gives the rows of the comparison."""
    from trainer import evaluate

    with step("evaluate"):
        return evaluate.run(evaluate_config(config, release, trained)).rows


def promote(config: PipelineConfig, release: int, trained: Sequence[Trained]) -> str:
    """Register the candidate and ask the gate; gives its reason to refuse, "" where it agrees."""
    from trainer import promote

    with step("promote"):
        try:
            promote.run(promote_config(config, release, trained))
        except GraftrecError as refusal:
            if refusal.exit_code != REFUSED:
                raise
            print(refusal)
            return str(refusal)
    return ""


def recommend(config: PipelineConfig, release: int) -> list[str]:
    """Write the champion's recommendations; gives lines on the champion and on what was written."""
    from trainer import recommend
    from trainer.registry import CHAMPION, Registry

    if not config.tracking.enabled:
        return []
    champion = Registry(config.registered_model).find(CHAMPION)
    if champion is None:
        return ["champion         none yet, so no recommendations are written"]
    with step("recommend"):
        written = recommend.run(recommend_config(config, release))
    made = f"{written.rows:,} rows" if written.committed else "unchanged"
    return [
        f"champion         {champion.label} (models:/{champion.name}@{CHAMPION})",
        f"recommendations  {config.etl.lake}/{RECOMMENDATIONS.name}, version {written.version}: {made}",
    ]


def choose(trained: Sequence[Trained]) -> list[Trained]:
    """The candidate, and then its replicas: the transfer with the best mean validation score, its best seed first.

    From-scratch is chosen only where there is nothing else; the gate then refuses it.
    """
    by_transfer: dict[TransferName, list[Trained]] = {}
    for model in [model for model in trained if model.transfer != SCRATCH] or trained:
        by_transfer.setdefault(model.transfer, []).append(model)
    best = max(by_transfer.values(), key=lambda models: sum(model.score for model in models) / len(models))
    return sorted(best, key=lambda model: -model.score)


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Transfer × metric under the first protocol: mean, gain over from-scratch, p-value; and the best baseline."""
    shown = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
    metrics = list(dict.fromkeys(row["metric"] for row in shown))
    baselines = [row for row in shown if not row["is_model"] and row["metric"] == metrics[0]]
    best = {max(baselines, key=lambda row: row["mean"])["label"]} if baselines else set()
    labels = dict.fromkeys(row["label"] for row in shown if row["is_model"] or row["label"] in best)
    width = max(len(label) for label in labels) + 2
    lines = [f"{'transfer':<{width}}" + "".join(f"{metric:>10}{'gain':>10}{'p':>9}" for metric in metrics)]
    for label in labels:
        line = f"{label:<{width}}"
        for row in (row for row in shown if row["label"] == label):
            gain, p_value = row["gain"], row["p_value"]
            line += f"{row['mean']:>10.4f}" + (f"{100 * gain['relative_gain']:>+8.1f} %" if gain else " " * 10)
            line += " " * 9 if p_value is None else f"{'<0.001' if p_value < 0.001 else f'{p_value:.3f}':>9}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def page_command() -> str:
    """What opens the MLflow page of the store in use."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return f"it is served at {uri}" if uri.startswith("http") else "make page, then http://127.0.0.1:5000"


# --- what each step is given ------------------------------------------------------------------------------------------

ConfigT = TypeVar("ConfigT", bound=PretrainConfig)


def pretrain_config(config: PipelineConfig, release: int, seed: int) -> PretrainConfig:
    return _training(config.pretrain, config, release, f"pretrain-{seed}", seed)


def finetune_config(
    config: PipelineConfig, release: int, transfer: TransferName, seed: int, parent: Path | None
) -> FinetuneConfig:
    made = _training(config.finetune, config, release, f"{transfer}-{seed}", seed)
    return made.model_copy(update={"transfer": transfer, "parent": str(parent) if parent else None})


def _training(section: ConfigT, config: PipelineConfig, release: int, name: str, seed: int) -> ConfigT:
    data = section.data.model_copy(update={"lake": config.etl.lake, "release": release})
    train = section.train.model_copy(update={"seed": seed})
    return section.model_copy(
        update={
            "name": name, "output": config.runs, "data": data, "train": train,
            "runtime": _quiet(section.runtime), "tracking": config.tracking,
        }
    )  # fmt: skip


def _quiet(runtime: RuntimeConfig) -> RuntimeConfig:
    """Progress bars are for terminals; a file gets the lines."""
    return runtime.model_copy(update={"progress": runtime.progress and sys.stderr.isatty()})


def evaluate_config(config: PipelineConfig, release: int, trained: Sequence[Trained]) -> EvaluateConfig:
    models = tuple(EvaluatedModel(model=str(one.model), label=one.transfer, seed=one.seed) for one in trained)
    return config.evaluate.model_copy(
        update={
            "name": "evaluate", "output": config.runs, "model": None, "models": models, "lake": config.etl.lake,
            "release": release, "runtime": _quiet(config.evaluate.runtime), "tracking": config.tracking,
        }
    )  # fmt: skip


def promote_config(config: PipelineConfig, release: int, trained: Sequence[Trained]) -> PromoteConfig:
    candidate, *replicas = choose(trained)
    return config.promote.model_copy(
        update={
            "name": "promote", "output": config.runs, "registered_model": config.registered_model,
            "candidate": str(candidate.model), "replicas": tuple(str(one.model) for one in replicas),
            "from_scratch": tuple(str(one.model) for one in trained if one.transfer == SCRATCH),
            "lake": config.etl.lake, "release": release, "runtime": _quiet(config.promote.runtime),
            "tracking": config.tracking,
        }
    )  # fmt: skip


def recommend_config(config: PipelineConfig, release: int) -> RecommendConfig:
    return config.recommend.model_copy(
        update={
            "registered_model": config.registered_model, "model": "champion", "lake": config.etl.lake,
            "release": release, "spark": config.etl.spark, "tracking": config.tracking,
        }
    )  # fmt: skip


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
            model = section.model.model_copy(update={"knowledge": {}})
            update[name] = section.model_copy(update={"model": model})
    return config.model_copy(update=update)


def movielens_etl(etl: EtlConfig, folder: Path) -> EtlConfig:
    """The log in `folder`, and of the knowledge files those that are there."""
    files = []
    for file in etl.knowledge.files:
        places = [folder / Path(file.path).name, folder.parent / file.path]
        if found := next((place for place in places if place.is_file()), None):
            files.append(file.model_copy(update={"path": str(found.resolve())}))
        else:
            print(f"no {places[1]}: the models get no directors and actors from {file.name}")
    source = etl.source.model_copy(update={"root": str(folder)})
    return etl.model_copy(update={"source": source, "knowledge": KnowledgeConfig(root=str(folder), files=tuple(files))})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "pipeline.py", description="From a raw log to recommendations.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a name under conf/ or a YAML file, e.g. pipeline/demo")
    parser.add_argument("--data", type=Path, help="MovieLens-1M: the folder of ratings.dat, movies.dat, users.dat")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(PipelineConfig, known.config, overrides)
        return run(movielens_in(config, known.data) if known.data else config)
    except GraftrecError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
