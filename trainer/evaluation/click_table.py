"""Models that tell what users take, side by side on held-out items and others that the users did not take.

Beside them, calibrated by a logistic regression on the validation part: popularity, and popularity with untrained
item-to-item over the user's items. They know which items are, not what they are.

Shape letters: ``N`` pairs of a user and an item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from etl.tables import UNK
from trainer.config import ClickConfig, EvaluateConfig, EvaluatedModel
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.histories import Histories
from trainer.data.item_features import read_content
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.baselines.names import POPULARITY, POPULARITY_AND_ITEMS
from trainer.evaluation.baselines.sequences import item_to_item, popularity
from trainer.evaluation.class_metrics import AUC, example_metrics, scikit_learn
from trainer.evaluation.clicks import (
    ERROR,
    OF_USER,
    Pairs,
    metrics_of,
    probabilities,
    read_pairs,
    reliability,
    user_auc,
)
from trainer.evaluation.comparison import Row
from trainer.evaluation.predictions import Key, Predictions, as_known, keys_of
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, raw_users, training_histories
from trainer.inference.model_folder import TrainedModel
from trainer.tasks.click import Click


@dataclass(frozen=True)
class ClickPredictions(Predictions):
    """Probabilities [N] that a user takes an item."""

    METRICS: ClassVar = (AUC, OF_USER, "log loss", ERROR)
    TESTED: ClassVar = (OF_USER, "log loss")

    pairs: Pairs
    impressions: tuple[str, ...]

    @property
    def histories(self) -> Histories:
        return self.pairs.histories

    def metrics(self, key: Key) -> dict[str, float]:
        return metrics_of(self.pairs.taken_N, self.probabilities[key], self.pairs.owner_N)

    def of_users(self, key: Key, metric: str) -> FloatArray:
        told_N, pairs = self.probabilities[key], self.pairs
        if metric == OF_USER:
            return user_auc(pairs.taken_N, told_N, pairs.owner_N)
        losses = example_metrics(pairs.taken_N.astype(np.int64), np.stack([1 - told_N, told_N], axis=1))[metric]
        found: FloatArray = np.bincount(pairs.owner_N, losses) / np.bincount(pairs.owner_N)
        return found

    def curve(self, label: str) -> FloatArray:
        """`reliability` of a label, its seeds together."""
        seeds = self.seeds(label)
        predictions = np.concatenate([self.probabilities[label, seed] for seed in seeds])
        return reliability(np.tile(self.pairs.taken_N, len(seeds)), predictions)


def tell(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel], release: Release
) -> ClickPredictions:
    """Ask every model, and the baselines. Raises EvaluateError for models that were not trained for one question."""
    first, data = models[0].config.task, models[0].config.data
    assert isinstance(first, ClickConfig)
    split, domain = config.split or data.split, config.domain or data.domain
    for trained_model in models:
        task, own = trained_model.config.task, trained_model.config.data
        if not isinstance(task, ClickConfig) or (task.negatives, task.impressions, own.split, own.domain) != (
            first.negatives,
            first.impressions,
            split,
            domain,
        ):
            raise EvaluateError(
                f"expected models of task click that read domain {domain!r} of split {split!r} with {first.negatives} "
                f"negatives for each item and impressions {', '.join(first.impressions) or 'none'}, found "
                f"{trained_model.folder} of task {task.kind}, domain {own.domain!r}, split {own.split!r}"
            )
    catalogue = read_catalogue(release, domain)
    pairs = _read(release, split, domain, catalogue, config, first, config.part)
    keys, costs = keys_of(chosen, models)
    users = raw_users(release, pairs.histories.users)
    found = {
        key: _told(trained_model, pairs, users, release, catalogue, config.evaluation.batch_size)
        for key, trained_model in zip(keys, models, strict=True)
    }
    if config.baselines.enabled:
        checked = _read(release, split, domain, catalogue, config, first, "validation")
        features = _Features(release, split, domain, catalogue, config, first.impressions)
        for label, width in ((POPULARITY, 1), (POPULARITY_AND_ITEMS, 2)):
            model = (
                scikit_learn("linear_model")
                .LogisticRegression(max_iter=1_000)
                .fit(features.of(checked)[:, :width], checked.taken_N)
            )
            found[label, None] = model.predict_proba(features.of(pairs)[:, :width])[:, 1]
    return ClickPredictions(found, config.part, domain, split, costs, pairs, first.impressions)


def _read(
    release: Release,
    split: str,
    domain: str,
    catalogue: Catalogue,
    config: EvaluateConfig,
    task: ClickConfig,
    part: str,
) -> Pairs:
    return read_pairs(
        release,
        split,
        domain,
        catalogue,
        "validation" if part == "validation" else "test",
        task,
        max_users=config.evaluation.max_users,
    )


def _told(
    trained_model: TrainedModel,
    pairs: Pairs,
    users: Sequence[str],
    release: Release,
    catalogue: Catalogue,
    batch_size: int,
) -> FloatArray:
    """Items that the model doesn't know are passed over in histories, and asked about by what they are."""
    task, model = trained_model.task, trained_model.model
    assert isinstance(task, Click)
    assert model.content_VF is not None, "items have been described"
    own, rows = as_known(trained_model, pairs.histories, users, catalogue)
    asked_about = np.zeros(len(catalogue), dtype=bool)
    asked_about[pairs.row_N] = True
    if len(new := np.flatnonzero((rows == UNK) & asked_about)):
        content = read_content(release, catalogue, task.config.content, known=trained_model.categories).vectors_VF[new]
        rows[new] = len(model.content_VF) + np.arange(len(new))  # behind those it knows
        model.describe(torch.cat([model.content_VF, torch.from_numpy(content).to(model.content_VF)]))
    examples = Pairs(own, pairs.owner_N, rows[pairs.row_N], pairs.taken_N)
    return probabilities(trained_model.teller(), model, task, examples, batch_size=batch_size)


