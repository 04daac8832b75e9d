"""Models that predict which items users take, evaluated on held-out items and others that the users did not take.

Beside them stand popularity, and popularity with untrained item-to-item over the user's items, calibrated by a logistic
regression on the validation part. They know which items are, not what they are.

Shape letters: ``U`` users, ``N`` pairs of a user and an item, user by user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from matplotlib.figure import Figure

from etl.tables import UNK
from trainer.arrays import IntArray
from trainer.config import BaselinesConfig, ClickConfig
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events
from trainer.data.held_out import Part, ReadOptions, read_held_out
from trainer.data.item_features import read_content
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.baselines.names import POPULARITY, POPULARITY_AND_ITEMS
from trainer.evaluation.baselines.sequences import item_to_item, popularity
from trainer.evaluation.class_metrics import AUC, LOG_LOSS, example_metrics, scikit_learn
from trainer.evaluation.click_metrics import ERROR, OF_USER, metrics_of, reliability, user_auc
from trainer.evaluation.evaluator import Measure, Question, TaskMetrics, Validation
from trainer.evaluation.predictions import PredictionEvaluator
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import Scorer, as_known, training_histories
from trainer.figures import reliability_curves
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World

NEGATIVES = "uniform-100"
RELIABILITY = "reliability.png"


@dataclass(frozen=True)
class Pairs:
    """Each user's held-out items, and some of the user's fixed negatives for each. Users ascend."""

    histories: Events  # in rows
    examples: Events  # of the same users: `items` in rows, and whether they were `taken`

    @property
    def owner_N(self) -> IntArray:
        return self.examples.owners

    @property
    def row_N(self) -> IntArray:
        return self.examples.items

    @property
    def taken_N(self) -> npt.NDArray[np.bool_]:
        return self.examples.columns["taken"]

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, users: IntArray) -> "Pairs":
        return Pairs(self.histories.take(users), self.examples.take(users))


def read_pairs(
    release: Release,
    split: str,
    domain: str,
    catalogue: Catalogue,
    part: Part,
    task: ClickConfig,
    *,
    max_users: int | None = None,
) -> Pairs:
    """Held-out items that were taken; for each so many of the user's `uniform-100`, the same ones for every model; and
    what the log says was shown, and not taken in this part. Raises GraftrecError."""
    protocols = (NEGATIVES,) if task.negatives else ()
    options = ReadOptions(protocols, event_types=task.impressions, max_users=max_users)
    examples = read_held_out(release, split, domain, catalogue, part, options)
    is_event = examples.targets >= 0
    is_taken = is_event & (examples.event_types == 0) if task.impressions else is_event
    taken = np.where(is_taken, examples.targets, -1)
    is_shown = is_event & ~(examples.targets[:, :, None] == taken[:, None, :]).any(2)
    histories = examples.histories
    if task.impressions:
        histories = histories.keep(histories.event_types == 0)
    fixed = examples.negatives.get(NEGATIVES, np.full((len(examples), 1), -1))
    wanted = np.minimum(is_taken.sum(1) * task.negatives, (fixed >= 0).sum(1))
    # Which of them: by a draw of the user's own, for they lie in an order that may mean something.
    order = np.stack([np.random.default_rng([int(user), 9]).permutation(fixed.shape[1]) for user in examples.users])
    shuffled = np.take_along_axis(fixed, order, axis=1)
    known_first = np.argsort(shuffled < 0, axis=1, kind="stable")
    shuffled = np.take_along_axis(shuffled, known_first, axis=1)
    is_chosen = np.arange(shuffled.shape[1]) < wanted[:, None]
    items = np.concatenate([examples.targets, shuffled], axis=1)
    owner, place = np.concatenate([is_taken | is_shown, is_chosen], axis=1).nonzero()
    yes = np.concatenate([is_taken, np.zeros_like(is_chosen)], axis=1)
    number = np.bincount(owner, minlength=len(histories))
    offsets = np.concatenate([[0], np.cumsum(number)])
    columns = {"items": items[owner, place], "taken": yes[owner, place]}
    pairs = Pairs(histories, Events(histories.users, offsets, columns))
    if not pairs.taken_N.any() or pairs.taken_N.all():
        raise DataError(
            f"expected items that were taken and others in the {part} part of split {split!r}, domain {domain!r}, "
            f"found {int(pairs.taken_N.sum()):,} and {int((~pairs.taken_N).sum()):,}; mend task.impressions, or raise "
            "task.negatives"
        )
    return pairs.take(np.flatnonzero(number))


def probabilities(scorer: ModelScorer, pairs: Pairs, *, batch_size: int) -> FloatArray:
    """[N] that the user takes the item."""
    task: Any = scorer.task
    found = []
    for start in range(0, len(pairs), batch_size):
        own = pairs.take(np.arange(start, min(start + batch_size, len(pairs))))
        with torch.inference_mode():
            hidden_BD = scorer.hidden(own.histories)
            owner, rows = (torch.from_numpy(x).to(hidden_BD.device) for x in (own.owner_N, own.row_N))
            found.append(task.logits(scorer.model, hidden_BD[owner], rows).double().sigmoid().cpu().numpy())
    return np.concatenate(found)


class ClickPrediction(PredictionEvaluator):
    """Pairs of a user and an item."""

    same = ("kind", "negatives", "impressions")
    tested = (OF_USER, LOG_LOSS)

    @staticmethod
    def metrics_of(task: ClickConfig) -> TaskMetrics:
        table = (AUC, OF_USER, LOG_LOSS, ERROR)
        return TaskMetrics(AUC, (OF_USER, LOG_LOSS), table, (POPULARITY, POPULARITY_AND_ITEMS))

    @staticmethod
    def measure(validation: Validation) -> Measure:
        config, data = validation.config, validation.config.data
        pairs = read_pairs(
            validation.release,
            data.split,
            data.domain,
            validation.catalogue,
            "validation",
            validation.task.config,
            max_users=config.train.validation_users,
        )

        def metrics(scorer: ModelScorer, world: World) -> dict[str, float]:
            """Each process asks about its share of the users."""
            share = world.share(len(pairs))
            own = pairs.take(share)
            given_N = probabilities(scorer, own, batch_size=config.evaluation.batch_size)
            place_N = (len(share) * world.rank + own.owner_N).astype(np.float64)
            table = world.gather(torch.from_numpy(np.stack([place_N, own.taken_N, given_N], axis=1))).numpy()
            table = table[table[:, 0] < len(pairs)]  # the last user may be in several shares
            return metrics_of(table[:, 1] > 0, table[:, 2], table[:, 0].astype(np.int64))

        return Measure(len(pairs), metrics)

    def __init__(self, question: Question, catalogue: Catalogue) -> None:
        super().__init__(question, catalogue)
        self.pairs = self._pairs(self.part)

    def _pairs(self, part: Part) -> Pairs:
        max_users = self.config.evaluation.max_users
        return read_pairs(self.release, self.split, self.domain, self.catalogue, part, self.task, max_users=max_users)

    @property
    def histories(self) -> Events:
        return self.pairs.histories

    def probabilities(self, model: TrainedModel) -> FloatArray:
        """Items that the model doesn't know are skipped in histories, and scored by what they are."""
        network = model.model
        assert network.content_VF is not None, "items have been described"
        own, rows = as_known(model, self.histories, self.raw_users, self.catalogue)
        is_example = np.zeros(len(self.catalogue), dtype=bool)
        is_example[self.pairs.row_N] = True
        known = network.content_VF
        if len(new := np.flatnonzero((rows == UNK) & is_example)):
            content = read_content(self.release, self.catalogue, self.task.content, known=model.categories).vectors_VF
            rows[new] = len(known) + np.arange(len(new))  # behind those it knows
            network.describe(torch.cat([known, torch.from_numpy(content[new]).to(known)]))
        pairs = Pairs(own, self.pairs.examples.with_columns(items=rows[self.pairs.row_N]))
        try:
            return probabilities(model.user_scorer(), pairs, batch_size=self.config.evaluation.batch_size)
        finally:
            network.describe(known)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        checked, features = self._pairs("validation"), _Features(self, config)
        found = []
        for label, width in ((POPULARITY, 1), (POPULARITY_AND_ITEMS, 2)):
            model = (
                scikit_learn("linear_model")
                .LogisticRegression(max_iter=1_000)
                .fit(features.of(checked)[:, :width], checked.taken_N)
            )
            found.append(self.baseline(label, model.predict_proba(features.of(self.pairs)[:, :width])[:, 1]))
        return found

    def metrics(self, given: FloatArray) -> dict[str, float]:
        return metrics_of(self.pairs.taken_N, given, self.pairs.owner_N)

    def of_users(self, given: FloatArray, metric: str) -> FloatArray:
        pairs = self.pairs
        if metric == OF_USER:
            return user_auc(pairs.taken_N, given, pairs.owner_N)
        losses = example_metrics(pairs.taken_N.astype(np.int64), np.stack([1 - given, given], axis=1))[metric]
        found: FloatArray = np.bincount(pairs.owner_N, losses) / np.bincount(pairs.owner_N)
        return found

    def heading(self) -> tuple[str, str]:
        return "clicks", f"{len(self.pairs):,} users"

    def notes(self) -> list[str]:
        shown, taken = ", ".join(self.task.impressions), int(self.pairs.taken_N.sum())
        others = f"drawn uniformly or shown and not taken ({shown})" if shown else "drawn uniformly, which were not"
        return [
            f"{taken:,} items taken and {len(self.pairs.taken_N) - taken:,} {others}",
            "popularity and item-to-item are calibrated by a logistic regression on the validation part",
        ]

    @property
    def example_users(self) -> pa.Array:
        return super().example_users.take(pa.array(self.pairs.owner_N))

    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        """Whether the item was taken, and the probability."""
        return {"taken": self.pairs.taken_N, "probability": given}

    def picture(self, by_label: Mapping[str, Sequence[FloatArray]]) -> tuple[str, Figure]:
        """Reliability of each label, its seeds together."""
        curves = {
            label: reliability(np.tile(self.pairs.taken_N, len(seeds)), np.concatenate(seeds))
            for label, seeds in by_label.items()
        }
        return RELIABILITY, reliability_curves(curves, title=f"{self.domain}, {len(self.pairs):,} users")


