"""How well it is predicted which items users take: AUC, also of each user's own pairs, log loss, calibration.

Shape letters: ``U`` users, ``N`` pairs of a user and an item.
"""

import numpy as np
import numpy.typing as npt

from trainer.arrays import IntArray
from trainer.evaluation.class_metrics import AUC
from trainer.evaluation.class_metrics import metrics_of as of_classes
from trainer.evaluation.ranking_metrics import FloatArray

BINS = 15
OF_USER = "user AUC"
ERROR = "calibration error"


def metrics_of(taken_N: npt.NDArray[np.bool_], given_N: FloatArray, owner_N: IntArray) -> dict[str, float]:
    """``AUC`` over all pairs, ``user AUC``, the mean over users of each one's own, ``log loss`` (nats), ``calibration
    error``: the mean distance between prediction and outcome, over 15 bins of equally many pairs (Naeini et al.
    2015)."""
    both = of_classes(taken_N.astype(np.int64), np.stack([1 - given_N, given_N], axis=1))
    count = np.bincount(owner_N)
    own = user_auc(taken_N, given_N, owner_N)
    curve = reliability(taken_N, given_N)
    return {
        AUC: both[AUC],
        OF_USER: float(np.nanmean(own[count > 0])),
        "log loss": both["log loss"],
        ERROR: float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=curve[:, 2])),
    }


def user_auc(taken_N: npt.NDArray[np.bool_], given_N: FloatArray, owner_N: IntArray) -> FloatArray:
    """[U] share of the pairs of a taken and another item of the user that are in the right order, ties a half;
    NaN for a user without both (Mann and Whitney 1947)."""
    order = np.lexsort((given_N, owner_N))
    owner, taken = owner_N[order], taken_N[order]
    # Mean ranks within a user's equal values.
    same = np.concatenate([[True], (np.diff(owner) != 0) | (np.diff(given_N[order]) != 0)])
    group = np.cumsum(same) - 1
    rank = (np.bincount(group, np.arange(1, len(order) + 1)) / np.bincount(group))[group]
    num_users = int(owner_N.max(initial=-1)) + 1
    count = np.bincount(owner, minlength=num_users)
    before = (np.cumsum(count) - count)[owner]
    yes = np.bincount(owner, taken, minlength=num_users)
    rank_sum = np.bincount(owner, np.where(taken, rank - before, 0), minlength=num_users)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: FloatArray = (rank_sum - yes * (yes + 1) / 2) / (yes * (count - yes))
    return found


def reliability(taken_N: npt.NDArray[np.bool_], given_N: FloatArray) -> FloatArray:
    """[bins, 3]: mean prediction, share that was taken, and number of pairs, of bins of equally many."""
    parts = [part for part in np.array_split(np.argsort(given_N, kind="stable"), BINS) if len(part)]
    return np.array([[given_N[part].mean(), taken_N[part].mean(), len(part)] for part in parts])
