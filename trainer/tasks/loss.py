"""The loss at the positions where one is taken: over the whole catalogue or over sampled negatives.

Sampled softmax (Jean et al. 2015; Bengio and Senecal 2008): the partition function ``sum_v exp(s_v)`` becomes
``exp(s_y) + sum_j exp(s_j - log(K q_j))`` over K negatives drawn from q, those that hit the target left out; its
expectation is the partition function itself, whatever q is.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import FIRST_INDEX
from trainer.config import LossConfig
from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.tasks.packed_softmax import cross_entropy
from trainer.tasks.pool import Hits, softmax_over_pool, softplus_over_pool
from trainer.tasks.positions import Draw, Positions, draw_of, integers
from trainer.tasks.softmax import summed_cross_entropy


def summed_loss(
    model: SequenceModel,
    hidden_ND: Tensor,
    targets_N: Tensor,
    config: LossConfig,
    *,
    draw: Draw,
    table_VD: Tensor | None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Sum over N positions of the negative log-likelihood (nats) of their targets (catalogue rows) among all that the
    model predicts. `weight` [N] bool: the positions that count; None: all."""
    rows_C = model.classes()
    if config.kind == "full":
        table_VD = model.item_vectors() if table_VD is None else table_VD
        bias_V, classes_N = model.bias(), targets_N - FIRST_INDEX
        if rows_C is not None:
            classes_N = torch.searchsorted(rows_C, targets_N)
        rows = slice(FIRST_INDEX, None) if rows_C is None else rows_C
        table_CD, query_ND = model.as_scored(table_VD[rows]), model.head(hidden_ND)
        if weight_N is not None:
            classes_N = classes_N.clamp(0, len(table_CD) - 1)  # of those that don't count, anything
            return cross_entropy(query_ND, table_CD, bias_V[rows], classes_N, weight_N, config.label_smoothing)
        return summed_cross_entropy(query_ND, table_CD, bias_V[rows], classes_N, label_smoothing=config.label_smoothing)
    num_items = model.num_items - FIRST_INDEX if rows_C is None else len(rows_C)
    negatives_K = integers(draw, 4, config.num_negatives, num_items, hidden_ND.device)
    negatives_K = negatives_K + FIRST_INDEX if rows_C is None else rows_C[negatives_K]
    if config.kind == "bce":
        return binary_loss(model, hidden_ND, targets_N, negatives_K, weight_N)
    if config.kind == "gbce":
        power = positive_power(config.num_negatives, num_items, config.calibration)
        return generalised_binary_loss(model, hidden_ND, targets_N, negatives_K, power, weight_N)
    log_expected = np.log(config.num_negatives / num_items)  # draws of one item among K: K q, uniform q
    return sampled_softmax(model, hidden_ND, targets_N, negatives_K, float(log_expected), weight_N)


