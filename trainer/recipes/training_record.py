"""What a training run prints, and what it logs to MLflow."""

import math
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from etl.tables import FIRST_INDEX
from trainer.config import PretrainConfig
from trainer.data.catalogue import Catalogue
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.validation import Validator
from trainer.parallel.distributed import World
from trainer.recipes.run_folder import MLFLOW_UID
from trainer.recipes.run_result import recipe_of, sequence_table
from trainer.tracking import Run
from trainer.training.loop import Epoch
from trainer.training.transfer import TransferReport


def introduction(
    config: PretrainConfig,
    release: Release,
    catalogue: Catalogue,
    dataset: SequenceDataset,
    validation: Validator,
    account: TransferReport,
) -> str:
    size = sum(math.prod(line.shape) for line in account.lines)
    return (
        f"{config.name}: {config.model.kind}, {size:,} parameters; release {release.number} of {release.lake}, "
        + size_of(config, catalogue, dataset, validation)
    )


def size_of(config: PretrainConfig, catalogue: Catalogue, dataset: SequenceDataset, validation: Validator) -> str:
    return (
        f"domain {config.data.domain}: {len(catalogue) - FIRST_INDEX:,} items, {dataset.num_rows:,} users, "
        f"{validation.num_users:,} of them validated"
    )


def mlflow_uid(folder: Path, world: World) -> str:
    """The uid of the MLflow run that records this training."""
    if not world.first:
        return ""
    place = folder / MLFLOW_UID
    try:
        uid = place.read_text()
    except FileNotFoundError:
        uid = ""
    if not re.fullmatch("[0-9a-f]{32}", uid):
        uid = uuid.uuid4().hex
        place.write_text(uid)
    return uid


def curves_of(epoch: Epoch) -> dict[str, float]:
    return {f"validation/{name}": value for name, value in epoch.metrics.items()} | {
        "train/loss": epoch.loss,
        "train/items_per_second": epoch.items_per_second,
        "train/epoch_seconds": epoch.seconds,
    }


def log_epoch(epoch: Epoch, score: str, tracked: Run, say: Callable[[str], None]) -> None:
    tracked.log_metrics(curves_of(epoch), step=epoch.epoch)
    validation = f"validation {score} {epoch.metrics[score]:.4f}  " if epoch.metrics else ""
    say(
        f"epoch {epoch.epoch:>3}  loss {epoch.loss:.4f}  {validation}"
        f"{epoch.items_per_second:,.0f} items/s  {epoch.seconds:.1f} s"
    )


def log_model(
    tracked: Run,
    digest: str,
    config: PretrainConfig,
    release: Release,
    account: TransferReport,
    metrics: Mapping[str, float],
) -> None:
    """The run's logged model: its parameters, and its validation metrics on the snapshot that it was trained on."""
    facts = {
        "recipe": recipe_of(config),
        "model": config.model.kind,
        "task": config.task.kind,
        "transfer": account.transfer,
        "domain": config.data.domain,
        "predicts": config.data.answered,
        "split": config.data.split,
        "seed": config.train.seed,
        "release": release.number,
        "parameters": account.counts()["total"],
    }
    tracked.log_model(config.name, digest, kind=config.model.kind, params=facts)
    best = {
        name: value
        for name, value in final_metrics(metrics).items()
        if name.startswith("best/") and name != "best/epoch"
    }
    tracked.log_model_metrics(digest, best, release, sequence_table(config).name)


def final_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A run's result under names that no curve has: the best epoch's metrics (`best/NDCG@10`) and costs."""
    costs = {"seconds", "epochs", "peak_gb", "pretrain_seconds"}
    return {
        f"cost/{name}" if name in costs else f"best/{name.removeprefix('validation/').removeprefix('best_')}": value
        for name, value in metrics.items()
    }
