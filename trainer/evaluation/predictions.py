"""Probabilities that models give, of classes or of clicks: how they are evaluated, and shown as rows of one table.

Shape letters: ``S`` seeds, ``U`` users, ``N`` examples, ``V`` rows of a catalogue.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from trainer.arrays import IntArray
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.events import Events
from trainer.evaluation.comparison import Key, Results, Row, block, in_order, notes_on_tests
from trainer.evaluation.evaluator import Evaluator, Output, Question
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, Scorer, label_of, raw_users
from trainer.inference.model_folder import TrainedModel

USERS = "users"  # the protocol of what is no ranking
PROBABILITIES = "probabilities"


class PredictionEvaluator(Evaluator):
    """Examples that models give probabilities for."""

    protocol = USERS
    tested: ClassVar[tuple[str, ...]]  # metrics of one user each, so that users can be paired
    same: ClassVar[tuple[str, ...]]  # settings of the task that say what is predicted

    @classmethod
    def read(cls, question: Question) -> Sequence[Self]:
        return [cls(question, read_catalogue(question.release, question.read_domain))]

    def __init__(self, question: Question, catalogue: Catalogue) -> None:
        self.first, self.config, self.catalogue = question.models[0], question.config, catalogue
        self.release, self.split, self.domain = question.release, question.split, question.read_domain
        self.part, self.task = question.config.part, question.task
        for model in question.models:
            self.check(model)

    def predicted(self, model: TrainedModel) -> tuple[Any, ...]:
        """What must be the same of all models."""
        return self._settings(model), model.classes

    def _settings(self, model: TrainedModel) -> str:
        named = model.config.task.model_dump(include=set(self.same)).items()
        return ", ".join(f"{name} {value}" for name, value in named)

    def check(self, model: TrainedModel) -> None:
        """Raises EvaluateError for a model that was not trained for the same question as the first."""
        first, data = self.first, model.config.data
        if self.predicted(model) != self.predicted(first):
            raise EvaluateError(
                f"expected models that predict the same as {first.folder} ({self._settings(first)}), with the same "
                f"classes, found {model.folder} ({self._settings(model)})"
            )
        if (data.split, data.domain) != (self.split, self.domain):
            raise EvaluateError(
                f"expected models that read domain {self.domain!r} of split {self.split!r}, found {data.domain!r} of "
                f"{data.split!r} in {model.folder}"
            )

    @property
    def table(self) -> str:
        table: str = self.task.needs.table
        return table

    @property
    @abstractmethod
    def histories(self) -> Events:
        """What is read of each user, in rows of the catalogue."""

    @cached_property
    def raw_users(self) -> list[str]:
        return raw_users(self.release, self.histories.users)

    @abstractmethod
    def probabilities(self, model: TrainedModel) -> FloatArray:
        """That a model gives for the examples."""

    def scorer(
        self, model: TrainedModel, *, label: str | None = None, seed: int | None = None, must_know: bool = True
    ) -> Scorer:
        self.check(model)
        return Scorer(
            label or label_of(model.config),
            model.config.train.seed if seed is None else seed,
            lambda: self.probabilities(model),
            self.domain,
            is_model=True,
            facts=model.facts,
        )

    def baseline(self, label: str, probabilities: FloatArray) -> Scorer:
        return Scorer(label, None, lambda: probabilities, self.domain)

    def output(self, scorer: Scorer) -> Output:
        return {PROBABILITIES: scorer.score()}

    def results(self, scorers: Mapping[Key, Scorer], outputs: Mapping[Key, Output]) -> "Predictions":
        given: dict[Key, Any] = {key: output[PROBABILITIES] for key, output in outputs.items()}
        return Predictions(scorers, self, given)

    # --- what given probabilities come to

    @abstractmethod
    def metrics(self, given: FloatArray) -> dict[str, float]:
        """Of all examples together."""

    @abstractmethod
    def of_users(self, given: FloatArray, metric: str) -> FloatArray:
        """[U], of those that are tested."""

    @abstractmethod
    def heading(self) -> tuple[str, str]:
        """What is predicted, and of how many users."""

    @abstractmethod
    def notes(self) -> list[str]:
        """What a reader of the table must know."""

    @abstractmethod
    def user_columns(self, given: FloatArray) -> dict[str, Any]:
        """Columns of the kept table: each example's truth, and what one model gave."""

    @property
    def example_users(self) -> pa.Array:
        """Raw id of each example's user."""
        return pa.array(self.raw_users, pa.string())

    @abstractmethod
    def picture(self, by_label: Mapping[str, Sequence[FloatArray]]) -> tuple[str, Figure]:
        """Name of a file and a picture of what the seeds of each label gave."""


