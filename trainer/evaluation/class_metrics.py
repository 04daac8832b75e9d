"""How well classes are predicted: accuracy, macro-F1, AUC, log loss (scikit-learn's; Fawcett 2006 for AUC).

Shape letters: ``N`` examples, ``C`` classes.
"""

import contextlib
import importlib
import warnings
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trainer.evaluation.ranking_metrics import FloatArray

IntArray = npt.NDArray[np.int64]

AUC = "AUC"
LOG_LOSS = "log loss"
PER_EXAMPLE = ("accuracy", LOG_LOSS)  # metrics that one example has
_LEAST = 1e-15  # of a probability, so that a logarithm has one


def scikit_learn(module: str) -> Any:
    """A module of scikit-learn, imported when it is needed: it takes a second.

    It asks of whatever it is given whether that is polars', where polars is among the imported modules; the thread that
    imports mlflow may be in the middle of importing that. So it is imported whole first, where it is installed.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("polars")
    return importlib.import_module(f"sklearn.{module}")


NumberT = TypeVar("NumberT", float, FloatArray)


def signed(value: NumberT, metric: str) -> NumberT:
    """Larger is better: the sign of losses and errors is turned."""
    return -value if metric.rpartition("/")[2] in (LOG_LOSS, "calibration error") else value


def metrics_of(classes_N: IntArray, probabilities_NC: FloatArray) -> dict[str, float]:
    """``accuracy``, ``macro-F1`` (all classes weigh alike), ``AUC`` and ``log loss`` (nats). `AUC` of more than two
    classes is the mean over classes of each against the rest, those without an example, or without another, left out;
    NaN where none is left."""
    scored = scikit_learn("metrics")
    per_example = example_metrics(classes_N, probabilities_NC)
    told_N, num_classes = probabilities_NC.argmax(1), probabilities_NC.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that nobody has
        f1 = scored.f1_score(classes_N, told_N, labels=range(num_classes), average="macro", zero_division=0)
    examples = range(num_classes) if num_classes > 2 else [1]
    areas = [
        float(scored.roc_auc_score(classes_N == one, probabilities_NC[:, one]))
        for one in examples
        if 0 < (classes_N == one).sum() < len(classes_N)
    ]
    return {
        "accuracy": float(per_example["accuracy"].mean()),
        "macro-F1": float(f1),
        AUC: float(np.mean(areas)) if areas else float("nan"),
        "log loss": float(per_example["log loss"].mean()),
    }


def example_metrics(classes_N: IntArray, probabilities_NC: FloatArray) -> dict[str, FloatArray]:
    """``accuracy`` and ``log loss`` of each example [N], for paired tests."""
    of_class_N = probabilities_NC[np.arange(len(classes_N)), classes_N]
    return {
        "accuracy": (probabilities_NC.argmax(1) == classes_N).astype(np.float64),
        "log loss": -np.log(np.maximum(of_class_N, _LEAST)),
    }
