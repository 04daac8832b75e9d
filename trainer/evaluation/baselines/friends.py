"""What friends have, counted: the simple baseline of users without a history of their own.

Shape letters: ``U`` users, ``B`` users of a batch, ``V`` rows of the catalogue.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from trainer.arrays import FloatArray, IntArray
from trainer.data.social import Network, widened

_TIE_BREAK = 2  # popularity is worth less than half a friend: enough to part ties in single precision


@dataclass(frozen=True)
class CountedFriends:
    """An item's score: how many friends of the user have it in their training parts. Ties, and users without friends,
    by popularity."""

    network: Network
    taken_UV: sp.csr_array  # float32, 1 where a user of the network has the item in the training part
    popular_V: FloatArray  # interactions in the training parts of all users

    def score(self, users_B: IntArray, candidates: slice) -> Tensor:
        """Scores float32 [B, C] for users by global index."""
        popular_C = self.popular_V[candidates]
        scores_BC = np.tile(popular_C / (_TIE_BREAK * max(float(self.popular_V.max(initial=1)), 1)), (len(users_B), 1))
        place = self.network.places(users_B)
        known = np.flatnonzero(place >= 0)
        friends = self.network.edges[place[known]]
        friends.data = np.ones_like(friends.data)
        scores_BC[known] += (friends @ self.taken_UV[:, candidates]).toarray()
        return torch.from_numpy(scores_BC.astype(np.float32))


def counted_friends(network: Network, users: IntArray, taken_UV: sp.csr_array) -> CountedFriends:
    """`users`: whose rows `taken_UV` has, by global index, ascending."""
    everyone = np.union1d(users, network.users)
    popular = np.asarray(taken_UV.sum(0), dtype=np.float32).ravel()
    return CountedFriends(network.of(everyone), widened(taken_UV, users, everyone), popular)
