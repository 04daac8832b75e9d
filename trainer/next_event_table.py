"""Models that tell what a user's next event is beside the item, side by side on the first held-out event of each user.

Beside them: the shares of the classes in the training parts of the users asked, and each user's own past, drawn towards
those shares.

Shape letters: ``U`` users, ``N`` users asked, ``C`` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl.tables import UNK
from trainer.artifact import Artifact
from trainer.baselines import Histories
from trainer.classification import AUC, example_metrics, metrics_of
from trainer.comparison import Row, block
from trainer.config import EvaluateConfig, EvaluatedModel, MultiConfig
from trainer.contenders import EvaluateError, raw_users
from trainer.data.dataset import Catalogue, Release, SequenceDataset, Sequences, read_catalogue, rows_by_raw_id
from trainer.metrics import FloatArray
from trainer.next_events import Classes, asked_of, read_classes
from trainer.profiles import Asked, probabilities
from trainer.ranking import read_held_out, read_users
from trainer.tasks.multi import NOTHING
from trainer.told import Key, Told, keys_of, notes_of, rows_of

METRICS = ("accuracy", "macro-F1", AUC, "log loss")
TESTED = ("accuracy", "log loss")
PRIOR = 5.0  # events that the shares of all users count for beside a user's own


@dataclass(frozen=True)
class ToldEvents(Told):
    """Probabilities [N, C] of the classes of one thing that is told."""

    name: str
    names: tuple[str, ...]  # of the classes
    asked: Asked

    def metrics(self, key: Key) -> dict[str, float]:
        return metrics_of(self.asked.class_N, self.probabilities[key])

    def of_users(self, key: Key, metric: str) -> FloatArray:
        return example_metrics(self.asked.class_N, self.probabilities[key])[metric]


def tell(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[Artifact], release: Release
) -> list[ToldEvents]:
    """One for each thing that the models tell beside the item; none where they tell only that. Raises EvaluateError for
    models that were not trained for the same."""
    task, data = models[0].config.task, models[0].config.data
    assert isinstance(task, MultiConfig)
    split, domain = config.split or data.split, config.domain or data.domain
    for artifact in models:
        own = artifact.config.data
        if (own.split, own.domain, artifact.classes) != (split, domain, models[0].classes):
            raise EvaluateError(
                f"expected models that read domain {domain!r} of split {split!r} and tell what {models[0].folder} does "
                f"({', '.join(models[0].classes)}), found {artifact.folder}, which reads {own.domain!r} of "
                f"{own.split!r} and tells {', '.join(artifact.classes) or 'items only'}"
            )
    if not models[0].classes:
        return []
    dataset = SequenceDataset(release, split, domain, values="value" in task.tells)
    catalogue = read_catalogue(release, domain)
    classes = read_classes(release, catalogue, task, dataset)
    if classes.names != models[0].classes:
        raise EvaluateError(
            f"expected the classes that {models[0].folder} was trained on, found others in release {release.number}; "
            "evaluate on its own release"
        )
    held_out = read_held_out(
        release, split, domain, catalogue, config.part, max_users=config.evaluation.max_users,
        values="value" in task.tells,
    )  # fmt: skip
    past = read_users(dataset, lambda sequences: np.isin(sequences.users, held_out.users))
    assert past is not None, "whoever holds something out has a past"
    keys, costs = keys_of(chosen, models)
    found = []
    for name, names in classes.names.items():
        asked = asked_of(held_out, classes, name)
        told = {
            key: _told(artifact, asked, catalogue, release, config.evaluation.batch_size, name)
            for key, artifact in zip(keys, models, strict=True)
        }
        if config.baselines.enabled:
            own_UC, shares_C = _counts(past, classes, catalogue, name, config.part)
            rows = np.searchsorted(past.users, asked.histories.users)
            own_NC = own_UC[rows]
            told["shares of all", None] = np.tile(shares_C, (len(asked), 1))
            told["the user's own past", None] = (own_NC + PRIOR * shares_C) / (own_NC.sum(1, keepdims=True) + PRIOR)
        found.append(ToldEvents(told, config.part, domain, split, costs, name, names, asked))
    return found


def _told(
    artifact: Artifact, asked: Asked, catalogue: Catalogue, release: Release, batch_size: int, name: str
) -> FloatArray:
    given, known = asked.histories, artifact.users or {}
    users = np.array([known.get(raw, UNK) for raw in raw_users(release, given.users)], dtype=np.int64)
    rows = rows_by_raw_id(artifact.catalogue, catalogue)[given.items]
    own = Histories(users, given.offsets, rows, given.times).keep(rows != UNK)
    return probabilities(artifact.teller(), artifact.model, own, batch_size=batch_size, head=name)


def _counts(
    past: Sequences, classes: Classes, catalogue: Catalogue, name: str, part: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """([U, C] events of each class that each user had before what is asked, [C] shares in their training parts)."""
    lengths = np.diff(past.offsets)
    owner = np.repeat(np.arange(len(past)), lengths)
    position = np.arange(len(past.items)) - np.repeat(past.offsets[:-1], lengths)
    if name == "category":
        class_N = classes.class_V[catalogue.rows(past.items)]
    else:
        levels = classes.levels_L
        place = np.minimum(np.searchsorted(levels, np.nan_to_num(past.values, nan=np.inf)), len(levels) - 1)
        class_N = np.where(levels[place] == past.values, place, NOTHING)
    size = len(classes.names[name])
    trained = (position < past.valid_start[owner]) & (class_N != NOTHING)
    shares = np.bincount(class_N[trained], minlength=size).astype(np.float64)
    before = (position < past.history_end(part)[owner]) & (class_N != NOTHING)
    own = np.bincount(owner[before] * size + class_N[before], minlength=len(past) * size).reshape(len(past), size)
    return own.astype(np.float64), shares / max(shares.sum(), 1)


def render(told: ToldEvents, *, against: str) -> tuple[list[Row], str]:
    """The rows, and the table for people."""
    rows = rows_of(told, metrics=METRICS, tested=TESTED, against=against)
    where = f"{told.part} · domain {told.domain} · split {told.split} · {len(told.asked):,} users"
    notes = [f"{len(told.names)} classes of the first held-out event; AUC: each against the rest, averaged"]
    table = block(rows, [("users", metric) for metric in METRICS])
    return rows, f"{told.name} · {where}\n{table}\n\n" + "\n".join(notes + notes_of(rows, against=against))
