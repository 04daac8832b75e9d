"""Models that predict an attribute of users, evaluated on users on whose attribute none was trained.

Beside them stand the shares of its values, and a logistic regression on which items a user has, whose strength is
chosen on the validation part. A transfer gain that doesn't beat that one is none.

Shape letters: ``N`` users, ``C`` classes, ``V`` rows of the catalogue.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import BaselinesConfig, ProfileConfig
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events
from trainer.data.held_out import read_users
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.evaluation.baselines.names import MOST_FREQUENT, REGRESSION
from trainer.evaluation.class_metrics import AUC, PER_EXAMPLE, metrics_of, scikit_learn
from trainer.evaluation.class_prediction import CLASS_METRICS, ClassPrediction, LabelledUsers, validate
from trainer.evaluation.evaluator import Measure, Question, TaskMetrics, Validation
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, Scorer
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World
from trainer.tasks import profile

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # C of the regression


class AttributePrediction(ClassPrediction):
    """Users on whose attribute no model was trained."""

    head = profile.HEAD
    same = ("kind", "attribute", "validation", "test", "min_users")

    @staticmethod
    def metrics_of(task: ProfileConfig) -> TaskMetrics:
        return TaskMetrics(AUC, PER_EXAMPLE, CLASS_METRICS, (MOST_FREQUENT, REGRESSION))

    @staticmethod
    def measure(validation: Validation) -> Measure:
        data, batch_size = validation.config.data, validation.config.evaluation.batch_size
        catalogue, known = validation.catalogue, validation.task.known
        users = labelled_users(validation.release, data.split, data.domain, catalogue, known, "validation")

        def metrics(scorer: ModelScorer, world: World) -> dict[str, float]:
            return validate(scorer, users, world, batch_size=batch_size, head=profile.HEAD)

        return Measure(len(users), metrics)

    def __init__(self, question: Question, catalogue: Catalogue) -> None:
        super().__init__(question, catalogue)
        self.name = question.task.attribute
        self.classes = profile.read_classes(question.release, question.task)
        self.names = self.first.classes[profile.HEAD]
        if self.classes.names != self.names:
            raise EvaluateError(
                f"expected {self.name} to have the values that {self.first.folder} was trained on "
                f"({', '.join(self.names)}), found {', '.join(self.classes.names)}; evaluate on its own release"
            )
        self.users = self._users(self.part)

    def _users(self, part: profile.Part) -> LabelledUsers:
        return labelled_users(self.release, self.split, self.domain, self.catalogue, self.classes, part)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        trained, checked = self._users("train"), self._users("validation")
        shares = np.bincount(trained.class_N, minlength=len(self.names)) / len(trained)
        return [
            self.baseline(MOST_FREQUENT, np.tile(shares, (len(self.users), 1))),
            self.baseline(REGRESSION, _regression(trained, checked, self.users, len(self.catalogue))),
        ]

    def heading(self) -> tuple[str, str]:
        name, users = super().heading()
        count = np.bincount(self.users.class_N, minlength=len(self.names))
        return name, f"{users} ({', '.join(f'{name} {one:,}' for name, one in zip(self.names, count, strict=True))})"

    def notes(self) -> list[str]:
        return ["reads the training part; AUC of more than two values: each against the rest, averaged"]

    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        """What the user is, and the probability of each class."""
        of_class = {f"is {name}": given[:, place] for place, name in enumerate(self.names)}
        return {self.name: [self.names[one] for one in self.users.class_N], **of_class}


def labelled_users(
    release: Release, split: str, domain: str, catalogue: Catalogue, classes: profile.Classes, part: profile.Part
) -> LabelledUsers:
    """What is read is the training part of the split, as in training. Raises DataError where no such user has any."""
    class_U = classes.of(part)

    def wanted(sequences: Sequences) -> Any:
        inside = sequences.users < len(class_U)
        return inside & (class_U[np.where(inside, sequences.users, 0)] >= 0) & (sequences.valid_start > 0)

    found = read_users(SequenceDataset(release, split, domain), wanted)
    if found is None:
        raise DataError(
            f"no user of domain {domain!r} and split {split!r} has {classes.attribute} in the {part} part; take a "
            "domain that users with that attribute have items of"
        )
    rows = catalogue.rows(found.items).astype(np.int64)
    return LabelledUsers(found.with_columns(items=rows).until(found.valid_start), class_U[found.users])


def _regression(trained: LabelledUsers, checked: LabelledUsers, examples: LabelledUsers, num_rows: int) -> FloatArray:
    """[N, C]: items that a user has, weighed by rarity (TF-IDF), rows of length one."""
    weigh = scikit_learn("feature_extraction.text").TfidfTransformer().fit(_items(trained.histories, num_rows))
    x, x_checked, x_asked = (weigh.transform(_items(part.histories, num_rows)) for part in (trained, checked, examples))

    kind = scikit_learn("linear_model").LogisticRegression
    models = [kind(C=strength, max_iter=1_000).fit(x, trained.class_N) for strength in STRENGTHS]
    scores = [metrics_of(checked.class_N, model.predict_proba(x_checked))["log loss"] for model in models]
    found: FloatArray = models[int(np.argmin(scores))].predict_proba(x_asked)
    return found


def _items(histories: Events, num_rows: int) -> sp.csr_matrix:
    found = sp.csr_matrix(
        (np.ones(len(histories.items)), histories.items, histories.offsets), shape=(len(histories), num_rows)
    )
    found.sum_duplicates()
    found.data[:] = 1
    return found
