"""The social network of a release, and what its users did in the training part of a split, as sparse matrices.

Shape letters: ``U`` users, ``V`` rows of the catalogue.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from etl import tables
from trainer.arrays import IntArray
from trainer.data.catalogue import Catalogue
from trainer.data.release import DataError, Release
from trainer.data.sequences import SequenceDataset


@dataclass(frozen=True)
class Network:
    """Friendships of users, whose global indices ascend."""

    users: IntArray  # [U] global index
    edges: sp.csr_array  # float32 [U, U], weights above 0; no user is their own friend

    def places(self, users: IntArray) -> IntArray:
        """Place in `users` of each global index, -1 where it has none."""
        if not len(self.users):
            return np.full(len(users), -1)
        place = np.minimum(np.searchsorted(self.users, users), len(self.users) - 1)
        return np.where(self.users[place] == users, place, -1)

    def of(self, users: IntArray) -> "Network":
        """Among these users (ascending) only, with those of them who have no friend."""
        place = self.places(users)
        width = len(self.users)
        known = np.flatnonzero(place >= 0)
        chosen = sp.csr_array((np.ones(len(known), np.float32), (known, place[known])), shape=(len(users), width))
        edges = (chosen @ self.edges @ chosen.T).tocsr()
        edges.sort_indices()
        return Network(users, edges)


def has_network(release: Release) -> bool:
    """Whether there is any friendship."""
    return tables.SOCIAL.name in release.versions and len(release.read(tables.SOCIAL, ["user_index"])) > 0


def read_network(release: Release, *, directed: bool = False) -> Network:
    """Of the table `social`. An edge in either direction is a friendship of both, of the larger weight; `directed`: of
    its `user` alone, as where trust isn't mutual. Raises DataError where there is none."""
    rows = (
        release.read(tables.SOCIAL, ["user_index", "friend_index", "weight"])
        if tables.SOCIAL.name in release.versions
        else tables.SOCIAL.schema.empty_table()
    )
    user, friend = (rows[name].to_numpy().astype(np.int64) for name in ("user_index", "friend_index"))
    weight = rows["weight"].to_numpy().astype(np.float32)
    is_edge = (weight > 0) & (user != friend)
    user, friend, weight = user[is_edge], friend[is_edge], weight[is_edge]
    if not len(user):
        raise DataError(
            f"expected friendships in the table social of release {release.number} of {release.lake}, found none; give "
            "the source edges (source.edges)"
        )
    users = np.unique(np.concatenate([user, friend]))
    shape = (len(users), len(users))
    place = (np.searchsorted(users, user), np.searchsorted(users, friend))
    edges = sp.csr_array((weight, place), shape=shape)
    edges = edges if directed else edges.maximum(edges.T).tocsr()
    edges.sort_indices()
    return Network(users, edges)


def read_training(
    release: Release, split: str, domain: str, catalogue: Catalogue, *, newest: int | None = None
) -> tuple[IntArray, sp.csr_array]:
    """(Global indices of users with a training part, ascending; float32 [U, V], 1 where it has the item). `newest`: the
    last so many of each user's only.

    Nothing behind `valid_start` is looked at, so that what anyone holds out, friends too, changes no bit.
    """
    dataset = SequenceDataset(release, split, domain)
    users, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for group in range(len(dataset.groups)):
        sequences = dataset.read_group(group, held_out=False)
        trained = sequences.until(sequences.valid_start)
        trained = trained if newest is None else trained.newest(newest)
        users.append(np.repeat(trained.users, trained.lengths))
        items.append(catalogue.rows(trained.items).astype(np.int64))
    user, item = np.concatenate(users), np.concatenate(items)
    known, place = np.unique(user, return_inverse=True)
    has = sp.csr_array((np.ones(len(item), np.float32), (place, item)), shape=(len(known), len(catalogue)))
    has.sum_duplicates()
    has.data[:] = 1  # repeats count once
    return known, has


def widened(rows: sp.csr_array, users: IntArray, everyone: IntArray) -> sp.csr_array:
    """The rows of `users` as those of `everyone`, of whom they are some (both ascend); empty rows of the others."""
    place = np.searchsorted(everyone, users)
    shape = (len(everyone), len(users))
    chosen = sp.csr_array((np.ones(len(users), np.float32), (place, np.arange(len(users)))), shape=shape)
    return (chosen @ rows).tocsr()


def rewired(network: Network, *, seed: int, swaps: int = 10) -> Network:
    """A network in which everyone has as many friends as before, but others: the control of what friends are worth.

    Swaps the ends of random pairs of edges, `swaps` times as many as there are, unless that would make an edge twice or
    one's own friend (Maslov and Sneppen 2002). Friendships of both stay so; weights stay with the first user.
    """
    random = np.random.default_rng(seed)
    mutual = (network.edges != network.edges.T).nnz == 0
    given = sp.triu(network.edges, format="coo") if mutual else network.edges.tocoo()
    ends = list(zip(given.row.tolist(), given.col.tolist(), strict=True))

    def key(a: int, b: int) -> tuple[int, int]:
        return (min(a, b), max(a, b)) if mutual else (a, b)

    present = {key(*pair) for pair in ends}
    for one, other in random.integers(len(ends), size=(swaps * len(ends), 2)).tolist():
        (a, b), (c, d) = ends[one], ends[other]
        new = {key(a, d), key(c, b)}
        if a == d or c == b or len(new) < 2 or present & new:
            continue
        present -= {key(a, b), key(c, d)}
        present |= new
        ends[one], ends[other] = (a, d), (c, b)
    row, column = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    edges = sp.csr_array((given.data, (row, column)), shape=network.edges.shape)
    edges = (edges + edges.T).tocsr() if mutual else edges
    edges.sort_indices()
    return Network(network.users, edges)