class _Features:
    """[N, 2] of pairs: logarithms of the item's popularity, and of its item-to-item score, in training parts."""

    def __init__(self, examples: ClickPrediction, config: BaselinesConfig) -> None:
        catalogue, impressions = examples.catalogue, examples.task.impressions
        dataset = SequenceDataset(examples.release, examples.split, examples.domain, event_types=impressions)
        training = training_histories(dataset, catalogue, max_users=config.max_users)
        if impressions:
            training = training.keep(training.event_types == 0)
        self._rows = np.arange(len(catalogue))
        self._popular = popularity(training, len(catalogue)).counts
        self._near = item_to_item(training, len(catalogue), last=None, decay=config.decay)

    def of(self, pairs: Pairs) -> FloatArray:
        near = np.empty(len(pairs.row_N))
        for start in range(0, len(pairs), 1_024):
            users = np.arange(start, min(start + 1_024, len(pairs)))
            at = np.flatnonzero((pairs.owner_N >= start) & (pairs.owner_N < start + len(users)))
            scores = self._near.score(pairs.histories.take(users), self._rows).numpy()
            near[at] = scores[pairs.owner_N[at] - start, pairs.row_N[at]]
        return np.stack([np.log1p(self._popular[pairs.row_N]), np.log(near + 1e-4)], axis=1)