class _Features:
    """[N, 2] of pairs: logarithms of the item's popularity, and of its item-to-item score, in training parts."""

    def __init__(
        self,
        release: Release,
        split: str,
        domain: str,
        catalogue: Catalogue,
        config: EvaluateConfig,
        impressions: Sequence[str],
    ) -> None:
        dataset = SequenceDataset(release, split, domain, event_types=impressions)
        training = training_histories(dataset, catalogue, max_users=config.baselines.max_users)
        if impressions:
            training = training.keep(training.event_types == 0)
        self._rows = np.arange(len(catalogue))
        self._popular = popularity(training, len(catalogue)).counts
        self._near = item_to_item(training, len(catalogue), last=None, decay=config.baselines.decay)

    def of(self, pairs: Pairs) -> FloatArray:
        near = np.empty(len(pairs.row_N))
        for start in range(0, len(pairs), 1_024):
            users = np.arange(start, min(start + 1_024, len(pairs)))
            at = np.flatnonzero((pairs.owner_N >= start) & (pairs.owner_N < start + len(users)))
            scores = self._near.score(pairs.histories.take(users), self._rows).numpy()
            near[at] = scores[pairs.owner_N[at] - start, pairs.row_N[at]]
        return np.stack([np.log1p(self._popular[pairs.row_N]), np.log(near + 1e-4)], axis=1)


def render(predictions: ClickPredictions, rows: Sequence[Row], *, against: str) -> str:
    """The table for people."""
    taken, shown = int(predictions.pairs.taken_N.sum()), ", ".join(predictions.impressions)
    others = f"drawn uniformly or shown and not taken ({shown})" if shown else "drawn uniformly, which were not"
    notes = [
        f"{taken:,} items taken and {len(predictions.pairs.taken_N) - taken:,} {others}",
        "popularity and item-to-item are calibrated by a logistic regression on the validation part",
    ]
    return predictions.table("clicks", rows, f"{len(predictions.pairs):,} users", notes, against=against)