@dataclass(frozen=True)
class Predictions(Results):
    """Probabilities that every model and baseline gave for the same examples."""

    examples: PredictionEvaluator
    probabilities: Mapping[Key, FloatArray]

    @property
    def columns(self) -> Sequence[str]:
        """Those requested, of what is predicted here; else all."""
        examples = self.examples
        known = examples.metrics_of(examples.task).table
        parts = [metric.rpartition("/") for metric in examples.config.metrics]
        requested = [metric for name, _, metric in parts if name in ("", examples.name) and metric in known]
        return tuple(dict.fromkeys(requested)) or known

    @property
    def protocols(self) -> Sequence[str]:
        return (self.examples.protocol,)

    @property
    def num_users(self) -> int:
        return len(self.examples.histories)

    @property
    def training_items(self) -> IntArray:
        return self.examples.histories.lengths

    def of_users(self, key: Key, protocol: str, metric: str) -> FloatArray:
        return self.examples.of_users(self.probabilities[key], metric)

    def is_tested(self, metric: str) -> bool:
        return metric in self.examples.tested

    def place_of(self, protocol: str, metric: str) -> tuple[str, str]:
        return self.examples.protocol, metric.rpartition("/")[2]

    def seed_means(self, label: str, protocol: str, metric: str) -> FloatArray:
        return np.array([self.averages((label, seed), protocol)[metric] for seed in in_order(self.seeds(label))])

    def averages(self, key: Key, protocol: str) -> dict[str, float]:
        return self.examples.metrics(self.probabilities[key])

    def means(self, key: Key) -> dict[str, dict[str, float]]:
        return {self.examples.task.kind: self.averages(key, "")}

    def faults(self) -> list[str]:
        return [
            f"{int((~np.isfinite(given)).sum()):,} probabilities of {label}, seed {seed}, are not numbers"
            for (label, seed), given in self.probabilities.items()
            if not np.isfinite(given).all()
        ]

    def text(self, rows: Sequence[Row], *, against: str) -> str:
        what, users = self.examples.heading()
        where = f"{self.examples.part} · domain {self.examples.domain} · split {self.examples.split} · {users}"
        table = block(rows, [(self.protocols[0], metric) for metric in self.columns])
        tested = ", ".join(dict.fromkeys(row.metric for row in rows if row.p_value is not None))
        notes = self.examples.notes() + notes_on_tests(rows, f"gains over {against}, of {tested}")
        notes += [
            f"{label}: pre-training {row.pretrain_seconds:,.0f} s, training {row.seconds:,.0f} s"
            for label, row in {row.label: row for row in rows if row.is_model}.items()
        ]
        return f"{what} · {where}\n{table}\n\n" + "\n".join(notes)

    def tables(self) -> Iterator[pa.Table]:
        """A row for each example: label, seed, user (raw id), and the evaluator's columns."""
        users = self.examples.example_users
        for (label, seed), given in self.probabilities.items():
            yield pa.table(
                {
                    "label": pa.array([label] * len(users), pa.string()),
                    "seed": pa.array([seed] * len(users), pa.int64()),
                    "user": users,
                    **self.examples.user_columns(given),
                }
            )

    def figure(self, rows: Sequence[Row], *, against: str) -> tuple[str, Figure] | None:
        given = self.probabilities
        return self.examples.picture(
            {label: [given[label, seed] for seed in self.seeds(label)] for label in self.labels}
        )

    def about(self) -> dict[str, Any]:
        return {"evaluated": " of ".join(self.examples.heading())}

    def summary(self) -> dict[str, Any]:
        return {"task": self.examples.task.model_dump(mode="json")}
