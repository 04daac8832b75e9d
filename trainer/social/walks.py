"""Random walks on a social network, by weights of edges and the two biases of node2vec.

Grover and Leskovec 2016, *node2vec: Scalable Feature Learning for Networks*, 3.2: after a step from t to v, the next
node x is drawn in proportion to the weight of (v, x) times 1/p where x is t, 1 where x is a neighbour of t, else 1/q.
Drawn by rejection (Yang et al. 2019, KnightKing): a neighbour by weights alone is accepted with its bias over the
largest one, so that no table of pairs of edges is kept.

Shape letters: ``W`` walks, ``L`` nodes of a walk, ``U`` nodes.
"""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from trainer.arrays import IntArray


def walks(
    edges: sp.csr_array, starts_W: IntArray, length: int, random: np.random.Generator, *, p: float = 1, q: float = 1
) -> IntArray:
    """[W, L] nodes of walks from `starts_W`, each of which has a neighbour. `edges`: weights above 0, [U, U], with
    sorted rows. A walk that meets a node without a way on stays there: -1 from then on."""
    found = np.full((len(starts_W), length), -1, dtype=np.int64)
    found[:, 0] = starts_W
    total = np.concatenate([[0.0], np.cumsum(edges.data, dtype=np.float64)])
    pairs = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr)) * edges.shape[0] + edges.indices
    most = max(1.0, 1 / p, 1 / q)
    for step in range(1, length):
        here = found[:, step - 1]
        open_W = np.flatnonzero((here >= 0) & (np.diff(edges.indptr)[here] > 0))
        if step == 1:
            found[open_W, 1] = _neighbours(edges, total, here[open_W], random)
            continue
        while len(open_W):
            drawn = _neighbours(edges, total, here[open_W], random)
            before = found[open_W, step - 2]
            bias = np.where(drawn == before, 1 / p, np.where(_has(pairs, before, drawn, edges.shape[0]), 1, 1 / q))
            accepted = random.random(len(open_W)) * most < bias
            found[open_W[accepted], step] = drawn[accepted]
            open_W = open_W[~accepted]
    return found


def _neighbours(
    edges: sp.csr_array, total: npt.NDArray[np.float64], nodes: IntArray, random: np.random.Generator
) -> IntArray:
    """A neighbour of each node, by weights. `total`: of all edges before each."""
    first, last = edges.indptr[nodes], edges.indptr[nodes + 1]
    drawn = total[first] + random.random(len(nodes)) * (total[last] - total[first])
    place = np.clip(np.searchsorted(total, drawn, side="right") - 1, first, last - 1)
    found: IntArray = edges.indices[place].astype(np.int64)
    return found


def _has(pairs: IntArray, rows: IntArray, columns: IntArray, width: int) -> npt.NDArray[np.bool_]:
    """Whether there is an edge from each row to each column. `pairs`: row * width + column of all, ascending."""
    wanted = rows * width + columns
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    found: npt.NDArray[np.bool_] = pairs[place] == wanted
    return found
