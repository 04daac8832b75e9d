"""LightGCN: vectors of users and items, propagated over the graph of what users took (and whom they know).

He, Deng, Wang, Li, Zhang and Wang 2020, *LightGCN: Simplifying and Powering Graph Convolution Network for
Recommendation*: Eq. 8 (propagation by the symmetrically normalised adjacency matrix, without weights or activations),
Eq. 4 and 11 (the mean over layers), Eq. 15 (BPR). The loss `softmax` is the sampled softmax of cosines (Wu et al.
2022, *On the Effectiveness of Sampled Softmax Loss for Item Recommendation*), which needs a tenth of the epochs.

A step propagates over the whole graph. Shape letters: ``U`` users, ``V`` items, ``N`` = U + V nodes, ``F`` width, ``B``
interactions of a batch, ``K`` negatives.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.social import LightGcnConfig
from trainer.training.loop import NonFiniteLoss

_SPREAD = 0.1  # standard deviation of initial vectors, as in the authors' program


@dataclass(frozen=True)
class Trained:
    """The best epoch's vectors, and the course of the run."""

    users: Tensor  # [U, F], propagated; zero of a node without an edge
    items: Tensor  # [V, F]
    own: Tensor  # [N, F] before propagation
    history: list[tuple[int, float, float]]  # epoch, mean loss, validation metric (NaN: not validated)
    epoch: int  # the best one


def adjacency(taken_UV: sp.csr_array, edges_UU: sp.csr_array | None = None, *, weight: float = 0.0) -> sp.csr_array:
    """D^-1/2 A D^-1/2 [N, N] of interactions, and of friendships by `weight`, each relative to their mean weight."""
    friends = None
    if edges_UU is not None and weight > 0 and edges_UU.nnz:
        friends = edges_UU * np.float32(weight / edges_UU.data.mean())
    joined = sp.block_array([[friends, taken_UV], [taken_UV.T, None]], format="csr").astype(np.float32)
    degree = np.asarray(joined.sum(1)).ravel()
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-12)), 0).astype(np.float32)
    found = (sp.diags_array(scale) @ joined @ sp.diags_array(scale)).tocsr()
    found.sort_indices()
    return found


def propagate(own_NF: Tensor, graph_NN: Tensor, layers: int) -> Tensor:
    """[N, F] the mean over layers 0 to `layers`."""
    return _Propagation.apply(own_NF, graph_NN, layers)  # type: ignore[no-any-return, no-untyped-call]


class _Propagation(torch.autograd.Function):
    """Its own transpose, since the graph is symmetric: torch would build a transposed matrix at each step."""

    @staticmethod
    def forward(context: Any, own_NF: Tensor, graph_NN: Tensor, layers: int) -> Tensor:
        context.graph_NN, context.layers = graph_NN, layers
        return _mean_of_layers(own_NF, graph_NN, layers)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _mean_of_layers(gradients[0], context.graph_NN, context.layers), None, None


def _mean_of_layers(values_NF: Tensor, graph_NN: Tensor, layers: int) -> Tensor:
    total_NF, layer_NF = values_NF.clone(), values_NF
    for _ in range(layers):
        layer_NF = graph_NN @ layer_NF
        total_NF += layer_NF
    return total_NF / (layers + 1)


def as_tensor(matrix: sp.csr_array) -> Tensor:
    rows, columns = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(rows, columns, values, matrix.shape, check_invariants=True)


def train(
    taken_UV: sp.csr_array,
    config: LightGcnConfig,
    *,
    edges_UU: sp.csr_array | None = None,
    validate: Callable[[Tensor, Tensor], float] | None = None,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, metric: None,
) -> Trained:
    """Train for all epochs, or, with `config.best_epoch`, until `validate` (users' and items' vectors -> a metric, more
    is better) stops improving. A function of the arguments alone. Raises NonFiniteLoss."""
    num_users, num_items = taken_UV.shape
    graph = as_tensor(adjacency(taken_UV, edges_UU, weight=config.friends))
    generator = torch.Generator().manual_seed(config.seed)
    own = nn.Parameter(torch.randn(num_users + num_items, config.width, generator=generator) * _SPREAD)
    optimizer = torch.optim.Adam([own], lr=config.learning_rate)
    pairs = taken_UV.tocoo()
    user, item = (torch.from_numpy(part.astype(np.int64)) for part in (pairs.row, pairs.col))
    chosen, chosen_epoch, highest, waited = own.detach(), config.epochs, -math.inf, 0
    history: list[tuple[int, float, float]] = []
    for epoch in range(1, config.epochs + 1):
        total = 0.0
        for batch in torch.split(torch.randperm(len(user), generator=generator), config.batch_size):
            loss = _loss(own, graph, (user[batch], item[batch]), num_users, config, generator)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        mean, metric = total / max(len(user), 1), math.nan
        if not math.isfinite(mean):
            raise NonFiniteLoss(
                f"expected a loss that is a number, found {mean} in epoch {epoch}; lower model.learning_rate"
            )
        if validate is not None and (epoch % config.validate_every == 0 or epoch == config.epochs):
            with torch.no_grad():
                vectors = propagate(own, graph, config.layers)
            metric = validate(vectors[:num_users], vectors[num_users:])
            waited += 1
            if config.best_epoch and metric > highest:
                chosen, chosen_epoch, highest, waited = own.detach().clone(), epoch, metric, 0
        history.append((epoch, mean, metric))
        on_epoch(epoch, mean, metric)
        if config.best_epoch and waited >= config.patience:
            break
    with torch.no_grad():
        vectors = propagate(chosen, graph, config.layers)
        vectors[torch.from_numpy(np.diff(graph.crow_indices().numpy()) == 0)] = 0  # nothing is known of them
    return Trained(vectors[:num_users], vectors[num_users:], chosen, history, chosen_epoch)


def _loss(
    own_NF: Tensor,
    graph_NN: Tensor,
    batch: tuple[Tensor, Tensor],
    num_users: int,
    config: LightGcnConfig,
    generator: torch.Generator,
) -> Tensor:
    user_B, item_B = batch
    vectors_NF = propagate(own_NF, graph_NN, config.layers)
    num_items = len(own_NF) - num_users
    user_BF, item_BF = vectors_NF[user_B], vectors_NF[num_users + item_B]
    count = len(user_B) if config.loss == "bpr" else config.negatives
    negatives = num_users + torch.randint(num_items, (count,), generator=generator)
    read = [user_B, num_users + item_B]
    if config.loss == "bpr":
        loss = -F.logsigmoid((user_BF * (item_BF - vectors_NF[negatives])).sum(1)).mean()
        read.append(negatives)
    else:
        user_BF, item_BF = F.normalize(user_BF, dim=1), F.normalize(item_BF, dim=1)
        true_B = (user_BF * item_BF).sum(1, keepdim=True)
        false_BK = user_BF @ F.normalize(vectors_NF[negatives], dim=1).T
        scores = torch.cat([true_B, false_BK], 1) / config.temperature
        loss = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
    if config.penalty:
        loss = loss + config.penalty * sum(own_NF[rows].square().sum() for rows in read) / len(user_B)
    return loss
