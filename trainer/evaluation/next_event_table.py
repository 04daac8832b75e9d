"""Models that tell what a user's next event is beside the item, side by side on the first held-out event of each user.

Beside them: the shares of the classes in the training parts of the users asked, and each user's own past, drawn towards
those shares.

Shape letters: ``U`` users, ``N`` users examples, ``C`` classes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.config import EvaluateConfig, EvaluatedModel, MultiConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.evaluation.baselines.names import OWN_PAST, SHARES
from trainer.evaluation.comparison import Row
from trainer.evaluation.item_ranking import read_held_out, read_users
from trainer.evaluation.next_events import Classes, examples_of, read_classes
from trainer.evaluation.predictions import ClassPredictions, keys_of, told_by
from trainer.evaluation.scorers import EvaluateError, raw_users
from trainer.inference.model_folder import TrainedModel
from trainer.tasks.multi import NOTHING

PRIOR = 5.0  # events that the shares of all users count for beside a user's own


def tell(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel], release: Release
) -> list[ClassPredictions]:
    """One for each thing that the models tell beside the item; none where they tell only that. Raises EvaluateError for
    models that were not trained for the same."""
    task, data = models[0].config.task, models[0].config.data
    assert isinstance(task, MultiConfig)
    split, domain = config.split or data.split, config.domain or data.domain
    for trained_model in models:
        own = trained_model.config.data
        same = (own.split, own.domain, trained_model.classes) == (split, domain, models[0].classes)
        if not same or own.event_types != data.event_types:
            raise EvaluateError(
                f"expected models that read domain {domain!r} of split {split!r} and tell what {models[0].folder} does "
                f"({', '.join(models[0].classes)}), of the same kinds of event, found {trained_model.folder}, which "
                f"reads {own.domain!r} of {own.split!r} and tells {', '.join(trained_model.classes) or 'items only'}"
            )
    if not models[0].classes:
        return []
    dataset = SequenceDataset(release, split, domain, values="value" in task.tells, event_types=data.event_types)
    catalogue = read_catalogue(release, domain)
    classes = read_classes(release, catalogue, task, dataset)
    if classes.names != models[0].classes:
        raise EvaluateError(
            f"expected the classes that {models[0].folder} was trained on, found others in release {release.number}; "
            "evaluate on its own release"
        )
    held_out = read_held_out(
        release,
        split,
        domain,
        catalogue,
        config.part,
        max_users=config.evaluation.max_users,
        values="value" in task.tells,
        event_types=data.event_types,
    )
    past = read_users(dataset, lambda sequences: np.isin(sequences.users, held_out.users))
    assert past is not None, "whoever holds something out has a past"
    keys, costs = keys_of(chosen, models)
    found = []
    for name, names in classes.names.items():
        examples = examples_of(held_out, classes, name)
        users = raw_users(release, examples.histories.users)
        predictions = {
            key: told_by(trained_model, examples, users, catalogue, batch_size=config.evaluation.batch_size, head=name)
            for key, trained_model in zip(keys, models, strict=True)
        }
        if config.baselines.enabled:
            own_UC, shares_C = _counts(past, classes, catalogue, name, config.part)
            rows = np.searchsorted(past.users, examples.histories.users)
            own_NC = own_UC[rows]
            predictions[SHARES, None] = np.tile(shares_C, (len(examples), 1))
            predictions[OWN_PAST, None] = (own_NC + PRIOR * shares_C) / (own_NC.sum(1, keepdims=True) + PRIOR)
        found.append(ClassPredictions(predictions, config.part, domain, split, costs, name, names, examples))
    return found


def _counts(
    past: Sequences, classes: Classes, catalogue: Catalogue, name: str, part: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """([U, C] events of each class that each user had before what is asked, [C] shares in their training parts)."""
    owner, position = past.owners, past.positions
    class_N = classes.of(name, catalogue.rows(past.items), past.values, past.event_types)
    size = len(classes.names[name])
    trained = (position < past.valid_start[owner]) & (class_N != NOTHING)
    shares = np.bincount(class_N[trained], minlength=size).astype(np.float64)
    before = (position < past.history_end(part)[owner]) & (class_N != NOTHING)
    own = np.bincount(owner[before] * size + class_N[before], minlength=len(past) * size).reshape(len(past), size)
    return own.astype(np.float64), shares / max(shares.sum(), 1)


def render(predictions: ClassPredictions, rows: Sequence[Row], *, against: str) -> str:
    """The table for people."""
    notes = [f"{len(predictions.names)} classes of the first held-out event; AUC: each against the rest, averaged"]
    return predictions.render(rows, notes, against=against)
