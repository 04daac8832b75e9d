"""Baselines that say something of items that nobody has had, by what the items are: predicted popularity, content
nearest neighbours, and ridge regression from features onto factors.

A model that reads features must be above all three: the first is the same for all users, and a large part of what
content is worth; the others read who the user is, and are fitted in closed form.

Factors: a truncated singular value decomposition of the training matrix (Cremonesi, Koren, Turrin 2010, PureSVD); the
map from features to factors as in Gantner et al. 2010, by ridge regression (`trainer.ridge`).

Shape letters: ``B`` users, ``V`` rows of the catalogue, ``F`` width of all features side by side, ``K`` factors.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from etl.tables import FIRST_INDEX
from trainer.arrays import FloatArray, IntArray
from trainer.config import BaselinesConfig, ItemFeaturesConfig
from trainer.data.baskets import open_dataset
from trainer.data.events import Events
from trainer.data.item_vectors import read_vectors, rows_of_items
from trainer.evaluation.baselines.names import CONTENT_NEIGHBOURS, PREDICTED_POPULARITY, RIDGE
from trainer.evaluation.scorers import EvaluationSet, Scorer, training_histories
from trainer.inference.scorer import Scores
from trainer.ridge import Ridge


def cold_scorers(examples: EvaluationSet, config: BaselinesConfig, encoders: tuple[str, ...]) -> list[Scorer]:
    """By vectors of these encoders, side by side. Raises DataError for one of no vectors."""
    trained_V = examples.training_interactions > 0
    read = ItemFeaturesConfig(encoders=encoders, whitening=False)
    found = read_vectors(
        examples.release, rows_of_items(examples.catalogue), read, split=examples.split, trained_V=trained_V
    ).values()
    features_VF = np.concatenate([one.vectors_VF.astype(np.float64) for one in found], axis=1)
    dataset = open_dataset(examples.table, examples.release, examples.split, examples.domain)
    training = training_histories(dataset, examples.catalogue, max_users=config.max_users)
    about = " and ".join(encoders)
    fitted = FittedOnTrained(features_VF, trained_V)
    popular_V = predicted_popularity(fitted, examples.training_interactions)
    ridge = ridge_onto_factors(fitted, training, len(features_VF), num_factors=config.factors)
    nearest = ContentNeighbours(_unit_rows(_centred(features_VF, trained_V)))

    def of_everyone(given: Events) -> Scores:
        return Scores.of(popular_V.expand(len(given), -1))

    return [
        Scorer(PREDICTED_POPULARITY, None, of_everyone, f"nothing of the user; {about} of items"),
        Scorer(CONTENT_NEIGHBOURS, None, lambda given: Scores.of(nearest.score(given)), f"items, by {about}"),
        Scorer(RIDGE, None, lambda given: Scores.of(ridge.score(given)), f"items, by {about}"),
    ]


class FittedOnTrained:
    """Ridge regressions from features [V, F] to targets [V, K], fitted on the trained rows, for all rows."""

    def __init__(self, features_VF: FloatArray, trained_V: npt.NDArray[np.bool_]) -> None:
        self._features_VF, self._trained_V = features_VF, trained_V
        self._ridge = Ridge(features_VF[trained_V])

    def predict(self, given_VK: FloatArray) -> FloatArray:
        """[V, K], of `given` [V, K] of the trained rows."""
        return self._ridge.fit(given_VK[self._trained_V])(self._features_VF)


def predicted_popularity(ridge: FittedOnTrained, interactions_V: IntArray) -> Tensor:
    """[V] an item's training interactions, as a ridge regression on features has them. Not their logarithms: the most
    popular items decide, and on MovieLens-1M these are found better so (NDCG@10 0.33 for 0.31)."""
    return torch.from_numpy(ridge.predict(interactions_V[:, None].astype(np.float64))[:, 0])


@dataclass(frozen=True)
class ContentNeighbours:
    """A candidate's score: the sum of its cosines with the items of the user's history."""

    unit_VF: FloatArray

    def score(self, histories: Events) -> Tensor:
        """[B, V] float64."""
        profile_BF = _counts(histories, len(self.unit_VF)) @ self.unit_VF
        return torch.from_numpy(profile_BF @ self.unit_VF.T)


@dataclass(frozen=True)
class Factors:
    """A user is the sum of the factors of its items; a candidate's factors are those that its features predict."""

    factors_VK: FloatArray  # zero for rows that nobody has had
    predicted_VK: FloatArray

    def score(self, histories: Events) -> Tensor:
        """[B, V] float64."""
        user_BK = _counts(histories, len(self.factors_VK)) @ self.factors_VK
        return torch.from_numpy(user_BK @ self.predicted_VK.T)


def ridge_onto_factors(ridge: FittedOnTrained, training: Events, num_rows: int, *, num_factors: int) -> Factors:
    """`training`: training parts, in rows of the catalogue, which has so many."""
    seen_UV = _counts(training, num_rows)
    seen_UV.data[:] = 1
    count = min(num_factors, min(seen_UV.shape) - 1)
    _, _, factors_KV = svds(seen_UV, k=count, v0=np.ones(min(seen_UV.shape)), random_state=0)
    factors_VK = np.ascontiguousarray(factors_KV.T)
    return Factors(factors_VK, ridge.predict(factors_VK))


def _counts(histories: Events, num_rows: int) -> sp.csr_array:
    """[B, V] how often each user has had each item."""
    is_item = histories.items >= FIRST_INDEX
    ones = np.ones(int(is_item.sum()))
    found = sp.csr_array((ones, (histories.owners[is_item], histories.items[is_item])), (len(histories), num_rows))
    found.sum_duplicates()
    return found


def _centred(features_VF: FloatArray, trained_V: npt.NDArray[np.bool_]) -> FloatArray:
    centred: FloatArray = features_VF - features_VF[trained_V].mean(0)
    return centred


def _unit_rows(vectors_VF: FloatArray) -> FloatArray:
    unit: FloatArray = vectors_VF / np.maximum(np.linalg.norm(vectors_VF, axis=1, keepdims=True), 1e-12)
    return unit
