"""Counted friends and the circle's evidence against loops over sets; the attention and what it must not read."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from etl.tables import FIRST_INDEX
from trainer.config import FriendModelConfig
from trainer.data.social import Network, rewired
from trainer.evaluation.baselines.friends import counted_friends
from trainer.social.attention import train_friends
from trainer.social.evidence import EVIDENCE, OF_FRIEND, Evidence

USERS, ITEMS = 30, 25


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(Weights of friendships, what each user has of rows FIRST_INDEX on): two users know nobody, two have nothing."""
    random = np.random.default_rng(seed)
    weights = np.triu((random.random((USERS, USERS)) < 0.2) * random.integers(1, 4, (USERS, USERS)), 1)
    weights[:2] = weights[:, :2] = 0
    taken = random.random((USERS, FIRST_INDEX + ITEMS)) < 0.3
    taken[:, :FIRST_INDEX] = False
    taken[5:7] = False
    return (weights + weights.T).astype(np.float32), taken


def test_counted_friends_by_loops_ties_by_popularity() -> None:
    weights, taken = world()
    index = 100 + 3 * np.arange(USERS)
    has_history = np.flatnonzero(taken.any(1))
    network = Network(index[weights.any(1)], sp.csr_array(weights[weights.any(1)][:, weights.any(1)]))
    found = counted_friends(network, index[has_history], sp.csr_array(taken[has_history].astype(np.float32)))
    asked = np.array([0, 2, 5, 9, 17])
    scores = found.score(np.append(index[asked], 7), slice(0, taken.shape[1])).numpy()
    popular = taken.sum(0)
    for user, row in zip(asked.tolist(), scores, strict=False):
        count = [sum(bool(weights[user, f]) and taken[f, v] for f in range(USERS)) for v in range(taken.shape[1])]
        expected = np.lexsort((-popular, -np.array(count)))
        best = [(count[v], popular[v]) for v in np.argsort(-row, kind="stable")]
        assert best == [(count[v], popular[v]) for v in expected]
    assert np.array_equal(np.argsort(-scores[-1], kind="stable"), np.argsort(-popular, kind="stable"))  # a stranger


def test_the_circles_evidence_by_loops() -> None:
    weights, taken = world()
    evidence = Evidence(sp.csr_array(weights), sp.csr_array(taken.astype(np.float32)), num_candidates=ITEMS)
    circle, fallback = evidence.of(np.arange(USERS))
    degree, size = (weights > 0).sum(1), taken.sum(1)
    assert circle.candidates_BC.min() == FIRST_INDEX
    assert (fallback < 0).all()
    found = np.exp(circle.evidence_BCJ.numpy()) - np.array([0.5, 0.02, 1e-3, 1e-2, 1e-5, 1e-2, 1e-2, 1e-3, 1, 1])
    for user in range(USERS):
        known = [f for f in range(USERS) if weights[user, f] and size[f]]
        n = max(len(known), 1)
        others = [w for w in range(USERS) if w != user]
        for place, item in enumerate(circle.candidates_BC[user]):
            of_it = dict(zip(EVIDENCE, found[user, place], strict=True))
            have = [f for f in known if taken[f, item]]
            second = sum(
                1 / degree[user] / degree[f]
                for f in range(USERS)
                for g in others
                if weights[user, f] and weights[f, g] and taken[g, item]
            )
            walk = sum(
                1 / size[f] / n / sum(taken[w, i] for w in others) / size[w]
                for f in known
                for i in np.flatnonzero(taken[f])
                for w in others
                if taken[w, i] and taken[w, item]
            )
            assert of_it["count"] == pytest.approx(len(have), abs=1e-4)
            assert of_it["share"] == pytest.approx(len(have) / n, abs=1e-5)
            assert of_it["part"] == pytest.approx(sum(1 / size[f] for f in have) / n, abs=1e-5)
            assert of_it["second"] == pytest.approx(second, abs=1e-5)
            assert of_it["walk"] == pytest.approx(walk, abs=1e-5)
            assert of_it["popularity"] == pytest.approx(sum(taken[w, item] for w in others) / USERS, abs=1e-5)
            assert of_it["known friends"] == pytest.approx(len(known), abs=1e-4)
    pairs = {(int(circle.owner_E[e]), int(circle.friend_E[e])) for e in range(len(circle.friend_E))}
    assert pairs == {(u, f) for u in range(USERS) for f in range(USERS) if weights[u, f] and size[f]}
    member = {
        (*_edge(circle, int(e)), int(circle.candidates_BC.ravel()[c]))
        for e, c in zip(circle.edge_M, circle.cell_M, strict=True)
    }
    assert member == {(u, f, i) for u, f in pairs for i in np.flatnonzero(taken[f])}


