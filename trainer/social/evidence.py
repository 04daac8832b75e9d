"""What a user's circle says about items: candidates, evidence of each, and which friend has which.

Everything is of training parts, and nothing of the user's own history: a user who has one is described as if they had
none, so that users with a history teach what to make of the circle of those without.

Shape letters: ``U`` users of the network, ``B`` users of a batch, ``V`` rows of the catalogue, ``C`` candidates of a
user, ``E`` pairs of a user and a friend who has a history, ``M`` pairs of an edge and a candidate that its friend has.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from etl.tables import FIRST_INDEX
from trainer.arrays import FloatArray, IntArray

# Of an item: friends who have it, their share; as a part of friends' histories; friends of friends who have it; those
# who have it among who shares items with friends; friends who have it, by common friends and by common items; share
# of users who have it. Of the user: friends with a history, and friends.
EVIDENCE = ("count", "share", "part", "second", "walk", "common", "alike", "popularity", "known friends", "friends")
# Of a friend: friends, items, common friends, likeness to the user's other friends, weight of the friendship.
OF_FRIEND = ("friends", "items", "common", "alike", "weight")
_FLOOR = np.array([0.5, 0.02, 1e-3, 1e-2, 1e-5, 1e-2, 1e-2, 1e-3, 1.0, 1.0], np.float32)  # added before the logarithm
_SCORES_PER_BLOCK = 1 << 22
STRANGER = -1  # in the place of somebody outside the network


@dataclass(frozen=True)
class Circle:
    """A batch of users with their candidates."""

    users_B: IntArray  # places in the network
    candidates_BC: IntArray  # rows of the catalogue
    evidence_BCJ: Tensor  # logarithms
    owner_E: Tensor  # place in the batch of each edge's user
    friend_E: IntArray  # place in the network of its friend
    friend_EK: Tensor  # what the attention reads
    edge_M: Tensor  # pairs: of this edge…
    cell_M: Tensor  # … and this candidate, as place * C + candidate


class Evidence:
    """Of one network and the training parts `taken_UV` of its users (float32, 1 where one has an item)."""

    def __init__(self, edges_UU: sp.csr_array, taken_UV: sp.csr_array, *, num_candidates: int) -> None:
        self.taken, self.edges = taken_UV, edges_UU
        self.num_candidates = min(num_candidates, taken_UV.shape[1] - FIRST_INDEX)
        self.popular = np.asarray(taken_UV.sum(0)).ravel()
        self.size = np.asarray(taken_UV.sum(1)).ravel()
        self.degree = np.diff(edges_UU.indptr).astype(np.float32)
        self.knows = _ones(edges_UU)
        self.known_by = self.knows.T.tocsr()
        self.has_history = sp.diags_array((self.size > 0).astype(np.float32))
        self.of_history = (sp.diags_array(1 / np.maximum(self.size, 1)) @ taken_UV).tocsr()
        # Likeness: cosine of histories in which rare items weigh more.
        rare = (taken_UV @ sp.diags_array(1 / np.log(np.e + self.popular))).tocsr()
        length = np.sqrt(np.asarray(rare.power(2).sum(1)).ravel())
        self.profile = (sp.diags_array(1 / np.maximum(length, 1e-9)) @ rare).tocsr()

    def batch_users(self) -> int:
        """Users whose scores of the whole catalogue are in memory at once."""
        return max(1, min(256, _SCORES_PER_BLOCK // int(self.taken.shape[1])))

    def of(self, users_B: IntArray) -> tuple[Circle, FloatArray]:
        """The circle of these places in the network, and what ranks all items without it, [B, V] below 0."""
        return self._of(users_B, self.edges[users_B], self.taken[users_B].toarray(), self.degree)

    def of_friends(self, friends_F: IntArray, *, mutual: bool) -> tuple[Circle, FloatArray]:
        """As `of`, [1, …], for somebody outside the network who has no history and these friends (places), each of
        weight 1: what `of` gives had they been part of it. `mutual`: a friendship is one of both."""
        row = (np.ones(len(friends_F), np.float32), (np.zeros(len(friends_F), np.int64), np.sort(friends_F)))
        degree = self.degree.copy()
        degree[friends_F] += mutual
        edges = sp.csr_array(row, shape=(1, len(self.size)))
        return self._of(np.array([STRANGER]), edges, np.zeros((1, self.taken.shape[1]), np.float32), degree)

    def _of(
        self, users_B: IntArray, edges_BU: sp.csr_array, own_BV: FloatArray, degree_U: FloatArray
    ) -> tuple[Circle, FloatArray]:
        knows, degree_B = _ones(edges_BU), np.diff(edges_BU.indptr).astype(np.float32)
        friends = _sorted(knows @ self.has_history)
        known = np.diff(friends.indptr).astype(np.float32)
        per_friend = (1 / np.maximum(known, 1))[:, None]
        popular = self.popular - own_BV
        count = (friends @ self.taken).toarray()
        part = (friends @ self.of_history).tocsr()
        walk = self._walk(users_B, part, popular) * per_friend
        second = (self._second(users_B, knows, degree_U) @ self.taken).toarray()
        # Common friends: Adamic and Adar 2003.
        of_common = _of_edges(friends, knows @ sp.diags_array(1 / np.log(np.e + degree_U)) @ self.known_by)
        of_alike = self._alike(friends)
        common, alike = ((of @ self.taken).toarray() * per_friend for of in (of_common, of_alike))
        share, parts = count * per_friend, part.toarray() * per_friend
        most = np.maximum(walk.max(1, keepdims=True), 1e-9)
        prior = popular / max(len(self.size) + int((users_B == STRANGER).any()), 1)
        order = share + 0.02 * walk / most + 0.02 * second + 1e-4 * prior
        order[:, :FIRST_INDEX] = -1
        chosen = np.argpartition(-order, self.num_candidates - 1, axis=1)[:, : self.num_candidates]
        chosen = np.sort(chosen, axis=1)
        of_items = (count, share, parts, second, walk, common, alike, prior)
        columns = [np.take_along_axis(found, chosen, 1) for found in of_items]
        columns += [np.repeat(found[:, None], chosen.shape[1], 1) for found in (known, degree_B)]
        evidence = np.log(np.stack(columns, -1).astype(np.float32) + _FLOOR)
        owner = np.repeat(np.arange(len(users_B)), np.diff(friends.indptr))
        friend = friends.indices.astype(np.int64)
        others = np.maximum(np.repeat(np.diff(friends.indptr), np.diff(friends.indptr)) - 1, 1)
        of_friend = [degree_U[friend], self.size[friend], of_common.data]
        of_friend += [of_alike.data / others, _of_edges(friends, edges_BU).data]
        edge, cell = self._members(owner, friend, chosen)
        circle = Circle(
            users_B,
            chosen,
            torch.from_numpy(evidence),
            torch.from_numpy(owner),
            friend,
            torch.from_numpy(np.log1p(np.stack(of_friend, -1)).astype(np.float32)),
            torch.from_numpy(edge),
            torch.from_numpy(cell),
        )
        return circle, (order / np.maximum(order.max(1, keepdims=True), 1e-9) - 2).astype(np.float32)

    def _second(self, users_B: IntArray, knows_BU: sp.csr_array, degree_U: FloatArray) -> sp.csr_array:
        """[B, U] of a walk to a friend and on to a friend of theirs who has a history, not back."""
        met = np.unique(knows_BU.indices)
        first = sp.diags_array((1 / np.maximum(np.diff(knows_BU.indptr), 1)).astype(np.float32)) @ knows_BU
        then = sp.diags_array(1 / np.maximum(degree_U[met], 1)) @ self.knows[met]
        found = (first.tocsr()[:, met] @ then @ self.has_history).tocsr()
        row = np.repeat(np.arange(len(users_B)), np.diff(found.indptr))
        found.data[found.indices == users_B[row]] = 0
        return _sorted(found)

    def _alike(self, friends_BU: sp.csr_array) -> sp.csr_array:
        """Of each edge: the summed cosine of the friend and the user's other friends."""
        total = (friends_BU @ self.profile).tocsr()  # [B, V]: a friend's own part is taken off below
        row = np.repeat(np.arange(friends_BU.shape[0]), np.diff(friends_BU.indptr))
        found = np.empty(len(row), np.float32)
        for start in range(0, len(row), 1 << 14):
            part = slice(start, start + (1 << 14))
            both = total[row[part]].multiply(self.profile[friends_BU.indices[part]])
            found[part] = np.asarray(both.sum(1)).ravel() - 1
        return sp.csr_array((np.maximum(found, 0), friends_BU.indices, friends_BU.indptr), shape=friends_BU.shape)

    def _walk(self, users_B: IntArray, part_BV: sp.csr_array, popular_BV: FloatArray) -> FloatArray:
        """[B, V] of a walk from a friend's item to others who have it and on to their items, never by the user."""
        row = np.repeat(np.arange(len(users_B)), np.diff(part_BV.indptr))
        steps = part_BV.data / np.maximum(popular_BV[row, part_BV.indices], 1)
        items = sp.csr_array((steps, part_BV.indices, part_BV.indptr), shape=part_BV.shape)
        others = (items @ self.taken.T).toarray()
        known = np.flatnonzero(users_B != STRANGER)
        others[known, users_B[known]] = 0
        found: FloatArray = (sp.csr_array(others) @ self.of_history).toarray()
        return found

    def _members(self, owner_E: IntArray, friend_E: IntArray, chosen_BC: IntArray) -> tuple[IntArray, IntArray]:
        """Pairs of an edge and a cell (user and candidate) whose item the edge's friend has."""
        num_rows = self.taken.shape[1]
        has = self.taken[friend_E]
        edge = np.repeat(np.arange(len(friend_E)), np.diff(has.indptr))
        wanted = owner_E[edge] * num_rows + has.indices
        cells = (np.arange(len(chosen_BC))[:, None] * num_rows + chosen_BC).ravel()  # ascend
        place = np.minimum(np.searchsorted(cells, wanted), len(cells) - 1)
        found = cells[place] == wanted
        return edge[found], place[found]


def _sorted(matrix: sp.csr_array) -> sp.csr_array:
    found = matrix.tocsr()
    found.eliminate_zeros()
    found.sort_indices()
    return found


def _ones(edges: sp.csr_array) -> sp.csr_array:
    found = edges.copy()
    found.data = np.ones_like(found.data)
    return found


def _of_edges(edges: sp.csr_array, values: sp.csr_array) -> sp.csr_array:
    """`values` at the places of `edges`, zeros kept: the same places in the same order."""
    row = np.repeat(np.arange(edges.shape[0]), np.diff(edges.indptr))
    data = np.asarray(values.tocsr()[row, edges.indices], dtype=np.float32).ravel()
    return sp.csr_array((data, edges.indices, edges.indptr), shape=edges.shape)
