"""How vectors of users and items rank what users hold out: dot products among all items of the domain.

Shape letters: ``U`` users, ``B`` users of a batch, ``V`` rows of the catalogue, ``F`` width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX
from trainer.arrays import IntArray
from trainer.data.catalogue import Catalogue
from trainer.data.events import Events
from trainer.data.held_out import HeldOut, Part, read_held_out, without_repeats
from trainer.data.release import Release
from trainer.evaluation.item_ranking import Score, rank
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.inference.scorer import Scores

Metrics = dict[str, FloatArray]  # metric -> [U]


def examples(release: Release, split: str, domain: str, catalogue: Catalogue, part: Part) -> HeldOut:
    """The users who hold out items of `part` that they have not had before. Raises DataError."""
    found = read_held_out(release, split, domain, catalogue, part)
    return without_repeats(found, where=f"split {split!r} and domain {domain!r} for {part}")


def ranked(score: Score, held_out: HeldOut) -> Metrics:
    """Of each user, among all items that the input lacks."""
    return rank(score, held_out)["full"]


@dataclass(frozen=True)
class VectorScore:
    """Dot products. An item without a vector is never found; a user without one gets the popular items."""

    known: IntArray  # [U] global indices of users, ascending
    users_UF: Tensor
    items_VF: Tensor  # of the catalogue's rows from FIRST_INDEX on
    popular_V: Tensor  # float32, of the same rows

    def __call__(self, given: Events) -> Scores:
        place = np.minimum(np.searchsorted(self.known, given.users), max(len(self.known) - 1, 0))
        user_BF = self.users_UF[torch.from_numpy(place)]
        has_none_B = torch.from_numpy(self.known[place] != given.users) | ~user_BF.any(1)
        scores_BV = user_BF @ self.items_VF.T
        scores_BV[:, ~self.items_VF.any(1)] = -torch.inf
        scores_BV[has_none_B] = self.popular_V
        reserved = scores_BV.new_full((len(given), FIRST_INDEX), -torch.inf)
        return Scores.of(torch.cat([reserved, scores_BV], 1))
