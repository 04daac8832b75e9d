"""Who is asked about which items, what the truth is, and how a model answers: content-based click prediction.

Shape letters: ``U`` users, ``N`` pairs of a user and an item, user by user.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.config import ClickConfig
from trainer.data.catalogue import Catalogue
from trainer.data.histories import Histories
from trainer.data.release import DataError, Release
from trainer.evaluation.class_metrics import AUC
from trainer.evaluation.class_metrics import metrics_of as of_classes
from trainer.evaluation.item_ranking import Part, read_held_out
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.inference.scorer import ModelScorer
from trainer.models import SequenceModel
from trainer.parallel.distributed import World
from trainer.tasks.click import Click

IntArray = npt.NDArray[np.int64]

NEGATIVES = "uniform-100"
BINS = 15
OF_USER = "user AUC"
ERROR = "calibration error"


@dataclass(frozen=True)
class Pairs:
    """What is asked: each user's held-out items, and some of the user's fixed negatives for each."""

    histories: Histories  # in rows; users ascend
    owner_N: IntArray  # place of the pair's user
    row_N: IntArray  # of the catalogue
    taken_N: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, users: IntArray) -> "Pairs":
        """The pairs of some users, in that order."""
        count = np.bincount(self.owner_N, minlength=len(self))
        first = np.cumsum(count) - count
        size = count[users]
        at = np.repeat(first[users] - (np.cumsum(size) - size), size) + np.arange(size.sum())
        return Pairs(
            self.histories.take(users), np.repeat(np.arange(len(users)), size), self.row_N[at], self.taken_N[at]
        )


def read_pairs(
    release: Release,
    split: str,
    domain: str,
    catalogue: Catalogue,
    part: Part,
    task: ClickConfig,
    *,
    max_users: int | None = None,
) -> Pairs:
    """Held-out items that were taken; for each so many of the user's `uniform-100`, the same ones for every model; and
    what the log says was shown, and not taken in this part. Raises GraftrecError."""
    protocols = (NEGATIVES,) if task.negatives else ()
    examples = read_held_out(
        release, split, domain, catalogue, part, protocols, max_users=max_users, event_types=task.impressions
    )
    is_event = examples.targets >= 0
    is_taken = is_event & (examples.event_types == 0) if task.impressions else is_event
    taken = np.where(is_taken, examples.targets, -1)
    is_shown = is_event & ~(examples.targets[:, :, None] == taken[:, None, :]).any(2)
    histories = examples.histories
    if task.impressions:
        histories = histories.keep(histories.event_types == 0)
    fixed = examples.negatives.get(NEGATIVES, np.full((len(examples), 1), -1))
    wanted = np.minimum(is_taken.sum(1) * task.negatives, (fixed >= 0).sum(1))
    # Which of them: by a draw of the user's own, for they lie in an order that may mean something.
    order = np.stack([np.random.default_rng([int(user), 9]).permutation(fixed.shape[1]) for user in examples.users])
    shuffled = np.take_along_axis(fixed, order, axis=1)
    known_first = np.argsort(shuffled < 0, axis=1, kind="stable")
    shuffled = np.take_along_axis(shuffled, known_first, axis=1)
    is_chosen = np.arange(shuffled.shape[1]) < wanted[:, None]
    items = np.concatenate([examples.targets, shuffled], axis=1)
    owner, place = np.concatenate([is_taken | is_shown, is_chosen], axis=1).nonzero()
    yes = np.concatenate([is_taken, np.zeros_like(is_chosen)], axis=1)
    pairs = Pairs(histories, owner, items[owner, place], yes[owner, place])
    if not pairs.taken_N.any() or pairs.taken_N.all():
        raise DataError(
            f"expected items that were taken and others in the {part} part of split {split!r}, domain {domain!r}, "
            f"found {int(pairs.taken_N.sum()):,} and {int((~pairs.taken_N).sum()):,}; mend task.impressions, or raise "
            "task.negatives"
        )
    return pairs.take(np.flatnonzero(np.bincount(owner, minlength=len(pairs))))


def probabilities(
    scorer: ModelScorer, model: SequenceModel, task: Click, pairs: Pairs, *, batch_size: int
) -> FloatArray:
    """[N] that the user takes the item."""
    found = []
    for start in range(0, len(pairs), batch_size):
        own = pairs.take(np.arange(start, min(start + batch_size, len(pairs))))
        with torch.inference_mode():
            hidden_BD = scorer.hidden(own.histories)
            owner, rows = (torch.from_numpy(x).to(hidden_BD.device) for x in (own.owner_N, own.row_N))
            found.append(task.told(model, hidden_BD[owner], rows).double().sigmoid().cpu().numpy())
    return np.concatenate(found)


def validate(
    scorer: ModelScorer, model: SequenceModel, task: Click, pairs: Pairs, world: World, *, batch_size: int
) -> dict[str, float]:
    """As `metrics_of`; each process asks about its share of the users."""
    share = world.share(len(pairs))
    own = pairs.take(share)
    told_N = probabilities(scorer, model, task, own, batch_size=batch_size)
    place_N = (len(share) * world.rank + own.owner_N).astype(np.float64)
    table = world.gather(torch.from_numpy(np.stack([place_N, own.taken_N, told_N], axis=1))).numpy()
    table = table[table[:, 0] < len(pairs)]  # the last user may be in several shares
    return metrics_of(table[:, 1] > 0, table[:, 2], table[:, 0].astype(np.int64))


def metrics_of(taken_N: npt.NDArray[np.bool_], told_N: FloatArray, owner_N: IntArray) -> dict[str, float]:
    """``AUC`` over all pairs, ``user AUC``, the mean over users of each one's own, ``log loss`` (nats), ``calibration
    error``: the mean distance between what is told and what is so, over 15 bins of equally many pairs (Naeini et al.
    2015)."""
    both = of_classes(taken_N.astype(np.int64), np.stack([1 - told_N, told_N], axis=1))
    count = np.bincount(owner_N)
    own = user_auc(taken_N, told_N, owner_N)
    curve = reliability(taken_N, told_N)
    return {
        AUC: both[AUC],
        OF_USER: float(np.nanmean(own[count > 0])),
        "log loss": both["log loss"],
        ERROR: float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=curve[:, 2])),
    }


def user_auc(taken_N: npt.NDArray[np.bool_], told_N: FloatArray, owner_N: IntArray) -> FloatArray:
    """[U] share of the pairs of a taken and another item of the user that are told in the right order, ties a half;
    NaN for a user without both (Mann and Whitney 1947)."""
    order = np.lexsort((told_N, owner_N))
    owner, taken = owner_N[order], taken_N[order]
    # Mean ranks within a user's equal values.
    same = np.concatenate([[True], (np.diff(owner) != 0) | (np.diff(told_N[order]) != 0)])
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


def reliability(taken_N: npt.NDArray[np.bool_], told_N: FloatArray) -> FloatArray:
    """[bins, 3]: mean of what is told, share of what is so, and number of pairs, of bins of equally many."""
    parts = [part for part in np.array_split(np.argsort(told_N, kind="stable"), BINS) if len(part)]
    return np.array([[told_N[part].mean(), taken_N[part].mean(), len(part)] for part in parts])
