"""Models that predict a class for each user: probabilities of the classes, metrics, and the table.

Shape letters: ``U`` users, ``N`` examples, ``C`` classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from trainer.arrays import IntArray
from trainer.data.events import Events
from trainer.evaluation.class_metrics import AUC, LOG_LOSS, PER_EXAMPLE, example_metrics, metrics_of
from trainer.evaluation.predictions import PredictionEvaluator
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import as_known
from trainer.figures import confusions
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World

CONFUSIONS = "confusions.png"
CLASS_METRICS = ("accuracy", "macro-F1", AUC, LOG_LOSS)


@dataclass(frozen=True)
class LabelledUsers:
    """Users of a part, what is read of each, and their classes. Users ascend."""

    histories: Events  # in rows
    class_N: IntArray

    def __len__(self) -> int:
        return len(self.class_N)


def probabilities(scorer: ModelScorer, histories: Events, *, batch_size: int, head: str) -> FloatArray:
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


class ClassPrediction(PredictionEvaluator):
    """Users and the class of each."""

    name: str  # of what is predicted
    names: tuple[str, ...]  # of its classes
    head: str
    users: LabelledUsers
    tested = PER_EXAMPLE

    @property
    def histories(self) -> Events:
        return self.users.histories

    def probabilities(self, model: TrainedModel) -> FloatArray:
        own, _ = as_known(model, self.histories, self.raw_users, self.catalogue)
        return probabilities(model.user_scorer(), own, batch_size=self.config.evaluation.batch_size, head=self.head)

    def metrics(self, given: FloatArray) -> dict[str, float]:
        return metrics_of(self.users.class_N, given)

    def of_users(self, given: FloatArray, metric: str) -> FloatArray:
        return example_metrics(self.users.class_N, given)[metric]

    def heading(self) -> tuple[str, str]:
        return self.name, f"{len(self.users):,} users"

    def picture(self, by_label: Mapping[str, Sequence[FloatArray]]) -> tuple[str, Figure]:
        shares = {label: self._confusion(seeds) for label, seeds in by_label.items()}
        return CONFUSIONS, confusions(shares, self.names, title=f"{self.name}, {len(self.users):,} users, %")

    def _confusion(self, seeds: Sequence[FloatArray]) -> FloatArray:
        """[C, C], seeds together: share of the users of each class (row) for whom another is predicted."""
        counted = np.zeros((len(self.names), len(self.names)))
        for given in seeds:
            np.add.at(counted, (self.users.class_N, given.argmax(1)), 1)
        shares: FloatArray = counted / np.maximum(counted.sum(1, keepdims=True), 1)
        return shares
