"""Ranks of scores that are there as a whole, [B, V]: by the block-wise code under test, and by plain counting."""

import numpy as np
import torch

from trainer.data.events import Events
from trainer.evaluation.item_ranking import rank_among, rank_in_full
from trainer.evaluation.ranking_metrics import MISSED, PADDED
from trainer.inference.scorer import Scores


def dense(score):
    """A `trainer.evaluation.item_ranking.Score` of a function of histories that gives all scores, [B, V]."""
    return lambda histories: Scores.of(score(histories))


def left_out(candidates_BV):
    """What is no candidate, as histories."""
    owner, rows = (~candidates_BV).nonzero(as_tuple=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner.numpy(), minlength=len(candidates_BV)))])
    return Events.of(np.arange(len(candidates_BV)), offsets, rows.numpy(), np.empty(0, np.int64))


def rank_targets(scores_BV, targets_BR, candidates_BV=None):
    """Ranks [B, R] among the candidates ([B, V] or [V] bool, None: every row)."""
    every = torch.ones_like(scores_BV, dtype=torch.bool)
    candidates_BV = every if candidates_BV is None else candidates_BV.expand_as(every)
    scores = Scores.of(scores_BV)
    return rank_in_full(scores, scores.gather(targets_BR), targets_BR, left_out(candidates_BV), 0)


def rank_targets_among(scores_BV, targets_BR, negatives_BN):
    """Ranks [B, R] among themselves and fixed negatives."""
    targets, negatives = (scores_BV.gather(1, rows.clamp(min=0)) for rows in (targets_BR, negatives_BN))
    return rank_among(targets, targets_BR, negatives, negatives_BN)


def ranks_by_listing(scores_BV, targets_BR, candidates_BV):
    """The same ranks as places in a written-out list: NaN counts against the held-out item on either side."""
    ranks = np.full(targets_BR.shape, PADDED)
    for user, targets in enumerate(targets_BR.tolist()):

        def key(row, user=user, targets=targets):
            score = scores_BV[user, row]
            if row in targets:
                return (np.inf if np.isnan(score) else -score, True, targets.index(row))
            return (-np.inf if np.isnan(score) else -score, False, 0)

        order = sorted(np.flatnonzero(candidates_BV[user]).tolist(), key=key)
        for r, target in enumerate(targets):
            if target >= 0 and target not in targets[:r]:
                ranks[user, r] = 1 + order.index(target) if target in order else MISSED
    return torch.from_numpy(ranks)
