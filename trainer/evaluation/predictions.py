"""What models told that rank nothing, as rows of one table: of what users are, or of what they click.

Shape letters: ``S`` seeds, ``U`` users, ``N`` examples, ``C`` classes, ``V`` rows of a catalogue.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from etl.tables import UNK
from trainer.config import EvaluatedModel
from trainer.data.catalogue import Catalogue, rows_by_raw_id
from trainer.data.histories import Histories
from trainer.evaluation.class_metrics import AUC, example_metrics, metrics_of
from trainer.evaluation.comparison import Row, adjust, block, in_order, mark_candidate, notes_on_tests
from trainer.evaluation.profiles import LabelledUsers, probabilities
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, user_rows
from trainer.evaluation.significance import compare
from trainer.inference.model_folder import TrainedModel

IntArray = npt.NDArray[np.int64]
Key = tuple[str, int | None]  # label, seed
Costs = Mapping[str, tuple[float, float]]  # label -> seconds of training and of pre-training, mean over seeds


@dataclass(frozen=True)
class Predictions(ABC):
    """Probabilities of every contender for the same examples."""

    METRICS: ClassVar[tuple[str, ...]]
    TESTED: ClassVar[tuple[str, ...]]  # of one user each, so that users can be paired

    probabilities: Mapping[Key, FloatArray]
    part: str
    domain: str
    split: str
    costs: Costs  # of models

    @abstractmethod
    def metrics(self, key: Key) -> dict[str, float]:
        """Of all examples together."""

    @abstractmethod
    def of_users(self, key: Key, metric: str) -> FloatArray:
        """[U] of each user's examples, for paired tests; NaN where these can't say, whatever was told."""

    @property
    @abstractmethod
    def histories(self) -> Histories:
        """What was read of each user."""

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for label, _ in self.probabilities))

    def seeds(self, label: str) -> list[int | None]:
        return [seed for name, seed in self.probabilities if name == label]

    def rows(self, *, against: str, candidate: str | None = None) -> list[Row]:
        """Every label under every metric; gains of TESTED over `against`, Holm over the models' tests. The gain of
        `candidate` in the first of TESTED is the one planned test."""
        tested = self.TESTED
        rows = [
            _row(self, label, against, metric, metric in tested) for metric in self.METRICS for label in self.labels
        ]
        return adjust(mark_candidate(rows, candidate, metric=tested[0]))

    def table(self, what: str, rows: Sequence[Row], users: str, notes: Sequence[str], *, against: str) -> str:
        """For people: what was told of whom, the rows, and what to know of them."""
        where = f"{self.part} · domain {self.domain} · split {self.split} · {users}"
        table = block(rows, [("users", metric) for metric in self.METRICS])
        return f"{what} · {where}\n{table}\n\n" + "\n".join([*notes, *_notes(rows, against=against)])


@dataclass(frozen=True)
class ClassPredictions(Predictions):
    """Probabilities [N, C] of the classes of something that each user is one of."""

    METRICS: ClassVar = ("accuracy", "macro-F1", AUC, "log loss")
    TESTED: ClassVar = ("accuracy", "log loss")

    name: str
    names: tuple[str, ...]  # of the classes
    examples: LabelledUsers

    @property
    def histories(self) -> Histories:
        return self.examples.histories

    def metrics(self, key: Key) -> dict[str, float]:
        return metrics_of(self.examples.class_N, self.probabilities[key])

    def of_users(self, key: Key, metric: str) -> FloatArray:
        return example_metrics(self.examples.class_N, self.probabilities[key])[metric]

    def confusion(self, label: str) -> FloatArray:
        """[C, C], its seeds together: share of the users of each class (row) who are told to be of another."""
        counted = np.zeros((len(self.names), len(self.names)))
        for seed in self.seeds(label):
            np.add.at(counted, (self.examples.class_N, self.probabilities[label, seed].argmax(1)), 1)
        shares: FloatArray = counted / np.maximum(counted.sum(1, keepdims=True), 1)
        return shares

    def render(self, rows: Sequence[Row], notes: Sequence[str], *, against: str, users: str = "") -> str:
        """The table for people. `users`: more of them, in brackets."""
        return self.table(self.name, rows, f"{len(self.examples):,} users{users}", notes, against=against)


def as_known(
    trained_model: TrainedModel, given: Histories, raw_users: Sequence[str], catalogue: Catalogue
) -> tuple[Histories, IntArray]:
    """(Histories of a catalogue's rows as a model knows users and items, others passed over; [V] its row of each row of
    the catalogue, UNK where it has none)."""
    rows = rows_by_raw_id(trained_model.catalogue, catalogue)
    own = Histories(
        user_rows(trained_model, raw_users), given.offsets, rows[given.items], given.times, given.event_types
    )
    return own.keep(own.items != UNK), rows


def told_by(
    trained_model: TrainedModel,
    examples: LabelledUsers,
    raw_users: Sequence[str],
    catalogue: Catalogue,
    *,
    batch_size: int,
    head: str,
) -> FloatArray:
    """[N, C] by one of a model's heads."""
    own, _ = as_known(trained_model, examples.histories, raw_users, catalogue)
    return probabilities(trained_model.teller(), trained_model.model, own, batch_size=batch_size, head=head)


