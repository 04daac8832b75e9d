"""Models that predict what a user's next event is beside the item, evaluated on the first held-out event of each user.

Beside them stand the shares of the classes in the training parts of these users, and each user's own past, drawn
towards those.

Shape letters: ``U`` users, ``N`` examples, ``C`` classes.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from etl import tables
from etl.settings import ConfigError
from trainer.config import BaselinesConfig, MultiConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.held_out import HeldOut, ReadOptions, read_held_out, read_users
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.evaluation.baselines.names import OWN_PAST, SHARES
from trainer.evaluation.class_metrics import AUC, PER_EXAMPLE
from trainer.evaluation.class_prediction import CLASS_METRICS, ClassPrediction, LabelledUsers, validate
from trainer.evaluation.evaluator import Measure, Question, TaskMetrics, Validation
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, Scorer
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World
from trainer.tasks import multi
from trainer.tasks.multi import NOTHING

PRIOR = 5.0  # events that the shares of all users count for beside a user's own


class EventPrediction(ClassPrediction):
    """The first held-out event of users, in one of the ways that it is predicted beside the item."""

    same = ("kind", "tells")

    @staticmethod
    def metrics_of(task: MultiConfig) -> TaskMetrics:
        per_user = tuple(f"{name}/{metric}" for name in task.tells for metric in PER_EXAMPLE)
        return TaskMetrics(f"{task.tells[0]}/{AUC}", per_user, CLASS_METRICS, (SHARES, OWN_PAST))

    @staticmethod
    def measure(validation: Validation) -> Measure:
        known, held_out = validation.task.known, validation.held_out
        users = {name: examples_of(held_out, known, name) for name in known.names}
        batch_size = validation.config.evaluation.batch_size

        def metrics(scorer: ModelScorer, world: World) -> dict[str, float]:
            found: dict[str, float] = {}
            for name, examples in users.items():
                own = validate(scorer, examples, world, batch_size=batch_size, head=name)
                found |= {f"{name}/{metric}": value for metric, value in own.items()}
            return found

        return Measure(len(held_out), metrics)

    @classmethod
    def read(cls, question: Question) -> Sequence[Self]:
        task, first, release = question.task, question.models[0], question.release
        split, domain, types = question.split, question.read_domain, first.config.data.event_types
        if not first.classes:
            return []
        dataset = SequenceDataset(release, split, domain, values=task.reads_values, event_types=types)
        catalogue = read_catalogue(release, domain)
        classes = multi.read_classes(release, catalogue, task, dataset)
        if classes.names != first.classes:
            raise EvaluateError(
                f"expected the classes that {first.folder} was trained on, found others in release {release.number}; "
                "evaluate on its own release"
            )
        config = question.config
        times = any(model.config.reads_times for model in question.models)
        if times:
            release.require_times(tables.SEQUENCES, str(first.folder))
        options = ReadOptions(
            times=times, values=task.reads_values, event_types=types, max_users=config.evaluation.max_users
        )
        held_out = read_held_out(release, split, domain, catalogue, config.part, options)
        past = read_users(dataset, lambda sequences: np.isin(sequences.users, held_out.users))
        assert past is not None, "whoever holds something out has a past"
        examples = {name: examples_of(held_out, classes, name) for name in classes.names}
        return [cls(question, catalogue, classes, name, users, past) for name, users in examples.items()]

    def __init__(
        self,
        question: Question,
        catalogue: Catalogue,
        classes: multi.Classes,
        name: str,
        users: LabelledUsers,
        past: Sequences,
    ) -> None:
        super().__init__(question, catalogue)
        self.classes, self.users, self.past = classes, users, past
        self.name = self.head = self.protocol = name
        self.names = classes.names[name]

    def predicted(self, model: TrainedModel) -> tuple[Any, ...]:
        return model.classes, model.config.data.event_types

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        own_UC, shares_C = self._counts()
        own_NC = own_UC[np.searchsorted(self.past.users, self.histories.users)]
        past_NC = (own_NC + PRIOR * shares_C) / (own_NC.sum(1, keepdims=True) + PRIOR)
        return [
            self.baseline(SHARES, np.tile(shares_C, (len(self.users), 1))),
            self.baseline(OWN_PAST, past_NC),
        ]

    def _counts(self) -> tuple[FloatArray, FloatArray]:
        """([U, C] events of each class that each user had before it, [C] shares in their training parts)."""
        past, size = self.past, len(self.names)
        owner, position = past.owners, past.positions
        class_N = self.classes.of(self.name, self.catalogue.rows(past.items), past.values, past.event_types)
        trained = (position < past.valid_start[owner]) & (class_N != NOTHING)
        shares = np.bincount(class_N[trained], minlength=size).astype(np.float64)
        before = (position < past.history_end(self.part)[owner]) & (class_N != NOTHING)
        own = np.bincount(owner[before] * size + class_N[before], minlength=len(past) * size).reshape(len(past), size)
        return own.astype(np.float64), shares / max(shares.sum(), 1)

    def notes(self) -> list[str]:
        return [f"{len(self.names)} classes of the first held-out event; AUC: each against the rest, averaged"]

    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        """What is predicted, what it was, and the probability given to that."""
        is_N = self.users.class_N
        return {
            "predicted": [self.name] * len(is_N),
            "is": [self.names[one] for one in is_N],
            "probability": given[np.arange(len(is_N)), is_N],
        }


def examples_of(held_out: HeldOut, classes: multi.Classes, name: str) -> LabelledUsers:
    """The users whose first held-out event has a class, and which. Raises ConfigError for one that training lacks."""
    given = held_out.first_value
    class_U = classes.of(name, held_out.targets[:, 0], given, held_out.event_types[:, :1].ravel())
    if name == "value" and (strange := given[~np.isnan(given) & (class_U == NOTHING)]).size:
        raise ConfigError(
            f"task.tells value: expected held-out values among those of the training parts, found {strange[0]:g}, "
            "which no training event has; leave such events out of the log, or values out of task.tells"
        )
    known = np.flatnonzero(class_U != NOTHING)
    return LabelledUsers(held_out.histories.take(known), class_U[known])
