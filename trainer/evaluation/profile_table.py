"""Models that tell an attribute of users, side by side on users whose attribute none was trained on.

Beside them: the most frequent value, and a logistic regression on which items a user has, whose strength is chosen on
the validation part. A transfer gain that doesn't beat that one is none.

Shape letters: ``N`` users, ``C`` classes, ``V`` rows of the catalogue.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from trainer.config import EvaluateConfig, EvaluatedModel, ProfileConfig
from trainer.data.catalogue import read_catalogue
from trainer.data.histories import Histories
from trainer.data.release import Release
from trainer.evaluation.baselines.names import MOST_FREQUENT, REGRESSION
from trainer.evaluation.class_metrics import metrics_of, scikit_learn
from trainer.evaluation.comparison import Row
from trainer.evaluation.predictions import ClassPredictions, keys_of, told_by
from trainer.evaluation.profiles import LabelledUsers, read_classes, read_examples
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, raw_users
from trainer.inference.model_folder import TrainedModel
from trainer.tasks.profile import HEAD

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # C of the regression


def tell(
    config: EvaluateConfig, chosen: Sequence[EvaluatedModel], models: Sequence[TrainedModel], release: Release
) -> ClassPredictions:
    """Ask every model, and the baselines. Raises EvaluateError for models that were not trained for one question."""
    task, data = models[0].config.task, models[0].config.data
    assert isinstance(task, ProfileConfig)
    split, domain = config.split or data.split, config.domain or data.domain
    for trained_model in models:
        _check(trained_model, models[0], split, domain)
    classes = read_classes(release, task)
    if classes.names != models[0].classes[HEAD]:
        raise EvaluateError(
            f"expected {task.attribute} to have the values that {models[0].folder} was trained on "
            f"({', '.join(models[0].classes[HEAD])}), found {', '.join(classes.names)}; evaluate on its own release"
        )
    catalogue = read_catalogue(release, domain)
    examples = read_examples(release, split, domain, catalogue, classes, config.part)
    keys, costs = keys_of(chosen, models)
    users = raw_users(release, examples.histories.users)
    found = {
        key: told_by(trained_model, examples, users, catalogue, batch_size=config.evaluation.batch_size, head=HEAD)
        for key, trained_model in zip(keys, models, strict=True)
    }
    if config.baselines.enabled:
        trained, checked = (
            read_examples(release, split, domain, catalogue, classes, part) for part in ("train", "validation")
        )
        shares = np.bincount(trained.class_N, minlength=len(classes.names)) / len(trained)
        found[MOST_FREQUENT, None] = np.tile(shares, (len(examples), 1))
        found[REGRESSION, None] = _regression(trained, checked, examples, len(catalogue))
    return ClassPredictions(found, config.part, domain, split, costs, task.attribute, classes.names, examples)


def _check(trained_model: TrainedModel, first: TrainedModel, split: str, domain: str) -> None:
    task, data = trained_model.config.task, trained_model.config.data
    if task.kind != "profile":
        raise EvaluateError(
            f"expected models that tell a profile, as {first.folder}, found {trained_model.folder} of task {task.kind}"
        )
    held = {"attribute", "validation", "test", "min_users"}
    assert isinstance(first.config.task, ProfileConfig)
    if (
        task.model_dump(include=held) != first.config.task.model_dump(include=held)
        or trained_model.classes != first.classes
    ):
        raise EvaluateError(
            f"expected models of one attribute with the same users held out, as {first.folder}, found another in "
            f"{trained_model.folder}"
        )
    if (data.split, data.domain) != (split, domain):
        raise EvaluateError(
            f"expected models that read domain {domain!r} of split {split!r}, found {data.domain!r} of {data.split!r} "
            f"in {trained_model.folder}"
        )


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


def render(predictions: ClassPredictions, rows: Sequence[Row], *, against: str) -> str:
    """The table for people."""
    count = np.bincount(predictions.examples.class_N, minlength=len(predictions.names))
    shown = ", ".join(f"{name} {users:,}" for name, users in zip(predictions.names, count, strict=True))
    notes = ["reads the training part; AUC of more than two values: each against the rest, averaged"]
    return predictions.render(rows, notes, against=against, users=f" ({shown})")
