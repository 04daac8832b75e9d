"""Vectors of nodes from walks: skip-gram with negative sampling.

Mikolov et al. 2013, *Distributed Representations of Words and Phrases and their Compositionality*, Eq. 4: the vector of
a node should score its neighbours in walks above nodes drawn by their count in walks to the power of 3/4. A step reads
and changes the rows of its batch only (row-wise Adagrad).

Shape letters: ``W`` walks, ``L`` nodes of a walk, ``N`` pairs, ``K`` negatives, ``U`` nodes, ``F`` width.
"""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.arrays import IntArray
from trainer.config.social import Node2VecConfig
from trainer.social.walks import walks
from trainer.training.optimizer import adagrad_rows

_POWER = 0.75  # of a node's count, in the draw of negatives
_SCALE = 0.5  # of initial vectors, divided by the width


def node2vec(edges: sp.csr_array, config: Node2VecConfig) -> tuple[Tensor, list[float]]:
    """(Vectors [U, F] of nodes, zero of one without a neighbour; the mean loss of each epoch). New walks are drawn each
    epoch, `config.walks` from each node, by a generator of the seed and the epoch."""
    num_nodes = edges.shape[0]
    starts = np.flatnonzero(np.diff(edges.indptr))
    generator = torch.Generator().manual_seed(config.seed)
    inputs = (torch.rand(num_nodes, config.width, generator=generator) - 0.5) * (2 * _SCALE / config.width)
    tables = [inputs, torch.zeros(num_nodes, config.width)]
    sums = [torch.zeros(num_nodes), torch.zeros(num_nodes)]
    losses = []
    for epoch in range(config.epochs):
        random = np.random.default_rng([config.seed, epoch])
        order = np.concatenate([random.permutation(starts) for _ in range(config.walks)])
        walked = walks(edges, order, config.length, random, p=config.p, q=config.q)
        noise = np.cumsum(np.bincount(walked[walked >= 0], minlength=num_nodes) ** _POWER)
        pairs = pairs_of(walked, config.window, random)
        batches = range(0, len(pairs), config.batch_size)
        loss = 0.0
        for number, start in enumerate(batches):
            rate = config.learning_rate * (1 - (epoch + number / len(batches)) / config.epochs)
            batch = pairs[start : start + config.batch_size]
            negatives = np.searchsorted(noise, random.random(config.negatives) * noise[-1], side="right")
            loss += _step(tables, sums, batch, negatives, rate) * len(batch)
        losses.append(loss / max(len(pairs), 1))
    inputs[np.diff(edges.indptr) == 0] = 0
    return inputs, losses


def pairs_of(walked_WL: IntArray, window: int, random: np.random.Generator) -> IntArray:
    """[N, 2] (node, another one at most `window` steps before or behind it in a walk), shuffled."""
    found = []
    for distance in range(1, window + 1):
        both = np.stack([walked_WL[:, :-distance].ravel(), walked_WL[:, distance:].ravel()], 1)
        both = both[(both >= 0).all(1)]
        found += [both, both[:, ::-1]]
    pairs = np.concatenate(found)
    return pairs[random.permutation(len(pairs))]


def _step(tables: list[Tensor], sums: list[Tensor], pairs_N2: IntArray, negatives_K: IntArray, rate: float) -> float:
    """One step; its mean loss. All pairs of a batch share their negatives, which weigh as 5 of a pair's own."""
    centre, centre_N = torch.unique(torch.from_numpy(pairs_N2[:, 0].copy()), return_inverse=True)
    others = torch.from_numpy(np.concatenate([pairs_N2[:, 1], negatives_K]))
    context, context_NK = torch.unique(others, return_inverse=True)
    rows = [tables[0][centre].requires_grad_(), tables[1][context].requires_grad_()]
    centre_NF = rows[0][centre_N]
    true_N = (centre_NF * rows[1][context_NK[: len(pairs_N2)]]).sum(1)
    false_NK = centre_NF @ rows[1][context_NK[len(pairs_N2) :]].T
    loss = -(F.logsigmoid(true_N) + _NEGATIVES * F.logsigmoid(-false_NK).mean(1)).sum()
    gradients = torch.autograd.grad(loss, rows)
    for table, of_row, index, old, gradient in zip(tables, sums, (centre, context), rows, gradients, strict=True):
        table[index], of_row[index] = adagrad_rows(old.detach(), of_row[index], gradient, rate)
    return float(loss.detach()) / len(pairs_N2)


_NEGATIVES = 5.0  # of a pair, in the paper's terms