def loss_at(
    model: SequenceModel,
    hidden_ND: Tensor,
    batch: Batch,
    positions: Positions,
    config: LossConfig,
    table_VD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(summed loss, number of positions that count): `summed_loss` where the target of a position is its own event."""
    loss = summed_loss(
        model,
        hidden_ND,
        positions.of_events(batch.items),
        config,
        draw=draw_of(batch),
        table_VD=table_VD,
        weight_N=positions.weight_N,
    )
    return loss, positions.count


def loss_of_users(
    model: SequenceModel,
    hidden_BD: Tensor,
    targets_N: Tensor,
    owner_N: Tensor,
    table_VD: Tensor | None,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """As `summed_loss` over the whole catalogue, and N, of targets that a user has one hidden state for, whichever it
    is (`owner` [N], places in B): a softmax for each user and not for each target. Or, by `config`, `squared_loss`."""
    rows_C = model.classes()
    if rows_C is None:
        rows_C = torch.arange(FIRST_INDEX, model.num_items, device=hidden_BD.device)
    place_N = torch.searchsorted(rows_C, targets_N)
    num_targets = torch.tensor(len(targets_N), device=hidden_BD.device)
    if config.kind == "squared":
        table_VD = model.item_vectors() if table_VD is None else table_VD
        return squared_loss(
            model.head(hidden_BD), table_VD[rows_C], model.bias(rows_C), (owner_N, place_N), config
        ), num_targets
    table_VD = None if table_VD is None else model.as_scored(table_VD)
    scores_BC = wide(model.scores(hidden_BD, rows_C, table_VD, model.bias()))
    counts_B = torch.bincount(owner_N, minlength=len(hidden_BD))
    own_N = scores_BC[owner_N, place_N]
    loss: Tensor = (torch.logsumexp(scores_BC, dim=1) * counts_B).sum() - own_N.sum()
    return loss, num_targets


def squared_loss(
    query_BD: Tensor, table_CD: Tensor, bias_C: Tensor, taken: tuple[Tensor, Tensor], config: LossConfig
) -> Tensor:
    """Implicit feedback as in Hu, Koren and Volinsky (2008), in the form and with the regularisation of Rendle et al.
    (2021): the sum over what was `taken` (user, item; [N] places in B and C) of (1 - score)² + l2 (|user|² + |item|²),
    and of weight times (score² + l2 (|user|² + |item|²)) over all pairs. Biases are not regularised."""
    users_N, items_N = taken
    scores_BC = wide(query_BD @ table_CD.T + bias_C)
    loss = (1 - scores_BC[users_N, items_N]).square().sum() + config.unobserved_weight * scores_BC.square().sum()
    if not config.l2:
        return loss
    of_users_B, of_items_C = wide(query_BD).square().sum(1), wide(table_CD).square().sum(1)
    taken_sum = of_users_B[users_N].sum() + of_items_C[items_N].sum()
    all_sum = len(of_items_C) * of_users_B.sum() + len(of_users_B) * of_items_C.sum()
    return loss + config.l2 * (taken_sum + config.unobserved_weight * all_sum)


def is_predicted(model: SequenceModel, items: Tensor) -> Tensor:
    """Which of the catalogue rows `items` a loss is taken on: bool, of their shape."""
    return torch.ones_like(items, dtype=torch.bool) if model.predicted_V is None else model.predicted_V[items]


def sampled_softmax(
    model: SequenceModel,
    hidden_ND: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    log_expected: float,
    counts_N: Tensor | None = None,
) -> Tensor:
    """The sampled loss for given negatives [K], all drawn with the same expected count exp(log_expected). `counts` [N]
    bool, here and below: the positions that count; None: all."""
    query_ND, own_N, pool = _read(model, hidden_ND, targets_N, negatives_K)
    hit_NK = Hits(targets_N, negatives_K)
    if model.multiplies and counts_N is None:
        return softmax_over_pool(query_ND, wide(own_N), pool, hit_NK, log_expected)
    others_NK = (model.crossed(query_ND, *pool) - log_expected).masked_fill(hit_NK[:], -torch.inf)
    total_N = torch.logsumexp(wide(torch.cat([own_N[:, None], others_NK], dim=1)), dim=1)
    return _summed(total_N - own_N, counts_N)


def binary_loss(
    model: SequenceModel,
    hidden_ND: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    counts_N: Tensor | None = None,
) -> Tensor:
    """Sum over N positions of -log s(target), less the mean of log(1 - s(negative)) over the negatives that aren't the
    target; s is the logistic function (Tang and Wang 2018, equation 8, there with the sum over 3 negatives)."""
    hit_NK = Hits(targets_N, negatives_K)
    weight_N = 1 / hit_NK.others().clamp(min=1)
    return _binary(model, hidden_ND, targets_N, negatives_K, 1.0, (weight_N, counts_N))


def positive_power(num_negatives: int, num_items: int, calibration: float) -> float:
    """beta of gBCE (Petrov and Macdonald 2023): alpha (t (1 - 1 / alpha) + 1 / alpha), where alpha = K / (items - 1) is
    the share of the negatives that is sampled, and t the calibration."""
    alpha = num_negatives / max(1, num_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def generalised_binary_loss(
    model: SequenceModel,
    hidden_ND: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    power: float,
    counts_N: Tensor | None = None,
) -> Tensor:
    """Sum over N positions of gBCE (Petrov and Macdonald 2023): -(log s(target)^power + sum of log(1 - s(negative))) /
    (K + 1), over the K negatives but those that are the target.

    log s^power is power * log s. The paper turns it into a logit, log(1 / (s^-power - 1)), for which it needs float64:
    where s is near 1 the difference is lost in float32. Here it is never formed.
    """
    weight_N = torch.ones(len(targets_N), device=targets_N.device)
    total = _binary(model, hidden_ND, targets_N, negatives_K, power, (weight_N, counts_N))
    return total / (len(negatives_K) + 1)


def _binary(
    model: SequenceModel,
    hidden_ND: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    power: float,
    weights: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Sum over N positions of -power log s(target), less weight times the sum of log(1 - s(negative)); `weights`:
    these, and which positions count."""
    query_ND, own_N, pool = _read(model, hidden_ND, targets_N, negatives_K)
    hit_NK, (weight_N, counts_N) = Hits(targets_N, negatives_K), weights
    if counts_N is not None:
        refused_NK = F.softplus(wide(model.crossed(query_ND, *pool))).masked_fill(hit_NK[:], 0)
        return _summed(power * F.softplus(-wide(own_N)) + refused_NK.sum(1) * weight_N, counts_N)
    if model.multiplies:
        refused = softplus_over_pool(query_ND, pool, hit_NK, weight_N)
    else:
        refused_NK = F.softplus(wide(model.crossed(query_ND, *pool))).masked_fill(hit_NK[:], 0)
        refused = (refused_NK.sum(1) * weight_N).sum()
    return power * F.softplus(-wide(own_N)).sum() + refused


def _read(
    model: SequenceModel, hidden_ND: Tensor, targets_N: Tensor, negatives_K: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries [N, Q], scores [N] of their targets, vectors [K, Q] and biases [K] of the negatives; each row is read
    once."""
    query_ND, rows, N = model.head(hidden_ND), torch.cat([targets_N, negatives_K]), len(targets_N)
    vectors, bias = model.as_scored(model.item_vectors(rows)), model.bias(rows)
    own_N = model.matched(query_ND, vectors[:N]) + bias[:N]
    return query_ND, own_N, (vectors[N:], bias[N:])


def _summed(loss_N: Tensor, counts_N: Tensor | None) -> Tensor:
    return loss_N.sum() if counts_N is None else torch.where(counts_N, loss_N, 0).sum()


def wide(scores: Tensor) -> Tensor:
    """Sums of exponentials lose too much in bf16."""
    return scores.float() if scores.dtype == torch.bfloat16 else scores