def _edge(circle, edge: int) -> tuple[int, int]:
    return int(circle.owner_E[edge]), int(circle.friend_E[edge])


def test_nothing_of_a_users_own_history_is_in_their_circle() -> None:
    weights, taken = world()
    changed = taken.copy()
    changed[9, FIRST_INDEX:] = ~taken[9, FIRST_INDEX:]
    both = [
        Evidence(sp.csr_array(weights), sp.csr_array(given.astype(np.float32)), num_candidates=ITEMS).of(np.array([9]))
        for given in (taken, changed)
    ]
    # Popularity elsewhere (in the weights of rare items) is of all users: that is the one thing that may differ.
    alike = EVIDENCE.index("alike")
    rest = [place for place in range(len(EVIDENCE)) if place != alike]
    torch.testing.assert_close(*(circle.evidence_BCJ[..., rest] for circle, _ in both))
    known = [place for place, name in enumerate(OF_FRIEND) if name != "alike"]
    torch.testing.assert_close(*(circle.friend_EK[:, known] for circle, _ in both))


def trained(weights: np.ndarray, taken: np.ndarray, **settings: int):
    config = FriendModelConfig(**{"candidates": 12, "hidden": 8, "epochs": 10, "batch_size": 8, **settings})
    return train_friends(sp.csr_array(weights), sp.csr_array(taken.astype(np.float32)), config)


def test_shares_of_influence_sum_to_one_and_a_seed_decides_all() -> None:
    weights, taken = world()
    found = trained(weights, taken)
    user, friend, share = found.influence(np.arange(USERS))
    assert set(zip(user.tolist(), friend.tolist(), strict=True)) == {
        (u, f) for u in range(USERS) for f in range(USERS) if weights[u, f] and taken[f].any()
    }
    total = np.bincount(user, share, minlength=USERS)
    has_any = [bool((weights[u] * taken.any(1)).any()) for u in range(USERS)]
    np.testing.assert_allclose(total, has_any, atol=1e-5)
    again = trained(weights, taken)
    assert np.array_equal(found.scores(np.arange(USERS)), again.scores(np.arange(USERS)))
    assert found.losses[-1] < found.losses[0]


def test_candidates_come_before_all_other_items() -> None:
    weights, taken = world()
    found = trained(weights, taken)
    scores = found.scores(np.arange(USERS))
    circle, _ = found.evidence.of(np.arange(USERS))
    of_candidates = np.take_along_axis(scores, circle.candidates_BC, 1)
    assert (of_candidates >= 0).all()
    assert ((scores >= 0).sum(1) == 12).all()
    assert (scores[:, :FIRST_INDEX] < 0).all()


def test_a_friend_who_is_copied_gains_influence() -> None:
    """Everyone copies the friend to whom the friendship weighs 9, and not the others."""
    random = np.random.default_rng(0)
    weights = np.zeros((200, 200), np.float32)
    taken = np.zeros((200, FIRST_INDEX + 60), bool)
    for pair in range(0, 200, 2):
        own = random.choice(60, 8, replace=False)
        taken[pair, FIRST_INDEX + own] = taken[pair + 1, FIRST_INDEX + own] = True
        weights[pair, pair + 1] = weights[pair + 1, pair] = 9
        for user in (pair, pair + 1):
            for other in random.choice(200, 2, replace=False):
                if not weights[user, other] and user != other:
                    weights[user, other] = weights[other, user] = 1
    found = trained(weights, taken, candidates=40, epochs=30)
    user, friend, share = found.influence(np.arange(200))
    assert share[weights[user, friend] == 9].mean() > 0.7


@pytest.mark.parametrize("mutual", [True, False])
def test_rewired_friends_are_as_many_and_others(mutual: bool) -> None:
    weights, _ = world()
    weights = weights if mutual else weights * (np.random.default_rng(1).random(weights.shape) < 0.6)
    found = rewired(Network(np.arange(USERS), sp.csr_array(weights)), seed=1).edges.toarray()
    assert np.array_equal(found, found.T) == mutual
    assert not found.diagonal().any()
    for axis in (0, 1):
        assert np.array_equal((found > 0).sum(axis), (weights > 0).sum(axis))
    assert ((found > 0) & (weights > 0)).sum() < 0.6 * (weights > 0).sum()
    assert sorted(found[found > 0]) == sorted(weights[weights > 0])
