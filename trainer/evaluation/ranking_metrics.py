"""Ranks and ranking metrics of a batch of users, vectorised (survey 4.5, table 2).

Shape letters: ``B`` users in the batch, ``R`` held-out items of a user (ragged, padded by -1).

Three conventions, which give different numbers and must never share a column:

* ``list``: all held-out items of a user are relevant in *one* list. Recall@k = hits / min(k, R); NDCG@k has min(k, R)
  items on top as its ideal; MRR is that of the best held-out item. The survey's BERT4Rec rows.
* ``single``: each held-out item is ranked *alone*, against the candidates that are not held out, as if it were the only
  one: Recall@k is the hit rate, NDCG@k = 1/log2(rank + 1) within k, MRR = 1/rank; a user's value is the mean over its
  held-out items. The survey's Caser rows.
* ``basket``: as ``list``, but Recall@k = hits / R; and F1@k, the harmonic mean of that and hits / k, and HR@k, 1 where
  anything is hit: next basket recommendation (Rendle et al. 2010; Yu et al. 2016).

Ties are never broken in the target's favour: whatever scores as high as a held-out item is placed above it, and so is
a score that is not a number. Held-out items tied with each other share the places they fill; their order changes no
metric.
Definitions: Järvelin and Kekäläinen 2002 (NDCG, binary gains); Voorhees 1999 (MRR).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
Convention = Literal["list", "single", "basket"]

KS = (1, 5, 10)
PADDED = -1  # no held-out item in this place, or one that an earlier place already has
PAIRS_AT_ONCE = 1 << 24  # of a user's held-out items with each other: there may be hundreds of a user
MISSED = 0  # a held-out item that is no candidate: it can't be found at any rank


def place_targets(above_BR: Tensor, scores_BR: Tensor, targets_BR: Tensor, is_candidate_BR: Tensor) -> Tensor:
    """Ranks int64 [B, R] of held-out items: 1 = best, PADDED, or MISSED.

    above [B, R]: how many competitors (candidates that are not held out) score not below each; scores [B, R] floating;
    targets [B, R] int64 rows of the catalogue, -1 where padded. To its competitors a rank adds the target's place among
    the user's own targets.
    """
    num_targets = targets_BR.shape[1]
    users = max(1, PAIRS_AT_ONCE // max(1, num_targets**2))
    if len(targets_BR) > users:
        given = (above_BR, scores_BR, targets_BR, is_candidate_BR)
        parts = zip(*(torch.split(part, users) for part in given), strict=True)
        return torch.cat([place_targets(*part) for part in parts])
    same_BRR = targets_BR[:, :, None] == targets_BR[:, None, :]
    earlier_RR = torch.ones(num_targets, num_targets, dtype=torch.bool, device=targets_BR.device).tril(-1)
    repeated_BR = (same_BRR & earlier_RR).any(2)
    counts_BR = (targets_BR >= 0) & is_candidate_BR & ~repeated_BR
    # Order among the user's own targets: by score, NaN last, then by place.
    key_BR = torch.where(scores_BR.isnan(), -torch.inf, scores_BR)
    over_BRR = (key_BR[:, None, :] > key_BR[:, :, None]) | ((key_BR[:, None, :] == key_BR[:, :, None]) & earlier_RR)
    ranks_BR = 1 + above_BR + (over_BRR & counts_BR[:, None, :]).sum(2)
    ranks_BR = torch.where(counts_BR, ranks_BR, MISSED)
    return torch.where((targets_BR < 0) | repeated_BR, PADDED, ranks_BR)


def metrics_from_ranks(
    ranks_BR: Tensor,
    *,
    convention: Convention = "list",
    ks: Sequence[int] = KS,
    only_BR: npt.NDArray[np.bool_] | None = None,
) -> dict[str, FloatArray]:
    """Per-user metrics float64 [B]: ``NDCG@k``, ``Recall@k``, ``MRR`` (and of `basket` F1@k, HR@k); NaN for a
    user without held-out items.

    `only_BR`: the held-out items that are counted (cold ones, say); the others keep their places in the list.
    """
    ranks = ranks_BR.cpu().numpy().copy()
    found = ranks > 0
    is_target = ranks != PADDED
    if convention == "single":  # alone: without the user's other targets that are placed above
        users = max(1, PAIRS_AT_ONCE // max(1, ranks.shape[1] ** 2))
        for start in range(0, len(ranks), users):
            own, own_found = ranks[start : start + users], found[start : start + users]
            ranks[start : start + users] -= (own_found[:, None, :] & (own[:, None, :] < own[:, :, None])).sum(2)
    if only_BR is not None:
        found, is_target = found & only_BR, is_target & only_BR
    num_targets = is_target.sum(1)
    places = np.where(found, ranks, 1)
    discounts = 1 / np.log2(places + 1)
    metrics: dict[str, FloatArray] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in ks:
            hits = found & (ranks <= k)
            best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # ideal of 0, 1… k items
            if convention == "single":
                metrics[f"NDCG@{k}"] = (hits * discounts).sum(1) / num_targets
                metrics[f"Recall@{k}"] = hits.sum(1) / num_targets
                continue
            metrics[f"NDCG@{k}"] = (hits * discounts).sum(1) / best[np.minimum(num_targets, k)]
            metrics[f"Recall@{k}"] = hits.sum(1) / (np.minimum(num_targets, k) if convention == "list" else num_targets)
            if convention == "basket":
                of_both = 2 * hits.sum(1) / (k + num_targets)  # 2 P R / (P + R), with P = hits / k
                metrics[f"F1@{k}"] = np.where(num_targets > 0, of_both, np.nan)
                metrics[f"HR@{k}"] = hits.any(1) / (num_targets > 0)
        reciprocal = found / places
        if convention != "single":
            metrics["MRR"] = np.where(num_targets > 0, reciprocal.max(1, initial=0.0), np.nan)
        else:
            metrics["MRR"] = reciprocal.sum(1) / num_targets
    return metrics


def means(metrics: Mapping[str, FloatArray]) -> dict[str, float]:
    """Mean over users of each metric; users without held-out items (NaN) are left out. NaN where no user is left."""
    return {
        name: float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")
        for name, values in metrics.items()
    }
