"""The simple baselines of next baskets: popularity, what the user has had most often, and a first-order Markov chain
over baskets (its maximum likelihood, as Rendle et al. 2010 begin from).

Histories are of baskets, a SEP behind each, in rows of one catalogue. Shape letters: ``B`` users, ``V`` rows.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX, SEP
from trainer.arrays import IntArray
from trainer.config import BaselinesConfig
from trainer.data.baskets import BasketDataset
from trainer.data.events import Events
from trainer.evaluation.baselines.names import MARKOV_CHAIN, PERSONAL_FREQUENCY, POPULARITY
from trainer.evaluation.baselines.sequences import TIE_BREAK
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluationSet, Scorer, training_histories
from trainer.inference.scorer import Scores


def baseline_scorers(examples: EvaluationSet, config: BaselinesConfig) -> list[Scorer]:
    """Counted on the training baskets of about `config.max_users` users."""
    dataset = BasketDataset(examples.release, examples.split, examples.domain)
    training = training_histories(dataset, examples.catalogue, max_users=config.max_users)
    num_rows = len(examples.catalogue)
    popular = popularity(training, num_rows)
    chain = markov_chain(training, num_rows)

    def of_everyone(given: Events) -> Scores:
        return Scores.of(torch.from_numpy(popular).expand(len(given), -1))

    def of_user(given: Events) -> Scores:
        return Scores.of(personal_frequency(given, popular))

    return [
        Scorer(POPULARITY, None, of_everyone, "nothing"),
        Scorer(PERSONAL_FREQUENCY, None, of_user, f"all baskets of {examples.domain}"),
        Scorer(MARKOV_CHAIN, None, lambda given: Scores.of(chain.score(given)), f"last basket of {examples.domain}"),
    ]


def frequency_scorer(examples: EvaluationSet) -> Scorer:
    """What the user has had most often, of items that may be had again."""
    popular = examples.training_interactions / max(examples.training_interactions.sum(), 1)

    def of_user(given: Events) -> Scores:
        return Scores.of(personal_frequency(given, popular))

    return Scorer(PERSONAL_FREQUENCY, None, of_user, f"all of a user's items of {examples.domain}")


def popularity(training: Events, num_rows: int) -> FloatArray:
    """[V] share of all interactions."""
    counts = np.bincount(training.items, minlength=num_rows).astype(np.float64)
    counts[:FIRST_INDEX] = 0
    shares: FloatArray = counts / max(counts.sum(), 1)
    return shares


def personal_frequency(given: Events, popular: FloatArray) -> Tensor:
    """[B, V]: how often the user has had an item; what the user never had, and ties, by popularity."""
    owner = given.owners
    scores = TIE_BREAK * np.tile(popular, (len(given), 1))
    np.add.at(scores, (owner, given.items), 1.0)
    return torch.from_numpy(scores)


@dataclass(frozen=True)
class MarkovChain:
    """P(item | item of the basket before) [V, V], and popularity for what was never seen to follow."""

    transitions: sp.csr_array
    popular: FloatArray

    def score(self, given: Events) -> Tensor:
        """[B, V]: the mean over the items of the last basket."""
        last = last_baskets(given, len(self.popular))
        scores = np.asarray((last @ self.transitions).todense()) + TIE_BREAK * self.popular
        return torch.from_numpy(scores)


def markov_chain(training: Events, num_rows: int) -> MarkovChain:
    """Of all pairs of consecutive baskets, each pair of an item of the first and one of the second counts once."""
    number, is_item = _basket_numbers(training)
    owner = training.owners
    has = sp.csr_array(
        (np.ones(int(is_item.sum())), (number[is_item], training.items[is_item])),
        shape=(int(number.max(initial=-1)) + 1, num_rows),
    )
    has.data[:] = 1
    of_basket = owner[~is_item]  # every basket ends with a SEP
    follows = np.flatnonzero(np.diff(of_basket) == 0)
    counts = (has[follows].T @ has[follows + 1]).tocsr()
    scale = np.asarray(counts.sum(1)).ravel()
    counts = sp.diags_array(1 / np.maximum(scale, 1)) @ counts
    return MarkovChain(counts.tocsr(), popularity(training, num_rows))


def last_baskets(given: Events, num_rows: int) -> sp.csr_array:
    """[B, V], each row the distribution over the items of a user's last basket; empty for a user without one."""
    number, is_item = _basket_numbers(given)
    owner = given.owners
    newest = np.full(len(given), -1)
    newest[owner] = number  # the last one written stays
    chosen = is_item & (number == newest[owner])
    found = sp.csr_array(
        (np.ones(int(chosen.sum())), (owner[chosen], given.items[chosen])), shape=(len(given), num_rows)
    )
    size = np.maximum(np.asarray(found.sum(1)).ravel(), 1)
    return (sp.diags_array(1 / size) @ found).tocsr()


def _basket_numbers(given: Events) -> tuple[IntArray, np.ndarray]:
    """(number of each place's basket, counted through all users; whether it is an item)."""
    is_item = given.items != SEP
    return np.cumsum(~is_item) - ~is_item, is_item
