"""Models that predict a class: an attribute of users, or what their next event is beside the item.

Beside them stand simple baselines. Of attributes: the shares of its values, and a logistic regression on which items a
user has, whose strength is chosen on the validation part; a transfer gain that doesn't beat that one is none. Of next
events: the shares of the classes in the training parts of these users, and each user's own past, drawn towards those.

Shape letters: ``U`` users, ``N`` examples, ``C`` classes, ``V`` rows of the catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from matplotlib.figure import Figure

from etl.settings import ConfigError
from trainer.arrays import IntArray
from trainer.config import BaselinesConfig, MultiConfig, ProfileConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.held_out import HeldOut, read_held_out, read_users
from trainer.data.histories import Histories
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.evaluation.baselines.names import MOST_FREQUENT, OWN_PAST, REGRESSION, SHARES
from trainer.evaluation.class_metrics import AUC, LOG_LOSS, PER_EXAMPLE, example_metrics, metrics_of, scikit_learn
from trainer.evaluation.comparison import Key, Row
from trainer.evaluation.evaluator import Measure, Question, Validation
from trainer.evaluation.predictions import USERS, PredictionEvaluator, Predictions
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, Scorer, as_known
from trainer.figures import confusions
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer
from trainer.parallel.distributed import World
from trainer.tasks import multi, profile
from trainer.tasks.multi import NOTHING

CONFUSIONS = "confusions.png"
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # C of the regression
PRIOR = 5.0  # events that the shares of all users count for beside a user's own


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
    protocol = USERS

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

    def predict(self, scorers: Sequence[Scorer]) -> ClassPredictions:
        found: ClassPredictions = ClassPredictions.of(scorers, self, self.protocol)
        return found


# --- attributes of users ---------------------------------------------


class AttributePrediction(ClassPrediction):
    """Users on whose attribute no model was trained."""

    head = profile.HEAD

    @staticmethod
    def monitor(task: ProfileConfig) -> str:
        return AUC

    @staticmethod
    def gate_metrics(task: ProfileConfig) -> tuple[str, ...]:
        return PER_EXAMPLE

    @staticmethod
    def baseline_names(task: ProfileConfig) -> tuple[str, ...]:
        return MOST_FREQUENT, REGRESSION

    @staticmethod
    def measure(validation: Validation) -> Measure:
        data, batch_size = validation.config.data, validation.config.evaluation.batch_size
        catalogue, known = validation.catalogue, validation.task.known
        users = labelled_users(validation.release, data.split, data.domain, catalogue, known, "validation")

        def metrics(scorer: ModelScorer, world: World) -> dict[str, float]:
            return validate(scorer, users, world, batch_size=batch_size, head=profile.HEAD)

        return Measure(len(users), metrics)

    @classmethod
    def read(cls, question: Question) -> Sequence[Self]:
        return [cls(question, read_catalogue(question.release, question.read_domain))]

    def __init__(self, question: Question, catalogue: Catalogue) -> None:
        super().__init__(question, catalogue)
        for model in question.models:
            self.check(model)
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

    def check(self, model: TrainedModel) -> None:
        held, task, first = {"attribute", "validation", "test", "min_users"}, model.config.task, self.first.config.task
        if task.kind != first.kind:
            raise EvaluateError(
                f"expected models that predict a profile, as {self.first.folder}, found {model.folder} of task "
                f"{task.kind}"
            )
        if task.model_dump(include=held) != first.model_dump(include=held) or model.classes != self.first.classes:
            raise EvaluateError(
                f"expected models of one attribute with the same users held out, as {self.first.folder}, found another "
                f"in {model.folder}"
            )
        self.check_domain(model)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        trained, checked = self._users("train"), self._users("validation")
        shares = np.bincount(trained.class_N, minlength=len(self.names)) / len(trained)
        return [
            self.baseline(MOST_FREQUENT, np.tile(shares, (len(self.users), 1))),
            self.baseline(REGRESSION, _regression(trained, checked, self.users, len(self.catalogue))),
        ]

    def counts(self) -> str:
        count = np.bincount(self.users.class_N, minlength=len(self.names))
        return f" ({', '.join(f'{name} {users:,}' for name, users in zip(self.names, count, strict=True))})"

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
    histories = Histories(found.users, found.offsets, rows, found.times).until(found.valid_start)
    return LabelledUsers(histories, class_U[found.users])


def _regression(trained: LabelledUsers, checked: LabelledUsers, examples: LabelledUsers, num_rows: int) -> FloatArray:
    """[N, C]: items that a user has, weighed by rarity (TF-IDF), rows of length one."""
    weigh = scikit_learn("feature_extraction.text").TfidfTransformer().fit(_items(trained.histories, num_rows))
    x, x_checked, x_asked = (weigh.transform(_items(part.histories, num_rows)) for part in (trained, checked, examples))

    kind = scikit_learn("linear_model").LogisticRegression
    models = [kind(C=strength, max_iter=1_000).fit(x, trained.class_N) for strength in STRENGTHS]
    scores = [metrics_of(checked.class_N, model.predict_proba(x_checked))["log loss"] for model in models]
    found: FloatArray = models[int(np.argmin(scores))].predict_proba(x_asked)
    return found


def _items(histories: Histories, num_rows: int) -> sp.csr_matrix:
    found = sp.csr_matrix(
        (np.ones(len(histories.items)), histories.items, histories.offsets), shape=(len(histories), num_rows)
    )
    found.sum_duplicates()
    found.data[:] = 1
    return found


# --- next events ---------------------------------------------


class EventPrediction(ClassPrediction):
    """The first held-out event of users, in one of the ways that it is predicted beside the item."""

    @staticmethod
    def monitor(task: MultiConfig) -> str:
        return f"{task.tells[0]}/{AUC}"

    @staticmethod
    def gate_metrics(task: MultiConfig) -> tuple[str, ...]:
        return tuple(f"{name}/{metric}" for name in task.tells for metric in PER_EXAMPLE)

    @staticmethod
    def baseline_names(task: MultiConfig) -> tuple[str, ...]:
        return SHARES, OWN_PAST

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
        for model in question.models:
            _check_events(model, first, split, domain)
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
        held_out = read_held_out(
            release,
            split,
            domain,
            catalogue,
            config.part,
            max_users=config.evaluation.max_users,
            values=task.reads_values,
            event_types=types,
        )
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

    def check(self, model: TrainedModel) -> None:
        _check_events(model, self.first, self.split, self.domain)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        own_UC, shares_C = self._counts()
        own_NC = own_UC[np.searchsorted(self.past.users, self.histories.users)]
        past_NC = (own_NC + PRIOR * shares_C) / (own_NC.sum(1, keepdims=True) + PRIOR)
        return [
            self.baseline(SHARES, np.tile(shares_C, (len(self.users), 1))),
            self.baseline(OWN_PAST, past_NC),
        ]

    def _counts(self) -> tuple[FloatArray, FloatArray]:
        """([U, C] events of each class that each user had before what is asked, [C] shares in their training parts)."""
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


def _check_events(model: TrainedModel, first: TrainedModel, split: str, domain: str) -> None:
    """Raises EvaluateError for a model that was not trained for the same as the first."""
    own = model.config.data
    same = (own.split, own.domain, model.classes) == (split, domain, first.classes)
    if not same or own.event_types != first.config.data.event_types:
        raise EvaluateError(
            f"expected models that read domain {domain!r} of split {split!r} and predict what {first.folder} does "
            f"({', '.join(first.classes)}), of the same event types, found {model.folder}, which "
            f"reads {own.domain!r} of {own.split!r} and predicts {', '.join(model.classes) or 'items only'}"
        )


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
