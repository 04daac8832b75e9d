"""Pre-train a model on one domain, or train it from scratch on any: read top to bottom.

`fit` is the whole recipe; `finetune.py` calls it with a parent.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from etl import tables
from etl.redaction import redact
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, UNK
from trainer import figures, tracking
from trainer.arrays import Int32Array, IntArray
from trainer.config import FinetuneConfig, PretrainConfig, patch_of
from trainer.data.baskets import open_dataset
from trainer.data.catalogue import Catalogue, read_catalogue, read_knowledge, rows_by_raw_id, rows_of_domain
from trainer.data.documents import Documents, read_documents
from trainer.data.item_vectors import EncodedVectors, encodings_of, read_vectors, rows_of_items, rows_of_users
from trainer.data.loader import Loader, Share
from trainer.data.release import Release, pin, vocabulary_size
from trainer.data.sequences import SequenceDataset, training_events, training_interactions
from trainer.data.shuffled_features import Shuffle
from trainer.evaluation.evaluators import monitor
from trainer.evaluation.validation import Validator
from trainer.inference.model_folder import ModelParts, TrainedModel, document_table, feature_tables, save_model
from trainer.models import ModelSizes, RowTables, SequenceModel, build_model
from trainer.parallel.distributed import World, join
from trainer.recipes.recorded_once import note_done
from trainer.recipes.run_folder import alone, clear_other, noted
from trainer.recipes.run_result import Result, agreed, read_tables, recipe_of, reused, run_identity
from trainer.recipes.training_record import (
    curves_of,
    final_metrics,
    introduction,
    log_epoch,
    log_model,
    mlflow_uid,
    size_of,
)
from trainer.registry import descriptions
from trainer.tasks import Task, prepare_task
from trainer.tracking import Run
from trainer.training.loop import NonFiniteLoss, Progress, Training, Watch, train
from trainer.training.transfer import COPIED_GROUPS, TransferPlan, TransferReport, initialise_from


@dataclass(frozen=True)
class Inputs:
    """What a training reads."""

    config: PretrainConfig
    release: Release
    catalogue: Catalogue
    knowledge: Int32Array
    parent: TrainedModel | None
    task: Task
    features: dict[str, EncodedVectors]
    user_features: dict[str, EncodedVectors]
    documents: Documents | None
    untrained_V: npt.NDArray[np.bool_] | None  # rows that nobody has had, where the model must do without ids
    interactions_V: IntArray | None  # in the training part, where features or cold items need them


class NonFiniteScore(NonFiniteLoss):
    """No epoch has a validation score that is a number, so none is the best."""


def unjudged(progress: Progress) -> None:
    """Never ends a run before its settings do."""


def run(config: PretrainConfig, *, judge: Callable[[Progress], None] = unjudged) -> Result:
    """The recipe `pretrain`; `judge` as in `fit`. Raises GraftrecError."""
    return fit(config, parent=None, judge=judge)


def fit(config: PretrainConfig, *, parent: TrainedModel | None, judge: Callable[[Progress], None] = unjudged) -> Result:
    """Train `config` on its domain, initialised from `parent` if there is one. Resumes a run of the same identity.

    `judge` sees the progress after each epoch, and may raise Pruned to end the run there. The model of such a run is
    not copied to MLflow: it is one of many trials, and stays in the run's folder.
    """
    world = join(config.runtime)
    with alone(Path(config.output) / config.name, world) as folder:
        return _fit(config, parent, judge, world, folder)


def _fit(
    config: PretrainConfig, parent: TrainedModel | None, judge: Callable[[Progress], None], world: World, folder: Path
) -> Result:
    say: Callable[[str], None] = print if world.first else lambda line: None
    release = _pinned(config, world)
    identity = ":".join(agreed(run_identity(config, release, parent), world).values())
    if (finished := reused(config, folder, identity, world)) is not None:
        say(f"{config.name}: unchanged, the model in {folder / 'model'} stands")
        return finished

    catalogue = read_catalogue(release, config.data.domain)
    knowledge = read_knowledge(release, catalogue, config.model.knowledge)
    dataset = _dataset(config, release)
    task = prepare_task(config.task, release, catalogue, dataset)
    validation = Validator(config, release, catalogue, task)
    interactions_V = None
    if config.model.features.given or config.data.split in release.cold_items:
        interactions_V = training_interactions(dataset, catalogue)
    features, documents = _features(config, release, catalogue, interactions_V, parent)
    user_features = _user_features(config, release, dataset, parent)
    untrained_V = _untrained(config, release, catalogue, interactions_V, parent)
    inputs = Inputs(
        config,
        release,
        catalogue,
        knowledge,
        parent,
        task,
        features,
        user_features,
        documents,
        untrained_V,
        interactions_V,
    )
    model, account = _model(inputs, world)
    clear_other(folder, identity, world, say)  # now that all is known to go together: a typo removes nothing
    loader = Loader(
        dataset,
        catalogue,
        config.data,
        batch_size=config.train.batch_size,
        max_length=config.model.max_length,
        seed=config.train.seed,
        share=Share(world.rank, world.size, everyone=config.task.reads_all_ranks),
    )
    training = Training(model, task, loader, config.train, world)
    score = monitor(config.task)
    say(introduction(config, release, catalogue, dataset, validation, account))
    if validation.measures_nothing:
        say(f"split {config.data.split} has no validation part: all {config.train.epochs} epochs are trained")
    say(account.text())

    data = f"release {release.number} of `{redact(release.lake)}`, {size_of(config, catalogue, dataset, validation)}"
    copied = parent.hash if parent is not None and account.transfer != "none" else None
    description = descriptions.training(config, parent=copied, counts=account.counts(), data=data)
    with (
        noted(folder, world),
        tracking.start_run(
            config.tracking,
            name=config.name,
            resolved=config,
            uid=mlflow_uid(folder, world),
            must_record=True,
        ) as tracked,
    ):
        tracked.log_release(release, tables=[table.name for table in read_tables(config)])
        tracked.describe(description)
        account_text = json.dumps(account.as_dict(), indent=1)
        tracked.log_params({f"parameters.{name}": count for name, count in account.counts().items()})
        tracked.log_text(account_text, "transfer.json")
        if world.first:
            (folder / "transfer.json").write_text(account_text)
        tracked.set_tags({"graftrec.recipe": recipe_of(config), "graftrec.transfer": account.transfer})
        train(
            training,
            validate=lambda: validation.metrics(model, world),
            score=score,
            checkpoints=folder / "checkpoints",
            watch=Watch(
                on_epoch=lambda epoch: log_epoch(epoch, score, tracked, say),
                on_resume=lambda epochs: tracked.log_history([(epoch.epoch, curves_of(epoch)) for epoch in epochs]),
                judge=judge,
                show_progress=config.runtime.progress,
                say=say,
            ),
        )
        if not training.progress.best_epoch:
            tried = len(training.progress.history)
            raise NonFiniteScore(
                f"expected a validation {score} that is a number, found none in {tried} epochs; "
                "validate more users, or lower train.learning_rate"
            )
        world.doing(lambda: "training is over, the model is written")
        metrics = _summary(training, parent)
        done: dict[str, Any] = {}
        if world.first:
            done = _finish(folder, inputs, training, metrics, identity, tracked)
            tracked.describe(descriptions.paragraphs(descriptions.outcome(metrics, score), description))
            if judge is unjudged:
                tracked.log_artifact(folder / "model")
                log_model(tracked, done["hash"], config, release, account, metrics)
        world.wait()
    progress = training.progress
    best = f"best epoch {progress.best_epoch} of {len(progress.history)}, validation {score} {progress.best_score:.4f}"
    best = f"{len(progress.history)} epochs" if validation.measures_nothing else best
    say(f"{config.name}: {best}, {metrics['seconds']:.0f} s; model in {folder / 'model'}")
    return Result(folder, metrics, reused=False, run_id=done.get("mlflow_run", ""))


def _pinned(config: PretrainConfig, world: World) -> Release:
    """The release of the first process: a later one may find a newer release in the lake."""
    release = pin(config.data.lake, config.data.release)
    number = world.of_first(release.number)
    return release if number == release.number else pin(config.data.lake, number)


def _dataset(config: PretrainConfig, release: Release) -> SequenceDataset:
    split, domain = config.data.split, config.data.domain
    negatives, table = config.task.negative_events, config.task.needs.table
    setting, types = ("task.impressions", negatives) if negatives else ("data.event_types", config.data.event_types)
    if config.reads_times:
        release.require_times(tables.TABLES[table], f"model {config.model.kind}")
    dataset = open_dataset(
        table,
        release,
        split,
        domain,
        values=config.task.reads_values,
        event_types=types,
        times=config.reads_times,
    )
    _check_event_types(dataset, setting)
    return dataset.sample_users(config.data.user_share)


def _check_event_types(dataset: SequenceDataset, setting: str) -> None:
    """Raises ConfigError for a name that no event of the training parts has."""
    found = np.zeros(len(dataset.event_types) + 1, dtype=np.int64)
    for group in range(len(dataset.groups)):
        if found[1:].all():  # as a rule after the first
            return
        sequences = dataset.read([group])
        trained = sequences.positions < sequences.valid_start[sequences.owners]
        found += np.bincount(sequences.event_types[trained], minlength=len(found))
    if lacking := [name for name, count in zip(dataset.event_types, found[1:], strict=True) if not count]:
        raise ConfigError(
            f"{setting}: expected event types of the training parts, found no event of "
            f"{', '.join(lacking)} in split {dataset.split!r}, domain {dataset.domain!r} of {dataset.release.lake} "
            f"({int(found[0]):,} events have other types, or none); correct the names, or name the log's column of "
            "event types in the source"
        )


def _features(
    config: PretrainConfig,
    release: Release,
    catalogue: Catalogue,
    interactions_V: IntArray | None,
    parent: TrainedModel | None,
) -> tuple[dict[str, EncodedVectors], Documents | None]:
    """Vectors of items by the encoders of the settings, behind the parent's whitening where its projections are copied;
    and their texts as words."""
    given = config.model.features
    if interactions_V is None or not given.given:
        return {}, None
    shuffle = Shuffle(interactions_V, config.train.seed) if given.shuffled else None
    documents = None if given.document is None else read_documents(release, catalogue, given.document)
    if documents is not None and shuffle is not None:
        documents = documents.shuffled(shuffle)
    vectors = read_vectors(
        release,
        rows_of_items(catalogue),
        given,
        split=config.data.split,
        trained_V=interactions_V > 0,
        shuffle=shuffle,
        fitted=parent.features if parent is not None and _copies_features(config) else None,
    )
    return vectors, documents


def _user_features(
    config: PretrainConfig, release: Release, dataset: SequenceDataset, parent: TrainedModel | None
) -> dict[str, EncodedVectors]:
    """As _features, of users."""
    given = config.model.user_features
    if not given.encoders:
        return {}
    events_V = training_events(dataset, vocabulary_size(release, tables.USERS))
    return read_vectors(
        release,
        rows_of_users(release),
        given,
        split=config.data.split,
        trained_V=events_V > 0,
        shuffle=Shuffle(events_V, config.train.seed) if given.shuffled else None,
        fitted=parent.user_features if parent is not None and _copies_features(config) else None,
    )


def _copies_features(config: PretrainConfig) -> bool:
    return isinstance(config, FinetuneConfig) and "features" in COPIED_GROUPS[config.transfer]


def _untrained(
    config: PretrainConfig,
    release: Release,
    catalogue: Catalogue,
    interactions_V: IntArray | None,
    parent: TrainedModel | None,
) -> npt.NDArray[np.bool_] | None:
    """Rows that nobody has had, in the training part or that of a parent whose items are shared. None where that
    changes nothing: the split has no cold items, and every item is seen with its id."""
    is_mapped = config.model.features.aggregate == "ridge"
    may_lack = is_mapped or config.model.features.id_dropout or config.data.split in release.cold_items
    if interactions_V is None or not may_lack:
        return None
    untrained_V = interactions_V == 0
    untrained_V[:FIRST_INDEX] = False
    if parent is not None and isinstance(config, FinetuneConfig) and config.shared_items:
        shared_V = rows_by_raw_id(parent.catalogue, catalogue)
        untrained_V &= (shared_V == UNK) | (parent.popularity[shared_V] == 0)
    return untrained_V if is_mapped or untrained_V.any() else None


def _model(inputs: Inputs, world: World) -> tuple[SequenceModel, TransferReport]:
    config, release, catalogue = inputs.config, inputs.release, inputs.catalogue
    parent, task = inputs.parent, inputs.task
    model = build_model(
        config.model,
        ModelSizes(
            num_users=vocabulary_size(release, tables.USERS),
            num_entities=vocabulary_size(release, tables.ENTITIES) if config.model.knowledge else 0,
            knowledge_VS=torch.from_numpy(inputs.knowledge),
            num_event_types=len(config.data.event_types),
            features=feature_tables(inputs.features),
            documents=document_table(inputs.documents),
            user_features=feature_tables(inputs.user_features),
        ),
        seed=config.train.seed,
        tables=RowTables(world) if config.train.table_optimizer == "rowwise" else None,
        patch=patch_of(config),
        task_heads=task.heads,
    )
    model.to(device=world.device, dtype=world.dtype)
    if task.content is not None:
        model.describe(torch.from_numpy(task.content.vectors_VF))
    if config.data.predicted is not None:
        model.restrict_targets(torch.from_numpy(rows_of_domain(release, catalogue, config.data.predicted)))
    if config.model.domain_asked:
        assert config.data.ranked is not None, "settings see to it"
        model.ask_for(torch.from_numpy(rows_of_domain(release, catalogue, config.data.ranked)))
    if inputs.untrained_V is not None:
        model.mark_untrained(torch.from_numpy(inputs.untrained_V))
    if isinstance(config, FinetuneConfig):
        shared = None
        if parent is not None and config.shared_items:
            shared = rows_by_raw_id(parent.catalogue, catalogue)
        plan = TransferPlan(
            config.transfer,
            config.freeze,
            shared,
            layer_norm=config.patch.layer_norm,
            unused=task.unused,
            event_types=config.data.event_types,
        )
        return model, initialise_from(model, config.model, parent, plan)
    return model, initialise_from(model, config.model, None, TransferPlan("none", unused=task.unused))


def _summary(training: Training, parent: TrainedModel | None) -> dict[str, float]:
    progress = training.progress
    seconds = sum(epoch.seconds for epoch in progress.history)
    best = {f"validation/{name}": value for name, value in progress.history[progress.best_epoch - 1].metrics.items()}
    cost = {
        "seconds": seconds,
        "epochs": len(progress.history),
        "best_epoch": progress.best_epoch,
        "peak_gb": training.world.peak_gb(),
    }
    inherited = (
        0.0 if parent is None else parent.metrics.get("seconds", 0.0) + parent.metrics.get("pretrain_seconds", 0.0)
    )
    return best | cost | {"pretrain_seconds": inherited}


def _finish(
    folder: Path, inputs: Inputs, training: Training, metrics: dict[str, float], identity: str, tracked: Run
) -> dict[str, Any]:
    """Model folder, curves, and the note that all is done (`noted` gives it its name), which is returned."""
    config, release, catalogue, task = inputs.config, inputs.release, inputs.catalogue, inputs.task
    others = bool(config.task.negative_events)  # what was shown only has not been taken
    popularity = inputs.interactions_V
    if popularity is None or others:
        popularity = training_interactions(training.loader.dataset, catalogue, others=others)
    digest = save_model(
        folder / "model",
        ModelParts(
            config=config,
            release=release,
            catalogue=catalogue,
            popularity=popularity,
            knowledge=inputs.knowledge,
            weights=training.best,
            metrics=metrics,
            parent=inputs.parent.hash if inputs.parent else None,
            users=release.read(tables.USERS, ["user", "index"]),
            predicted=None if training.model.predicted_V is None else training.model.predicted_V.cpu().numpy(),
            untrained=inputs.untrained_V,
            asked=None if training.model.asked_V is None else training.model.asked_V.cpu().numpy(),
            classes=task.class_names,
            task_heads=task.heads,
            content=task.content,
            features=inputs.features,
            user_features=inputs.user_features,
            documents=inputs.documents,
            encodings=encodings_of(release, list(inputs.features), config.data.split) if inputs.features else {},
        ),
    )
    history = [vars(epoch) for epoch in training.progress.history]
    (folder / "history.json").write_text(json.dumps(history, indent=1))
    score = monitor(config.task)
    curve = figures.Curve(
        config.name,
        [epoch["loss"] for epoch in history],
        [epoch["metrics"].get(score, float("nan")) for epoch in history],
    )
    tracked.log_figure(figures.learning_curves([curve], title=config.name, score=score), "pictures/learning_curve.png")
    tracked.log_metrics(final_metrics(metrics))
    return note_done(folder, identity, digest, metrics, tracked)
