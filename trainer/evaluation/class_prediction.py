"""Models that predict a class for each user: probabilities of the classes, metrics, and the table.

Shape letters: ``U`` users, ``N`` examples, ``C`` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from trainer.arrays import IntArray
from trainer.data.histories import Histories
from trainer.evaluation.class_metrics import AUC, LOG_LOSS, PER_EXAMPLE, example_metrics, metrics_of
from trainer.evaluation.comparison import Key, Row
from trainer.evaluation.predictions import PredictionEvaluator, Predictions
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import as_known
from trainer.figures import confusions
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World

CONFUSIONS = "confusions.png"


@dataclass(frozen=True)
class LabelledUsers:
    """Users of a part, what is read of each, and their classes. Users ascend."""

    histories: Histories  # in rows
    class_N: IntArray

    def __len__(self) -> int:
        return len(self.class_N)


def probabilities(scorer: ModelScorer, histories: Histories, *, batch_size: int, head: str) -> FloatArray:
    """[N, C] that a model gives each class for each user, by one of its task's heads."""
    parts = []
    for start in range(0, len(histories), batch_size):
        users = np.arange(start, min(start + batch_size, len(histories)))
        with torch.inference_mode():
            scores_BC: torch.Tensor = scorer.model.task_heads[head](scorer.hidden(histories.take(users)))
            parts.append(scores_BC.double().softmax(1).cpu().numpy())
    return np.concatenate(parts)


def validate(
    scorer: ModelScorer, examples: LabelledUsers, world: World, *, batch_size: int, head: str
) -> dict[str, float]:
    """Metrics of `trainer.evaluation.class_metrics`; each process asks about its share of the users."""
    share = world.share(len(examples))
    given = probabilities(scorer, examples.histories.take(share), batch_size=batch_size, head=head)
    probabilities_NC = world.gather(torch.from_numpy(given))[: len(examples)].numpy()
    return metrics_of(examples.class_N, probabilities_NC)


@dataclass(frozen=True)
class ClassPredictions(Predictions["ClassPrediction"]):
    """Probabilities [N, C] of the classes of something that each user is one of."""

    TESTED = PER_EXAMPLE

    @property
    def num_users(self) -> int:
        return len(self.examples.users)

    def metrics(self, key: Key) -> dict[str, float]:
        return metrics_of(self.examples.users.class_N, self.probabilities[key])

    def of_users(self, key: Key, protocol: str, metric: str) -> FloatArray:
        return example_metrics(self.examples.users.class_N, self.probabilities[key])[metric]

    def heading(self) -> tuple[str, str]:
        return self.examples.name, f"{self.num_users:,} users{self.examples.counts()}"

    def notes(self) -> list[str]:
        return self.examples.notes()

    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        return self.examples.user_columns(given)

    def confusion(self, label: str) -> FloatArray:
        """[C, C], its seeds together: share of the users of each class (row) for whom another is predicted."""
        size = len(self.examples.names)
        counted = np.zeros((size, size))
        for seed in self.seeds(label):
            np.add.at(counted, (self.examples.users.class_N, self.probabilities[label, seed].argmax(1)), 1)
        shares: FloatArray = counted / np.maximum(counted.sum(1, keepdims=True), 1)
        return shares

    def figure(self, rows: Sequence[Row], *, against: str) -> tuple[str, Figure] | None:
        shares = {label: self.confusion(label) for label in self.labels}
        title = f"{self.examples.name}, {self.num_users:,} users, %"
        return CONFUSIONS, confusions(shares, self.examples.names, title=title)


class ClassPrediction(PredictionEvaluator):
    """Users and the class of each."""

    name: str  # of what is predicted
    names: tuple[str, ...]  # of its classes
    head: str
    users: LabelledUsers
    predictions = ClassPredictions

    @staticmethod
    def table_metrics(task: Any) -> tuple[str, ...]:
        return "accuracy", "macro-F1", AUC, LOG_LOSS

    @property
    def histories(self) -> Histories:
        return self.users.histories

    def probabilities(self, model: TrainedModel) -> FloatArray:
        own, _ = as_known(model, self.histories, self.raw_users, self.catalogue)
        return probabilities(model.user_scorer(), own, batch_size=self.config.evaluation.batch_size, head=self.head)

    def counts(self) -> str:
        """More on the number of users, in brackets."""
        return ""

    def notes(self) -> list[str]:
        raise NotImplementedError

    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        raise NotImplementedError