def keys_of(chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel]) -> tuple[list[Key], Costs]:
    """Label and seed of each model. Raises EvaluateError for two of the same."""
    keys: list[Key] = []
    seconds: dict[str, list[tuple[float, float]]] = {}
    for named, trained_model in zip(chosen, models, strict=True):
        label = named.label or str(getattr(trained_model.config, "transfer", trained_model.config.name))
        key = label, trained_model.config.train.seed if named.seed is None else named.seed
        if key in keys:
            raise EvaluateError(
                f"expected one model of each label and seed, found two of {label!r}, seed {key[1]}; give `label` or "
                "`seed` in models"
            )
        keys.append(key)
        spent = trained_model.metrics.get("seconds", 0.0), trained_model.metrics.get("pretrain_seconds", 0.0)
        seconds.setdefault(label, []).append(spent)
    costs = {label: tuple(np.mean(of, axis=0).tolist()) for label, of in seconds.items()}
    return keys, costs


def _row(predictions: Predictions, label: str, against: str, metric: str, tested: bool) -> Row:
    seeds, others = in_order(predictions.seeds(label)), in_order(predictions.seeds(against))
    values = [predictions.metrics((label, seed))[metric] for seed in seeds]
    gain = None
    if tested and label != against and others:
        paired = seeds
        if None not in seeds and None not in others:
            paired = others = [seed for seed in seeds if seed in others]
            if not paired:
                raise EvaluateError(f"expected {label!r} and {against!r} to share a seed; train both with the same")
        gain = compare(_of_users(predictions, label, paired, metric), _of_users(predictions, against, others, metric))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    seconds, before = predictions.costs.get(label, (0.0, 0.0))
    return Row(
        label,
        "users",
        metric,
        float(np.mean(values)),
        spread,
        len(values),
        label in predictions.costs,
        predictions.domain,
        gain,
        seconds=seconds,
        pretrain_seconds=before,
    )


def _of_users(predictions: Predictions, label: str, seeds: Sequence[int | None], metric: str) -> FloatArray:
    """[S, U]; [U] where there are no seeds. Of the users of whom something can be said."""
    found = np.stack([predictions.of_users((label, seed), metric) for seed in seeds])
    found = found[:, ~np.isnan(found).any(0)]
    return found[0] if list(seeds) == [None] else found


def _notes(rows: Sequence[Row], *, against: str) -> list[str]:
    """What a reader of the table must know: what was tested, what models cost."""
    tested = ", ".join(dict.fromkeys(row.metric for row in rows if row.p_value is not None))
    notes = notes_on_tests(rows, f"gains over {against}, of {tested}")
    costs = {row.label: row for row in rows if row.is_model}
    return notes + [
        f"{label}: pre-training {row.pretrain_seconds:,.0f} s, training {row.seconds:,.0f} s"
        for label, row in costs.items()
    ]
